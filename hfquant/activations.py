"""Activations to codes: one scale a tensor or a token, a segment at a time, single or dual.

DualScale (SegQuant, arXiv 2507.14811): after SiLU, GELU and kin the negative side is small, so it gets a finer scale
``s- = s+ / 2^e``. With e an integer both sides stay one integer code, ``x ~ s- * ((Q+ << e) + Q-)``, and one product
serves. The exponent is at most 15 - (b - 1), so that a code fits 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfquant import formats
from hfquant.config import DType, InputQuant


def dual_exponent(low: Tensor, high: Tensor, dtype: DType) -> Tensor:
    """``e = floor(log2(s+ / s-))`` in [0, 15 - (b - 1)] for ranges [low, high]; 0 means that a single scale serves.

    Args:
        low, high: smallest and largest value, any equal shape.
        dtype: an integer format.

    Returns:
        float32 of the same shape. ``s+ / 2^e`` is never below ``-low / qmax``.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    most = 15 - (dtype.bits - 1)
    # log2 and the quotient round; frexp does not: floor(log2(a / b)) for a = m 2^i, b = n 2^j, m and n in [0.5, 1).
    (m, i), (n, j) = torch.frexp(high), torch.frexp(-low)
    exponent = (i - j - (m < n).int()).float()
    exponent = torch.where(low == 0, torch.full_like(exponent, most), exponent)
    return torch.where(high == 0, torch.zeros_like(exponent), exponent).clamp(0, most)


def static_scales(low: Tensor, high: Tensor, dtype: DType, dual: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Scales of the positive and the negative side, [..., segments] float32, equal where ``dual`` is False or e = 0."""
    scale = formats.scale_from_amax(torch.maximum(-low, high), dtype)
    if not any(dual):
        return scale, scale
    flags = torch.tensor(list(dual), device=low.device)
    exponent = torch.where(flags, dual_exponent(low, high, dtype), torch.zeros_like(scale))
    negative = scale / torch.exp2(exponent)
    return scale, torch.where(negative < formats.MIN_SCALE, scale, negative)


def quantize_input(
    x: Tensor,
    quant: InputQuant,
    segments: Sequence[int],
    dual: Sequence[bool],
    scale: Tensor | None = None,
    scale_neg: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Quantize activations.

    Args:
        x: [..., in] float32.
        quant: format; where it is dynamic the scales come from ``x``.
        segments: column sizes that have a scale of their own.
        dual: for each segment, whether its negative side has its own scale (integer formats).
        scale, scale_neg: [segments] float32, static only (``scale_neg`` only with dual).

    Returns:
        values [..., in] float32, the codes as numbers (integers of at most 16 bits, or FP8/FP16/BF16 values), and
        their scale [..., segments] or [segments] (None for FP16 and BF16): ``x ~ values * scale``.
    """
    if not quant.type.is_scaled:
        return formats.fake_quantize(x, None, quant.type), None
    if quant.dynamic:
        low, high = formats.range_columns(x, segments) if x.numel() else (x.new_zeros(len(segments)),) * 2
        if quant.axis is None:
            low, high = low.reshape(-1, len(segments)).amin(0), high.reshape(-1, len(segments)).amax(0)
        scale, scale_neg = static_scales(low, high, quant.type, dual)
    assert scale is not None
    positive = formats.expand_columns(scale, segments)
    limit = formats.qmax(quant.type)
    if not quant.type.is_integer:
        return formats.fake_quantize(x / positive, x.new_ones(()), quant.type), scale
    if scale_neg is None or not any(dual):
        return (x / positive).round_().clamp_(-limit, limit), scale
    negative = formats.expand_columns(scale_neg, segments)
    fine = (x / torch.where(x < 0, negative, positive)).round_().clamp_(-limit, limit)
    return torch.where(x < 0, fine, fine * (positive / negative)), scale_neg
