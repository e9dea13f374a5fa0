"""Calibration sets on disk: chunks of samples in safetensors, and the index that vouches for them.

    index.json                        what the set is, where it came from, and a checksum of every chunk
    chunk-00000.safetensors[.zst]     the tensors of `chunk_size` samples, their structures in the metadata
    ...

Every file is written under a temporary name, flushed to the disk and renamed, a chunk before the index that lists it.
So whenever the writer is killed, the index describes a set that is whole as far as it goes; `cursor` says how far that
is, and the next run goes on from there. Reading trusts nothing: file names follow from the position in the index, sizes
are compared before memory is taken, and checksums before anything is parsed.

Processes that share the work write a directory each, `shard-00000-of-00004` and so on, every one a set in itself.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import xxhash
import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hfquant.calibration.recorder import Recording, layout, placeholders

INDEX = "index.json"
_FORMAT = "hfquant.calibration"
_VERSION = 1
# zstd turns 128 KiB of equal bytes into a block of 4; nothing expands further, so a larger claim is a lie.
_MAX_EXPANSION = 1 << 15
_PARALLEL_SIZE = 4 << 20
# What safetensors calls each dtype. Others are stored as flat bytes; a sample's structure says what they are.
_NAMES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bool": "BOOL", "uint8": "U8", "int8": "I8"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "uint64": "U64", "uint32": "U32", "uint16": "U16"},
}


class CalibSetError(ValueError):
    """A calibration set on disk is damaged, or is not the one asked for. The message names the file."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


