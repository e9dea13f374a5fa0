"""The interpreter accepts more than the compiler, so compile every kernel to machine code, which needs no device."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the package triton brings ptxas for x86_64")
@pytest.mark.parametrize("capability", ["90", *[pytest.param(c, marks=pytest.mark.slow) for c in ("80", "89", "120")]])
def test_every_program_compiles(capability, tmp_path) -> None:
    root = str(HERE.parents[2])
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": root, "TRITON_CACHE_DIR": str(tmp_path)}
    script = str(HERE / "compile_for_devices.py")
    done = subprocess.run([sys.executable, script, capability], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 21
    for line in lines:
        # All products with more than one token use tensor cores.
        assert line.endswith("mma") != any(word in line for word in ("one token", "codes", "ranges")), line
        # At most a few registers spill (dual scale needs two sums).
        assert int(line.split("STACK:")[1].split()[0]) <= 80, line
