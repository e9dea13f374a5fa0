"""Statistics that calibration collects of each layer's inputs: channel ranges, second moments, a sample of rows.

Each statistic is declared once, in :data:`STATISTICS`: its shape, how it is computed from a set of rows, and how the
values of two sets combine into that of their union, in one process or across several. The result does not depend on the
order or the split of the rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from hfquant.formats.rotation import rotated

T = TypeVar("T")

#: Rows kept of each layer's input, for the alpha search and the error report.
SAMPLE_ROWS = 192
HALVES = 2


class Reduction(Enum):
    """How the statistics of two sets of rows combine into that of their union, and the value for no rows."""

    MIN = torch.minimum, torch.inf
    MAX = torch.maximum, -torch.inf
    SUM = torch.add, 0.0

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the statistic of both sets of rows."""
        return self.value[0](a, b)

    @property
    def initial(self) -> float:
        """The statistic of no rows."""
        return float(self.value[1])


class Rows:
    """A set of input rows, and quantities that several statistics need, computed once."""

    def __init__(self, x: Tensor, draw: Tensor, wanted: Collection[str]) -> None:
        self.x, self.draw, self.wanted = x.float(), draw, wanted

    @cached_property
    def second_moment(self) -> Tensor:
        """Sum of x x^T, [in, in]."""
        return self.x.T @ self.x

    @cached_property
    def power(self) -> Tensor:
        """Sum of squares of each channel, [in]."""
        return self.second_moment.diagonal().clone() if "hessian" in self.wanted else self.x.square().sum(0)

    @cached_property
    def halves(self) -> list[Tensor]:
        """The rows of each random half: element i holds those for which ``draw < 0.5`` equals bool(i)."""
        second = (self.draw < 0.5).to(self.x.device)
        return [self.x[~second], self.x[second]]

    def over_halves(self, reduce: Callable[[Tensor], Tensor], empty: float) -> Tensor:
        """Reduce each half, [halves, in]; ``empty`` for a half without rows."""
        return torch.stack([reduce(half) if len(half) else torch.full_like(self.x[0], empty) for half in self.halves])


@dataclass(frozen=True)
class Statistic:
    """One statistic of a layer's inputs.

    Attributes:
        shape: shape of the float32 tensor, given the number of input features.
        reduction: how the values of two sets of rows combine.
        measure: computes the statistic of a set of rows (at least one).
        always: whether it is collected for every layer, or only if a transform or a rounding method needs it.
    """

    shape: Callable[[int], tuple[int, ...]]
    reduction: Reduction
    measure: Callable[[Rows], Tensor]
    always: bool = False


STATISTICS: dict[str, Statistic] = {
    "low": Statistic(
        lambda n: (HALVES, n), Reduction.MIN, lambda r: r.over_halves(lambda x: x.amin(0), torch.inf), always=True
    ),
    "high": Statistic(
        lambda n: (HALVES, n), Reduction.MAX, lambda r: r.over_halves(lambda x: x.amax(0), -torch.inf), always=True
    ),
    "power": Statistic(lambda n: (n,), Reduction.SUM, lambda r: r.power, always=True),
    "hessian": Statistic(lambda n: (n, n), Reduction.SUM, lambda r: r.second_moment),
}


def collected(needs: Collection[str]) -> tuple[str, ...]:
    """Return the names of the statistics to collect if ``needs`` are needed.

    Raises:
        ValueError: there is no such statistic.
    """
    if unknown := set(needs) - STATISTICS.keys():
        raise ValueError(f"unknown statistics {sorted(unknown)}; available: {', '.join(STATISTICS)}")
    return tuple(name for name, statistic in STATISTICS.items() if statistic.always or name in needs)


def stats_bytes(features: int, needs: Collection[str]) -> int:
    """Return the maximum memory in bytes of the statistics of a layer with ``features`` inputs."""
    numbers = sum(torch.Size(STATISTICS[name].shape(features)).numel() for name in collected(needs))
    return 4 * (numbers + SAMPLE_ROWS * features)


