"""Quantize activations, some tokens of one segment per program; results equal ``formats.inputs.InputRule``."""

from __future__ import annotations

import triton
import triton.language as tl

#: The largest finite float32. A value above it, or NaN, spoils its token: the output is NaN.
_LARGEST = tl.constexpr(3.4028234663852886e38)
_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def _loaded(
    x: tl.tensor, divisor: tl.tensor, in_m: tl.tensor, start: tl.tensor, end: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Return values [ROWS, BLOCK] float32 from column ``start``, 0 from ``end`` on; ``x`` are [ROWS] pointers."""
    k = start + tl.arange(0, BLOCK)
    value = tl.load(x[:, None] + k[None, :], mask=in_m[:, None] & (k < end)[None, :], other=0).to(tl.float32)
    if divisor is not None:
        value = tl.div_rn(value, tl.load(divisor + k, mask=k < end, other=1)[None, :])
    return value


@triton.jit
def _range(value: tl.tensor, low: tl.tensor, high: tl.tensor, spoiled: tl.tensor) -> tl.tensor:
    """Widen ``low`` <= 0 <= ``high`` [ROWS] by values [ROWS, BLOCK]; ``spoiled`` becomes 1 if one is not finite."""
    finite = tl.abs(value) <= _LARGEST
    value = tl.where(finite, value, 0.0)
    bad = tl.max(tl.where(finite, 0, 1), 1)
    return tl.minimum(low, tl.min(value, 1)), tl.maximum(high, tl.max(value, 1)), tl.maximum(spoiled, bad)


@triton.jit
def _range_of_rows(
    x: tl.tensor,
    divisor: tl.tensor,
    in_m: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return minimum and maximum of the columns' values and 0, and whether one is not finite, [ROWS] each."""
    low, high = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    spoiled = tl.zeros((ROWS,), tl.int32)
    for k in range(start, end, BLOCK):
        low, high, spoiled = _range(_loaded(x, divisor, in_m, k, end, BLOCK), low, high, spoiled)
    return low, high, spoiled


@triton.jit
def _exponent(value: tl.tensor) -> tl.tensor:
    """Return exponent and mantissa bits of a positive float32; only their order and differences matter."""
    tiny = value < _NORMAL
    bits = tl.where(tiny, value * 4294967296.0, value).to(tl.int32, bitcast=True)
    return (bits >> 23) - tl.where(tiny, 32, 0), bits & 0x7FFFFF


@triton.jit
def _dual_exponent(low: tl.tensor, high: tl.tensor, most: tl.tensor) -> tl.tensor:
    """Return ``floor(log2(high / -low))`` clamped to [0, most], like ``inputs.dual_exponent``."""
    i, a = _exponent(high)
    j, b = _exponent(-low)
    exponent = i - j - tl.where(a < b, 1, 0)
    exponent = tl.where(low == 0.0, most, exponent)
    exponent = tl.where(high == 0.0, 0, exponent)
    return tl.minimum(tl.maximum(exponent, 0), most)


@triton.jit
def _nearest(value: tl.tensor) -> tl.tensor:
    """Round half to even: below 2^22 in magnitude the sum has no fractional bits."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _float_code(value: tl.tensor, MANTISSA: tl.constexpr) -> tl.tensor:
    """Return the bits (int32) of the FP8 nearest to a value in range: E4M3 with 3 mantissa bits, E5M2 with 2."""
    BIAS: tl.constexpr = 7 if MANTISSA == 3 else 15
    SHIFT: tl.constexpr = 23 - MANTISSA
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + ((1 << (SHIFT - 1)) - 1) + ((size >> SHIFT) & 1)) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number, codes are evenly spaced.
    small = tl.minimum(tl.abs(value), 2.0 ** (1 - BIAS))
    steps = _nearest(small * 2.0 ** (BIAS - 1 + MANTISSA)).to(tl.int32)
    return tl.where(tl.abs(value) < 2.0 ** (1 - BIAS), steps, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _columns_of(segments: tl.tensor, s: tl.tensor, S: tl.tensor, size: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """Return first and end column (exclusive) of segment ``s``.

    Args:
        segments: [3, S] int32: first column, end column, largest dual-scale exponent; None if all are alike.
        s, S: index and number of segments.
        size: size of a segment, if all are alike.
        ALIGNED: whether all segments start and end at multiples of 16 (then 16 bytes are loaded at a time).
    """
    if segments is None:
        start, end = s * size, (s + 1) * size
    else:
        start, end = tl.load(segments + s), tl.load(segments + S + s)
    if ALIGNED:
        start, end = tl.multiple_of(start, 16), tl.multiple_of(end, 16)
    return start, end


@triton.jit
def ranges(
    x: tl.tensor,
    divisor: tl.tensor,
    low_out: tl.tensor,
    high_out: tl.tensor,
    segments: tl.tensor,
    M: tl.tensor,
    S: tl.tensor,
    size: tl.tensor,
    stride_x: tl.tensor,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store minimum and maximum of each token's values and 0, [M, S] float32, NaN if a value is not finite.

    Args:
        x: [M, K] float, rows ``stride_x`` apart.
        divisor: [K] float32 or None.
        low_out, high_out: the outputs.
        segments, M, S, size, ALIGNED: see :func:`quantize`.
        stride_x: row stride.
        ROWS, BLOCK: tokens per program, columns read at a time.
    """
    m, s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    in_m = m < M
    start, end = _columns_of(segments, s, S, size, ALIGNED)
    low, high, spoiled = _range_of_rows(x + m * stride_x, divisor, in_m, start, end, ROWS, BLOCK)
    spoil = tl.where(spoiled != 0, float("nan"), 0.0)
    tl.store(low_out + m * S + s, low + spoil, mask=in_m)
    tl.store(high_out + m * S + s, high + spoil, mask=in_m)


@triton.jit
def quantize(
    x: tl.tensor,
    divisor: tl.tensor,
    given: tl.tensor,
    given_neg: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    segments: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    S: tl.tensor,
    size: tl.tensor,
    stride_x: tl.tensor,
    stride_plane: tl.tensor,
    QMAX: tl.constexpr,
    LIMIT: tl.constexpr,
    DUAL: tl.constexpr,
    MOST: tl.constexpr,
    ALIGNED: tl.constexpr,
    MANTISSA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,
) -> None:
    """Store codes [planes, M, K] int8 of ``x`` and their scales [M, S] float32, NaN if a value is not finite.

    Args:
        x: [M, K] float, rows ``stride_x`` apart.
        divisor: [K] float32 or None.
        given, given_neg: [S] float32, scales of the positive and the negative side; None to use the token's range.
        codes: one plane, or two with DUAL: ``code = 256 * second + first``.
        scales: the outputs; with DUAL, those of the negative side.
        segments, size, ALIGNED: see ``_columns_of``.
        M, K, S: tokens, columns, segments.
        stride_x, stride_plane: strides between rows of ``x`` and between planes of codes.
        QMAX: largest value that a code stands for.
        LIMIT: magnitudes are clipped to this before scales are computed.
        DUAL: whether any segment has dual scale.
        MOST: largest dual-scale exponent, if all segments are alike.
        MANTISSA: mantissa bits of FP8; 0 for integers.
        ROWS, BLOCK: tokens per program, columns at a time.
        ONE: whether every segment fits one block and is read only once.
    """
    m, s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    in_m = m < M
    start, end = _columns_of(segments, s, S, size, ALIGNED)
    row = x + m * stride_x
    if ONE:
        value = _loaded(row, divisor, in_m, start, end, BLOCK)
        low, high, spoiled = _range(value, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32), 0)
    else:
        low, high, spoiled = _range_of_rows(row, divisor, in_m, start, end, ROWS, BLOCK)
    if given is None:
        amax = tl.minimum(tl.maximum(-low, high), LIMIT)
        positive = tl.where(amax == 0.0, 1.0, tl.maximum(tl.div_rn(amax, QMAX), _NORMAL))
        negative = positive
        if DUAL:
            most = MOST if segments is None else tl.load(segments + 2 * S + s)
            exponent = _dual_exponent(low, high, most)
            negative = positive * ((127 - exponent) << 23).to(tl.float32, bitcast=True)
            negative = tl.where(negative < _NORMAL, positive, negative)
    else:
        positive = tl.load(given + s) + tl.zeros((ROWS,), tl.float32)
        negative = tl.load(given_neg + s) + tl.zeros((ROWS,), tl.float32) if DUAL else positive
    spoil = tl.where(spoiled != 0, float("nan"), 0.0)
    tl.store(scales + m * S + s, negative + spoil, mask=in_m)
    if ONE:
        _store(value, in_m, start, end, codes + m * K, stride_plane, positive, negative, QMAX, DUAL, MANTISSA, BLOCK)
    else:
        for k in range(start, end, BLOCK):
            value = _loaded(row, divisor, in_m, k, end, BLOCK)
            _store(value, in_m, k, end, codes + m * K, stride_plane, positive, negative, QMAX, DUAL, MANTISSA, BLOCK)


