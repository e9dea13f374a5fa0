"""GPTQ (arXiv 2210.17323): round column by column, and let the columns to come make up for the error."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from hfquant import formats
from hfquant.algorithms.rounding import dequantize_weight, round_to_nearest, weight_grid
from hfquant.config import CalibConfig, WeightQuant

logger = logging.getLogger(__name__)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    quant: WeightQuant,
    calib: CalibConfig,
    columns: Sequence[int],
    rows: Sequence[int] | None = None,
    name: str = "",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes that minimise ``(w - q) H (w - q)^T`` for each row w, greedily.

    Each row keeps the better of GPTQ and round-to-nearest, so the loss is never above the latter's.

    Args:
        weight: [out, in], float.
        hessian: [in, in], ``sum x x^T`` up to a factor, symmetric.
        quant: format, symmetry and clipping.
        calib: block_size, damp, act_order.
        columns: sizes of the column blocks (groups or input segments) that have a scale of their own.
        rows: sizes of row blocks that share a scale; None: a scale for each row.
        name: of the layer, for the log.

    Returns:
        codes [out, in] int8 or int16, scale [out, G] float32, zero_point [out, G] or None.
    """
    w, h = weight.float(), hessian.float()
    importance = h.diagonal()
    scale, zero_point = weight_grid(w, quant, columns, rows, importance)
    assert scale is not None
    nearest = round_to_nearest(w, scale, zero_point, quant.type, columns)
    inverse = _inverse_cholesky(h, calib.damp, calib.act_order)
    if inverse is None:
        logger.warning(
            "layer %r: its Hessian cannot be factorized even with full damping; weights are rounded to nearest", name
        )
        return nearest, scale, zero_point
    codes, new_scale, new_zero = _sweep(w, inverse, quant, calib, columns, scale, zero_point, importance, rows is None)
    before = _row_loss(w, nearest, scale, zero_point, quant, columns, h)
    after = _row_loss(w, codes, new_scale, new_zero, quant, columns, h)
    worse = (before < after)[:, None]
    if zero_point is not None and new_zero is not None:
        new_zero = torch.where(worse, zero_point, new_zero)
    return torch.where(worse, nearest, codes), torch.where(worse, scale, new_scale), new_zero


def _row_loss(
    w: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant: WeightQuant,
    columns: Sequence[int],
    h: Tensor,
) -> Tensor:
    error = w - dequantize_weight(codes, scale, zero_point, quant.type, columns)
    return ((error @ h) * error).sum(-1)


def _inverse_cholesky(h: Tensor, damp: float, act_order: bool) -> tuple[Tensor, Tensor] | None:
    """The upper Cholesky factor of the damped H^-1, and the order of the columns.

    Dead columns (no input ever) get a diagonal of 1, which makes them round to nearest. Where the factorization fails
    the damping grows tenfold.
    """
    diagonal = h.diagonal()
    order = torch.arange(len(h), device=h.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
        h = h[order][:, order]
    h = h.double()
    mean = h.diagonal().mean()
    if not mean > 0:
        h, mean = torch.zeros_like(h), torch.ones_like(mean)
    dead = h.diagonal() == 0
    while damp <= 1.0:
        damped = h.clone()
        damped.diagonal().add_(damp * mean)
        damped.diagonal().masked_fill_(dead, 1.0)
        factor, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            inverse = torch.cholesky_inverse(factor)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if info == 0 and upper.isfinite().all():
                return upper.float(), order
        damp *= 10
    return None


def _sweep(
    w: Tensor,
    inverse: tuple[Tensor, Tensor],
    quant: WeightQuant,
    calib: CalibConfig,
    columns: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    importance: Tensor,
    own_scales: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One pass over the columns in blocks; see :func:`gptq`.

    In natural order a group's scale is found anew when the sweep reaches it, from the weights as the errors before it
    left them. With act_order, or where rows share a scale, the grid stays the one given.
    """
    upper, order = inverse
    starts = [0]
    for size in columns:
        starts.append(starts[-1] + size)
    refit = own_scales and not calib.act_order and len(columns) > 1
    scale, zero_point = scale.clone(), None if zero_point is None else zero_point.clone()
    group_of = torch.repeat_interleave(torch.arange(len(columns)), torch.tensor(list(columns))).tolist()
    visited = order.tolist()
    # Transposed, a column is contiguous memory.
    work = w.T[order].contiguous()
    codes = torch.empty_like(work, dtype=formats.code_dtype(quant.type))
    group, column_scale, column_zero = -1, scale[:, 0], None
    for start in range(0, len(work), calib.block_size):
        end = min(start + calib.block_size, len(work))
        errors = torch.empty_like(work[start:end])
        for j in range(start, end):
            if group_of[visited[j]] != group:
                group = group_of[visited[j]]
                if refit:
                    # Columns of the group beyond this block have yet to receive the block's errors.
                    ahead = work[j : starts[group + 1]].clone()
                    if starts[group + 1] > end and j > start:
                        ahead[end - j :] -= upper[start:j, end : starts[group + 1]].T @ errors[: j - start]
                    part = slice(j, starts[group + 1])
                    found, zero = weight_grid(ahead.T, quant, (columns[group],), None, importance[part])
                    assert found is not None
                    scale[:, group] = found[:, 0]
                    if zero_point is not None and zero is not None:
                        zero_point[:, group] = zero[:, 0]
                column_scale = scale[:, group].contiguous()
                column_zero = None if zero_point is None else zero_point[:, group].contiguous()
            column = work[j]
            q = formats.quantize(column, column_scale, quant.type, column_zero)
            codes[j] = q
            error = (column - formats.dequantize(q, column_scale, quant.type, column_zero)) / upper[j, j]
            errors[j - start] = error
            if j + 1 < end:
                work[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        if end < len(work):
            work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    back = torch.empty_like(codes)
    back[order] = codes
    return back.T.contiguous(), scale, zero_point