def within_budget(items: Iterable[T], size: Callable[[T], int], budget: int) -> Iterator[list[T]]:
    """Yield groups of consecutive items that take at most ``budget`` bytes together; a larger item is on its own."""
    group: list[T] = []
    total = 0
    for item in items:
        takes = size(item)
        if group and total + takes > budget:
            yield group
            group, total = [], 0
        group.append(item)
        total += takes
    if group:
        yield group


@dataclass(frozen=True)
class RowSample:
    """Rows drawn by priority sampling, weighted by their squared norm.

    Duffield, Lund, Thorup: Priority sampling for estimation of arbitrary subset sums, J. ACM 54, 2007. A language
    model's first token can carry most of a layer's energy, and a uniform sample of 200 rows out of 16,000 would hardly
    ever contain one.

    Attributes:
        rows: [<= SAMPLE_ROWS, in] float32.
        keys: [<= SAMPLE_ROWS] float64, random draw divided by weight; the smallest keys of a union form its sample.
        second_half: [<= SAMPLE_ROWS] bool, whether each row belongs to the second half.
    """

    rows: Tensor
    keys: Tensor
    second_half: Tensor

    @classmethod
    def empty(cls, features: int) -> RowSample:
        """Return a sample of no rows."""
        return cls(torch.zeros(0, features), torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool))

    @classmethod
    def draw(cls, x: Tensor, draw: Tensor) -> RowSample:
        """Draw from rows [n, in], given a number in [0, 1) for each, [n] float64."""
        return cls(x, draw / _energy(x), draw < 0.5).trimmed()

    def merge(self, *others: RowSample) -> RowSample:
        """Return the sample of the union."""
        parts = (self, *others)
        joined = (torch.cat([getattr(p, name) for p in parts]) for name in ("rows", "keys", "second_half"))
        return RowSample(*joined).trimmed()

    def trimmed(self) -> RowSample:
        """Return the sample sorted by key, cut to :data:`SAMPLE_ROWS`."""
        kept = self.keys.argsort(stable=True)[:SAMPLE_ROWS]
        return RowSample(self.rows[kept.to(self.rows.device)], self.keys[kept], self.second_half[kept])

    def weights(self, count: int) -> Tensor:
        """Return how many of ``count`` rows each row represents, [rows] float32: weighted sums estimate totals."""
        weights = self.rows.new_ones(len(self.keys))
        if count > len(self.keys):
            threshold = self.keys.argmax()
            weights = (1 / (self.keys[threshold] * _energy(self.rows))).clamp(min=1).to(weights)
            weights[threshold] = 0
        return weights

    def to(self, device: torch.device) -> RowSample:
        """Return the sample on another device; keys and halves stay on the CPU, where they are used."""
        return replace(self, rows=self.rows.to(device))


