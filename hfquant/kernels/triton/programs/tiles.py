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
def weight_tile(
    row: tl.tensor,
    in_n: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """Return codes [BN, BK] int8 of the columns from ``start``, 0 from ``end`` on (except a byte's second nibble).

    Args:
        row: pointers to the first byte of each row, [BN].
        in_n: which rows exist, [BN].
        start, end: first column, end column (exclusive).
        BITS: bits of a code.
        PAIRS: whether codes are nibbles and ``start`` is even; each byte is then read once, in wide loads.
        BN, BK: shape of the tile.
    """
    if PAIRS:
        byte = start // 2 + tl.arange(0, BK // 2)
        mask = in_n[:, None] & (byte * 2 < end)[None, :]
        pair = tl.load(row[:, None] + byte[None, :], mask=mask, other=0).to(tl.int32)
        low = ((pair << 28) >> 28).to(tl.int8)
        tile = tl.reshape(tl.join(low, (pair >> 4).to(tl.int8)), (BN, BK))
    else:
        column = start + tl.arange(0, BK)
        tile = unpacked(row[:, None], column[None, :], in_n[:, None] & (column < end)[None, :], BITS)
    return tile


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
def block_of(blocks: tl.tensor, g: tl.tensor, G: tl.tensor, GROUP: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Return first column, end column (exclusive) and input segment of block ``g``.

    Args:
        blocks: [3, G] int32, these three for each block.
        g: index of the block.
        G: number of blocks.
        GROUP: the block size if all blocks have the same and there is one input segment (nothing is read then), else 0.
        ALIGNED: whether all blocks start and end at multiples of 16 (then 16 bytes are loaded at a time).
    """
    if GROUP > 0:
        start, end, segment = g * GROUP, (g + 1) * GROUP, 0
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
    RANK: tl.constexpr,
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
        RANK: the rank rounded up to a power of two, at least 16.
        VECTOR: whether BM is 1.
    """
    if narrow is not None:
        r = tl.arange(0, RANK)
        left = tl.load(
            narrow + m[:, None].to(tl.int64) * rank + r[None, :], mask=in_m[:, None] & (r < rank)[None, :], other=0
        )
        right = tl.load(
            up + n[:, None].to(tl.int64) * stride_up + r[None, :], mask=in_n[:, None] & (r < rank)[None, :], other=0
        )
        total = multiplied(left, right.to(tl.float32), total, VECTOR)
    if bias is not None:
        total += tl.load(bias + n, mask=in_n, other=0).to(tl.float32)[None, :]
    place = y + m[:, None].to(tl.int64) * stride_y + n[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
