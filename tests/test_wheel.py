"""What pip installs: from source without torch or a compiler, and as a wheel that contains the C++ kernels."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = {f"hfquant/kernels/cpu/{path.name}" for path in (ROOT / "hfquant/kernels/cpu").glob("*.[ch]*")}
COMPILERS = ("g++", "clang++", "c++", "gcc", "clang", "cc")
#: Runs on the installed package, and compares a layer on each available kernel with the reference.
PROGRAM = """
import os, sys, torch, hfquant
from hfquant.kernels import cpu, table
assert hfquant.__file__.startswith(sys.prefix), hfquant.__file__
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(200, 72))
hfquant.quantize(model, None, "w8a8-dynamic")
hfquant.set_real_quant(model, True)
assert isinstance(model[0], hfquant.QuantLinear)
here = [kernel.name for kernel in cpu.KERNELS if not kernel.missing()]
assert "scalar" in here, cpu.KERNELS[-1].missing()
for tokens in (1, 33):
    x = torch.randn(tokens, 200)
    os.environ["HFQUANT_KERNEL"] = "reference"
    expected = model(x)
    assert expected.abs().max() > 0.1
    for name in here:
        os.environ["HFQUANT_KERNEL"] = name
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
print(*here)
"""


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


def no_compilers(folder: Path) -> dict[str, str]:
    """Return an environment whose compilers only record that they were called."""
    folder.mkdir()
    for name in COMPILERS:
        (folder / name).write_text(f"#!/bin/sh\n/bin/touch {folder}/called\nexit 1\n")
        (folder / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC", "PYTHONPATH")}
    return {**kept, "PATH": str(folder), "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}


def build(target: Path, environment: dict[str, str], source: Path = ROOT) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", target, source], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_a_source_distribution_needs_neither_torch_nor_a_compiler(tmp_path) -> None:
    environment = no_compilers(tmp_path / "bin")
    (tmp_path / "torch.py").write_text("raise ImportError('building must not need torch')\n")
    environment["PYTHONPATH"] = str(tmp_path)
    program = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (source,) = tmp_path.glob("*.tar.gz")
    wheel = build(tmp_path / "wheels", environment, source)
    assert wheel.name.endswith("-py3-none-any.whl")
    found = files_of(wheel)
    assert found >= SOURCES
    assert len(SOURCES) > 5
    assert not [name for name in found if name.endswith(".so")]
    assert not (tmp_path / "bin" / "called").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="wheels are built for Linux")
def test_a_wheel_brings_its_kernels(tmp_path) -> None:
    wheel = build(tmp_path / "wheels", {**os.environ, "HFQUANT_COMPILED_WHEEL": "1"})
    assert re.fullmatch(rf"hfquant-.*-py3-none-linux_{platform.machine()}\.whl", wheel.name)
    found = files_of(wheel)
    assert found >= SOURCES
    (library,) = [name for name in found if name.endswith(".so")]
    assert library.startswith("hfquant/kernels/cpu/hfquant_cpu-")
    assert not list(ROOT.rglob("hfquant/**/*.so"))

    environment = no_compilers(tmp_path / "bin")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, env=environment)
    # Only the packages that hfquant depends on; this checkout, which one of their .pth files names, stays out.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    done = subprocess.run([python, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "scalar" in done.stdout
    assert not (tmp_path / "bin" / "called").exists()
    assert not (tmp_path / "bin" / "cache").exists()
    assert "compiling" not in done.stderr
