"""What calibration collects of each layer's inputs, in one pass: channel ranges, the Hessian, a sample of rows.

Statistics of two sets of rows merge into those of their union, whatever the order, so several processes (or several
passes) give what one gives.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfquant.calibration.batches import (
    CalibrationError,
    batches,
    device_of,
    evaluating,
    options_for,
    release_free_memory,
    run,
    samples,
)

#: Rows kept of each layer's input, for the alpha search and the error report.
SAMPLE_ROWS = 192
FOLDS = 2


@dataclass(frozen=True)
class LayerStats:
    """Statistics of the input of one linear, over all rows (tokens) seen.

    Rows are drawn by priority sampling (Duffield, Lund, Thorup: Priority sampling for estimation of arbitrary subset
    sums, J. ACM 54, 2007) with their squared norm as weight: a language model's first token can carry most of a layer's
    energy, and a uniform sample of 200 rows out of 16,000 would hardly ever hold one.

    Attributes:
        fold_low, fold_high: [2, in] float32, smallest and largest value of each channel over either half of the rows
            (drawn by chance); infinities where a half is empty.
        count: how many rows were seen.
        power: [in] float32, sum of squares of each channel (the Hessian's diagonal).
        sample: [<= SAMPLE_ROWS, in] float32, rows drawn.
        keys: [<= SAMPLE_ROWS] float64, their draw by their weight; the smallest keys of a union are its sample.
        fold: [<= SAMPLE_ROWS] bool, the half that each row is in.
        hessian: [in, in] float32, ``sum x x^T`` over the rows; None where nothing asked for it.
    """

    fold_low: Tensor
    fold_high: Tensor
    count: int
    power: Tensor
    sample: Tensor
    keys: Tensor
    fold: Tensor
    hessian: Tensor | None = None

    @classmethod
    def empty(cls, features: int, hessian: bool = False) -> LayerStats:
        """Statistics of no rows: merging them changes nothing."""
        return cls(
            torch.full((FOLDS, features), torch.inf),
            torch.full((FOLDS, features), -torch.inf),
            0,
            torch.zeros(features),
            torch.zeros(0, features),
            torch.zeros(0, dtype=torch.float64),
            torch.zeros(0, dtype=torch.bool),
            torch.zeros(features, features) if hessian else None,
        )

    def merge(self, other: LayerStats) -> LayerStats:
        """Statistics of both sets of rows."""
        both = LayerStats(
            torch.minimum(self.fold_low, other.fold_low),
            torch.maximum(self.fold_high, other.fold_high),
            self.count + other.count,
            self.power + other.power,
            torch.cat([self.sample, other.sample]),
            torch.cat([self.keys, other.keys]),
            torch.cat([self.fold, other.fold]),
            None if self.hessian is None or other.hessian is None else self.hessian + other.hessian,
        )
        return both.trimmed()

    def trimmed(self) -> LayerStats:
        """The same with its sample in order, cut to :data:`SAMPLE_ROWS`."""
        kept = self.keys.argsort(stable=True)[:SAMPLE_ROWS]
        sample = self.sample[kept.to(self.sample.device)]
        return replace(self, sample=sample, keys=self.keys[kept], fold=self.fold[kept])

    def to(self, device: torch.device) -> LayerStats:
        """The same on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @property
    def low(self) -> Tensor:
        """[in] float32, smallest value of each channel."""
        return self.fold_low.amin(0)

    @property
    def high(self) -> Tensor:
        """[in] float32, largest value of each channel."""
        return self.fold_high.amax(0)

    @property
    def row_weights(self) -> Tensor:
        """[rows of the sample] float32: how many rows each stands for, so that weighted sums estimate those of all."""
        weights = self.sample.new_ones(len(self.keys))
        if self.count > len(self.keys):
            threshold = self.keys.argmax()
            weights = (1 / (self.keys[threshold] * _energy(self.sample))).clamp(min=1).to(weights)
            weights[threshold] = 0
        return weights

    def halves(self) -> list[tuple[LayerStats, Tensor]]:
        """The statistics with one half's ranges, and which sampled rows the other half has, for either half.

        What is chosen on rows that set a range themselves never sees a value clipped. Where a half is empty there is
        but one set: all of it.
        """
        if not self.fold_low.isfinite().all():
            return [(self, torch.ones_like(self.fold))]
        return [
            (
                replace(self, fold_low=self.fold_low[i : i + 1], fold_high=self.fold_high[i : i + 1]),
                self.fold != bool(i),
            )
            for i in range(FOLDS)
        ]

    @property
    def amax(self) -> Tensor:
        """[in] float32, largest magnitude of each channel."""
        return torch.maximum(-self.low, self.high)


def layer_stats(x: Tensor, draw: Tensor, hessian: bool = False) -> LayerStats:
    """Statistics of inputs ``x`` [rows, in] (rows >= 1), with a number in [0, 1) drawn for each row [rows] float64."""
    x = x.float()
    folds = (draw < 0.5).long()
    ranges = [x[(folds == i).to(x.device)] for i in range(FOLDS)]
    second = x.T @ x if hessian else None
    everything = LayerStats(
        torch.stack([r.amin(0) if len(r) else torch.full_like(x[0], torch.inf) for r in ranges]),
        torch.stack([r.amax(0) if len(r) else torch.full_like(x[0], -torch.inf) for r in ranges]),
        len(x),
        x.square().sum(0) if second is None else second.diagonal().clone(),
        x,
        draw / _energy(x),
        folds.bool(),
        second,
    )
    return everything.trimmed()


def _energy(x: Tensor) -> Tensor:
    """Squared norm of each row, [rows] float64 on the CPU, positive."""
    return x.square().sum(1).cpu().double().clamp(min=torch.finfo(torch.float32).tiny)


def stats_bytes(features: int, hessian: bool) -> int:
    """Memory that the statistics of a layer with ``features`` inputs take at most."""
    return 4 * features * (2 * FOLDS + 1 + SAMPLE_ROWS + (features if hessian else 0))


class _AllSeen(Exception):
    """Every observed layer has run: the rest of the forward is of no interest."""


class _Measured(NamedTuple):
    """Statistics of one tensor: q, k and v eat the same, which is measured once."""

    of: weakref.ref[Tensor]
    version: int
    stats: LayerStats
    #: By the id of what a layer had before, that and both together: layers of one history share their statistics.
    merged: dict[int, tuple[LayerStats | None, LayerStats]]


class Observer:
    """Collects the statistics of some layers while batches run through the model."""

    def __init__(self, hessians: Mapping[str, bool], stop_early: bool = False) -> None:
        self.hessians = hessians
        self.stop_early = stop_early
        self.stats: dict[str, LayerStats] = {}
        self.batch = -1
        self._mask: Tensor | None = None
        self._ran: set[str] = set()
        self._measured: dict[tuple[int, bool], _Measured] = {}
        self._seed = 0
        self._draws: dict[int, Tensor] = {}

    def start(self, batch: int, number: int, sample: Any, device: torch.device | str | int) -> None:
        """Before a sample's forward.

        Args:
            batch, number: of the sample in the batch; they seed the draw of its rows.
            sample: its attention mask says which rows are padding.
            device: of the mask.
        """
        # The CPU's generator takes 32 bits of a seed.
        self.batch, self._seed = batch, (batch + 1_000_003 * number) % 2**32
        self._draws.clear()
        mask = sample.get("attention_mask") if isinstance(sample, Mapping) else None
        padded = isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask == 0).any())
        self._mask = (mask != 0).to(device) if padded and mask is not None else None
        self._ran.clear()
        self._measured.clear()

    def see(self, name: str, x: Tensor) -> None:
        """Take in one input of layer ``name``.

        Raises:
            CalibrationError: ``x`` has NaN or Inf.
        """
        measured = self._measure(name, x)
        if measured is not None:
            old = self.stats.get(name)
            if id(old) not in measured.merged:
                measured.merged[id(old)] = old, measured.stats if old is None else old.merge(measured.stats)
            self.stats[name] = measured.merged[id(old)][1]
        self._ran.add(name)
        if self.stop_early and len(self._ran) == len(self.hessians):
            raise _AllSeen

    def _measure(self, name: str, x: Tensor) -> _Measured | None:
        key = id(x), self.hessians[name]
        known = self._measured.get(key)
        if known is not None and known.of() is x and known.version == x._version:
            return known
        flat = self._mask is not None and x.shape[:2] == self._mask.shape
        rows = x[self._mask] if flat else x.reshape(-1, x.shape[-1])
        if not rows.shape[0]:
            return None
        new = layer_stats(rows, self._draw(len(rows)), self.hessians[name])
        if not (new.low.isfinite().all() and new.high.isfinite().all()):
            raise CalibrationError(
                f"layer {name!r}: {int((~rows.isfinite()).sum())} of {rows.numel()} inputs are NaN or Inf "
                f"in calibration batch {self.batch}"
            )
        # Forgotten with the tensor: kept to the end of the batch, those of all layers would add up.
        self._measured[key] = _Measured(weakref.ref(x, lambda _: self._measured.pop(key, None)), x._version, new, {})
        return self._measured[key]

    def _draw(self, rows: int) -> Tensor:
        if rows not in self._draws:
            generator = torch.Generator().manual_seed(self._seed)
            self._draws[rows] = torch.rand(rows, dtype=torch.float64, generator=generator)
        return self._draws[rows]


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    loader: Any,
    hessians: Mapping[str, bool] | None = None,
    stop_early: bool = False,
    description: str = "calibrating",
    shard: tuple[int, int] = (0, 1),
) -> dict[str, LayerStats]:
    """Run ``model`` over the data once and collect the statistics of the inputs of ``layers``.

    Rows that a batch's 2-D ``attention_mask`` masks out (padding) are not counted.

    Args:
        model: run as it is, in eval mode.
        layers: name -> module (of ``model``).
        loader: batches: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of these.
        hessians: name -> whether its Hessian is wanted; default: none.
        stop_early: cut each forward short once all ``layers`` have run.
        description: of the progress bar.
        shard: (rank, size): of every ``size`` batches only number ``rank`` is run.

    Returns:
        name -> statistics; layers that never ran (or saw no rows) are missing.

    Raises:
        CalibrationError: NaN or Inf reached a layer, or the loader is empty.
        TypeError: unusable data.
    """
    observer = Observer(hessians or dict.fromkeys(layers, False), stop_early)
    device = device_of(model)

    def hook(name: str) -> Any:
        def pre_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observer.see(name, args[0] if args else kwargs["input"])

        return pre_forward

    rank, size = shard
    options = options_for(model, layers.values())
    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in layers.items()]
    try:
        with evaluating(model):
            for index, batch in enumerate(tqdm(batches(loader), description, disable=rank > 0)):
                if index % size != rank:
                    continue
                for number, sample in enumerate(samples(batch)):
                    observer.start(index, number, sample, device)
                    with suppress(_AllSeen):
                        run(model, sample, options)
                release_free_memory()
    finally:
        for handle in handles:
            handle.remove()
    return observer.stats
