"""Collect the statistics of some layers' inputs in one pass over the calibration data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfquant.calibration.batches import CalibrationError, device_of, evaluating, forward, samples
from hfquant.console import progress_bar
from hfquant.experts import UnfusedExperts
from hfquant.memory import release_free_memory
from hfquant.nn.kinds import kind_of
from hfquant.statistics import Collector, LayerStats


class _AllSeen(Exception):
    """Every observed layer has run, so the rest of the forward is not needed."""


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    data: Iterable[Any],
    needs: Mapping[str, Collection[str]] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    stop_early: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, LayerStats]:
    """Run ``model`` over the data once and collect the statistics of the inputs of ``layers``.

    A layer's kind defines the rows of its input (:mod:`hfquant.nn.kinds`). Rows that a sample's 2-D
    ``attention_mask`` masks out (padding) do not count.

    Args:
        model: run as is, in eval mode.
        layers: name -> module (of ``model``).
        data: batches, iterated once.
        needs: name -> statistics that it needs beyond those always collected; default: none.
        options: keyword arguments to add to a sample of keyword arguments that lacks them.
        stop_early: stop each forward once all ``layers`` have run.
        shard: (rank, size): of every ``size`` batches, only the one at index ``rank`` is run.

    Returns:
        name -> statistics; layers that never ran (or saw no rows) are missing.

    Raises:
        CalibrationError: NaN or Inf reached a layer, or a sample cannot be used.
    """
    collector = Collector(needs or dict.fromkeys(layers, ()))
    device = device_of(model)
    mask: Tensor | None = None
    batch = 0
    seen: set[str] = set()

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        kind = kind_of(module)
        assert kind is not None

        def see(x: Tensor) -> None:
            rows, left_out = kind.rows(module, x, collector.seed)
            if bad := collector.add(name, rows, _counted(rows, mask), left_out):
                raise CalibrationError(
                    f"layer {name!r}: {bad} of {rows.numel()} inputs are NaN or Inf in calibration batch {batch}"
                )
            seen.add(name)
            if stop_early and len(seen) == len(layers):
                raise _AllSeen

        return kind.watch(module, see)

    experts = [module for module in model.modules() if isinstance(module, UnfusedExperts)]
    handles = [watch(n, m) for n, m in layers.items()]
    try:
        with evaluating(model):
            for batch, number, sample in _share(data, *shard):
                mask = _padding_mask(sample, device)
                for module in experts:
                    module.real = mask
                seen.clear()
                collector.start(batch + 1_000_003 * number)
                with suppress(_AllSeen):
                    forward(model, sample, options)
    finally:
        for handle in handles:
            handle.remove()
        for module in experts:
            module.real = None
    return collector.stats


def _share(data: Iterable[Any], rank: int, size: int) -> Iterator[tuple[int, int, Any]]:
    """Yield (batch index, index in the batch, sample) for one process's share of the batches."""
    for index, batch in enumerate(progress_bar(data, "calibrating", shown=rank == 0)):
        if index % size == rank:
            for number, sample in enumerate(samples(batch)):
                yield index, number, sample
            release_free_memory()


def _counted(rows: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return which rows [batch, tokens, ..., in] or [batch * tokens, in] are not padding; None if all or unknown."""
    if mask is None or rows.dim() < 2:
        return None
    if rows.dim() == 2:
        return mask.flatten() if len(rows) == mask.numel() else None
    return mask if rows.shape[:2] == mask.shape else None


def _padding_mask(sample: Any, device: torch.device | str | int) -> Tensor | None:
    """Return which tokens of a sample are not padding, [batch, tokens] bool; None if there is no padding."""
    mask = sample.get("attention_mask") if isinstance(sample, Mapping) else None
    padded = isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask == 0).any())
    return (mask != 0).to(device) if padded and mask is not None else None
