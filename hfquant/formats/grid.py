"""The grid that weight codes are counted on: how it is fitted to a weight, and the way to codes and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hfquant.formats import scales
from hfquant.formats.base import NumberFormat
from hfquant.formats.columns import expand_columns, range_columns, sum_columns

#: Factors of amax that ``clip="mse"`` tries.
CLIP_FACTORS = tuple(1.0 - 0.02 * i for i in range(21))
#: The same for scales in two levels, in steps of theirs (1/32 to 1/64), tried first; then the best one's neighbors.
CLIP_STEPS = tuple(range(0, 36, 3))
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
        scale_codes, scale_row: [out, G] uint8 and [out, 1] float32, what scales in two levels are made of; else None.
    """

    format: NumberFormat
    columns: tuple[int, ...]
    scale: Tensor | None
    zero_point: Tensor | None = None
    scale_codes: Tensor | None = None
    scale_row: Tensor | None = None

    @classmethod
    def two_level(
        cls, form: NumberFormat, columns: tuple[int, ...], codes: Tensor, row: Tensor, zero_point: Tensor | None = None
    ) -> Grid:
        """Return the grid of scales ``values(codes) * row``."""
        return cls(form, columns, scales.values(codes) * row, zero_point, codes, row)

    @classmethod
    def from_tensors(cls, form: NumberFormat, columns: tuple[int, ...], tensors: Mapping[str, Tensor | None]) -> Grid:
        """Return the grid of a layer's stored tensors, the inverse of :meth:`tensors`."""
        zero_point = tensors.get("weight_zero_point")
        if zero_point is not None:
            zero_point = form.unpack(zero_point, len(columns))
        scale, row = tensors.get("weight_scale"), tensors.get("weight_scale_row")
        if scale is None or row is None:
            return cls(form, columns, scale, zero_point)
        return cls.two_level(form, columns, scale, row, zero_point)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a layer stores of the grid, by name."""
        zero_point = None if self.zero_point is None else self.format.pack(self.zero_point)
        stored = {
            "weight_scale": self.scale if self.scale_codes is None else self.scale_codes,
            "weight_scale_row": self.scale_row,
            "weight_zero_point": zero_point,
        }
        return {name: tensor.contiguous() for name, tensor in stored.items() if tensor is not None}

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
        return self._with(other, lambda ours, theirs: torch.where(rows[:, None], theirs, ours))

    def with_column(self, group: int, part: Grid) -> None:
        """Take the scale and zero point of one block of columns over from a grid of that block alone, in place."""

        def put(ours: Tensor, theirs: Tensor) -> Tensor:
            ours[:, group] = theirs[:, 0]
            return ours

        self._with(replace(part, scale_row=None), put)

    def clone(self) -> Grid:
        """Return a copy whose tensors can be written to."""
        return self._with(self, lambda ours, _: ours.clone())

    def _with(self, other: Grid, join: Callable[[Tensor, Tensor], Tensor]) -> Grid:
        names = ("scale", "zero_point", "scale_codes", "scale_row")
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        joined: dict[str, Any] = {
            n: join(ours, theirs) for n, (ours, theirs) in pairs.items() if ours is not None and theirs is not None
        }
        return replace(self, **joined)

    def part(self, rows: slice) -> Grid:
        """Return the grid of some rows."""
        return self._with(self, lambda ours, _: ours[rows])

    def smaller(self, steps: int | Tensor) -> Tensor:
        """Return the scale some steps of its byte down, as a share of the scale, [out, G]; in two levels only."""
        assert self.scale is not None
        assert self.scale_codes is not None
        assert self.scale_row is not None
        codes = (self.scale_codes.int() - steps).clamp(0, 255)
        return scales.values(codes) * self.scale_row / self.scale

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
        two_level: scales are stored as a byte a group times a float32 a row (see :mod:`hfquant.formats.scales`).
    """

    format: NumberFormat
    columns: tuple[int, ...]
    rows: tuple[int, ...] | None = None
    symmetric: bool = True
    clip: Literal["amax", "mse"] = "amax"
    two_level: bool = False

    def fit(self, weight: Tensor, importance: Tensor | None = None, scale_row: Tensor | None = None) -> Grid:
        """Return the grid of ``weight`` [out, in], any float dtype.

        Args:
            weight: the matrix.
            importance: [in], weight of each column's squared error under "mse" (the Hessian's diagonal).
            scale_row: [out, 1] float32, the rows' share of scales in two levels, where it is settled already.
        """
        if not self.format.has_scale:
            return Grid(self.format, self.columns, None)
        low, high = range_columns(weight, self.columns)
        if self.rows is not None:
            low, high = self._over_rows(low, torch.amin), self._over_rows(high, torch.amax)
        grid = self._reaching(low, high, scale_row)
        return self._clipped(weight, grid, low, high, importance) if self.clip == "mse" else grid

    def _reaching(self, low: Tensor, high: Tensor, scale_row: Tensor | None = None) -> Grid:
        """Return the grid that reaches ``low`` and ``high`` [out, G]."""
        form, amax = self.format, torch.maximum(-low, high)
        scale = form.scale_from_amax(amax) if self.symmetric else form.scale_from_range(low, high)
        grid = Grid(form, self.columns, scale)
        if self.two_level:
            row = scales.row_scale(scale, amax > 0) if scale_row is None else scale_row
            grid = Grid.two_level(form, self.columns, scales.encode(scale, row), row)
        assert grid.scale is not None
        return grid if self.symmetric else replace(grid, zero_point=form.zero_point(low, grid.scale))

    def _over_rows(self, values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        assert self.rows is not None
        return torch.cat([reduce(b, dim=0, keepdim=True).expand_as(b) for b in values.split(list(self.rows))])

    def _clipped(self, weight: Tensor, widest: Grid, low: Tensor, high: Tensor, importance: Tensor | None) -> Grid:
        """Take for each scale the one at most the widest grid's with the least (weighted) squared error.

        Zero points stay those of the widest grid.
        """
        w = weight.float()
        if self.rows is None:
            # A block of rows stays in the cache while all scales are tried on it.
            count = max(CHUNK // w.shape[1] // 64, 1) * 64
            blocks = [slice(start, start + count) for start in range(0, len(w), count)]
        else:
            blocks = [slice(None)]
        best = torch.cat([self._best_share(w[rows], widest.part(rows), importance) for rows in blocks])
        if widest.scale_codes is not None and widest.scale_row is not None:
            codes = (widest.scale_codes - best).clamp(0, 255).to(torch.uint8)
            return Grid.two_level(self.format, self.columns, codes, widest.scale_row, widest.zero_point)
        return replace(self._reaching(low * best, high * best), zero_point=widest.zero_point)

    def _best_share(self, w: Tensor, widest: Grid, importance: Tensor | None) -> Tensor:
        """Return the factor for each scale with the least squared error, or in two levels the number of steps down."""
        assert widest.scale is not None
        # Counted in steps of the widest grid.
        steps = widest._grouped(w / expand_columns(widest.scale, self.columns))
        shift = per_column(widest.zero_point, self.columns)
        importance = None if importance is None else importance.to(w)
        least, best = torch.full_like(widest.scale, torch.inf), torch.zeros_like(widest.scale)

        def consider(candidate: Tensor, share: Tensor) -> None:
            nonlocal least, best
            error = self.format.round(steps, share, shift).sub_(steps).square_().view(w.shape)
            if importance is not None:
                error *= importance
            loss = sum_columns(error, self.columns)
            if self.rows is not None:
                loss = self._over_rows(loss, torch.sum)
            best = torch.where(loss < least, candidate, best)
            least = torch.minimum(least, loss)

        if widest.scale_codes is None:
            for factor in widest.scale.new_tensor(CLIP_FACTORS):
                consider(factor, factor)
            return best
        for step in widest.scale.new_tensor(CLIP_STEPS, dtype=torch.int32):
            consider(step, _spread(widest.smaller(step), self.columns))
        coarse = best.int()
        for neighbor in (coarse - 1, coarse + 1):
            consider(neighbor, _spread(widest.smaller(neighbor), self.columns))
        return best.int()


def _spread(values: Tensor, columns: Sequence[int]) -> Tensor:
    spread = per_column(values, columns)
    assert spread is not None
    return spread
