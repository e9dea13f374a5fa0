"""Calibration sets on disk: chunks of samples in safetensors, and an index that describes and verifies them.

    index.json                        what the set is, where it came from, and a checksum of every chunk
    chunk-00000.safetensors[.zst]     the tensors of `chunk_size` samples, with their structures in the metadata
    ...

Every file is written under a temporary name, flushed to disk and renamed, and a chunk before the index that lists it.
So the index always describes a consistent set, even if the writer is killed; `cursor` says how far the set has come,
and the next run continues from there.

Reading trusts nothing. Files must be regular ones, not links or pipes, and their names must follow from their position
in the index. Sizes are compared before memory is allocated, and checksums before anything is parsed. A sample must hold
exactly the tensors that the index declares, and no more than a file of its size can hold.

Processes that share the work each write their own directory, `shard-00000-of-00004` and so on; each is a complete set.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
import xxhash
import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from hfquant.calibration.files import INDEX, CalibSetError, open_file, read_file, write_whole
from hfquant.calibration.recorder import Recording, layout, placeholders, size_of
from hfquant.console import counted
from hfquant.schema import explained

_FORMAT = "hfquant.calibration"
_VERSION = 1
# zstd turns 128 KiB of equal bytes into a block of 4, its highest expansion, so a larger claimed size must be false.
_MAX_EXPANSION = 1 << 15
_PARALLEL_SIZE = 4 << 20
# Dtypes that are stored as they are. Others are stored as flat bytes; a sample's structure holds their dtype and shape.
_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


_Count = Annotated[int, Field(ge=0)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class Cursor(_Strict):
    """How far a set has come: all batches before ``batch`` are stored, and the first ``taken`` samples of that one.

    A complete set has the number of all batches of its data, and the digest of all of them.
    """

    batch: _Count = 0
    taken: _Count = 0
    source: str = ""
    """Digest of all batches read so far: a repeated run must receive the same data. "" if it is not known."""


class ChunkEntry(_Strict):
    """The index entry of a chunk."""

    file: str
    samples: Annotated[int, Field(gt=0)]
    size: _Count
    raw_size: _Count
    """Bytes before compression."""
    xxh3_128: _Digest
    layouts: list[tuple[_Count, _Count]]
    """Run lengths over the samples: (position of the layout in the index, number of samples)."""


class Index(_Strict):
    """The content of index.json."""

    format: Literal["hfquant.calibration"] = "hfquant.calibration"
    version: Literal[1] = 1
    complete: bool = False
    chunk_size: Annotated[int, Field(gt=0)]
    compress: bool
    length: _Count = 0
    provenance: dict[str, Any]
    cursor: Cursor = Cursor()
    layouts: list[dict[str, tuple[str, list[_Count]]]] = []
    """The distinct sets of tensors found in samples: path in the sample to (dtype, shape)."""
    chunks: list[ChunkEntry] = []


@dataclass(frozen=True)
class ChunkFile:
    """A chunk on disk."""

    path: Path
    entry: ChunkEntry
    index: Index

    def __len__(self) -> int:
        return self.entry.samples

    def load(self) -> Recording:
        """Read the chunk.

        Raises:
            FileNotFoundError: there is no such file.
            CalibSetError: it does not match the index, or cannot be read.
        """
        data, entry = read_file(self.path, self.entry.size), self.entry
        if xxhash.xxh3_128_hexdigest(data) != entry.xxh3_128:
            raise CalibSetError(f"{self.path} is damaged: its checksum is not the one in {INDEX}")
        try:
            recording = _parse(_decompress(data, entry.raw_size) if self.index.compress else data)
            if len(recording) != len(self):
                raise ValueError(f"it holds {counted(len(recording), 'sample')}, {INDEX} promises {len(self)}")
            declared = (self.index.layouts[number] for number, count in entry.layouts for _ in range(count))
            for structure, expected in zip(recording.samples, declared, strict=True):
                _check_sample(structure, expected, _MAX_EXPANSION * entry.size)
        except MemoryError as error:
            raise CalibSetError(
                f"{self.path} needs {entry.raw_size} bytes of memory, more than is available"
            ) from error
        except (zstandard.ZstdError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CalibSetError(f"{self.path} cannot be read: {error}") from error
        return recording

    def check_size(self) -> None:
        """Compare the file's type and size with the index, without reading the file.

        Raises:
            FileNotFoundError: there is no such file.
            CalibSetError: it is not a regular file of the size given in the index.
        """
        os.close(open_file(self.path, self.entry.size))


def _check_sample(structure: Any, declared: dict[str, tuple[str, list[int]]], limit: int) -> None:
    """Raise ValueError unless a sample's tensors are the declared ones and take at most ``limit`` bytes in total."""
    found = list(placeholders(structure))
    if sum(size_of(*spec) for _, _, spec in found) > limit:
        raise ValueError("a sample claims more memory than a file of this size can hold")
    if {path: tuple(spec) for _, path, spec in found} != declared:
        raise ValueError(f"the tensors of a sample are not those that {INDEX} declares")


