"""Products of integer codes: exact int32 sums, scaled to float32 one column block at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from hfquant.kernels.triton.programs.tiles import block_of, block_scale, finish, multiplied, weight_tile, zero_of


@triton.jit
def _add_columns(
    sums: tl.tensor,
    high: tl.tensor,
    codes: tl.tensor,
    plane: tl.tensor,
    row: tl.tensor,
    zero: tl.tensor,
    in_m: tl.tensor,
    in_n: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    SETS: tl.constexpr,
    VECTOR: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """Return ``sums`` and ``high`` (the second plane's sums, unchanged with one plane) with the columns added."""
    w = weight_tile(row, in_n, start, end, BITS, SETS, BN, BK)
    # Codes of fewer than 8 bits minus their zero points still fit int8; 8-bit codes do not.
    if zero is not None and BITS < 8:
        w = w - zero[:, None]
    k = start + tl.arange(0, BK)
    mask = in_m[:, None] & (k < end)[None, :]
    a = tl.load(codes[:, None] + k[None, :], mask=mask, other=0)
    sums = multiplied(a, w, sums, VECTOR)
    if zero is not None and BITS == 8:
        sums -= tl.sum(a.to(tl.int32), 1)[:, None] * zero[None, :].to(tl.int32)
    if PLANES == 2:
        a = tl.load(codes[:, None] + plane + k[None, :], mask=mask, other=0)
        high = multiplied(a, w, high, VECTOR)
        if zero is not None and BITS == 8:
            high -= tl.sum(a.to(tl.int32), 1)[:, None] * zero[None, :].to(tl.int32)
    return sums, high


@triton.jit
def _scaled(
    sums: tl.tensor,
    high: tl.tensor,
    input_scale: tl.tensor,
    scale: tl.tensor,
    scale_row: tl.tensor,
    in_m: tl.tensor,
    n: tl.tensor,
    in_n: tl.tensor,
    g: tl.tensor,
    stride_scale: tl.tensor,
    PLANES: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """Return the float32 product of block ``g``, given its sums and pointers to the scales of its input segment."""
    if PLANES == 2:
        sums = (high.to(tl.int64) * 256 + sums) if WIDE else high * 256 + sums
    s_w = block_scale(scale, scale_row, n.to(tl.int64), in_n, g, stride_scale)
    s_x = tl.load(input_scale, mask=in_m, other=0)
    return sums.to(tl.float32) * s_w[None, :] * s_x[:, None]


@triton.jit
def integer_product(
    codes: tl.tensor,
    input_scale: tl.tensor,
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
    K: tl.tensor,
    G: tl.tensor,
    S: tl.tensor,
    stride_plane: tl.tensor,
    stride_weight: tl.tensor,
    stride_scale: tl.tensor,
    stride_zero: tl.tensor,
    stride_up: tl.tensor,
    rank: tl.tensor,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    IN_SEGMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SETS: tl.constexpr,
    STEPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Compute a tile of ``y = sum_g s_x s_w[:, g] (X_g W_g^T - z_g rowsum(X_g)) + narrow up^T + bias``.

    Args:
        codes: [PLANES, M, K] int8 input codes; with two planes a code is ``256 * second + first``.
        input_scale: [M, S] float32, NaN if the token's output must be NaN.
        weight, scale, scale_row, zero_point: as stored, [N, ...].
        narrow, up, bias, y, rank: see ``tiles.finish``.
        blocks, GROUP, IN_SEGMENT, ALIGNED: see ``tiles.block_of``.
        M, N, K, G, S: tokens, output rows, columns, column blocks and input segments.
        stride_plane: stride between the planes of ``codes``.
        stride_weight, stride_scale, stride_zero, stride_up: row strides.
        BITS: bits of a weight code.
        PLANES: 1, or 2 for codes of up to 16 bits.
        WIDE: whether a block's sum may exceed 32 bits (two planes).
        SETS: see ``tiles.weight_tile``.
        STEPS: steps of BK columns in each block, if all have the same number; 0 if not, or if there is one block.
        BM, BN, BK: tile shape; BM = 1 for few tokens.
        STAGES: steps whose loads are in flight.
    """
    # Neighboring programs share a weight tile, so it is read from memory once.
    tiles_m = tl.cdiv(M, BM)
    m = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    n = tl.program_id(0) // tiles_m * BN + tl.arange(0, BN)
    in_m, in_n = m < M, n < N
    row = weight + n.to(tl.int64) * stride_weight
    code = codes + m.to(tl.int64) * K
    total = tl.zeros((BM, BN), tl.float32)
    token_scale = input_scale + m.to(tl.int64) * S
    # A loop cannot carry None.
    none = tl.zeros((BM, BN) if PLANES == 2 else (1, 1), tl.int32)
    sums, high = tl.zeros((BM, BN), tl.int32), none
    if STEPS > 0:
        # One loop for all blocks: between two loops, no load would be in flight.
        for i in tl.range(0, G * STEPS, num_stages=STAGES):
            g = i // STEPS
            start, end, segment = block_of(blocks, g, G, GROUP, IN_SEGMENT, ALIGNED)
            zero = zero_of(zero_point, n, in_n, g, stride_zero, BITS)
            k = start + i % STEPS * BK
            sums, high = _add_columns(
                sums, high, code, stride_plane, row, zero, in_m, in_n, k, end, BITS, PLANES, SETS, BM == 1, BN, BK
            )
            if i % STEPS == STEPS - 1:
                total += _scaled(
                    sums, high, token_scale + segment, scale, scale_row, in_m, n, in_n, g, stride_scale, PLANES, WIDE
                )
                sums, high = tl.zeros((BM, BN), tl.int32), none
    else:
        for g in range(G):
            start, end, segment = block_of(blocks, g, G, GROUP, IN_SEGMENT, ALIGNED)
            zero = zero_of(zero_point, n, in_n, g, stride_zero, BITS)
            sums, high = tl.zeros((BM, BN), tl.int32), none
            for k in tl.range(start, end, BK, num_stages=STAGES):
                sums, high = _add_columns(
                    sums, high, code, stride_plane, row, zero, in_m, in_n, k, end, BITS, PLANES, SETS, BM == 1, BN, BK
                )
            total += _scaled(
                sums, high, token_scale + segment, scale, scale_row, in_m, n, in_n, g, stride_scale, PLANES, WIDE
            )
    finish(total, m, n, in_m, in_n, narrow, up, bias, y, stride_up, N, rank, BM == 1)
