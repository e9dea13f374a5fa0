"""The cache of compiled kernels, with small shell scripts as compilers; one test runs a real compiler."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hfquant
from hfquant.kernels import cpu, table
from hfquant.kernels.base import product_of
from hfquant.kernels.cpu import build

#: Writes to the file that -o names, and logs every call that produces a file.
COMPILER = """#!/bin/sh
case "$*" in *--version*) echo "a compiler, version {version}"; exit 0;; esac
echo "$*" >> {log}
{also}
while [ "$1" != -o ]; do shift; done
echo "made by version {version}" > "$2"
"""

#: Waits for a byte on stdin, then prints the library. Runs by path, since importing the package takes seconds.
PROGRAM = f"""
import runpy, sys
build = runpy.run_path({str(build.HERE / "build.py")!r})
sys.stdin.read(1)
print(build["library"]())
"""


class Compiler:
    """A compiler for ``CXX`` that records what it was asked to build."""

    def __init__(self, folder: Path) -> None:
        self.path, self.log = folder / "cxx", folder / "calls"
        self.write()

    def write(self, version: str = "1", also: str = "") -> None:
        # As a new file: calls of a killed process may still run, and a script that runs cannot be written to.
        new = self.path.with_suffix(".new")
        new.write_text(COMPILER.format(version=version, log=self.log, also=also))
        new.chmod(0o755)
        new.replace(self.path)

    def linked(self) -> int:
        """Return how many libraries were linked."""
        return self.log.read_text().count("-shared") if self.log.exists() else 0


@pytest.fixture
def compiler(tmp_path, monkeypatch) -> Compiler:
    made = Compiler(tmp_path)
    monkeypatch.setenv("CXX", str(made.path))
    monkeypatch.delenv(build.EXTRA_FLAGS, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temp"))
    monkeypatch.setattr(build.tempfile, "tempdir", None)
    (tmp_path / "temp").mkdir()
    return made


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A copy of the sources that tests may change."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for path in [*build.HERE.glob("*.cpp"), *build.HERE.glob("*.h")]:
        shutil.copy(path, folder)
    monkeypatch.setattr(build, "HERE", folder)
    return folder


@pytest.fixture
def fresh():
    """Reset the table to the state of a process that has not loaded the library yet."""
    caches = (cpu._missing, cpu._instruction_sets, cpu._lacks, cpu.spec_of, table._pick)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_compiled_once_and_every_instruction_set(compiler, tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING, "hfquant"):
        path = build.library()
    assert caplog.messages == ["compiling the C++ kernels, once for this machine: about a minute of CPU time"]
    assert path.parent == tmp_path / "cache" / "hfquant"
    assert path.stem.endswith(hashlib.sha256(path.read_bytes()).hexdigest()[:20])
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, "lock"])
    calls = compiler.log.read_text().splitlines()
    assert len(calls) == len(build.INSTRUCTION_SETS) + 2
    for name in build.INSTRUCTION_SETS:
        assert sum(f"-DHFQUANT_ISA={name} " in call for call in calls) == 1
    caplog.clear()
    assert build.library() == path
    assert compiler.linked() == 1
    assert not caplog.messages


def test_the_linker_sees_the_plain_files_first(compiler) -> None:
    """If several files define a function, the linker keeps the first; an AVX-512 version would crash older CPUs."""
    build.library()
    *made, linked = compiler.log.read_text().splitlines()
    objects = [word for word in linked.split() if word.endswith(".o")]
    flags = {next(word for word in call.split() if word.endswith(".o")): call for call in made}
    assert ["-mavx" in flags[name] for name in objects] == sorted("-mavx" in flags[name] for name in objects)
    assert "native.cpp" in flags[objects[0]]
    assert "-DHFQUANT_ISA=scalar" in flags[objects[1]]


@pytest.mark.parametrize("what", ["compiler", "torch", "flags", "a source", "a new source", "a renamed source"])
def test_anything_else_is_compiled_anew(what, compiler, sources, monkeypatch) -> None:
    first = build.library()
    match what:
        case "compiler":
            compiler.write(version="2")
        case "torch":
            monkeypatch.setattr(torch, "__version__", "2.99.0")
        case "flags":
            monkeypatch.setenv(build.EXTRA_FLAGS, "-fsanitize=address")
        case "a source":
            (sources / "rows.h").write_text((sources / "rows.h").read_text() + "\n")
        case "a new source":
            (sources / "more.h").touch()
        case "a renamed source":
            (sources / "rows.h").rename(sources / "rows2.h")
    second = build.library()
    assert second != first
    assert compiler.linked() == 2
    assert first.exists()


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_a_damaged_library_is_compiled_anew(damage, compiler) -> None:
    path = build.library()
    good = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(good[:-1])
        case "changed":
            path.write_bytes(b"?" + good[1:])
        case "empty":
            path.write_bytes(b"")
    again = build.library()
    assert again.read_bytes() == good
    assert compiler.linked() == 2


def test_a_damaged_library_goes(compiler) -> None:
    path = build.library()
    damaged = path.with_stem(path.stem[:-20] + "0" * 20)
    path.rename(damaged)
    assert build.library() == path
    assert not damaged.exists()


def test_a_run_that_was_cut_off_leaves_nothing_to_load(compiler) -> None:
    """The process is killed while compiling; the library's file appears only once it is complete."""
    compiler.write(also="kill -9 $PPID")
    found = subprocess.run([sys.executable, "-c", PROGRAM], input=b"x", capture_output=True)
    assert found.returncode == -9
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "hfquant"
    assert not list(folder.glob("*.so"))
    compiler.write()
    assert build.library().exists()