@triton.jit
def _store(
    value: tl.tensor,
    in_m: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    codes: tl.tensor,
    plane: tl.tensor,
    positive: tl.tensor,
    negative: tl.tensor,
    QMAX: tl.constexpr,
    DUAL: tl.constexpr,
    MANTISSA: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store the codes of values [ROWS, BLOCK] from column ``start``; scales ``positive``, ``negative`` are [ROWS]."""
    k = start + tl.arange(0, BLOCK)
    mask = in_m[:, None] & (k < end)[None, :]
    codes = codes[:, None] + k[None, :]
    below = value < 0.0
    steps = tl.div_rn(value, tl.where(below, negative[:, None], positive[:, None]))
    # A token with a NaN already has a NaN scale; its codes can be any number.
    steps = tl.where(steps == steps, steps, 0.0)
    steps = tl.minimum(tl.maximum(steps, -QMAX), QMAX)
    if MANTISSA > 0:
        code = _float_code(steps, MANTISSA)
    else:
        code = _nearest(steps)
        if DUAL:
            code = tl.where(below, code, code * tl.div_rn(positive, negative)[:, None])
        code = code.to(tl.int32)
    if DUAL:
        second = (code + 128) >> 8
        tl.store(codes + plane, second.to(tl.int8), mask=mask)
        code = code - second * 256
    tl.store(codes, code.to(tl.int8), mask=mask)
