"""Products of float inputs and integer codes: exact products, float32 sums, scaled one column block at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from hfquant.kernels.triton.programs.tiles import block_of, block_scale, finish, multiplied, weight_tile, zero_of


@triton.jit
def _add_columns(
    sums: tl.tensor,
    x: tl.tensor,
    row: tl.tensor,
    zero: tl.tensor,
    in_m: tl.tensor,
    in_n: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    BITS: tl.constexpr,
    SETS: tl.constexpr,
    FLOAT32: tl.constexpr,
    VECTOR: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """Return ``sums`` with the columns from ``start`` added."""
    # Codes minus zero points are at most 255 in magnitude, exact in bfloat16.
    w = weight_tile(row, in_n, start, end, BITS, SETS, BN, BK).to(tl.float32)
    if zero is not None:
        w = w - zero[:, None].to(tl.float32)
    k = start + tl.arange(0, BK)
    a = tl.load(x[:, None] + k[None, :], mask=in_m[:, None] & (k < end)[None, :], other=0)
    if FLOAT32:
        a = a.to(tl.float32)
    return multiplied(a, w.to(a.dtype), sums, VECTOR)


@triton.jit
def weight_only_product(
    x: tl.tensor,
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
    SETS: tl.constexpr,
    FLOAT32: tl.constexpr,
    STEPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Compute a tile of ``y = sum_g s_w[:, g] X_g (W_g - z_g)^T + narrow up^T + bias``.

    Args:
        x: [M, K] float, rows ``stride_x`` apart.
        weight, scale, scale_row, zero_point: as stored, [N, ...].
        narrow, up, bias, y, rank: see ``tiles.finish``.
        blocks, GROUP, ALIGNED: see ``tiles.block_of``.
        M, N, G: tokens, output rows, column blocks.
        stride_x, stride_weight, stride_scale, stride_zero, stride_up: row strides.
        BITS: bits of a weight code.
        SETS: see ``tiles.weight_tile``.
        FLOAT32: whether to multiply in float32 whatever the dtype of ``x``.
        STEPS: steps of BK columns in each block, if all have the same number; 0 if not, or if there is one block.
        BM, BN, BK: tile shape; BM = 1 for few tokens.
        STAGES: steps whose loads are in flight.
    """
    tiles_m = tl.cdiv(M, BM)
    m = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    n = tl.program_id(0) // tiles_m * BN + tl.arange(0, BN)
    in_m, in_n = m < M, n < N
    row = weight + n.to(tl.int64) * stride_weight
    token = x + m.to(tl.int64) * stride_x
    total = tl.zeros((BM, BN), tl.float32)
    sums = tl.zeros((BM, BN), tl.float32)
    if STEPS > 0:
        # One loop for all blocks: between two loops, no load would be in flight.
        for i in tl.range(0, G * STEPS, num_stages=STAGES):
            g = i // STEPS
            start, end, _ = block_of(blocks, g, G, GROUP, 1, ALIGNED)
            zero = zero_of(zero_point, n, in_n, g, stride_zero, BITS)
            k = start + i % STEPS * BK
            sums = _add_columns(sums, token, row, zero, in_m, in_n, k, end, BITS, SETS, FLOAT32, BM == 1, BN, BK)
            if i % STEPS == STEPS - 1:
                total += sums * block_scale(scale, scale_row, n.to(tl.int64), in_n, g, stride_scale)[None, :]
                sums = tl.zeros((BM, BN), tl.float32)
    else:
        for g in range(G):
            start, end, _ = block_of(blocks, g, G, GROUP, 1, ALIGNED)
            zero = zero_of(zero_point, n, in_n, g, stride_zero, BITS)
            sums = tl.zeros((BM, BN), tl.float32)
            for k in tl.range(start, end, BK, num_stages=STAGES):
                sums = _add_columns(sums, token, row, zero, in_m, in_n, k, end, BITS, SETS, FLOAT32, BM == 1, BN, BK)
            total += sums * block_scale(scale, scale_row, n.to(tl.int64), in_n, g, stride_scale)[None, :]
    finish(total, m, n, in_m, in_n, narrow, up, bias, y, stride_up, N, rank, BM == 1)
