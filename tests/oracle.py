"""An independent implementation of the number formats, in numpy's float64 and Python's integers, to test hfquant with.

Nothing here uses hfquant or torch. Formats have their names from JSON ("int4", "fp8e4m3", ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import numpy as np

INTEGERS = {f"int{bits}": bits for bits in (2, 3, 4, 5, 6, 7, 8, 16)}
#: bits, exponent bits, mantissa bits, bias, whether the top exponent is Inf and NaN (E4M3 has only S.1111.111 as NaN).
FLOATS = {
    "fp8e4m3": (8, 4, 3, 7, False),
    "fp8e5m2": (8, 5, 2, 15, True),
    "fp16": (16, 5, 10, 15, True),
    "bf16": (16, 8, 7, 127, True),
}


@cache
def decode(dtype: str) -> np.ndarray:
    """Return the value of every bit pattern of a float format, indexed by the pattern as an unsigned integer."""
    bits, exponent_bits, mantissa_bits, bias, has_inf = FLOATS[dtype]
    codes = np.arange(2**bits)
    sign = np.where(codes >> (bits - 1), -1.0, 1.0)
    exponent = (codes >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = (codes & (2**mantissa_bits - 1)) / 2.0**mantissa_bits
    normal, top = exponent > 0, exponent == 2**exponent_bits - 1
    values = sign * np.where(normal, 1 + mantissa, mantissa) * 2.0 ** (np.where(normal, exponent, 1) - bias)
    if has_inf:
        return np.where(top, np.where(mantissa == 0, sign * np.inf, np.nan), values)
    return np.where(top & (mantissa == 1 - 2.0**-mantissa_bits), np.nan, values)


def largest(dtype: str) -> float:
    """Return the largest code: 2^(b-1) - 1, or the largest finite value."""
    if dtype in INTEGERS:
        return 2.0 ** (INTEGERS[dtype] - 1) - 1
    values = decode(dtype)
    return float(values[np.isfinite(values)].max())


def nearest(q: np.ndarray, dtype: str) -> np.ndarray:
    """Round ``q`` to the nearest values of ``dtype``, saturating; ties go to the even code."""
    q = np.clip(np.asarray(q, np.float64), -largest(dtype), largest(dtype))
    if dtype in INTEGERS:
        return np.rint(q)
    positive = decode(dtype)[: 2 ** (FLOATS[dtype][0] - 1)]
    positive = positive[np.isfinite(positive)]
    above = np.searchsorted(positive, np.abs(q)).clip(max=len(positive) - 1)
    below = (above - 1).clip(min=0)
    middle = (positive[below] + positive[above]) / 2
    up = (np.abs(q) > middle) | ((np.abs(q) == middle) & (above % 2 == 0))
    return np.sign(q) * np.where(up, positive[above], positive[below])


def scale_of(amax: float, dtype: str) -> np.float32:
    """Return amax / qmax as float32; 1 if amax is 0, at least 2^-126."""
    return np.float32(1) if amax == 0 else np.float32(max(float(amax) / largest(dtype), 2.0**-126))


def codes_of(x: np.ndarray, scale: np.ndarray | None, dtype: str) -> np.ndarray:
    """Return the code values of float32 ``x``: the quotient rounded to float32, then to the format."""
    x = np.asarray(x, np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        return nearest(x if scale is None else (x / np.asarray(scale, np.float64)).astype(np.float32), dtype)


def group_scale(code: int) -> float:
    """Return the value of a group scale's byte: 3 bits of exponent, 5 of mantissa."""
    exponent, mantissa = divmod(int(code), 32)
    return 2.0 ** (exponent - 7) * (1 + mantissa / 32)


def unpacked(row: bytes, bits: int, columns: int) -> list[int]:
    """Unpack the codes of a packed row: a little-endian bit stream of two's complement integers."""
    stream = int.from_bytes(row, "little")
    codes = [(stream >> (j * bits)) % 2**bits for j in range(columns)]
    return [c - 2**bits if c >= 2 ** (bits - 1) else c for c in codes]


def exponent_of(low: float, high: float, dtype: str) -> int:
    """Return DualScale's e = floor(log2(s+ / s-)) in [0, 15 - (b - 1)], in exact arithmetic."""
    most = 15 - (INTEGERS[dtype] - 1)
    if high <= 0:
        return 0
    e = 0
    while e < most and Fraction(float(high)) >= 2 ** (e + 1) * Fraction(max(-float(low), 0.0)):
        e += 1
    return e


def activation(
    x: np.ndarray, dtype: str, axis: int | None, segments: Sequence[int], dual: Sequence[bool]
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize activations [..., in] dynamically; return their float64 values and the step of each element."""
    x = np.asarray(x, np.float32)
    if dtype in ("fp16", "bf16"):
        return codes_of(x, None, dtype), np.zeros_like(x, np.float64)
    values, steps, start = np.zeros(x.shape), np.zeros(x.shape), 0
    for size, is_dual in zip(segments, dual, strict=True):
        block = (..., slice(start, start + size))
        rows = [()] if axis is None else list(np.ndindex(*x.shape[:-1]))
        for row in rows:
            part = x[block] if axis is None else x[row][block]
            pos = scale_of(np.abs(part).max(), dtype)
            e = exponent_of(part.min(), part.max(), dtype) if is_dual else 0
            step = np.where(part < 0, np.float64(pos) / 2.0**e, np.float64(pos))
            where = block if axis is None else (*row, slice(start, start + size))
            values[where], steps[where] = codes_of(part, step, dtype) * step, step
        start += size
    return values, steps
