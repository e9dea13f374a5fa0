"""The integer-exact product every faster kernel is checked against.

Codes are multiplied in float64: integer codes of up to 16 bits sum exactly up to K = 2^21 terms, as do products of
FP8 values. Scales are applied once a column block, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    total = x.new_zeros(x.shape[0], weight.shape[0])
    start = 0
    for g, (size, segment) in enumerate(zip(columns, _segment_of(columns, segments), strict=True)):
        part = x[:, start : start + size].double()
        product = part @ weight[:, start : start + size].double().T
        if zero_point is not None:
            product -= part.sum(-1, keepdim=True) * zero_point[:, g].double()
        product = product.float()
        if weight_scale is not None:
            product *= weight_scale[:, g]
        if x_scale is not None:
            product *= x_scale[..., segment : segment + 1].reshape(-1, 1)
        total += product
        start += size
    return total.reshape(*shape[:-1], weight.shape[0])


def _segment_of(columns: Sequence[int], segments: Sequence[int]) -> list[int]:
    """Index of the input segment that each column block lies in."""
    ends = torch.tensor(list(segments)).cumsum(0)
    starts = torch.tensor([0, *columns]).cumsum(0)[:-1]
    return torch.searchsorted(ends, starts, right=True).tolist()
