"""Number formats: from values to scales, codes and back, for every :class:`~hfquant.config.DType`.

Codes are integers (or, for FP8, FP16 and BF16, the bits of the float as an integer of equal width), so that a cast
of the model never touches them. Arithmetic is float32 whatever the input's dtype, rounding is half to even.
``dequantize(quantize(x)) = code * scale``; FP16 and BF16 are plain casts and carry no scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfquant.config import DType

#: Scales below the smallest normal float32 would make ``x / scale`` overflow or flush to zero.
MIN_SCALE = 2.0**-126

#: Magnitudes above this are clipped (by a millionth at most), or ``qmax * scale`` could round up to Inf.
_MAX_AMAX = torch.finfo(torch.float32).max * (1 - 2.0**-20)

_FLOAT_TYPES = {
    DType.FP8E4M3: torch.float8_e4m3fn,
    DType.FP8E5M2: torch.float8_e5m2,
    DType.FP16: torch.float16,
    DType.BF16: torch.bfloat16,
}


def qmax(dtype: DType) -> float:
    """Largest code: 2^(b-1) - 1 for b-bit integers, the largest finite value for floats."""
    return float(2 ** (dtype.bits - 1) - 1) if dtype.is_integer else torch.finfo(_FLOAT_TYPES[dtype]).max


def code_dtype(dtype: DType) -> torch.dtype:
    """The integer dtype that holds unpacked codes: int8, or int16 for the 16-bit formats."""
    return torch.int16 if dtype.bits == 16 else torch.int8


def scale_from_amax(amax: Tensor, dtype: DType) -> Tensor:
    """Symmetric scale ``amax / qmax`` (float32); 1 where amax is 0, never below 2^-126. NaN and Inf stay."""
    amax = amax.float()
    scale = (amax.clamp(max=_MAX_AMAX) / qmax(dtype)).clamp(min=MIN_SCALE)
    scale = torch.where(amax == 0, torch.ones_like(scale), scale)
    return torch.where(amax == torch.inf, amax, scale)


def scale_from_range(low: Tensor, high: Tensor, dtype: DType) -> tuple[Tensor, Tensor]:
    """Asymmetric scale and zero point of an integer format; the range is widened to contain 0.

    Returns:
        scale float32 ``(max - min) / (2^b - 1)`` and the integer zero point minus 2^(b-1), as codes are stored
        (int8, int16 for INT16). An all-zero range has scale 1 and (unshifted) zero point 0.
    """
    levels, offset = 2.0**dtype.bits - 1, 2.0 ** (dtype.bits - 1)
    # Rounding the zero point moves the range by up to half a step, which must not take it beyond float32.
    limit = torch.finfo(torch.float32).max * (1 - 1 / offset)
    low, high = low.float().clamp(-limit, 0), high.float().clamp(0, limit)
    # Halved before subtracting: max - min of float32 extremes overflows.
    scale = ((high / 2 - low / 2) / (levels / 2)).clamp(min=MIN_SCALE)
    scale = torch.where((low == 0) & (high == 0), torch.ones_like(scale), scale)
    zero_point = torch.round(-low / scale).clamp(0, levels) - offset
    return scale, zero_point.to(code_dtype(dtype))


def quantize(x: Tensor, scale: Tensor | None, dtype: DType, zero_point: Tensor | None = None) -> Tensor:
    """Codes of ``x``: ``clamp(round(x / scale))``, or the cast bits for float formats.

    Args:
        x: values, any float dtype.
        scale: float32, broadcastable to ``x``; None for FP16 and BF16.
        dtype: the format.
        zero_point: integer, broadcastable; asymmetric integer formats only (stored minus 2^(b-1), like the codes).

    Returns:
        Tensor of ``x``'s shape, int8 or int16.
    """
    if not dtype.is_scaled:
        return _cast(x, dtype).view(torch.int16)
    assert scale is not None
    q = x.float() / scale
    if not dtype.is_integer:
        return q.clamp_(-qmax(dtype), qmax(dtype)).to(_FLOAT_TYPES[dtype]).view(torch.int8)
    if zero_point is not None:
        half = 2 ** (dtype.bits - 1)
        return q.round_().add_(zero_point).clamp_(-half, half - 1).to(code_dtype(dtype))
    return q.round_().clamp_(-qmax(dtype), qmax(dtype)).to(code_dtype(dtype))


def _cast(x: Tensor, dtype: DType) -> Tensor:
    """FP16 or BF16, saturating where a plain cast would give Inf."""
    return x.float().clamp(-qmax(dtype), qmax(dtype)).to(_FLOAT_TYPES[dtype])


def code_values(
    codes: Tensor, dtype: DType, zero_point: Tensor | None = None, out: torch.dtype = torch.float32
) -> Tensor:
    """What codes stand for before the scale: integers (less the zero point), or the float that the bits spell."""
    if not dtype.is_integer:
        return codes.view(_FLOAT_TYPES[dtype]).to(out)
    values = codes.to(out)
    return values if zero_point is None else values - zero_point


def dequantize(codes: Tensor, scale: Tensor | None, dtype: DType, zero_point: Tensor | None = None) -> Tensor:
    """``(code - zero_point) * scale`` in float32; shapes and arguments as in :func:`quantize`."""
    values = code_values(codes, dtype, zero_point)
    return values if scale is None else values * scale


def fake_quantize(x: Tensor, scale: Tensor | None, dtype: DType, zero_point: Tensor | None = None) -> Tensor:
    """``dequantize(quantize(x))`` in float32, without the detour over integer codes; arguments as there."""
    if not dtype.is_scaled:
        return _cast(x, dtype).float()
    assert scale is not None
    q = x.float() / scale
    limit = qmax(dtype)
    if zero_point is not None:
        half = 2 ** (dtype.bits - 1)
        return q.round_().add_(zero_point).clamp_(-half, half - 1).sub_(zero_point).mul_(scale)
    if dtype.is_integer:
        return q.round_().clamp_(-limit, limit).mul_(scale)
    return q.clamp_(-limit, limit).to(_FLOAT_TYPES[dtype]).float().mul_(scale)


def expand_columns(scale: Tensor, sizes: Sequence[int]) -> Tensor:
    """Repeat one value a column group over its columns: [..., G] -> [..., sum(sizes)], without a copy when G = 1."""
    if len(sizes) == 1:
        return scale.expand(*scale.shape[:-1], sizes[0])
    if all(s == sizes[0] for s in sizes):
        return scale.unsqueeze(-1).expand(*scale.shape, sizes[0]).flatten(-2)
    return torch.cat([s.expand(*s.shape[:-1], n) for s, n in zip(scale.split(1, dim=-1), sizes, strict=True)], dim=-1)


def amax_columns(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Largest magnitude in each column group: [..., K] -> [..., G] float32."""
    low, high = range_columns(x, sizes)
    return torch.maximum(-low, high)


def range_columns(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Smallest and largest value in each column group: [..., K] -> two [..., G] float32."""
    x = x.float()
    # amin and amax are ten times faster than torch's aminmax along a dimension.
    if all(s == sizes[0] for s in sizes):
        x = x.unflatten(-1, (len(sizes), sizes[0]))
        return x.amin(-1), x.amax(-1)
    parts = x.split(list(sizes), dim=-1)
    return torch.stack([p.amin(-1) for p in parts], -1), torch.stack([p.amax(-1) for p in parts], -1)


def sum_columns(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sum over each column group: [..., K] -> [..., G]."""
    if all(s == sizes[0] for s in sizes):
        return x.unflatten(-1, (len(sizes), sizes[0])).sum(-1)
    return torch.stack([part.sum(-1) for part in x.split(list(sizes), dim=-1)], -1)
