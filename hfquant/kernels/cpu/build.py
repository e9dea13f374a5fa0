"""Compile the C++ kernels once for a machine, keep the library in a cache, load it.

A wheel carries the library; a source install compiles it on first use. Its name in the cache is the hash of all that it
is made of, so a library of other sources, another compiler or another torch is never loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
#: The library within a wheel.
BUILT = HERE / "hfquant_cpu.so"
#: Flags for each instruction set, narrowest first; the order is that of ``choices`` in native.cpp.
X86 = {
    "scalar": "",
    "avx2": "-mavx2 -mfma -mf16c -mbmi2",
    "avxvnni": "-mavx2 -mfma -mf16c -mbmi2 -mavxvnni",
    "avx512_vnni": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c -mbmi2 "
    "-mprefer-vector-width=512",
}
INSTRUCTION_SETS = list(X86) if platform.machine().lower() in ("x86_64", "amd64") else ["scalar"]
FLAGS = (
    "-std=c++20 -O3 -fPIC -fopenmp-simd -fno-math-errno -fno-trapping-math -DTORCH_TARGET_VERSION=0x020a000000000000"
)
#: Environment variable for more flags (sanitizers).
EXTRA_FLAGS = "HFQUANT_CXXFLAGS"


class BuildError(RuntimeError):
    """The library cannot be compiled here."""


def library() -> Path:
    """Return the compiled library: the wheel's, that of the cache, or a new one.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    if BUILT.exists() and not os.environ.get(EXTRA_FLAGS):
        return BUILT
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler (g++ or clang++) is installed")
    name = f"hfquant_cpu-{_fingerprint(compiler)}.so"
    for folder in _folders():
        path = folder / name
        if path.exists() and _intact(path):
            return path
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            # Several processes may compile at once; whoever is last replaces the file by an equal one.
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = compile_library(Path(scratch) / name, compiler)
                _digest_file(made).write_text(_digest(made))
                os.replace(_digest_file(made), _digest_file(path))
                os.replace(made, path)
            return path
    raise BuildError("no folder for the compiled library can be written")


def compile_library(target: Path, compiler: str) -> Path:
    """Compile every instruction set, and link them as ``target``.

    Raises:
        BuildError: the compiler fails.
    """
    torch_folder = Path(torch.__file__).parent
    include = f"-I{torch_folder / 'include'}"
    extra = os.environ.get(EXTRA_FLAGS, "").split()
    common = [*FLAGS.split(), *extra, include]
    x86 = ["-DHFQUANT_X86"] if len(INSTRUCTION_SETS) > 1 else []
    jobs = [["native.cpp", *x86, "-o", f"{target}.native.o"]]
    jobs += [["isa.cpp", f"-DHFQUANT_ISA={n}", *X86[n].split(), "-o", f"{target}.{n}.o"] for n in INSTRUCTION_SETS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: _call([compiler, *common, "-c", *job]), jobs))
    objects = [job[-1] for job in jobs]
    _call([compiler, "-shared", *extra, *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", str(target)])
    return target


def _call(command: list[str]) -> None:
    try:
        subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{command[0]} fails: {error.stderr.strip()[:2000]}") from None
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from None


def _fingerprint(compiler: str) -> str:
    made_of = hashlib.sha256()
    for path in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")]):
        made_of.update(path.read_bytes())
    try:
        version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{compiler} cannot be run: {error}") from None
    flags = (FLAGS, str(X86), os.environ.get(EXTRA_FLAGS, ""), platform.machine())
    made_of.update("\0".join([torch.__version__, version, *flags]).encode())
    return made_of.hexdigest()[:20]


def _folders() -> Iterator[Path]:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    yield Path(cache) / "hfquant"
    # A read-only home. The folder is this user's alone: nobody else can put a library there.
    folder = Path(tempfile.gettempdir()) / f"hfquant-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_dir() and folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o022:
        yield folder


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _intact(path: Path) -> bool:
    try:
        return _digest_file(path).read_text() == _digest(path)
    except OSError:
        return False
