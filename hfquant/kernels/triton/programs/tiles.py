"""Device code shared by the products: weight tiles as stored, their scales, and the epilogue of a tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpacked(row: tl.tensor, column: tl.tensor, mask: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Return codes (int8) unpacked from a bit stream; see ``formats.packing``.

    Args:
        row: pointers to the first byte of each row, broadcastable with ``column``.
        column: indices of the codes.
        mask: which codes to read; the rest are 0.
        BITS: bits of a code, 2 to 8.
    """
    if BITS == 8:
        code = tl.load(row + column, mask=mask, other=0)
    else:
        bit = column * BITS
        shift = bit & 7
        word = tl.load(row + (bit >> 3), mask=mask, other=0).to(tl.int32) & 255
        if 8 % BITS != 0:
            following = tl.load(row + (bit >> 3) + 1, mask=mask & (shift > 8 - BITS), other=0).to(tl.int32)
            word = word | (following << 8)
        # Shift to the top and back down: the arithmetic shift extends the sign.
        code = ((word << (32 - BITS - shift)) >> (32 - BITS)).to(tl.int8)
    return code


@triton.jit
def _codes_of_words(
    word: tl.tensor,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Return codes FIRST, FIRST + STEP, ... of words that hold CODES codes each, as int8 [*word.shape, 2, 2, ...]."""
    if STEP == CODES:
        # Shift to the top and back down: the arithmetic shift extends the sign.
        code = ((word << (WIDTH - BITS * (FIRST + 1))) >> (WIDTH - BITS)).to(tl.int8)
    else:
        code = tl.join(
            _codes_of_words(word, FIRST, STEP * 2, BITS, CODES, WIDTH),
            _codes_of_words(word, FIRST + STEP, STEP * 2, BITS, CODES, WIDTH),
        )
    return code


@triton.jit
def weight_tile(
    row: tl.tensor,
    in_n: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    BITS: tl.constexpr,
    SETS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """Return codes [BN, BK] int8 of the columns from ``start``, 0 from ``end`` on (except in the set of the last one).

    Args:
        row: pointers to the first byte of each row, [BN].
        in_n: which rows exist, [BN].
        start, end: first column, end column (exclusive).
        BITS: bits of a code.
        SETS: whether ``start`` is the first code of a set: the fewest codes that fill whole bytes (see
            ``host.codes_per_set``). Each byte is then read once, and nibbles and smaller codes in wide loads.
        BN, BK: shape of the tile.
    """
    if SETS and BITS < 8:
        CODES: tl.constexpr = 8 if BITS % 2 == 1 else 4 if BITS % 4 == 2 else 2
        BYTES: tl.constexpr = CODES * BITS // 8
        byte = start // CODES * BYTES + tl.arange(0, BK // CODES) * BYTES
        # This is ceil(end * BITS / 8), written so that the compiler sees how many bytes share a mask: a mask per byte
        # forbids wide loads.
        limit = end - end * (8 - BITS) // 8
        WIDTH: tl.constexpr = 32 if BYTES <= 4 else 64
        word = tl.zeros((BN, BK // CODES), tl.int32 if WIDTH == 32 else tl.int64)
        for i in tl.static_range(BYTES):
            mask = in_n[:, None] & (byte + i < limit)[None, :]
            part = tl.load(row[:, None] + (byte + i)[None, :], mask=mask, other=0)
            word |= (part.to(word.dtype) & 255) << (8 * i)
        tile = tl.reshape(_codes_of_words(word, 0, 1, BITS, CODES, WIDTH), (BN, BK))
    else:
        column = start + tl.arange(0, BK)
        tile = unpacked(row[:, None], column[None, :], in_n[:, None] & (column < end)[None, :], BITS)
    return tile


@triton.jit
def zero_of(
    zero_point: tl.tensor, n: tl.tensor, in_n: tl.tensor, g: tl.tensor, stride: tl.tensor, BITS: tl.constexpr
) -> tl.tensor:
    """Return the zero points [BN] int8 of column block ``g``; None if there are none."""
    zero = None
    if zero_point is not None:
        zero = unpacked(zero_point + n.to(tl.int64) * stride, g + tl.zeros((1,), tl.int32), in_n, BITS)
    return zero


@triton.jit
def block_scale(
    scale: tl.tensor, scale_row: tl.tensor, n: tl.tensor, in_n: tl.tensor, g: tl.tensor, stride: tl.tensor
) -> tl.tensor:
    """Return the scale [BN] float32 of column block ``g``, stored in one level or two (see ``formats.scales``)."""
    value = tl.load(scale + n * stride + g, mask=in_n, other=0)
    if scale_row is not None:
        value = ((value.to(tl.int32) << 18) + (120 << 23)).to(tl.float32, bitcast=True)
        value *= tl.load(scale_row + n, mask=in_n, other=0)
    return value


@triton.jit
def block_of(
    blocks: tl.tensor,
    g: tl.tensor,
    G: tl.tensor,
    GROUP: tl.constexpr,
    IN_SEGMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Return first column, end column (exclusive) and input segment of block ``g``.

    Args:
        blocks: [3, G] int32, these three for each block; None with GROUP.
        g: index of the block.
        G: number of blocks.
        GROUP: the block size if all blocks, and all input segments, have the same size, else 0.
        IN_SEGMENT: with GROUP, number of blocks in an input segment.
        ALIGNED: whether all blocks start and end at multiples of 16 (then 16 bytes are loaded at a time).
    """
    if GROUP > 0:
        start, end, segment = g * GROUP, (g + 1) * GROUP, g // IN_SEGMENT
    else:
        start, end, segment = tl.load(blocks + g), tl.load(blocks + G + g), tl.load(blocks + 2 * G + g)
        if ALIGNED:
            start, end = tl.multiple_of(start, 16), tl.multiple_of(end, 16)
    return start, end, segment


@triton.jit
def multiplied(a: tl.tensor, b: tl.tensor, total: tl.tensor, VECTOR: tl.constexpr) -> tl.tensor:
    """Return ``total + a b^T``: a [BM, BK], b [BN, BK] of one dtype, accumulated in ``total``'s (int32 or float32).

    Args:
        a, b, total: the tiles.
        VECTOR: whether BM is 1, which tensor cores do not support.
    """
    if VECTOR:
        total += tl.sum(a.to(total.dtype) * b.to(total.dtype), 1)[None, :]
    else:
        # Three TF32 products are as precise as one in float32.
        total = tl.dot(a, tl.trans(b), total, input_precision="tf32x3", out_dtype=total.dtype)
    return total


@triton.jit
def finish(
    total: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    in_m: tl.tensor,
    in_n: tl.tensor,
    narrow: tl.tensor,
    up: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    stride_up: tl.tensor,
    stride_y: tl.tensor,
    rank: tl.tensor,
    VECTOR: tl.constexpr,
) -> None:
    """Apply the epilogue to a tile [BM, BN] float32: add low-rank branch and bias, store in ``y``'s dtype.

    Args:
        total: the tile.
        m, n, in_m, in_n: indices of its rows and columns, and which of them exist.
        narrow: [tokens, rank] float32, the input times ``down^T``; None without a branch.
        up, bias: [out, rank] and [out], any float dtype, or None.
        y: the output [tokens, out].
        stride_up, stride_y: row strides.
        rank: rank of the branch.
        VECTOR: whether BM is 1.
    """
    if narrow is not None:
        # In short steps, and not pipelined: of a high rank, the whole tiles would not fit shared memory and registers.
        left = narrow + m[:, None].to(tl.int64) * rank
        right = up + n[:, None].to(tl.int64) * stride_up
        for first in tl.range(0, rank, 32, num_stages=1):
            r = first + tl.arange(0, 32)[None, :]
            a = tl.load(left + r, mask=in_m[:, None] & (r < rank), other=0)
            b = tl.load(right + r, mask=in_n[:, None] & (r < rank), other=0)
            total = multiplied(a, b.to(tl.float32), total, VECTOR)
    if bias is not None:
        total += tl.load(bias + n, mask=in_n, other=0).to(tl.float32)[None, :]
    place = y + m[:, None].to(tl.int64) * stride_y + n[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