def _energy(x: Tensor) -> Tensor:
    """Return the squared norm of each row, [rows] float64 on the CPU, positive."""
    return x.square().sum(1).cpu().double().clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class LayerStats:
    """Statistics of the input of one linear, over all rows (tokens) seen.

    Attributes:
        count: how many rows were seen.
        sums: the requested tensors of :data:`STATISTICS`, by name, of the raw input.
        sample: sampled rows.
        divisor: [in]; the properties describe the input divided by it (what a smoothed layer sees).
        rotation: size of the channel blocks that are rotated after the division; 0 for none.
    """

    count: int
    sums: Mapping[str, Tensor]
    sample: RowSample
    divisor: Tensor | None = None
    rotation: int = 0

    @classmethod
    def empty(cls, features: int, needs: Collection[str] = ()) -> LayerStats:
        """Return the statistics of no rows; merging them changes nothing."""
        tables = {name: STATISTICS[name] for name in collected(needs)}
        sums = {name: torch.full(s.shape(features), s.reduction.initial) for name, s in tables.items()}
        return cls(0, sums, RowSample.empty(features))

    @classmethod
    def of(cls, x: Tensor, draw: Tensor, needs: Collection[str] = ()) -> LayerStats:
        """Return the statistics of rows ``x`` [rows, in], at least one, given a number in [0, 1) for each (float64)."""
        names = collected(needs)
        rows = Rows(x, draw, names)
        return cls(len(x), {name: STATISTICS[name].measure(rows) for name in names}, RowSample.draw(rows.x, draw))

    def merge(self, other: LayerStats) -> LayerStats:
        """Return the statistics of both sets of rows."""
        sums = {name: STATISTICS[name].reduction(ours, other.sums[name]) for name, ours in self.sums.items()}
        return LayerStats(self.count + other.count, sums, self.sample.merge(other.sample))

    def widened(self, low: Tensor, high: Tensor) -> LayerStats:
        """Return the statistics with ranges extended by [halves, in] of further rows, which affect nothing else."""
        ranges = {"low": low, "high": high}
        found = {name: STATISTICS[name].reduction(self.sums[name], more) for name, more in ranges.items()}
        return replace(self, sums={**self.sums, **found})

    def to(self, device: torch.device) -> LayerStats:
        """Return the statistics on another device."""
        sums = {k: v.to(device) for k, v in self.sums.items()}
        divisor = None if self.divisor is None else self.divisor.to(device)
        return replace(self, sums=sums, sample=self.sample.to(device), divisor=divisor)

    def divided(self, divisor: Tensor | None) -> LayerStats:
        """Return the statistics of the input divided by ``divisor`` [in] > 0, without a copy."""
        if divisor is None:
            return self
        return replace(self, divisor=divisor if self.divisor is None else self.divisor * divisor)

    def rotated(self, size: int) -> LayerStats:
        """Return the statistics of the input with blocks of ``size`` channels rotated, without a copy.

        Ranges are then taken from the sampled rows.
        """
        return replace(self, rotation=size)

    def _divided(self, values: Tensor) -> Tensor:
        return values if self.divisor is None else values / self.divisor

    @property
    def low(self) -> Tensor:
        """Smallest value of each channel, [in] float32."""
        return self._divided(self.sums["low"].amin(0)) if not self.rotation else self.rows.amin(0)

    @property
    def high(self) -> Tensor:
        """Largest value of each channel, [in] float32."""
        return self._divided(self.sums["high"].amax(0)) if not self.rotation else self.rows.amax(0)

    @property
    def amax(self) -> Tensor:
        """Largest magnitude of each channel, [in] float32."""
        return torch.maximum(-self.low, self.high)

    @property
    def mean_square(self) -> Tensor:
        """Mean square of each channel, [in] float32; an estimate from the sample if rotated without "hessian"."""
        if self.rotation:
            if "hessian" in self.sums:
                return self.hessian.diagonal()
            return self.row_weights @ self.rows.square() / self.count
        mean = self.sums["power"] / self.count
        return mean if self.divisor is None else mean / self.divisor.square()

    @property
    def hessian(self) -> Tensor:
        """Mean of x x^T over the rows, [in, in] float32; requires "hessian"."""
        mean = self.sums["hessian"] / self.count
        mean = mean if self.divisor is None else mean / self.divisor / self.divisor[:, None]
        return rotated(rotated(mean, self.rotation).T, self.rotation) if self.rotation else mean

    @property
    def rows(self) -> Tensor:
        """The sampled rows, [n, in] float32."""
        return rotated(self._divided(self.sample.rows), self.rotation)

    @property
    def row_weights(self) -> Tensor:
        """Number of rows that each sampled row represents, [n] float32."""
        return self.sample.weights(self.count)

    def halves(self) -> list[tuple[LayerStats, Tensor]]:
        """Return, for each half of the rows, the statistics with its ranges and a mask of the other half's samples.

        A choice made on the rows that set the range would never see a clipped value. If a half is empty, there is one
        set: all rows.
        """
        if not self.sums["low"].isfinite().all():
            return [(self, torch.ones_like(self.sample.second_half))]
        sets = []
        for i in range(HALVES):
            ranges = {name: self.sums[name][i : i + 1] for name in ("low", "high")}
            sets.append((replace(self, sums={**self.sums, **ranges}), self.sample.second_half != bool(i)))
        return sets


