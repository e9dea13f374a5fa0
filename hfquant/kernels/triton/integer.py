"""Integer weights x integer inputs: exact int32 sums; everything else is fused into the quantizer and the product.

Weights of 2 to 8 bits are read as stored. Two programs run: :mod:`.quantize`, and a product that scales each column
block, adds the low-rank branch and the bias, and stores the result in the input's dtype.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hfquant.kernels.base import Kernel, Operands, Product, over_tokens
from hfquant.kernels.triton import quantize
from hfquant.kernels.triton.host import (
    DTYPES,
    FEW,
    branch,
    few_tokens,
    in_groups,
    layout,
    missing,
    rows_contiguous,
    stride,
    tile,
)


@lru_cache(maxsize=1024)
def largest_sum(product: Product) -> int:
    """Return an upper bound on the sums of products over one column block, partial sums included."""
    assert product.input is not None
    form, rule = product.weight, product.input
    codes = (2**rule.format.bits - 1) << (rule.format.max_dual_exponent if any(rule.dual) else 0)
    return max(product.columns) * codes * (2**form.bits - 1)


def refuses(product: Product) -> str:
    """Return why the product cannot be computed exactly here; "" if it can."""
    rule, form = product.input, product.weight
    if rule is None:
        return "the input is not quantized"
    if not rule.format.is_integer:
        return f"the input is {rule.format.name}, not integers"
    if not form.is_integer or form.bits > 8:
        return f"the weight is {form.name}, not integers of up to 8 bits"
    if why := quantize.refuses(rule.format):
        return why
    # One byte of an input code times a weight code (8 bits minus a zero point: 9 bits).
    if max(product.columns) * 128 * 255 >= 2**31:
        return f"sums over {max(product.columns)} columns may not fit 32 bits"
    return ""


@over_tokens
def run(x: Tensor, operands: Operands, product: Product) -> Tensor:
    """Return ``x`` [tokens, in] times the weight, [tokens, out]."""
    from hfquant.kernels.triton.programs.integer import integer_product

    if x.dtype not in DTYPES:
        return run(x.float(), operands, product).to(x.dtype)
    codes, scales = quantize.quantize(x, operands, product)
    weight, low = rows_contiguous(operands.weight), branch(x, operands)
    tokens, out = len(x), len(weight)
    y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    if tokens <= FEW and in_groups(product) and largest_sum(product) < 2**31:
        few_tokens(codes, scales, None, operands._replace(weight=weight), low, y, product)
        return y
    light = len(codes) == len(product.columns) == 1
    where = layout(product, x.device)
    shape = tile(tokens, where.longest, 128, light)
    with torch.cuda.device_of(x):
        integer_product[(-(-tokens // shape.BM) * -(-out // shape.BN),)](
            codes, scales, weight, operands.scale, operands.scale_row, operands.zero_point,
            low.narrow, low.up, operands.bias, y, where.blocks,
            tokens, out, x.shape[1], len(product.columns), len(product.segments),
            stride(codes), stride(weight), stride(operands.scale), stride(operands.zero_point),
            stride(low.up), low.rank,
            BITS=product.weight.bits, PLANES=len(codes), WIDE=largest_sum(product) >= 2**31, GROUP=where.group,
            IN_SEGMENT=where.in_segment, ALIGNED=where.aligned, SETS=where.sets, STEPS=where.steps(shape.BK),
            STAGES=shape.num_stages, **shape._asdict(),
        )  # fmt: skip
    return y


KERNEL = Kernel("triton-integer", "cuda", missing, refuses, lambda *size: True, run, rotates=False)
