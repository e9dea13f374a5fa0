"""Products of float inputs and integer codes: exact products, float32 sums, scaled one column block at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from hfquant.kernels.triton.programs.tiles import block_of, block_scale, finish, multiplied, unpacked, weight_tile


@triton.jit
def _add_columns(
    sums: tl.tensor,
    x: tl.tensor,
    divisor: tl.tensor,
    row: tl.tensor,
    zero: tl.tensor,
    in_m: tl.tensor,
    in_n: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    FLOAT32: tl.constexpr,
    VECTOR: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """Return ``sums`` with the columns from ``start`` added."""
    # Codes minus zero points are at most 255 in magnitude, exact in bfloat16.
    w = weight_tile(row, in_n, start, end, BITS, PAIRS, BN, BK).to(tl.float32)
    if zero is not None:
        w = w - zero[:, None].to(tl.float32)
    k = start + tl.arange(0, BK)
    a = tl.load(x[:, None] + k[None, :], mask=in_m[:, None] & (k < end)[None, :], other=0)
    if FLOAT32:
        a = a.to(tl.float32)
    if divisor is not None:
        a = tl.div_rn(a, tl.load(divisor + k, mask=k < end, other=1)[None, :])
    return multiplied(a, w.to(a.dtype), sums, VECTOR)


@triton.jit
def weight_only_product(
    x: tl.tensor,
    divisor: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    scale_row: tl.tensor,
    zero_point: tl.tensor,
    narrow: tl.tensor,
    up: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    blocks: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    G: tl.tensor,
    stride_x: tl.tensor,
    stride_weight: tl.tensor,
    stride_scale: tl.tensor,
    stride_zero: tl.tensor,
    stride_up: tl.tensor,
    rank: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PAIRS: tl.constexpr,
    FLOAT32: tl.constexpr,
    SINGLE: tl.constexpr,
    RANK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """Compute a tile of ``y = sum_g s_w[:, g] X_g (W_g - z_g)^T + narrow up^T + bias``.

    Args:
        x: [M, K] float, rows ``stride_x`` apart.
        divisor: [K] float32, by which ``x`` is divided first, or None.
        weight, scale, scale_row, zero_point: as stored, [N, ...].
        narrow, up, bias, y, rank, RANK: see ``tiles.finish``.
        blocks, GROUP, ALIGNED: see ``tiles.block_of``.
        M, N, G: tokens, output rows, column blocks.
        stride_x, stride_weight, stride_scale, stride_zero, stride_up: row strides.
        BITS: bits of a weight code.
        PAIRS: see ``tiles.weight_tile``.
        FLOAT32: whether to multiply in float32 whatever the dtype of ``x`` (always with ``divisor``).
        SINGLE: whether every block fits in BK columns.
        BM, BN, BK: tile shape; BM = 1 for few tokens.
    """
    tiles_m = tl.cdiv(M, BM)
    m = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    n = tl.program_id(0) // tiles_m * BN + tl.arange(0, BN)
    in_m, in_n = m < M, n < N
    row = weight + n.to(tl.int64) * stride_weight
    token = x + m.to(tl.int64) * stride_x
    total = tl.zeros((BM, BN), tl.float32)
    for g in range(G):
        start, end, _ = block_of(blocks, g, G, GROUP, ALIGNED)
        zero = None
        if zero_point is not None:
            zero = unpacked(zero_point + n.to(tl.int64) * stride_zero, g + tl.zeros((1,), tl.int32), in_n, BITS)
        sums = tl.zeros((BM, BN), tl.float32)
        if SINGLE:
            sums = _add_columns(
                sums, token, divisor, row, zero, in_m, in_n, start, end, BITS, PAIRS, FLOAT32, BM == 1, BN, BK
            )
        else:
            for k in range(start, end, BK):
                sums = _add_columns(
                    sums, token, divisor, row, zero, in_m, in_n, k, end, BITS, PAIRS, FLOAT32, BM == 1, BN, BK
                )
        total += sums * block_scale(scale, scale_row, n.to(tl.int64), in_n, g, stride_scale)[None, :]
    finish(total, m, n, in_m, in_n, narrow, up, bias, y, stride_up, N, rank, RANK, BM == 1)
