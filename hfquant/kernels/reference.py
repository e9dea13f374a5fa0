"""The integer-exact product every faster kernel is checked against.

Codes are multiplied, summed and scaled in float64, and rounded to float32 once, at the end. Sums of products of integer
codes of up to 16 bits are exact up to K = 2^21 terms, those of FP8 E4M3 values up to 2^17; no intermediate overflows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def scaled_matmul(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    zero_point: Tensor | None,
    columns: Sequence[int],
    segments: Sequence[int],
) -> Tensor:
    """``Y = sum_g s_x s_w[:, g] (X_g W_g^T - z_g rowsum(X_g))`` over column blocks g.

    Args:
        x: [..., in] float32, values of activation codes (or plain activations, weight-only).
        x_scale: [..., segments] or [segments] float32, or None (weight-only, FP16, BF16).
        weight: [out, in], values of the weight's codes, any dtype that float64 holds exactly.
        weight_scale: [out, G] float32, or None (FP16, BF16).
        zero_point: [out, G] integer, or None (symmetric).
        columns: sizes of the G column blocks; each lies within one segment.
        segments: sizes of the input segments.

    Returns:
        [..., out] float32.
    """
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    total = x.new_zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    start = 0
    for g, (size, segment) in enumerate(zip(columns, _segment_of(columns, segments), strict=True)):
        part = x[:, start : start + size].double()
        product = part @ weight[:, start : start + size].double().T
        if zero_point is not None:
            product -= part.sum(-1, keepdim=True) * zero_point[:, g].double()
        if weight_scale is not None:
            product *= weight_scale[:, g]
        if x_scale is not None:
            product *= x_scale[..., segment : segment + 1].reshape(-1, 1)
        total += product
        start += size
    return total.float().reshape(*shape[:-1], weight.shape[0])


def _segment_of(columns: Sequence[int], segments: Sequence[int]) -> list[int]:
    """Index of the input segment that each column block lies in."""
    ends = list(accumulate(segments))
    return [sum(start >= end for end in ends) for start in accumulate(columns[:-1], initial=0)]
