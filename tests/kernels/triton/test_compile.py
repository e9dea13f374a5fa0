"""The interpreter accepts more than the compiler, so compile every kernel to machine code, which needs no device."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
#: Bytes of shared memory that a program can have, by compute capability.
SHARED = {"80": 166912, "89": 101376, "90": 232448, "100": 232448, "120": 101376}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the package triton brings ptxas for x86_64")
@pytest.mark.parametrize("capability", ["90", *[pytest.param(c, marks=pytest.mark.slow) for c in SHARED if c != "90"]])
def test_every_program_compiles(capability, tmp_path) -> None:
    root = str(HERE.parents[2])
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": root, "TRITON_CACHE_DIR": str(tmp_path)}
    script = str(HERE / "compile_for_devices.py")
    done = subprocess.run([sys.executable, script, capability], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 30
    for line in lines:
        # All products with more than one token use tensor cores.
        assert line.endswith("mma") != any(word in line for word in ("one token", "codes", "ranges")), line
        # At most a few registers spill (dual scale needs two sums).
        used = {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", line)}
        assert used["STACK"] <= 80, line
        assert used["SHARED"] <= SHARED[capability], line
        # Weights are copied to shared memory, several bytes at a time, while previous ones are multiplied.
        if "wide" in line:
            assert used["BYTES"] == 0 < used["ASYNC"], line
        # Each thread adds many columns before it exchanges sums with others.
        if "wide w4" in line and "one token" in line:
            assert used["SHUFFLES"] <= 16, line