@dataclass(frozen=True)
class _Shared:
    """Statistics of one tensor, measured once even if several layers read it, as q, k and v do."""

    of: weakref.ref[Tensor]
    version: int | None
    stats: LayerStats
    #: By the id of a layer's earlier statistics: those, and both merged. Layers with equal history share statistics.
    merged: dict[int, tuple[LayerStats | None, LayerStats]]


class Collector:
    """Collects the statistics of several layers as their inputs arrive.

    Args:
        needs: layer -> names of the statistics that it needs beyond those always collected.
    """

    def __init__(self, needs: Mapping[str, Collection[str]]) -> None:
        self.needs = {name: frozenset(n) for name, n in needs.items()}
        self.stats: dict[str, LayerStats] = {}
        self._measured: dict[tuple[int, frozenset[str]], _Shared] = {}
        self._draws: dict[int, Tensor] = {}
        self.seed = 0

    def start(self, seed: int) -> None:
        """Begin a sample whose rows are drawn with ``seed`` (the CPU generator uses 32 bits of it)."""
        self.seed = seed % 2**32
        self._draws.clear()
        self._measured.clear()

    def add(
        self, name: str, x: Tensor, mask: Tensor | None = None, left_out: tuple[Tensor, Tensor] | None = None
    ) -> int:
        """Add an input of layer ``name``.

        Args:
            name: name of the layer.
            x: [..., in].
            mask: bool over ``x``'s leading dimensions, the rows that count; None: all.
            left_out: ranges of the rows left out of ``x`` if it is a sample; see :meth:`LayerStats.widened`.

        Returns:
            How many values of ``x`` are NaN or Inf, or 1 if only rows left out of it have some; if there are any,
            nothing is added.
        """
        measured = self._measure(name, x, mask, left_out)
        if measured is None:
            return 0
        if isinstance(measured, int):
            return measured
        old = self.stats.get(name)
        if id(old) not in measured.merged:
            measured.merged[id(old)] = old, measured.stats if old is None else old.merge(measured.stats)
        self.stats[name] = measured.merged[id(old)][1]
        return 0

    def _measure(
        self, name: str, x: Tensor, mask: Tensor | None, left_out: tuple[Tensor, Tensor] | None
    ) -> _Shared | int | None:
        key = id(x), self.needs[name]
        known = self._measured.get(key)
        version = None if x.is_inference() else x._version  # inference tensors do not count their changes
        if known is not None and known.of() is x and known.version == version is not None:
            return known
        rows = (x if mask is None else x[mask]).reshape(-1, x.shape[-1])
        if not rows.shape[0]:
            return None
        new = LayerStats.of(rows, self._draw(len(rows)), self.needs[name])
        if left_out is not None:
            new = new.widened(*left_out)
        if not (new.low.isfinite().all() and new.high.isfinite().all()):
            return max(1, int((~rows.isfinite()).sum()))  # rows that were left out have some if these have none
        # Dropped with the tensor: kept until the end of the batch, those of all layers would add up.
        self._measured[key] = _Shared(weakref.ref(x, lambda _: self._measured.pop(key, None)), version, new, {})
        return self._measured[key]

    def _draw(self, rows: int) -> Tensor:
        if rows not in self._draws:
            generator = torch.Generator().manual_seed(self.seed)
            self._draws[rows] = torch.rand(rows, dtype=torch.float64, generator=generator)
        return self._draws[rows]
