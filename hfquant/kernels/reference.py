"""Integer-exact reference product that every faster kernel is checked against.

Codes are multiplied, summed and scaled in float64; the result is rounded to float32 once, at the end. Sums of products
of integer codes of up to 16 bits are exact up to K = 2^21 terms, and of FP8 E4M3 values up to 2^17. No intermediate
overflows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfquant.formats import Grid
from hfquant.formats.inputs import segment_of
from hfquant.kernels.base import Kernel, Operands, Product


def run(x: Tensor, operands: Operands, product: Product) -> Tensor:
    """Return ``x`` [tokens, in] times the weight, [tokens, out]."""
    raw = x.float()
    values, scale = operands.quantized_input(raw, product)
    y = scaled_matmul(values, scale, operands.codes(product), operands.grid(product), product.segments)
    return operands.added(raw, y).to(x.dtype)


def scaled_matmul(x: Tensor, x_scale: Tensor | None, codes: Tensor, grid: Grid, segments: Sequence[int]) -> Tensor:
    """Return ``Y = sum_g s_x s_w[:, g] (X_g W_g^T - z_g rowsum(X_g))`` over column blocks g.

    Args:
        x: [..., in] float32, the values of activation codes; for weight-only products the activations themselves.
        x_scale: [..., segments] or [segments] float32, or None (weight-only products, formats without a scale).
        codes: [out, in], unpacked weight codes.
        grid: grid of the weight; each column block lies within one input segment.
        segments: sizes of the input segments.

    Returns:
        [..., out] float32.
    """
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    weight = grid.format.values(codes)
    total = x.new_zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    start = 0
    for g, (size, segment) in enumerate(zip(grid.columns, segment_of(grid.columns, segments), strict=True)):
        part = x[:, start : start + size].double()
        product = part @ weight[:, start : start + size].double().T
        if grid.zero_point is not None:
            product -= part.sum(-1, keepdim=True) * grid.zero_point[:, g].double()
        if grid.scale is not None:
            product *= grid.scale[:, g]
        if x_scale is not None:
            product *= x_scale[..., segment : segment + 1].reshape(-1, 1)
        total += product
        start += size
    return total.float().reshape(*shape[:-1], weight.shape[0])


KERNEL = Kernel("reference", "", lambda: "", lambda product: "", lambda *size: True, run)
