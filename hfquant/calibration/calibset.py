"""Calibration sets: the recorded inputs of a layer as a torch `Dataset`, and how to load one.

A set lives in memory or in a directory (see :mod:`hfquant.calibration.storage`); the dataset is the same.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from hfquant.calibration import storage
from hfquant.calibration.recorder import Recording
from hfquant.calibration.storage import CalibSetError, ChunkFile, Cursor, Index

logger = logging.getLogger(__name__)


class BaseCalibSet(Dataset):
    """Calibration samples, each the arguments of one call of the recorded layer.

    A sample is a tuple of positional arguments or a dict of keyword arguments, on the CPU; :func:`hfquant.quantize`
    takes the set itself, or its loader. Samples are copies: writing to one does not change the set.

    Args:
        chunks: The samples, in order: recordings in memory, chunks on disk, or both.
        provenance: Where they come from, as JSON.
        cached_chunks: Chunks from the disk that are kept in memory, the last used ones.
    """

    def __init__(
        self,
        chunks: Sequence[Recording | ChunkFile],
        *,
        provenance: Mapping[str, Any] | None = None,
        cached_chunks: int = 2,
    ) -> None:
        if cached_chunks < 1:
            raise ValueError(f"cached_chunks must be at least 1, got {cached_chunks}.")
        self.chunks = list(chunks)
        self.provenance = dict(provenance or {})
        self.cached_chunks = cached_chunks
        self._ends = list(itertools.accumulate(map(len, self.chunks)))
        self._cache: OrderedDict[int, Recording] = OrderedDict()

    @classmethod
    def from_samples(cls, samples: Iterable[Any]) -> BaseCalibSet:
        """Makes a set in memory from samples at hand: tensors, tuples or dicts.

        Raises:
            TypeError: A sample holds something that cannot be stored.
        """
        recording = Recording()
        for i, sample in enumerate(samples):
            recording.add(sample, f"sample {i}")
        return cls([recording])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        """Gives sample `index`, counted from the end when negative.

        Raises:
            IndexError: There is no such sample.
            FileNotFoundError: Its chunk is missing.
            CalibSetError: Its chunk is damaged.
        """
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, position)
        chunk = self._chunk(number)
        try:
            return chunk[position - (self._ends[number] - len(chunk))]
        except (ValueError, RecursionError) as error:
            source = self.chunks[number]
            raise CalibSetError(f"{getattr(source, 'path', 'calibration set')}: sample {index}: {error}.") from error

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def _chunk(self, number: int) -> Recording:
        source = self.chunks[number]
        if isinstance(source, Recording):
            return source
        if number not in self._cache:
            while len(self._cache) >= self.cached_chunks:
                self._cache.popitem(last=False)
            self._cache[number] = source.load()
        self._cache.move_to_end(number)
        return self._cache[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}  # a DataLoader worker reads its own

    def verify(self) -> None:
        """Reads everything once.

        Raises:
            FileNotFoundError: A chunk is missing.
            CalibSetError: A chunk is damaged.
        """
        for _ in tqdm(self, desc="Verifying", total=len(self)):
            pass

    def save(self, dump_path: str | os.PathLike[str], chunk_size: int = 400, compress: bool = True) -> BaseCalibSet:
        """Writes the set to a new or empty directory and gives the set that is there.

        Raises:
            FileExistsError: A set is there already.
        """
        directory = Path(dump_path)
        directory.mkdir(parents=True, exist_ok=True)
        with storage.exclusive(directory):
            if storage.read_index(directory) is not None:
                raise FileExistsError(f"{directory} holds a calibration set already.")
            index = Index(chunk_size=chunk_size, compress=compress, provenance=self.provenance)
            writer = storage.Writer(directory, index)
            for number, end in enumerate(self._ends):
                chunk = self._chunk(number)
                for position in range(len(chunk)):
                    writer.add(chunk, position, Cursor(taken=end - len(chunk) + position + 1))
            writer.finish(Cursor(taken=len(self)))
        return open_stored(directory, index)

    def get_dataloader(
        self, batch_size: int = 1, shuffle: bool = False, *, collate: bool = False, seed: int = 0, **kwargs: Any
    ) -> DataLoader:
        """Makes a loader whose batches are lists of `batch_size` samples, in the same order at every walk.

        Args:
            batch_size: Samples a batch.
            shuffle: Walk in an order drawn from `seed`: chunks are shuffled, then the samples of `cached_chunks` chunks
                at a time, so each chunk is read once.
            collate: Join the samples of a batch into one, along the first dimension, where their shapes agree: tensors
                whose first dimension is the batch's are concatenated, all else must be equal. A batch where it is not
                stays a list.
            seed: Seed of the order.
            **kwargs: Further arguments of `torch.utils.data.DataLoader`.
        """
        kwargs.setdefault("collate_fn", join if collate else as_list)
        if shuffle:
            kwargs["sampler"] = _ChunkwiseShuffle([len(chunk) for chunk in self.chunks], self.cached_chunks, seed)
        # Without a generator of its own a loader draws from the global one, which is the caller's.
        kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
        return DataLoader(self, batch_size=batch_size, **kwargs)


class _ChunkwiseShuffle(Sampler[int]):
    """A random order that stays within a few chunks at a time."""

    def __init__(self, lengths: Sequence[int], window: int, seed: int) -> None:
        self.lengths, self.window, self.seed = lengths, window, seed

    def __len__(self) -> int:
        return sum(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        starts = [0, *itertools.accumulate(self.lengths)]
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for i in range(0, len(order), self.window):
            group = [position for c in order[i : i + self.window] for position in range(starts[c], starts[c + 1])]
            yield from (group[j] for j in torch.randperm(len(group), generator=generator).tolist())


def as_list(samples: list[Any]) -> list[Any]:
    """Return samples as a batch: in a list, a bare tensor travels as a 1-tuple (a list of tensors is one sample)."""
    return [(sample,) if isinstance(sample, torch.Tensor) else sample for sample in samples]


def join(samples: list[Any]) -> Any:
    """Joins samples along their batch dimension where their shapes agree; gives the list back where they do not.

    The batch dimension's size is that of the first dimension of a sample's first tensor.
    """
    try:
        return _join(samples, next(_batch_sizes(samples[0]))) if len(samples) > 1 else as_list(samples)
    except (_Mismatch, StopIteration):
        return as_list(samples)


class _Mismatch(Exception):
    pass


def _batch_sizes(sample: Any) -> Iterator[int]:
    if isinstance(sample, torch.Tensor) and sample.ndim:
        yield sample.shape[0]
    elif isinstance(sample, (tuple, list, Mapping)):
        for item in sample.values() if isinstance(sample, Mapping) else sample:
            yield from _batch_sizes(item)


def _join(parts: list[Any], batch: int) -> Any:
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        raise _Mismatch
    if isinstance(first, torch.Tensor):
        if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
            raise _Mismatch
        if first.ndim and first.shape[0] == batch:
            return torch.cat(parts)
        if any(not torch.equal(part, first) for part in parts):
            raise _Mismatch
        return first
    if type(first) is dict:
        if any(part.keys() != first.keys() for part in parts):
            raise _Mismatch
        return {key: _join([part[key] for part in parts], batch) for key in first}
    if type(first) in (list, tuple):
        if any(len(part) != len(first) for part in parts):
            raise _Mismatch
        return type(first)(_join(list(items), batch) for items in zip(*parts, strict=True))
    if not all(isinstance(first, (bool, int, float, str, type(None))) and part == first for part in parts):
        raise _Mismatch
    return first


def load_calibrate_set(dump_path: str | os.PathLike[str], compress: bool = True) -> BaseCalibSet | None:
    """Opens a calibration set on disk. Chunks are read when a sample of theirs is asked for.

    Args:
        dump_path: The set's directory, or one with the shards of several processes.
        compress: Whether the caller believes it to be compressed; what the index says counts.

    Returns:
        The set; None where nothing is stored, or not all of it yet (:func:`generate_calibrate_set` goes on with it).

    Raises:
        FileNotFoundError: A chunk or a shard is missing.
        CalibSetError: The index or a chunk is damaged, cut off, or not from a calibration set.
    """
    directory = Path(dump_path)
    shards = sorted(path for path in directory.glob("shard-*-of-*") if path.is_dir())
    if shards:
        return _load_shards(directory, shards)
    index = storage.read_index(directory)
    if index is None:
        return None
    if not index.complete:
        logger.warning(
            "%s is unfinished (%d samples so far): generate_calibrate_set goes on with it.", directory, index.length
        )
        return None
    if index.compress != compress:
        logger.info("%s is stored %s compression.", directory, "with" if index.compress else "without")
    return open_stored(directory, index)


def open_stored(directory: Path, index: Index) -> BaseCalibSet:
    """The set that an index describes, its chunks checked for presence and size."""
    return BaseCalibSet(storage.chunk_files(directory, index), provenance=index.provenance)


def _load_shards(directory: Path, shards: list[Path]) -> BaseCalibSet | None:
    match = re.fullmatch(r"shard-\d{5}-of-(\d{5})", shards[0].name)
    expected = [directory / storage.shard_name(i, int(match[1])) for i in range(int(match[1]))] if match else []
    if missing := sorted(set(expected) - set(shards)):
        raise FileNotFoundError(f"{missing[0]}, a shard of this calibration set, is missing.")
    if len(expected) != len(shards):
        raise CalibSetError(f"{directory} mixes the shards of different sets: {[path.name for path in shards]}.")
    sets = [load_calibrate_set(path) for path in shards]
    whole = [part for part in sets if part is not None]
    if len(whole) < len(sets):
        return None
    return BaseCalibSet([chunk for part in whole for chunk in part.chunks], provenance=whole[0].provenance)
