"""What the products have in common: tiles of weights as they are stored, their scales, and the last steps of a tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpacked(row: tl.tensor, column: tl.tensor, mask: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Return codes (int8) of a bit stream, see ``formats.packing``.

    Args:
        row: pointers to the first byte of each row, of a shape that broadcasts with ``column``.
        column: indices of codes.
        mask: what to read; the rest is 0.
        BITS: of a code, 2 to 8.
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
        # Up to the top and back down: the arithmetic shift extends the sign.
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
    """Return codes [BN, BK] int8 of the columns from ``start``, 0 from ``end`` on (but for a byte's second nibble).

    Args:
        row: pointers to the first byte of each row, [BN].
        in_n: which rows there are, [BN].
        start, end: first column, and the one after the last.
        BITS: of a code.
        PAIRS: whether codes are nibbles and ``start`` is even: then each byte is read once, and many in one go.
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
    """Return the scale [BN] float32 of block ``g`` of columns, in one level or two (see ``formats.scales``)."""
    value = tl.load(scale + n * stride + g, mask=in_n, other=0)
    if scale_row is not None:
        value = ((value.to(tl.int32) << 18) + (120 << 23)).to(tl.float32, bitcast=True)
        value *= tl.load(scale_row + n, mask=in_n, other=0)
    return value


@triton.jit
def block_of(blocks: tl.tensor, g: tl.tensor, G: tl.tensor, GROUP: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Return first column, the column after the last, and input segment of block ``g``.

    Args:
        blocks: [3, G] int32, the three of each block.
        g: index of the block.
        G: how many there are.
        GROUP: size of all blocks where it is one and there is one input segment (nothing is read then); else 0.
        ALIGNED: whether all blocks start and end at multiples of 16 (then 16 bytes are read at a time).
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
    """Return ``total + a b^T``: a [BM, BK], b [BN, BK] of one dtype, summed in ``total``'s (int32 or float32).

    Args:
        a, b, total: the tiles.
        VECTOR: whether BM is 1, which tensor cores cannot take.
    """
    if VECTOR:
        total += tl.sum(a.to(total.dtype) * b.to(total.dtype), 1)[None, :]
    else:
        # Three products of TF32 are as good as one of float32.
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
    """Add low-rank branch and bias to a tile [BM, BN] float32 of the product and store it in ``y``'s dtype.

    Args:
        total: the tile.
        m, n, in_m, in_n: its rows and columns, and which there are.
        narrow: [tokens, rank] float32, the input times ``down^T``; None without a branch.
        up, bias: [out, rank] and [out], any float dtype, or None.
        y: the output [tokens, out].
        stride_up, stride_y: of rows.
        rank: of the branch.
        RANK: the same, rounded up to a power of two, at least 16.
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
