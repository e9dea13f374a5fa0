"""The grid that weight codes are counted on: how it is fitted to a weight, and the way to codes and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hfquant.formats.base import NumberFormat
from hfquant.formats.columns import expand_columns, range_columns, sum_columns

#: Factors of amax that ``clip="mse"`` tries.
CLIP_FACTORS = tuple(1.0 - 0.02 * i for i in range(21))
#: Weights in a block of rows that ``clip="mse"`` works on: 512 kB of float32, within a core's second-level cache.
CHUNK = 1 << 17


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a weight matrix [out, in].

    Attributes:
        format: of the codes.
        columns: sizes of the G blocks of columns (groups or input segments) that have a scale of their own.
        scale: [out, G] float32; None for a format without a scale.
        zero_point: [out, G] integer; None where symmetric.
    """

    format: NumberFormat
    columns: tuple[int, ...]
    scale: Tensor | None
    zero_point: Tensor | None = None

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the nearest codes [out, in] of ``weight`` [out, in], any float dtype."""
        return self.format.quantize(self._grouped(weight), *self._per_column()).view(weight.shape)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the float32 weight [out, in] of unpacked codes [out, in]."""
        return self.format.dequantize(self._grouped(codes), *self._per_column()).view(codes.shape)

    def round(self, weight: Tensor) -> Tensor:
        """Return ``dequantize(quantize(weight))`` without the codes in between."""
        return self.format.round(self._grouped(weight), *self._per_column()).view(weight.shape)

    def where(self, rows: Tensor, other: Grid) -> Grid:
        """Return this grid, with ``other``'s rows where ``rows`` [out] bool says so."""

        def choose(ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            return None if ours is None or theirs is None else torch.where(rows[:, None], theirs, ours)

        scale, zero_point = choose(self.scale, other.scale), choose(self.zero_point, other.zero_point)
        return replace(self, scale=scale, zero_point=zero_point)

    def column(self, group: int) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point of one block of columns, [out] each."""
        assert self.scale is not None
        zero_point = None if self.zero_point is None else self.zero_point[:, group].contiguous()
        return self.scale[:, group].contiguous(), zero_point

    def _grouped(self, values: Tensor) -> Tensor:
        """Return [..., in] as [..., G, in / G] where all blocks are equal: then scales broadcast without a copy."""
        return values.unflatten(-1, (len(self.columns), self.columns[0])) if len(set(self.columns)) == 1 else values

    def _per_column(self) -> tuple[Tensor | None, Tensor | None]:
        return per_column(self.scale, self.columns), per_column(self.zero_point, self.columns)


def per_column(values: Tensor | None, columns: Sequence[int]) -> Tensor | None:
    """Return one value a block [..., G] in a shape that broadcasts over columns, grouped where all are equal."""
    if values is None:
        return None
    return values.unsqueeze(-1) if len(set(columns)) == 1 else expand_columns(values, columns)


@dataclass(frozen=True)
class GridRule:
    """How the grid of a weight matrix is found.

    Attributes:
        format: of the codes.
        columns: sizes of the blocks of columns that have a scale of their own, summing to in.
        rows: sizes of the blocks of rows that share a scale (one scale a tensor); None: a scale for each row.
        symmetric: without zero points.
        clip: "amax" reaches the largest weight; "mse" takes the share of it with the least squared error.
    """

    format: NumberFormat
    columns: tuple[int, ...]
    rows: tuple[int, ...] | None = None
    symmetric: bool = True
    clip: Literal["amax", "mse"] = "amax"

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """Return the grid of ``weight`` [out, in], any float dtype.

        Args:
            weight: the matrix.
            importance: [in], weight of each column's squared error under "mse" (the Hessian's diagonal).
        """
        if not self.format.has_scale:
            return Grid(self.format, self.columns, None)
        low, high = range_columns(weight, self.columns)
        if self.rows is not None:
            low, high = self._over_rows(low, torch.amin), self._over_rows(high, torch.amax)
        if self.clip == "mse":
            return self._clipped(weight, low, high, importance)
        return self._reaching(low, high)

    def _reaching(self, low: Tensor, high: Tensor) -> Grid:
        if self.symmetric:
            return Grid(self.format, self.columns, self.format.scale_from_amax(torch.maximum(-low, high)))
        return Grid(self.format, self.columns, *self.format.scale_from_range(low, high))

    def _over_rows(self, values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        assert self.rows is not None
        return torch.cat([reduce(b, dim=0, keepdim=True).expand_as(b) for b in values.split(list(self.rows))])

    def _clipped(self, weight: Tensor, low: Tensor, high: Tensor, importance: Tensor | None) -> Grid:
        """Take for each scale the factor of amax whose grid has the least (weighted) squared error."""
        w = weight.float()
        count = max(CHUNK // w.shape[1] // 64, 1) * 64
        if self.rows is None and len(w) > count:
            # A block of rows stays in the cache while all factors are tried on it.
            blocks = zip(w.split(count), low.split(count), high.split(count), strict=True)
            grids = [self._clipped(part, a, b, importance) for part, a, b in blocks]
            scales = [g.scale for g in grids if g.scale is not None]
            zeros = [g.zero_point for g in grids if g.zero_point is not None]
            return Grid(self.format, self.columns, torch.cat(scales), torch.cat(zeros) if zeros else None)
        # Counted in steps of the unclipped grid, whose zero points a factor leaves as they are.
        widest = self._reaching(low, high)
        assert widest.scale is not None
        steps = widest._grouped(w / expand_columns(widest.scale, self.columns))
        shift = per_column(widest.zero_point, self.columns)
        importance = None if importance is None else importance.to(w)
        best, best_factor = torch.full_like(widest.scale, torch.inf), torch.ones_like(widest.scale)
        for factor in CLIP_FACTORS:
            error = self.format.round(steps, steps.new_tensor(factor), shift).sub_(steps)
            error = error.square_().view(w.shape)
            if importance is not None:
                error *= importance
            loss = sum_columns(error, self.columns)
            if self.rows is not None:
                loss = self._over_rows(loss, torch.sum)
            best_factor = torch.where(loss < best, factor, best_factor)
            best = torch.minimum(best, loss)
        return replace(self._reaching(low * best_factor, high * best_factor), zero_point=widest.zero_point)