def test_several_processes_compile_once(compiler) -> None:
    compiler.write(also="sleep 0.1")
    command = [sys.executable, "-c", PROGRAM]
    processes = [subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    found = {process.communicate("x")[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(found) == 1
    assert Path(found.pop().strip()).exists()
    assert compiler.linked() == 1


def test_without_locks_each_process_compiles(compiler, monkeypatch) -> None:
    import fcntl

    def unsupported(*arguments: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert build.library().exists()


@pytest.mark.parametrize("home", ["read-only", "none"])
def test_without_a_home_to_write_a_private_folder_of_the_temporary_one(home, compiler, tmp_path, monkeypatch) -> None:
    if home == "none":
        monkeypatch.delenv("XDG_CACHE_HOME")

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    else:
        # Not even root can create a folder below a file.
        (tmp_path / "cache").touch()
    path = build.library()
    assert path.parent == tmp_path / "temp" / f"hfquant-{os.getuid()}"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert build.library() == path
    assert compiler.linked() == 1


@pytest.mark.parametrize("whose", ["everybody's", "a link", "another user's", "a file"])
def test_a_folder_that_others_can_write_is_not_trusted(whose, compiler, tmp_path, monkeypatch) -> None:
    (tmp_path / "cache").touch()
    folder = tmp_path / "temp" / f"hfquant-{os.getuid()}"
    match whose:
        case "everybody's":
            folder.mkdir()
            folder.chmod(0o777)
        case "a link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            folder.symlink_to(tmp_path / "elsewhere")
        case "another user's":
            monkeypatch.setattr(os, "getuid", lambda: 12345)
            folder = folder.with_name("hfquant-12345")
            folder.mkdir(mode=0o700)
        case "a file":
            folder.touch()
    with pytest.raises(build.BuildError, match="there is no writable folder for the compiled library"):
        build.library()
    assert compiler.linked() == 0


@pytest.mark.parametrize("problem", ["none", "not there", "fails", "fails to link", "no version", "hangs"])
def test_without_a_working_compiler(problem, compiler, monkeypatch, tmp_path) -> None:
    said = {
        "none": r"no C\+\+ compiler \(g\+\+ or clang\+\+\) is installed",
        "not there": "cxx cannot be run: ",
        "fails": "cxx failed: native.cpp: sorry",
        "fails to link": "cxx failed: no such library",
        "no version": "cxx failed: exit code 3",
        "hangs": "cxx did not finish within 0.3 s",
    }[problem]
    match problem:
        case "none":
            monkeypatch.delenv("CXX")
            monkeypatch.setenv("PATH", str(tmp_path))
        case "not there":
            compiler.path.unlink()
        case "fails":
            compiler.write(also='echo "native.cpp:  sorry\n" >&2; exit 1')
        case "fails to link":
            compiler.write(also='case "$*" in *-shared*) echo "no such library" >&2; exit 1;; esac')
        case "no version":
            compiler.path.write_text("#!/bin/sh\nexit 3\n")
        case "hangs":
            compiler.write(also="exec sleep 20")
            monkeypatch.setattr(build, "PATIENCE", 0.3)
    with pytest.raises(build.BuildError, match=said):
        build.library()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_compiler_may_come_with_arguments(compiler, monkeypatch) -> None:
    monkeypatch.setenv("CXX", f"env LC_ALL=C {compiler.path}")
    assert build.library().exists()


def test_a_wheels_library_is_loaded_before_any_compiler_is_asked(compiler, sources, monkeypatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    carried = sources / build.wheel_name()
    carried.touch()
    build.load()
    assert loaded == [str(carried)]
    # A library built from other sources is not loaded: here they have changed since.
    (sources / "rows.h").touch()
    (sources / "tiles.h").write_text("// changed")
    build.load()
    assert loaded[1:] == [str(build.library())]
    assert compiler.linked() == 1


def test_a_wheels_library_that_cannot_be_loaded_is_compiled(compiler, sources, monkeypatch, caplog) -> None:
    loaded: list[str] = []

    def load(path: str) -> None:
        loaded.append(path)
        if path == str(carried):
            raise OSError("version `GLIBC_9.99' not found")

    monkeypatch.setattr(torch.ops, "load_library", load)
    carried = sources / build.wheel_name()
    carried.touch()
    build.load()
    assert loaded == [str(carried), str(build.library())]
    assert "cannot be loaded here: version `GLIBC_9.99' not found" in caplog.messages[0]


@pytest.mark.parametrize("broken", ["compiler", "library"])
def test_torchs_own_ops_take_over_with_one_line(broken, compiler, monkeypatch, caplog, fresh) -> None:
    """Without a compiler, or with one whose output is not a library."""
    monkeypatch.setattr(build, "wheel_name", lambda: "no wheel.so")
    if broken == "compiler":
        compiler.write(also="exit 1")
    form = '{"weight":"int8","columns":[[64,1]],"segments":[64],"input":"int8","dynamic":true,"per_token":true}'
    with caplog.at_level(logging.WARNING, "hfquant"):
        for tokens in (1, 2, 64):
            kernel = table.pick(product_of(form), "cpu", torch.float32, tokens, 64)
            assert kernel.name not in build.INSTRUCTION_SETS
    lines = [line for line in caplog.messages if not line.startswith("compiling")]
    assert len(lines) == 1
    assert lines[0].startswith("quantized layers run on torch's own ops, more slowly: ")
    monkeypatch.setenv("HFQUANT_KERNEL", "scalar")
    with pytest.raises(ValueError, match=r"scalar cannot compute .* here: the C\+\+ kernels could not be"):
        table.pick(product_of(form), "cpu", torch.float32, 1, 64)


def test_the_first_call_may_be_traced(fresh) -> None:
    layer, x = hfquant.quantize(nn.Sequential(nn.Linear(16, 8)), None, "w8a16"), torch.randn(3, 16)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        assert torch.equal(traced(2 * x), layer(2 * x))
    assert torch._C._get_tracing_state() is None


@pytest.mark.slow
def test_the_real_compiler(tmp_path) -> None:
    """Two processes at once, in a home without a library; then one more."""
    program = f"""
import runpy, torch
torch.ops.load_library(runpy.run_path({str(build.HERE / "build.py")!r})["library"]())
print(torch.ops.hfquant_cpu.instruction_sets())
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program]
        return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
        out, said = process.communicate()
        assert process.returncode == 0, said
        return int(out), said

    found = [finish(process) for process in [start(), start()]]
    assert sorted(said.count("compiling the C++ kernels") for _, said in found) == [0, 1]
    assert found[0][0] == found[1][0]
    assert found[0][0] & 1  # the scalar kernels run everywhere
    assert "compiling" not in finish(start())[1]
