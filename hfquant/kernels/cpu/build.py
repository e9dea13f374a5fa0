"""Compile the C++ kernels once per machine, cache the library and load it.

A wheel ships the library; a source install compiles it on first use. The file name contains a hash of the sources; in
the cache the hash covers compiler and torch too, and a digest of the content follows. A library built from other
sources, with another compiler or torch, or a damaged one, is never loaded.
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
AVX512_VNNI = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c -mbmi2 -mprefer-vector-width=512"
#: Compiler flags per instruction set, narrowest first, in the order of ``choices`` in native.cpp.
X86 = {
    "scalar": "",
    "avx2": "-mavx2 -mfma -mf16c -mbmi2",
    "avxvnni": "-mavx2 -mfma -mf16c -mbmi2 -mavxvnni",
    "avx512_vnni": AVX512_VNNI,
    "avx512_bf16": f"{AVX512_VNNI} -mavx512bf16",
}
FLAGS_OF = X86 if platform.machine().lower() in ("x86_64", "amd64") else {"scalar": ""}
INSTRUCTION_SETS = list(FLAGS_OF)
FLAGS = (
    "-std=c++20 -O3 -fPIC -fopenmp-simd -fno-math-errno -fno-trapping-math -DTORCH_TARGET_VERSION=0x020a000000000000"
)
#: Environment variable with extra compiler flags (sanitizers).
EXTRA_FLAGS = "HFQUANT_CXXFLAGS"
#: Time limit of one compiler call, in seconds.
PATIENCE = 600


class BuildError(RuntimeError):
    """The library cannot be compiled here."""


def load() -> None:
    """Load the library shipped with the wheel, or else one compiled for this machine.

    Raises:
        BuildError: there is no compiler, or it fails.
        OSError: the compiled library cannot be loaded.
    """
    carried = HERE / wheel_name()
    if carried.exists() and not os.environ.get(EXTRA_FLAGS):
        try:
            torch.ops.load_library(str(carried))
        except OSError as error:  # the wheel was built against a newer C library than this system's
            logger.warning("the C++ kernels of this wheel cannot be loaded here: %s", error)
        else:
            return
    torch.ops.load_library(str(library()))


def library() -> Path:
    """Return the library compiled for this machine, from the cache or newly compiled.

    Raises:
        BuildError: there is no compiler, it fails, or no cache folder is writable.
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
    raise BuildError("there is no writable folder for the compiled library")


def wheel_name() -> str:
    """Return the library's file name in a wheel of these sources; it works with every torch from 2.10 on."""
    return f"hfquant_cpu-{_sources().hexdigest()[:20]}.so"


def compile_library(target: Path, compiler: Sequence[str] | None = None) -> Path:
    """Compile the kernels of every instruction set and link them into ``target``.

    Args:
        target: the file to write.
        compiler: the command; by default ``CXX``, else g++ or clang++.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler = compiler or _compiler()
    torch_folder = Path(torch.__file__).parent
    extra = shlex.split(os.environ.get(EXTRA_FLAGS, ""))
    common = [*FLAGS.split(), f"-I{torch_folder / 'include'}"]
    x86 = ["-DHFQUANT_X86"] if FLAGS_OF is X86 else []
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # Objects for any CPU come first: of duplicate definitions (std::vector's code), the linker keeps the first.
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
        # The name contains the digest of the content, so one rename installs both.
        path = folder / f"{name}-{_digest(made)}.so"
        os.replace(made, path)
    return path


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process compile while the others wait; the lock is released if its process dies."""
    import fcntl

    with open(folder / "lock", "w") as lock:
        # Not every network file system supports locks. Then each process compiles, all with the same result.
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
        raise BuildError(f"{command[0]} failed: {why}") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} did not finish within {PATIENCE} s") from None
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
    with contextlib.suppress(RuntimeError):  # there may be no home directory
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hfquant"
    # For a read-only home. Only this user can write to the folder, so nobody else can place a library there.
    folder = Path(tempfile.gettempdir()) / f"hfquant-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            yield folder


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


def _intact(folder: Path, name: str) -> Path | None:
    """Return a cached library whose content matches the digest in its name, or None."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob(f"{name}-*.so")):
            if path.stem.endswith(f"-{_digest(path)}"):
                return path
    return None
