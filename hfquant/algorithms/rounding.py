"""The grid that weight codes are counted on, and round-to-nearest on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hfquant import formats
from hfquant.config import DType, WeightQuant

#: Factors of amax that ``clip="mse"`` tries.
CLIP_FACTORS = tuple(1.0 - 0.02 * i for i in range(21))
#: Weights in a block of rows that ``clip="mse"`` works on: 512 kB of float32, within a core's second-level cache.
CHUNK = 1 << 17


def weight_grid(
    weight: Tensor,
    quant: WeightQuant,
    columns: Sequence[int],
    rows: Sequence[int] | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Scales and zero points of a weight matrix.

    Args:
        weight: [out, in], any float dtype.
        quant: format, symmetry and clipping (``axis`` and ``group_size`` are in ``columns`` and ``rows``).
        columns: sizes of the column blocks (groups or input segments), summing to in.
        rows: sizes of row blocks that share a scale (per tensor); None: a scale for each row.
        importance: [in], the weight of each column's squared error under ``clip="mse"`` (the Hessian's diagonal).

    Returns:
        scale [out, G] float32 and zero_point [out, G] (None where symmetric); (None, None) for FP16 and BF16.
    """
    if not quant.type.is_scaled:
        return None, None
    low, high = formats.range_columns(weight, columns)
    if rows is not None:
        low, high = _over_rows(low, torch.amin, rows), _over_rows(high, torch.amax, rows)
    if quant.clip == "mse":
        return _clipped(weight, quant, columns, low, high, importance, rows)
    return _grid(quant, low, high)


def _grid(quant: WeightQuant, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
    if quant.symmetric:
        return formats.scale_from_amax(torch.maximum(-low, high), quant.type), None
    return formats.scale_from_range(low, high, quant.type)


def _over_rows(values: Tensor, reduce: Callable[..., Tensor], rows: Sequence[int]) -> Tensor:
    return torch.cat([reduce(b, dim=0, keepdim=True).expand_as(b) for b in values.split(list(rows))])


def _clipped(
    weight: Tensor,
    quant: WeightQuant,
    columns: Sequence[int],
    low: Tensor,
    high: Tensor,
    importance: Tensor | None,
    rows: Sequence[int] | None,
) -> tuple[Tensor, Tensor | None]:
    """For each scale the factor of amax whose grid has the least (weighted) squared error."""
    w = weight.float()
    count = max(CHUNK // w.shape[1] // 64, 1) * 64
    if rows is None and len(w) > count:
        # A block of rows stays in the cache while all factors are tried on it.
        blocks = zip(w.split(count), low.split(count), high.split(count), strict=True)
        scales, zeros = zip(
            *(_clipped(part, quant, columns, a, b, importance, rows) for part, a, b in blocks), strict=True
        )
        return torch.cat(scales), None if zeros[0] is None else torch.cat(zeros)
    # Counted in steps of the unclipped grid, whose zero points a factor leaves as they are.
    step, zero = _grid(quant, low, high)
    steps, shift = _grouped(w / formats.expand_columns(step, columns), columns), _per_column(zero, columns)
    importance = None if importance is None else importance.to(w)
    best, best_factor = torch.full_like(step, torch.inf), torch.ones_like(step)
    for factor in CLIP_FACTORS:
        error = formats.fake_quantize(steps, step.new_tensor(factor), quant.type, shift).sub_(steps)
        error = error.square_().view(w.shape)
        if importance is not None:
            error *= importance
        loss = formats.sum_columns(error, columns)
        if rows is not None:
            loss = _over_rows(loss, torch.sum, rows)
        best_factor = torch.where(loss < best, factor, best_factor)
        best = torch.minimum(best, loss)
    return _grid(quant, low * best_factor, high * best_factor)[0], zero


def round_to_nearest(
    weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: DType, columns: Sequence[int]
) -> Tensor:
    """Codes [out, in] of ``weight`` [out, in] on a grid from :func:`weight_grid`."""
    scale, zero_point = _per_column(scale, columns), _per_column(zero_point, columns)
    return formats.quantize(_grouped(weight, columns), scale, dtype, zero_point).view(weight.shape)


def dequantize_weight(
    codes: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: DType, columns: Sequence[int]
) -> Tensor:
    """Float32 weight [out, in] of unpacked codes [out, in]."""
    scale, zero_point = _per_column(scale, columns), _per_column(zero_point, columns)
    return formats.dequantize(_grouped(codes, columns), scale, dtype, zero_point).view(codes.shape)


def rounded_weight(
    weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: DType, columns: Sequence[int]
) -> Tensor:
    """``dequantize_weight(round_to_nearest(weight))`` without the codes in between."""
    scale, zero_point = _per_column(scale, columns), _per_column(zero_point, columns)
    return formats.fake_quantize(_grouped(weight, columns), scale, dtype, zero_point).view(weight.shape)


def _equal(columns: Sequence[int]) -> bool:
    return len(set(columns)) == 1


def _grouped(values: Tensor, columns: Sequence[int]) -> Tensor:
    """``values`` [..., in] as [..., G, in / G] where all groups are equal: then scales broadcast without a copy."""
    return values.unflatten(-1, (len(columns), columns[0])) if _equal(columns) else values


def _per_column(values: Tensor | None, columns: Sequence[int]) -> Tensor | None:
    """One value a column group [..., G], in a shape that broadcasts over :func:`_grouped`."""
    if values is None:
        return None
    return values.unsqueeze(-1) if _equal(columns) else formats.expand_columns(values, columns)
