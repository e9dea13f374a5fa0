"""Quantization grids of weights: fitting one to a weight, and converting to codes and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from hfquant.formats import scales
from hfquant.formats.base import MIN_SCALE, NumberFormat
from hfquant.formats.clipping import least_error
from hfquant.formats.columns import expand_columns, range_columns


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a weight matrix [out, in].

    Attributes:
        format: number format of the codes.
        columns: sizes of the G column blocks (groups or input segments) with their own scale.
        scale: [out, G] float32; None for a format without a scale.
        zero_point: [out, G] integer; None if symmetric.
        scale_codes, scale_row: [out, G] uint8 and [out, 1] float32, the parts of two-level scales; otherwise None.
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
        """Return the grid with scales ``values(codes) * row``."""
        return cls(form, columns, scales.values(codes) * row, zero_point, codes, row)

    @classmethod
    def from_tensors(cls, form: NumberFormat, columns: tuple[int, ...], tensors: Mapping[str, Tensor | None]) -> Grid:
        """Return the grid from a layer's stored tensors, the inverse of :meth:`tensors`."""
        zero_point = tensors.get("weight_zero_point")
        if zero_point is not None:
            zero_point = form.unpack(zero_point, len(columns))
        scale, row = tensors.get("weight_scale"), tensors.get("weight_scale_row")
        if scale is None or row is None:
            return cls(form, columns, scale, zero_point)
        return cls.two_level(form, columns, scale, row, zero_point)

    def tensors(self) -> dict[str, Tensor]:
        """Return the grid's tensors as a layer stores them, by name."""
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
        """Return the float32 weight [out, in] for unpacked codes [out, in]."""
        return self.format.dequantize(self._grouped(codes), *self._per_column()).view(codes.shape)

    def round(self, weight: Tensor) -> Tensor:
        """Return ``dequantize(quantize(weight))`` without computing codes."""
        return self.format.round(self._grouped(weight), *self._per_column()).view(weight.shape)

    def spacing(self, weight: Tensor) -> Tensor:
        """Return the distance between grid values around each weight, [out, in] float32; the grid must have scales."""
        scale, _ = self._per_column()
        assert scale is not None
        return (self.format.spacing(self._grouped(weight) / scale) * scale).view(weight.shape)

    def quantize_stochastic(self, weight: Tensor, draw: Tensor) -> Tensor:
        """Return codes [out, in] that round each weight up or down to a neighboring grid value at random.

        Averaged over uniform draws, the result equals the weight; a weight on the grid stays unchanged. The grid must
        have scales.

        Args:
            weight: [out, in] float32.
            draw: [out, in], in [0, 1): a weight is rounded up if this is less than its distance from the lower value,
                in steps.
        """
        step = self.spacing(weight)
        return self.quantize(torch.ceil(weight / step - draw) * step)

    def where(self, rows: Tensor, other: Grid) -> Grid:
        """Return this grid with the rows of ``other`` wherever ``rows`` [out] bool is True."""
        return self._with(other, lambda ours, theirs: torch.where(rows[:, None], theirs, ours))

    def with_column(self, group: int, part: Grid) -> None:
        """Overwrite the scale and zero point of one column block, in place, with those of a grid of only that block."""

        def put(ours: Tensor, theirs: Tensor) -> Tensor:
            ours[:, group] = theirs[:, 0]
            return ours

        self._with(replace(part, scale_row=None), put)

    def clone(self) -> Grid:
        """Return a copy with writable tensors."""
        return self._with(self, lambda ours, _: ours.clone())

    def _with(self, other: Grid, join: Callable[[Tensor, Tensor], Tensor]) -> Grid:
        names = ("scale", "zero_point", "scale_codes", "scale_row")
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        joined: dict[str, Any] = {
            n: join(ours, theirs) for n, (ours, theirs) in pairs.items() if ours is not None and theirs is not None
        }
        return replace(self, **joined)

    def part(self, rows: slice) -> Grid:
        """Return the grid of the given rows."""
        return self._with(self, lambda ours, _: ours[rows])

    def groups(self, which: slice) -> Grid:
        """Return the grid of the given adjacent column blocks."""
        part = self._with(replace(self, scale_row=None), lambda ours, _: ours[:, which])
        return replace(part, columns=self.columns[which], scale_row=self.scale_row)

    def smaller(self, steps: Tensor, zero_point: Tensor | None = None) -> Grid:
        """Return the grid with scales ``steps`` [out, G] smaller, limited to what can be stored.

        For two-level scales, a step is one unit of the byte (1/64 to 1/32 of the scale); otherwise it is 1/64 of the
        scale. ``zero_point`` [out, G] replaces the current zero point, if there is one.
        """
        if zero_point is None or self.zero_point is None:
            zero_point = self.zero_point
        else:
            zero_point = zero_point.to(self.zero_point.dtype)
        if self.scale_codes is not None and self.scale_row is not None:
            codes = (self.scale_codes.int() - steps).clamp(0, 255).to(torch.uint8)
            return Grid.two_level(self.format, self.columns, codes, self.scale_row, zero_point)
        assert self.scale is not None
        return replace(self, scale=(self.scale * (1 - steps / 64)).clamp(min=MIN_SCALE), zero_point=zero_point)

    def column(self, group: int) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point of one column block, [out] each."""
        assert self.scale is not None
        zero_point = None if self.zero_point is None else self.zero_point[:, group].contiguous()
        return self.scale[:, group].contiguous(), zero_point

    def _grouped(self, values: Tensor) -> Tensor:
        """Return [..., in] as [..., G, in / G] if all blocks are equal in size, so scales broadcast without a copy."""
        return values.unflatten(-1, (len(self.columns), self.columns[0])) if len(set(self.columns)) == 1 else values

    def _per_column(self) -> tuple[Tensor | None, Tensor | None]:
        return _per_column(self.scale, self.columns), _per_column(self.zero_point, self.columns)


def _per_column(values: Tensor | None, columns: Sequence[int]) -> Tensor | None:
    """Return per-block values [..., G] in a shape that broadcasts over columns, grouped if all sizes are equal."""
    if values is None:
        return None
    return values.unsqueeze(-1) if len(set(columns)) == 1 else expand_columns(values, columns)


@dataclass(frozen=True)
class GridRule:
    """How to fit the grid of a weight matrix.

    Attributes:
        format: number format of the codes.
        columns: sizes of the column blocks with their own scale, summing to in.
        rows: sizes of the row blocks that share a scale (one scale per tensor); None for one scale per row.
        symmetric: whether there are no zero points.
        clip: "amax" covers the largest weight; "mse" picks the scale and zero point with the least squared error.
        two_level: scales are stored as one byte per group times one float32 per row (see
            :mod:`hfquant.formats.scales`).
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
            scale_row: [out, 1] float32, the row factors of two-level scales, if they are already known.
        """
        if not self.format.has_scale:
            return Grid(self.format, self.columns, None)
        low, high = range_columns(weight, self.columns)
        if self.rows is not None:
            low, high = self._over_rows(low, torch.amin), self._over_rows(high, torch.amax)
        low, high = low.clamp(max=0), high.clamp(min=0)
        grid = self._reaching(low, high, scale_row)
        if self.clip == "amax":
            return grid
        over_rows = None if self.rows is None else partial(self._over_rows, reduce=torch.sum)
        return least_error(weight, grid, low / 2 + high / 2, importance, over_rows)

    def _reaching(self, low: Tensor, high: Tensor, scale_row: Tensor | None = None) -> Grid:
        """Return the grid that covers ``low`` and ``high`` [out, G]."""
        form, amax = self.format, torch.maximum(-low, high)
        scale = form.scale_from_amax(amax) if self.symmetric else form.scale_from_range(low, high)
        grid = Grid(form, self.columns, scale)
        if self.two_level:
            row = scales.row_scale(scale, amax > 0) if scale_row is None else scale_row
            # Up to six bits, a slightly smaller scale clips the largest weight by less than half a step.
            up = form.is_integer and form.bits > 6
            grid = Grid.two_level(form, self.columns, scales.encode(scale, row, up), row)
        assert grid.scale is not None
        return grid if self.symmetric else replace(grid, zero_point=form.zero_point(low, grid.scale))

    def _over_rows(self, values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        assert self.rows is not None
        return torch.cat([reduce(b, dim=0, keepdim=True).expand_as(b) for b in values.split(list(self.rows))])
