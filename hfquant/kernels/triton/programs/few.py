"""Few-token products with grouped weights: several groups per step, which :mod:`.integer` takes one by one."""

from __future__ import annotations

import triton
import triton.language as tl

from hfquant.kernels.triton.programs.tiles import finish, unpacked, weight_tile


@triton.jit
def few_tokens_product(
    x: tl.tensor,
    input_scale: tl.tensor,
    divisor: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    scale_row: tl.tensor,
    zero_point: tl.tensor,
    narrow: tl.tensor,
    up: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    G: tl.tensor,
    stride_x: tl.tensor,
    stride_plane: tl.tensor,
    stride_weight: tl.tensor,
    stride_scale: tl.tensor,
    stride_zero: tl.tensor,
    stride_up: tl.tensor,
    rank: tl.tensor,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Compute BN outputs of one token for the product of :mod:`.integer` or :mod:`.weight_only`.

    Args:
        x: codes [PLANES, M, K] int8, or [M, K] float; rows ``stride_x`` apart.
        input_scale: [M] float32, scale of the codes; None if ``x`` is float, which is multiplied in float32.
        divisor: [K] float32, by which a float ``x`` is divided first, or None.
        weight, scale, scale_row, zero_point: as stored, [N, ...]; one input segment, groups of GROUP columns.
        narrow, up, bias, y, rank: see ``tiles.finish``.
        M, N, K, G: tokens, output rows, columns, groups.
        stride_x, stride_weight, stride_scale, stride_zero, stride_up: row strides.
        stride_plane: stride between the planes of ``x``.
        BITS: bits of a weight code.
        PLANES: planes of ``x``.
        GROUP: a power of two, at least 2, that divides K and BK; a group's sum fits 32 bits.
        BN, BK: output rows per program, columns per step.
        STAGES: steps whose loads are in flight; the compiler finds this only for loops with tensor cores.
    """
    m = tl.program_id(0) % M + tl.arange(0, 1)
    n = tl.program_id(0) // M * BN + tl.arange(0, BN)
    in_m, in_n = m < M, n < N
    n = n.to(tl.int64)
    token = x + (tl.program_id(0) % M).to(tl.int64) * stride_x
    row = weight + n * stride_weight
    total = tl.zeros((BN,), tl.float32)
    KIND: tl.constexpr = tl.float32 if input_scale is None else tl.int32
    for start in tl.range(0, K, BK, num_stages=STAGES):
        # Weights are loaded last: the compiler then distributes all values among threads as suits this load, which is
        # by far the largest. Each thread adds up many columns of one row; if it had all rows, most of the time would go
        # into exchanging sums.
        g = start // GROUP + tl.arange(0, BK // GROUP)
        there = in_n[:, None] & (g < G)[None, :]
        s = tl.load(scale + n[:, None] * stride_scale + g[None, :], mask=there, other=0)
        if scale_row is not None:
            s = ((s.to(tl.int32) << 18) + (120 << 23)).to(tl.float32, bitcast=True)
        zero = None
        if zero_point is not None:
            zero = unpacked(zero_point + n[:, None] * stride_zero, g[None, :], there, BITS).to(KIND)
        k = start + tl.arange(0, BK)
        a = tl.load(token + k, mask=k < K, other=0).to(KIND)
        if divisor is not None:
            a = tl.div_rn(a, tl.load(divisor + k, mask=k < K, other=1))
        if PLANES == 2:
            a += tl.load(token + stride_plane + k, mask=k < K, other=0).to(KIND) * 256
        # Shapes are [BN, groups of this step, GROUP]; per-group values are [BN, groups].
        codes = tl.reshape(weight_tile(row, in_n, start, K, BITS, True, BN, BK), (BN, BK // GROUP, GROUP))
        w = codes.to(KIND)
        if zero is not None:
            w -= zero[:, :, None]
        sums = tl.sum(w * tl.reshape(a, (1, BK // GROUP, GROUP)), 2)
        total += tl.sum(tl.where(there, sums.to(tl.float32) * s, 0.0), 1)
    if scale_row is not None:
        total *= tl.load(scale_row + n, mask=in_n, other=0)
    if input_scale is not None:
        total *= tl.load(input_scale + tl.program_id(0) % M)
    finish(total[None, :], m, n, in_m, in_n, narrow, up, bias, y, stride_up, N, rank, True)
