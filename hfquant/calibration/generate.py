"""Generate a calibration set: run the sampler over the data, store what it records, resume interrupted runs."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from torch import nn

from hfquant.calibration import files, storage
from hfquant.calibration.batches import CalibrationError, length_of
from hfquant.calibration.calibset import BaseCalibSet, load_calibrate_set, open_stored
from hfquant.calibration.provenance import differences, provenance
from hfquant.calibration.recorder import Recording, Target, find_layer
from hfquant.calibration.samplers import BaseSampler, seeded
from hfquant.calibration.sources import is_source
from hfquant.calibration.storage import CalibSetError, Cursor, Index
from hfquant.calibration.streams import calibration_batches
from hfquant.console import counted, progress_bar
from hfquant.digests import update
from hfquant.distributed import processes

logger = logging.getLogger(__name__)


def generate_calibrate_set(
    model: Any,
    sampler: BaseSampler,
    sample_dataloader: Iterable[Any],
    calib_layer: nn.Module | str,
    dump_path: str | os.PathLike[str] | None = None,
    chunk_size: int = 400,
    compress: bool = True,
    **kwargs: Any,
) -> BaseCalibSet:
    """Run a pipeline or model over data and collect the inputs of one layer.

    With `dump_path`, calling this again with the same arguments resumes an interrupted run where it stopped and
    produces the same files, byte for byte; a finished set is opened after reading the data once, without running the
    model. Both require data in the same order on every run. Shuffling by torch's global random state satisfies this (it
    is seeded from the sampler's seed); shuffling by Python's or numpy's does not. A source that has changed is
    detected.

    Args:
        model: A diffusers pipeline or a torch module; its state is restored afterwards.
        sampler: chooses the timesteps to keep and runs the model.
        sample_dataloader: inputs of the pipeline or model. Each batch is a mapping of keyword arguments, a tuple of
            positional ones, a list of these, or the single positional argument (a list of prompts, a tensor).
            Alternatively a source of batches: a dict naming a dataset, a `datasets` object or a path (see
            :func:`calibration_batches`).
        calib_layer: layer whose inputs are collected, or its name ("transformer", "unet.mid_block", ...).
        dump_path: directory to write to, empty or with this set, unfinished or not; None keeps the set in memory.
        chunk_size: samples per stored chunk; generation holds at most one chunk in memory.
        compress: compress chunks with zstd.
        **kwargs: arguments of the pipeline's or model's call (guidance_scale, num_inference_steps, ...).

    Under `accelerate launch`, all processes call this with the same data and share its batches among them; each returns
    the whole set. In memory, it equals the set that a single process makes. With `dump_path`, which all processes must
    be able to read, each process writes a shard and the samples are ordered by shard.

    Raises:
        TypeError: `model` is neither a pipeline nor a module, or the layer is called with something that cannot be
            stored.
        ValueError: unknown layer, bad argument, or a `generator` (seed the sampler instead).
        CalibrationError: no data, or the layer never ran.
        CalibSetError: `dump_path` holds a different set, one of other data, or a damaged one.
        FileExistsError: `dump_path` holds files that are not of a set.
        RuntimeError: generation failed in another process.
    """
    with processes() as group:
        shard = group.rank, group.size
        with group.together():
            made = generate_shard(
                model, sampler, sample_dataloader, calib_layer, dump_path, chunk_size, compress, kwargs, shard
            )
        if group.size == 1:
            return made
        with group.together():
            whole = None if dump_path is None else load_calibrate_set(dump_path)
        if whole is not None:
            return whole
        # Each process has one recording per batch; merge them in batch order.
        everything, mine = Recording(), [chunk for chunk in made.chunks if isinstance(chunk, Recording)]
        for turn in itertools.zip_longest(*group.gather(mine), fillvalue=Recording()):
            for recording in turn:
                for position in range(len(recording)):
                    everything.take(recording, position)
        return BaseCalibSet([everything], provenance={**made.provenance, "shard": [0, 1]})


def generate_shard(
    model: Any,
    sampler: BaseSampler,
    sample_dataloader: Iterable[Any],
    calib_layer: nn.Module | str,
    dump_path: str | os.PathLike[str] | None,
    chunk_size: int,
    compress: bool,
    call_kwargs: Mapping[str, Any],
    shard: tuple[int, int] = (0, 1),
) -> BaseCalibSet:
    """Run :func:`generate_calibrate_set` as process `shard[0]` of `shard[1]`, which takes every `shard[1]`-th batch.

    Batches are numbered before they are distributed, and a batch's noise depends on its number, so all shards together
    hold the same samples as a single process would record.
    """
    if not isinstance(sampler, BaseSampler):
        raise TypeError(f"sampler must be a BaseSampler, got {type(sampler).__name__}")
    if type(chunk_size) is not int or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}")
    if is_source(sample_dataloader):
        sample_dataloader = calibration_batches(sample_dataloader, model=model)
    if call_kwargs.get("generator") is not None:
        raise ValueError(
            "generator: not supported, because the noise is drawn from the sampler's seed to make runs repeatable; "
            "set that seed instead"
        )
    target = find_layer(model, calib_layer)
    origin = provenance(model, target, sampler, call_kwargs, shard)
    source = _Source(sample_dataloader, sampler.seed)

    def runs(start: Cursor) -> Iterator[tuple[Recording, int, Cursor]]:
        return _samples(model, sampler, source, target, call_kwargs, shard, start)

    if dump_path is None:
        # A single recording stores tensors shared by all batches once; several processes need one per batch to merge.
        collected: dict[int, Recording] = {}
        for recording, position, cursor in runs(Cursor()):
            collected.setdefault(cursor.batch if shard[1] > 1 else 0, Recording()).take(recording, position)
        return BaseCalibSet(list(collected.values()) or [Recording()], provenance=origin)

    storage.check_unmixed(Path(dump_path))
    if others := storage.writers(Path(dump_path)) - {shard[1]}:
        raise CalibSetError(
            f"{dump_path} was begun by {min(others)} process(es), this run has {shard[1]}: use the same "
            "number, or choose another path"
        )
    directory = Path(dump_path) if shard[1] == 1 else Path(dump_path) / storage.shard_name(*shard)
    directory.mkdir(parents=True, exist_ok=True)
    with files.exclusive(directory):
        index = _resume(directory, Index(chunk_size=chunk_size, compress=compress, provenance=origin))
        if index.complete:
            _check_source(directory, source, index.cursor)
        else:
            writer = storage.Writer(directory, index)
            for recording, position, cursor in runs(index.cursor):
                writer.add(recording, position, cursor)
            writer.finish(Cursor(batch=source.count, source=source.digest.hexdigest()))
        return open_stored(directory, index)


def _resume(directory: Path, wanted: Index) -> Index:
    """Return the index to continue: the stored one if it matches ``wanted``, else a new one."""
    stored = storage.read_index(directory)
    if stored is None or not (stored.complete or stored.length):  # also a run that died before its first chunk
        storage.write_index(directory, wanted)
        return wanted
    reasons = differences(stored.provenance, wanted.provenance) + [
        f"{name} is {getattr(stored, name)!r} there, {getattr(wanted, name)!r} here"
        for name in ("chunk_size", "compress")
        if getattr(stored, name) != getattr(wanted, name)
    ]
    if reasons:
        raise CalibSetError(f"{directory} holds another calibration set ({'; '.join(reasons)}): choose another path")
    storage.chunk_files(directory, stored)
    if stored.complete:
        logger.info("%s is complete with %s: nothing to generate", directory, counted(stored.length, "sample"))
    elif stored.length:
        samples = counted(stored.length, "sample")
        logger.info("%s has %s: continuing from batch %d", directory, samples, stored.cursor.batch)
    if stored.provenance.get("versions") != wanted.provenance["versions"]:
        logger.warning("%s was begun with other versions: %s", directory, stored.provenance.get("versions"))
    return stored


class _Source:
    """The batches of a loader, for one pass, with the number and the digest of those read so far."""

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        self.loader, self.seed = loader, seed
        self.count, self.digest = 0, xxhash.xxh3_128()

    def __iter__(self) -> Iterator[Any]:
        with seeded(self.seed):
            batches = iter(self.loader)
        while True:
            # A loader that shuffles by the global random state must shuffle the same way when the run is repeated.
            with seeded(self.seed, self.count):
                batch = next(batches, batches)
            if batch is batches:
                return
            update(self.digest, batch)
            self.count += 1
            yield batch


def _check_source(directory: Path, source: _Source, end: Cursor) -> None:
    """Raise CalibSetError if a finished set was recorded from other data. Read at most one batch more than it did."""
    if not end.source:  # saved from memory
        return
    batches = iter(source)
    for _ in zip(range(end.batch + (end.taken > 0)), batches, strict=False):
        pass
    # Older sets have the position of their last sample, after which there may be batches that gave none.
    longer = not end.taken and next(batches, batches) is not batches
    if longer or source.digest.hexdigest() != end.source:
        raise CalibSetError(f"{directory} was recorded from other data: choose another path")


def _samples(
    model: Any,
    sampler: BaseSampler,
    source: _Source,
    target: Target,
    call_kwargs: Mapping[str, Any],
    shard: tuple[int, int],
    start: Cursor,
) -> Iterator[tuple[Recording, int, Cursor]]:
    """Yield the samples after `start`: a recording, the sample's position in it, and the cursor after it."""
    rank, world_size = shard
    steps, found = None, start.taken > 0
    calls: list[None] = []
    ran = False
    progress = progress_bar(desc=f"Sampling {type(sampler).__name__}", unit="batch", total=length_of(source.loader))
    try:
        for number, batch in enumerate(source):
            progress.update()
            if number % world_size != rank or number < start.batch:
                continue
            skip = start.taken if number == start.batch else 0
            digest = source.digest.hexdigest()
            if skip and digest != start.source:
                raise CalibSetError(
                    "sample_dataloader yields different data than when this set was begun: choose another path"
                )
            with _without_token_cache(target.component), _counted(target.layer, calls):
                recording, steps = sampler.sample(model, batch, target.layer, call_kwargs, index=number, steps=steps)
            ran, found = True, found or len(recording) > 0
            for position in range(skip, len(recording)):
                yield recording, position, Cursor(batch=number, taken=position + 1, source=digest)
    finally:
        progress.close()
    if start.taken and source.count <= start.batch:
        raise CalibSetError(f"sample_dataloader ends after {source.count} batches, fewer than when this set was begun")
    if ran and not found:
        what = target.name or type(target.layer).__name__
        if not calls:
            raise CalibrationError(
                f"{what}: the run never calls its forward. Either it has no steps (a low strength), or it calls other "
                "methods, which are not recorded; then, use a config that needs no data"
            )
        raise CalibrationError(f"{what} was never called with a timestep that is kept: nothing was recorded")
    if not source.count:
        raise CalibrationError("sample_dataloader is empty: nothing was recorded")


@contextmanager
def _counted(layer: nn.Module, calls: list[None]) -> Iterator[None]:
    """Within this context, append an item to ``calls`` at each call of a layer."""
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _without_token_cache(model: nn.Module) -> Iterator[None]:
    """Within this context, a language model caches no keys and values, unless a call asks for it.

    A cache cannot be recorded, and calls with one have only the last token. Pipelines leave this to the model's config.
    """
    names = ("config", "generation_config")
    configs: list[Any] = [getattr(module, name, None) for module in model.modules() for name in names]
    caching = [(config, config.use_cache) for config in configs if getattr(config, "use_cache", False) is not False]
    try:
        for config, _ in caching:
            config.use_cache = False
        yield
    finally:
        for config, use_cache in caching:
            config.use_cache = use_cache