def _decompress(data: bytes, size: int) -> bytes:
    claimed = zstandard.get_frame_parameters(data).content_size
    if claimed != size or claimed > _MAX_EXPANSION * len(data):
        raise ValueError(f"it claims to hold {claimed} bytes, {INDEX} says {size}")
    return zstandard.ZstdDecompressor().decompress(data)


def _parse(raw: bytes) -> Recording:
    tensors = safetensors.torch.load(raw)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    samples = json.loads(header["__metadata__"]["samples"])
    if not isinstance(samples, list):
        raise ValueError("its samples are not a list")
    return Recording(samples, tensors)


def _serialize(chunk: Recording) -> bytes:
    tensors = {
        key: tensor if tensor.dtype in _DTYPES else tensor.reshape(-1).view(torch.uint8)
        for key, tensor in chunk.tensors.items()
    }
    return safetensors.torch.save(tensors, {"samples": json.dumps(chunk.samples, separators=(",", ":"))})


def _compress(data: bytes) -> bytes:
    # Level 2 takes half the time of level 3, zstd's default, and compresses dense floats better, but not those after a
    # ReLU.
    middle = data[len(data) // 2 :][: 1 << 18]  # a megabyte would choose no better and take as long as a small chunk
    level = min(2, 3, key=lambda level: len(zstandard.compress(middle, level)))
    # The output is the same for any number of threads except 0, so that choice must not depend on the machine.
    return zstandard.ZstdCompressor(level=level, threads=-1 if len(data) >= _PARALLEL_SIZE else 0).compress(data)


class Writer:
    """Append samples to a set on disk, chunk by chunk."""

    def __init__(self, directory: Path, index: Index) -> None:
        self.directory = directory
        self.index = index
        self._chunk = Recording()
        self._layouts = {json.dumps(tensors): i for i, tensors in enumerate(index.layouts)}

    def add(self, recording: Recording, position: int, cursor: Cursor) -> None:
        """Append one sample; ``cursor`` is the set's progress including this sample."""
        self._chunk.take(recording, position)
        if len(self._chunk) == self.index.chunk_size:
            self._flush(cursor)
            write_index(self.directory, self.index)

    def finish(self, cursor: Cursor) -> None:
        """Write the remaining samples and mark the set complete; ``cursor`` is the end of its data."""
        if self._chunk.samples:
            self._flush(cursor)
        self.index.complete, self.index.cursor = True, cursor
        write_index(self.directory, self.index)

    def _flush(self, cursor: Cursor) -> None:
        chunk, self._chunk, index = self._chunk, Recording(), self.index
        numbers = [self._layout_number(layout(sample)) for sample in chunk.samples]
        raw = _serialize(chunk)
        data = _compress(raw) if index.compress else raw
        entry = ChunkEntry(
            file=_chunk_name(len(index.chunks), index.compress),
            samples=len(chunk),
            size=len(data),
            raw_size=len(raw),
            xxh3_128=xxhash.xxh3_128_hexdigest(data),
            layouts=[(number, len(list(run))) for number, run in groupby(numbers)],
        )
        write_whole(self.directory / entry.file, data)
        index.chunks.append(entry)
        index.length += len(chunk)
        index.cursor = cursor

    def _layout_number(self, tensors: dict[str, Any]) -> int:
        number = self._layouts.setdefault(json.dumps(tensors), len(self._layouts))
        if number == len(self.index.layouts):
            self.index.layouts.append({path: (dtype, shape) for path, (dtype, shape) in tensors.items()})
        return number


def chunk_files(directory: Path, index: Index) -> list[ChunkFile]:
    """Return the chunks that an index lists, after checking that each exists with the right type and size."""
    files = [ChunkFile(directory / entry.file, entry, index) for entry in index.chunks]
    for file in files:
        file.check_size()
    return files


def write_index(directory: Path, index: Index) -> None:
    """Write index.json, including its own checksum."""
    body = index.model_dump(mode="json")
    write_whole(directory / INDEX, json.dumps(body | {"checksum": _checksum(body)}, indent=1).encode())
    # A power cut that undoes a rename leaves an older index, which is equally valid; so only the last one is synced.
    if index.complete and os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_index(directory: Path) -> Index | None:
    """Read and check index.json; return None if there is neither an index nor a chunk.

    Raises:
        CalibSetError: the index is damaged, not an hfquant index, from a newer version, or missing next to its chunks.
    """
    path = directory / INDEX
    try:
        body = json.loads(read_file(path))
    except FileNotFoundError:
        if any(path.suffix != ".tmp" for path in directory.glob("chunk-*.safetensors*")):
            raise CalibSetError(f"{path} is missing, but its folder has chunks") from None
        return None
    except NotADirectoryError:
        raise CalibSetError(f"{directory} is a file, not the directory of a calibration set") from None
    except CalibSetError:
        raise
    except (ValueError, RecursionError) as error:
        raise CalibSetError(f"{path} is damaged: {error}") from error
    if not isinstance(body, dict) or body.get("format") != _FORMAT:
        raise CalibSetError(f"{path} is not the index of a calibration set")
    version = body.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise CalibSetError(f"{path} has format version {version}; this hfquant reads {_VERSION}: upgrade it")
    checksum = body.pop("checksum", None)
    try:
        index = Index.model_validate_json(json.dumps(body))
    except ValidationError as error:
        raise CalibSetError(f"{path}: {explained(error, Index)}") from error
    if checksum != _checksum(body):
        raise CalibSetError(f"{path} is damaged: its checksum does not match")
    try:
        _check_index(index)
    except ValueError as error:
        raise CalibSetError(f"{path}: {error}") from error
    return index


def _check_index(index: Index) -> None:
    """Raise ValueError if parts of an index contradict each other."""
    for tensors in index.layouts:
        for dtype, shape in tensors.values():
            size_of(dtype, shape)
    for i, entry in enumerate(index.chunks):
        if entry.file != (name := _chunk_name(i, index.compress)):
            raise ValueError(f"chunk {i} must be named {name}, not {entry.file!r}")
        if not index.compress and entry.raw_size != entry.size:
            raise ValueError(f"chunk {i} is not compressed, yet its two sizes differ")
        numbers = [number for number, _ in entry.layouts]
        if max(numbers, default=0) >= len(index.layouts) or sum(n for _, n in entry.layouts) != entry.samples:
            raise ValueError(f"the layouts of chunk {i} are not those of {entry.samples} samples")
    if index.length != sum(entry.samples for entry in index.chunks):
        raise ValueError(f"the chunks do not add up to {index.length} samples")


def shard_name(rank: int, world_size: int) -> str:
    """Return the directory that process ``rank`` of ``world_size`` writes its share of a set to."""
    return f"shard-{rank:05d}-of-{world_size:05d}"


def shards(directory: Path) -> list[Path]:
    """Return the directories in which several processes wrote their shards.

    Raises:
        CalibSetError: one of them is a link.
    """
    found = sorted(p for p in directory.glob("shard-*") if re.fullmatch(r"shard-\d{5}-of-\d{5}", p.name) and p.is_dir())
    if link := next((path for path in found if path.is_symlink()), None):
        raise CalibSetError(f"{link} is a link, not a directory of this calibration set")
    return found


def writers(directory: Path) -> set[int]:
    """Return the number of processes that began the set, as a set: empty if none, several if runs were mixed."""
    return {int(path.name[-5:]) for path in shards(directory)} | ({1} if (directory / INDEX).exists() else set())


def check_unmixed(directory: Path) -> None:
    """Check that a set written to ``directory`` would not be mixed with other files.

    Raises:
        FileExistsError: there are files but nothing of a set, finished or not.
    """
    found = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    if found and not any(re.match(rf"{re.escape(INDEX)}|(chunk|shard)-\d{{5}}", name) for name in found):
        raise FileExistsError(
            f"{directory} is not empty and holds no calibration set; choose another path, or remove it first"
        )


def _chunk_name(number: int, compress: bool) -> str:
    return f"chunk-{number:05d}.safetensors{'.zst' if compress else ''}"


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