_Count = Annotated[int, Field(ge=0)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class Cursor(_Strict):
    """How far a set has come: `taken` samples of batch `batch` are stored, all of those before, none of those after."""

    batch: _Count = 0
    taken: _Count = 0
    source: str = ""
    """Digest of all batches up to and including this one: a resumed run must be fed the same."""


class ChunkEntry(_Strict):
    """What the index says of a chunk."""

    file: str
    samples: Annotated[int, Field(gt=0)]
    size: _Count
    raw_size: _Count
    """Bytes before compression."""
    xxh3_128: _Digest
    layouts: list[list[_Count]]
    """Run lengths over the samples: [number of the layout in the index, samples]."""


class Index(_Strict):
    """index.json."""

    format: Literal["hfquant.calibration"] = "hfquant.calibration"
    version: Literal[1] = 1
    complete: bool = False
    chunk_size: Annotated[int, Field(gt=0)]
    compress: bool
    length: _Count = 0
    provenance: dict[str, Any]
    cursor: Cursor = Cursor()
    layouts: list[dict[str, list[Any]]] = []
    """The distinct sets of tensors that samples are made of: path in the sample to [dtype, shape]."""
    chunks: list[ChunkEntry] = []


@dataclass(frozen=True)
class ChunkFile:
    """A chunk that is on disk."""

    path: Path
    entry: ChunkEntry
    compress: bool

    def __len__(self) -> int:
        return self.entry.samples

    def load(self) -> Recording:
        """Reads the chunk.

        Raises:
            FileNotFoundError: It is not there.
            CalibSetError: It is not what the index says, or nothing that can be read.
        """
        self.check_size()
        data = self.path.read_bytes()
        if len(data) != self.entry.size or xxhash.xxh3_128_hexdigest(data) != self.entry.xxh3_128:
            raise CalibSetError(f"{self.path} is damaged: its checksum is not the one in {INDEX}.")
        try:
            recording = _parse(_decompress(data, self.entry.raw_size) if self.compress else data)
        except MemoryError as error:
            raise CalibSetError(f"{self.path} needs {self.entry.raw_size} bytes, more than there is.") from error
        except (zstandard.ZstdError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CalibSetError(f"{self.path} cannot be read: {error!r}.") from error
        if len(recording) != self.entry.samples:
            raise CalibSetError(f"{self.path} does not hold the {self.entry.samples} samples that {INDEX} promises.")
        return recording

    def check_size(self) -> None:
        """Compares the size on disk with the index, which costs no reading."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.path}, a chunk of this calibration set, is missing.") from None
        if size != self.entry.size:
            raise CalibSetError(f"{self.path} has {size} bytes, {INDEX} says {self.entry.size}: cut off or replaced.")


def _decompress(data: bytes, size: int) -> bytes:
    claimed = zstandard.get_frame_parameters(data).content_size
    if claimed != size or claimed > _MAX_EXPANSION * len(data):
        raise ValueError(f"it claims to hold {claimed} bytes, {INDEX} says {size}")
    return zstandard.ZstdDecompressor().decompress(data)


def _parse(raw: bytes) -> Recording:
    """Reads a safetensors file in memory, without a copy of the tensors."""
    start = 8 + int.from_bytes(raw[:8], "little")
    if not 8 <= start <= len(raw):
        raise ValueError("its header is longer than the file")
    header = json.loads(raw[8:start])
    samples = json.loads(header.pop("__metadata__")["samples"])
    if not isinstance(samples, list):
        raise ValueError("its samples are no list")
    body, tensors = memoryview(raw)[start:], {}
    for key, spec in header.items():
        begin, end = spec["data_offsets"]
        if not 0 <= begin <= end <= len(body):
            raise ValueError(f"tensor {key!r} lies outside the file")
        tensors[key] = body[begin:end]
    return Recording(samples, tensors)


def _serialize(chunk: Recording) -> Iterator[bytes | memoryview]:
    """The parts of a safetensors file: the header, then each tensor, without a copy of them."""
    specs = {key: spec for sample in chunk.samples for key, _, spec in placeholders(sample)}
    # Wide elements first, so that each tensor is aligned when the file is mapped to memory.
    order = sorted(specs, key=lambda key: -getattr(torch, specs[key][0]).itemsize)
    header: dict[str, Any] = {"__metadata__": {"samples": json.dumps(chunk.samples, separators=(",", ":"))}}
    end = 0
    for key in order:
        dtype, shape = specs[key]
        begin, end = end, end + chunk.tensors[key].nbytes
        name = _NAMES.get(dtype)
        header[key] = {
            "dtype": name or "U8",
            "shape": shape if name else [end - begin],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for key in order:
        yield chunk.tensors[key]


def _compress(parts: Sequence[bytes | memoryview], size: int) -> Iterator[bytes]:
    # zstd gives the same bytes for any number of threads but none, so that must not depend on the machine.
    threads = -1 if size >= _PARALLEL_SIZE else 0
    compressor = zstandard.ZstdCompressor(level=_level(parts), threads=threads).compressobj(size=size)
    for part in parts:
        yield compressor.compress(part)
    yield compressor.flush()


def _level(parts: Sequence[bytes | memoryview]) -> int:
    """The better of two zstd levels on a probe of at most 2 MiB.

    Level 2 takes half the time of 3, zstd's default, and dense floats come out smaller; sparse ones, after a ReLU, do
    not.
    """
    probe = b"".join(bytes(part[: 1 << 17]) for part in parts[:: len(parts) // 8 or 1])
    return min(2, 3, key=lambda level: len(zstandard.compress(probe, level)))


class Writer:
    """Appends samples to a set on disk, chunk by chunk."""

    def __init__(self, directory: Path, index: Index) -> None:
        self.directory = directory
        self.index = index
        self._chunk = Recording()
        self._layouts = {json.dumps(tensors): i for i, tensors in enumerate(index.layouts)}

    def add(self, recording: Recording, position: int, cursor: Cursor) -> None:
        """Appends one sample; `cursor` says how far the set has come with it."""
        self._chunk.take(recording, position)
        if len(self._chunk) == self.index.chunk_size:
            self._flush(cursor)
            write_index(self.directory, self.index)

    def finish(self, cursor: Cursor) -> None:
        """Writes what is left and declares the set complete."""
        if self._chunk.samples:
            self._flush(cursor)
        self.index.complete = True
        write_index(self.directory, self.index)

    def _flush(self, cursor: Cursor) -> None:
        chunk, self._chunk = self._chunk, Recording()
        ids = [self._layout_id(layout(sample)) for sample in chunk.samples]
        parts = list(_serialize(chunk))
        raw_size = sum(map(len, parts))
        file = _chunk_name(len(self.index.chunks), self.index.compress)
        stored = _compress(parts, raw_size) if self.index.compress else parts
        size, checksum = _write_atomically(self.directory / file, stored)
        entry = ChunkEntry(
            file=file,
            samples=len(chunk),
            size=size,
            raw_size=raw_size,
            xxh3_128=checksum,
            layouts=[[number, len(list(run))] for number, run in groupby(ids)],
        )
        self.index.chunks.append(entry)
        self.index.length += len(chunk)
        self.index.cursor = cursor

    def _layout_id(self, tensors: dict[str, list[Any]]) -> int:
        number = self._layouts.setdefault(json.dumps(tensors), len(self._layouts))
        if number == len(self.index.layouts):
            self.index.layouts.append(tensors)
        return number


def chunk_files(directory: Path, index: Index) -> list[ChunkFile]:
    """The chunks that an index lists, each checked for presence and size."""
    files = [ChunkFile(directory / entry.file, entry, index.compress) for entry in index.chunks]
    for file in files:
        file.check_size()
    return files


def write_index(directory: Path, index: Index) -> None:
    """Writes index.json, with a checksum of itself."""
    body = index.model_dump(mode="json")
    text = json.dumps(body | {"checksum": _checksum(body)}, indent=1)
    _write_atomically(directory / INDEX, [text.encode()])
    # A power cut that undoes a rename leaves an older index, which is as good; only the last one is waited for.
    if index.complete and os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_index(directory: Path) -> Index | None:
    """Reads and checks index.json; None where there is neither an index nor a chunk.

    Raises:
        CalibSetError: The index is damaged, not one of ours, from a newer version, or missing beside its chunks.
    """
    path = directory / INDEX
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        if any(directory.glob("chunk-*.safetensors*")):
            raise CalibSetError(f"{path} is missing, yet there are chunks beside it.") from None
        return None
    except NotADirectoryError:
        raise CalibSetError(f"{directory} is a file, not the directory of a calibration set.") from None
    except (ValueError, RecursionError) as error:
        raise CalibSetError(f"{path} is damaged: {error}.") from error
    if not isinstance(body, dict) or body.get("format") != _FORMAT:
        raise CalibSetError(f"{path} is not the index of a calibration set.")
    version = body.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise CalibSetError(f"{path} has format version {version}; this hfquant reads {_VERSION}: upgrade it.")
    checksum = body.pop("checksum", None)
    try:
        index = Index.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise CalibSetError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
    if checksum != _checksum(body):
        raise CalibSetError(f"{path} is damaged: its checksum does not match.")
    for i, entry in enumerate(index.chunks):
        if entry.file != _chunk_name(i, index.compress):
            raise CalibSetError(
                f"{path}: chunk {i} must be named {_chunk_name(i, index.compress)}, not {entry.file!r}."
            )
        if not index.compress and entry.raw_size != entry.size:
            raise CalibSetError(f"{path}: chunk {i} is not compressed, yet its two sizes differ.")
    if index.length != sum(entry.samples for entry in index.chunks):
        raise CalibSetError(f"{path}: the chunks do not add up to {index.length} samples.")
    return index


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Keeps two processes from writing one set. The lock goes with the process, however that ends.

    Raises:
        RuntimeError: Another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock on a directory
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is writing the calibration set {directory}.") from None
        yield
    finally:
        os.close(handle)


def shard_name(rank: int, world_size: int) -> str:
    """Directory that process `rank` of `world_size` writes its share of a set to."""
    return f"shard-{rank:05d}-of-{world_size:05d}"


def writers(directory: Path) -> set[int]:
    """By how many processes the set in `directory` was begun: one number, none, or several where runs were mixed."""
    shards = (re.fullmatch(r"shard-\d{5}-of-(\d{5})", path.name) for path in directory.glob("shard-*") if path.is_dir())
    return {int(match[1]) for match in shards if match} | ({1} if (directory / INDEX).exists() else set())


def _chunk_name(number: int, compress: bool) -> str:
    return f"chunk-{number:05d}.safetensors{'.zst' if compress else ''}"


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _write_atomically(path: Path, parts: Iterable[bytes | memoryview], *, sync_rename: bool = False) -> tuple[int, str]:
    """Writes a file that is there whole or not at all; gives its size and checksum."""
    temporary = path.with_name(path.name + ".tmp")
    digest = xxhash.xxh3_128()
    with open(temporary, "wb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    os.replace(temporary, path)
    return size, digest.hexdigest()
