"""Quantize activations in one pass over the input: the first step of products with quantized inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from hfquant.formats import InputRule, NumberFormat
from hfquant.formats.base import _MAX_AMAX
from hfquant.kernels.base import Operands, Product
from hfquant.kernels.triton.host import Segments, rows_contiguous, segments_of

#: Most columns that a program holds; longer segments are read twice (the second time from cache).
BLOCK = 8192
#: Values per program; if segments are short, a program takes several tokens.
ELEMENTS = 2048
#: Mantissa bits of the FP8 formats.
MANTISSA = {"fp8e4m3": 3, "fp8e5m2": 2}


def refuses(form: NumberFormat) -> str:
    """Return why activations of a format cannot be quantized here; "" if they can."""
    if form.name in MANTISSA or (form.is_integer and form.bits <= 8):
        return ""
    return f"codes of {form.name} are not one byte"


def quantize(x: Tensor, operands: Operands, product: Product) -> tuple[Tensor, Tensor]:
    """Return codes and scales of ``x``, as ``Operands.quantized_input`` does.

    Args:
        x: [tokens, in] float32, bfloat16 or float16.
        operands: provides the static scales and the divisor.
        product: provides the segments and the input's format (see :func:`refuses`).

    Returns:
        int8 codes [planes, tokens, in] (FP8 as bits), in two planes with dual scale, ``256 * [1] + [0]``; and float32
        scales [tokens, segments], NaN for tokens with a non-finite value, so that their products are NaN too.
    """
    from hfquant.kernels.triton.programs import quantize as programs

    rule = product.input
    assert rule is not None
    x, segments = rows_contiguous(x), segments_of(product, x.device)
    count, longest = len(product.segments), max(product.segments)
    dual = any(rule.dual)
    codes = torch.empty(2 if dual else 1, *x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(len(x), count, dtype=torch.float32, device=x.device)
    block = min(max(1 << (longest - 1).bit_length(), 16), BLOCK)
    rows, warps = max(ELEMENTS // block, 1), min(max(block // 512, 4), 8)
    given, given_neg = operands.input_scale, operands.input_scale_neg
    with torch.cuda.device_of(x):
        if rule.dynamic and not rule.per_token:
            given, given_neg = _scales_of_tensor(x, operands.divisor, segments, rule, rows, block, warps)
        programs.quantize[(-(-len(x) // rows), count)](
            x, operands.divisor, given, given_neg if dual else None, codes, scales, segments.bounds,
            len(x), x.shape[1], count, segments.size, x.stride(0), codes.stride(0),
            QMAX=rule.format.qmax, LIMIT=_MAX_AMAX, DUAL=dual, MOST=segments.most, ALIGNED=segments.aligned,
            MANTISSA=MANTISSA.get(rule.format.name, 0), ROWS=rows, BLOCK=block, ONE=longest <= block, num_warps=warps,
        )  # fmt: skip
    return codes, scales


def _scales_of_tensor(
    x: Tensor, divisor: Tensor | None, segments: Segments, rule: InputRule, rows: int, block: int, warps: int
) -> tuple[Tensor, Tensor]:
    """Return the per-tensor scales of both sides, [segments] float32 each; NaN if a segment is not finite."""
    from hfquant.kernels.triton.programs import quantize as programs

    low, high = torch.empty(2, len(x), len(rule.segments), dtype=torch.float32, device=x.device)
    programs.ranges[(-(-len(x) // rows), len(rule.segments))](
        x, divisor, low, high, segments.bounds, len(x), len(rule.segments), segments.size, x.stride(0),
        ALIGNED=segments.aligned, ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return rule.scales(low.amin(0), high.amax(0))
