"""Compile the C++ kernels once for a machine, keep the library in a cache, load it.

A wheel carries the library; a source install compiles it on first use. A library's name says what it is made of, and in
the cache what it consists of, so one of other sources, another compiler or another torch, or a damaged one, is never
loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
#: Flags for each instruction set, narrowest first; the order is that of ``choices`` in native.cpp.
X86 = {
    "scalar": "",
    "avx2": "-mavx2 -mfma -mf16c -mbmi2",
    "avxvnni": "-mavx2 -mfma -mf16c -mbmi2 -mavxvnni",
    "avx512_vnni": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c -mbmi2 "
    "-mprefer-vector-width=512",
}
FLAGS_OF = X86 if platform.machine().lower() in ("x86_64", "amd64") else {"scalar": ""}
INSTRUCTION_SETS = list(FLAGS_OF)
FLAGS = (
    "-std=c++20 -O3 -fPIC -fopenmp-simd -fno-math-errno -fno-trapping-math -DTORCH_TARGET_VERSION=0x020a000000000000"
)
#: Environment variable for more flags (sanitizers).
EXTRA_FLAGS = "HFQUANT_CXXFLAGS"
#: Seconds that the compiler may take for one file.
PATIENCE = 600


class BuildError(RuntimeError):
    """The library cannot be compiled here."""


def load() -> None:
    """Load the library that the wheel carries, or else one compiled for this machine.

    Raises:
        BuildError: there is no compiler, or it fails.
        OSError: what was compiled cannot be loaded.
    """
    carried = HERE / wheel_name()
    if carried.exists() and not os.environ.get(EXTRA_FLAGS):
        try:
            torch.ops.load_library(str(carried))
        except OSError as error:  # this system's C library is older than the one that the wheel was built with
            logger.warning("the C++ kernels of this wheel cannot be loaded here: %s", error)
        else:
            return
    torch.ops.load_library(str(library()))


def library() -> Path:
    """Return the library compiled for this machine: that of the cache, or a new one.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler = _compiler()
    name = f"hfquant_cpu-{_fingerprint(compiler)}"
    for folder in _folders():
        if made := _intact(folder, name):
            return made
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder):
                return _intact(folder, name) or _compile_into(folder, name, compiler)
    raise BuildError("no folder for the compiled library can be written")


def wheel_name() -> str:
    """Return the file name of the library within a wheel of these sources; it serves every torch from 2.10 on."""
    return f"hfquant_cpu-{_sources().hexdigest()[:20]}.so"


def compile_library(target: Path, compiler: Sequence[str] | None = None) -> Path:
    """Compile every instruction set, and link them as ``target``.

    Args:
        target: the file to write.
        compiler: the command; default: what ``CXX`` names, g++ or clang++.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler = compiler or _compiler()
    torch_folder = Path(torch.__file__).parent
    extra = shlex.split(os.environ.get(EXTRA_FLAGS, ""))
    common = [*FLAGS.split(), f"-I{torch_folder / 'include'}"]
    x86 = ["-DHFQUANT_X86"] if FLAGS_OF is X86 else []
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # The plain ones come first: of what several files define (std::vector's code), the linker takes the first.
        sources = [["native.cpp", *x86]]
        sources += [["isa.cpp", f"-DHFQUANT_ISA={name}", *flags.split()] for name, flags in FLAGS_OF.items()]
        objects = [str(Path(scratch) / f"{i}.o") for i in range(len(sources))]
        commands = [
            [*compiler, *common, *source, *extra, "-c", "-o", made]
            for source, made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_call, commands))
        linked = Path(scratch) / "linked.so"
        _call([*compiler, "-shared", *extra, *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", str(linked)])
        os.replace(linked, target)
    return target


def _compile_into(folder: Path, name: str, compiler: Sequence[str]) -> Path:
    logger.warning("compiling the C++ kernels, once for this machine: about a minute of CPU time")
    for damaged in folder.glob(f"{name}-*.so"):
        damaged.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = compile_library(Path(scratch) / "made.so", compiler)
        # The name holds the digest of the content, so one step puts both in place.
        path = folder / f"{name}-{_digest(made)}.so"
        os.replace(made, path)
    return path


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process compile while the others wait; the lock goes with the process that holds it."""
    import fcntl

    with open(folder / "lock", "w") as lock:
        # Not every network file system has locks. Then each process compiles, and all give equal files.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compiler() -> list[str]:
    if os.name != "posix":
        raise BuildError(f"compiling is not supported on {platform.system()}")
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise BuildError("no C++ compiler (g++ or clang++) is installed")
    return [found]


def _call(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.CalledProcessError as error:
        why = " ".join(error.stderr.split())[:500] or f"exit code {error.returncode}"
        raise BuildError(f"{command[0]} fails: {why}") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} does not end within {PATIENCE} s") from None
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from None
    return done.stdout


def _sources() -> hashlib._Hash:
    made_of = hashlib.sha256()
    for path in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")]):
        made_of.update(f"{path.name}\0".encode() + path.read_bytes())
    made_of.update("\0".join([platform.machine(), FLAGS, str(FLAGS_OF)]).encode())
    return made_of


def _fingerprint(compiler: Sequence[str]) -> str:
    made_of = _sources()
    version = _call([*compiler, "--version"])
    made_of.update("\0".join([torch.__version__, version, os.environ.get(EXTRA_FLAGS, "")]).encode())
    return made_of.hexdigest()[:20]


def _folders() -> Iterator[Path]:
    with contextlib.suppress(RuntimeError):  # there may be no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hfquant"
    # A read-only home. The folder is this user's alone: nobody else can put a library there.
    folder = Path(tempfile.gettempdir()) / f"hfquant-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            yield folder


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


def _intact(folder: Path, name: str) -> Path | None:
    """Return a library of the cache whose content is what its name says."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob(f"{name}-*.so")):
            if path.stem.endswith(f"-{_digest(path)}"):
                return path
    return None
