"""Calibration sets: the recorded inputs of a layer as a torch `Dataset`, and loading them from disk.

A set lives in memory or in a directory (see :mod:`hfquant.calibration.storage`); both have the same interface.
"""

from __future__ import annotations

import itertools
import logging
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from hfquant.calibration import files, storage
from hfquant.calibration.recorder import Recording
from hfquant.calibration.storage import CalibSetError, ChunkFile, Cursor, Index
from hfquant.console import counted

logger = logging.getLogger(__name__)

# Number of most recently used chunks from disk to keep in memory.
_CACHED_CHUNKS = 2


class BaseCalibSet(Dataset):
    """Calibration samples, each the arguments of one call of the recorded layer.

    A sample is a tuple of positional arguments or a dict of keyword arguments, on the CPU. :func:`hfquant.quantize`
    accepts the set itself or its loader. Samples are copies: writing to one does not change the set.

    Args:
        chunks: the samples, in order: recordings in memory, chunks on disk, or both.
        provenance: where they come from, as a JSON-serializable mapping.
    """

    def __init__(self, chunks: Sequence[Recording | ChunkFile], *, provenance: Mapping[str, Any] | None = None) -> None:
        self.chunks = list(chunks)
        self.provenance = dict(provenance or {})
        self._ends = list(itertools.accumulate(map(len, self.chunks)))
        self._cache: OrderedDict[int, Recording] = OrderedDict()

    @classmethod
    def from_samples(cls, samples: Iterable[Any]) -> BaseCalibSet:
        """Return an in-memory set of the given samples: tensors, tuples or dicts.

        Raises:
            TypeError: a sample holds something that cannot be stored.
        """
        recording = Recording()
        for i, sample in enumerate(samples):
            recording.add(sample, f"sample {i}")
        return cls([recording])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        """Return sample ``index``, counted from the end when negative.

        Raises:
            IndexError: there is no such sample.
            FileNotFoundError: its chunk is missing.
            CalibSetError: its chunk is damaged.
        """
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, position)
        chunk, source = self._chunk(number), self.chunks[number]
        try:
            return chunk[position - (self._ends[number] - len(chunk))]
        except (ValueError, RecursionError) as error:
            raise CalibSetError(f"{getattr(source, 'path', 'calibration set')}: sample {index}: {error}") from error

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def _chunk(self, number: int) -> Recording:
        source = self.chunks[number]
        if isinstance(source, Recording):
            return source
        if number not in self._cache:
            while len(self._cache) >= _CACHED_CHUNKS:
                self._cache.popitem(last=False)
            self._cache[number] = source.load()
        self._cache.move_to_end(number)
        return self._cache[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}  # a DataLoader worker reads its own chunks

    def save(self, dump_path: str | os.PathLike[str], chunk_size: int = 400, compress: bool = True) -> BaseCalibSet:
        """Write the set to a new or empty directory and return the stored set.

        Raises:
            FileExistsError: the directory already holds a set, or shards of one.
        """
        directory = Path(dump_path)
        directory.mkdir(parents=True, exist_ok=True)
        with files.exclusive(directory):
            if storage.read_index(directory) is not None or storage.shards(directory):
                raise FileExistsError(f"{directory} already holds a calibration set; choose another path")
            index = Index(chunk_size=chunk_size, compress=compress, provenance=self.provenance)
            writer = storage.Writer(directory, index)
            for number, end in enumerate(self._ends):
                chunk = self._chunk(number)
                for position in range(len(chunk)):
                    writer.add(chunk, position, Cursor(taken=end - len(chunk) + position + 1))
            writer.finish(Cursor(taken=len(self)))
        return open_stored(directory, index)

    def get_dataloader(self, batch_size: int = 1, shuffle: bool = False, *, seed: int = 0, **kwargs: Any) -> DataLoader:
        """Return a loader whose batches are lists of ``batch_size`` samples, in the same order on every pass.

        A sample that is a bare tensor or array is returned as a 1-tuple, since a list of tensors means one sample.

        Args:
            batch_size: samples per batch.
            shuffle: shuffle by ``seed``: first the chunks, then the samples within each pair of chunks, so that each
                chunk is read only once.
            seed: seed of the shuffle.
            **kwargs: further arguments of `torch.utils.data.DataLoader`.
        """
        kwargs.setdefault("collate_fn", _as_batch)
        if shuffle:
            kwargs["sampler"] = _ChunkwiseShuffle([len(chunk) for chunk in self.chunks], seed)
        # Without its own generator, a loader would draw from the global one, which belongs to the caller.
        kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
        return DataLoader(self, batch_size=batch_size, **kwargs)


def _as_batch(samples: list[Any]) -> list[Any]:
    return [(sample,) if isinstance(sample, (torch.Tensor, np.ndarray)) else sample for sample in samples]


class _ChunkwiseShuffle(Sampler[int]):
    """A random order that only mixes samples of a few chunks at a time."""

    def __init__(self, lengths: Sequence[int], seed: int) -> None:
        self.lengths, self.seed = lengths, seed

    def __len__(self) -> int:
        return sum(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        starts = [0, *itertools.accumulate(self.lengths)]
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for i in range(0, len(order), _CACHED_CHUNKS):
            group = [p for c in order[i : i + _CACHED_CHUNKS] for p in range(starts[c], starts[c + 1])]
            yield from (group[j] for j in torch.randperm(len(group), generator=generator).tolist())


def load_calibrate_set(dump_path: str | os.PathLike[str], compress: bool = True) -> BaseCalibSet | None:
    """Open a calibration set on disk. A chunk is read when one of its samples is accessed.

    Args:
        dump_path: directory of the set, or of the shards that several processes wrote.
        compress: whether the caller expects compressed chunks; the index takes precedence.

    Returns:
        The set, or None if there is none or it is unfinished (:func:`generate_calibrate_set` continues it).

    Raises:
        FileNotFoundError: a chunk or a shard is missing.
        CalibSetError: the index or a chunk is damaged, truncated, not a regular file, or not from a calibration set.
    """
    directory = Path(dump_path)
    shards = storage.shards(directory)
    if shards:
        return _load_shards(directory, shards)
    index = storage.read_index(directory)
    if index is None:
        return None
    if not index.complete:
        logger.warning(
            "%s is unfinished (%s so far): call generate_calibrate_set again to continue",
            dump_path,
            counted(index.length, "sample"),
        )
        return None
    if index.compress != compress:
        logger.info("%s is stored %s compression", directory, "with" if index.compress else "without")
    return open_stored(directory, index)


def open_stored(directory: Path, index: Index) -> BaseCalibSet:
    """Return the set that an index describes, after checking that its chunks exist and have the right size."""
    return BaseCalibSet(storage.chunk_files(directory, index), provenance=index.provenance)


def _load_shards(directory: Path, shards: list[Path]) -> BaseCalibSet | None:
    size = int(shards[0].name[-5:])
    expected = [directory / storage.shard_name(i, size) for i in range(size)]
    if missing := sorted(set(expected) - set(shards)):
        raise FileNotFoundError(f"{missing[0]}, a shard of this calibration set, is missing")
    if len(expected) != len(shards):
        raise CalibSetError(f"{directory} mixes the shards of different sets: {[path.name for path in shards]}")
    parts = [load_calibrate_set(path) for path in shards]
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        return None
    return BaseCalibSet([chunk for part in whole for chunk in part.chunks], provenance=whole[0].provenance)
