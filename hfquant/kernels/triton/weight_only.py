"""Integer weights x float inputs: the weight is read as stored, 2 to 8 bits, and never materialized in float.

Codes minus zero points are exact in bfloat16 and float16, so tensor cores multiply them by inputs of that dtype, and
each column block is scaled in float32 afterwards. A float32 input is multiplied in three TF32 products, as precise as
one in float32. An input divided by a smoothing vector is rounded to bfloat16 if it was; float16 may not hold it, so it
becomes float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfquant.kernels.base import Kernel, Operands, Product, over_tokens
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


def refuses(product: Product) -> str:
    """Return why the product cannot be computed here; "" if it can."""
    form = product.weight
    if product.input is not None:
        return "the input is quantized"
    return "" if form.is_integer and form.bits <= 8 else f"the weight is {form.name}, not integers of up to 8 bits"


@over_tokens
def run(x: Tensor, operands: Operands, product: Product) -> Tensor:
    """Return ``x`` [tokens, in] times the weight, [tokens, out]."""
    from hfquant.kernels.triton.programs.weight_only import weight_only_product

    if x.dtype not in DTYPES:
        return run(x.float(), operands, product).to(x.dtype)
    x, weight, low = rows_contiguous(x), rows_contiguous(operands.weight), branch(x, operands)
    tokens, out = len(x), len(weight)
    y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    if tokens <= FEW and in_groups(product):
        few_tokens(x, None, operands.divisor, operands._replace(weight=weight), low, y, product)
        return y
    # Divided once: programs would do so for each of their tiles.
    x = x if operands.divisor is None else _divided(x, operands.divisor)
    # Triton's interpreter (on the CPU) multiplies bfloat16 bits as if they were integers.
    wide = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not x.is_cuda)
    # Float32 tiles take twice the shared memory.
    where = layout(product, x.device)
    shape = tile(tokens, where.longest, 32 if wide else 64)
    with torch.cuda.device_of(x):
        weight_only_product[(-(-tokens // shape.BM) * -(-out // shape.BN),)](
            x, weight, operands.scale, operands.scale_row, operands.zero_point,
            low.narrow, low.up, operands.bias, y, where.blocks,
            tokens, out, len(product.columns), stride(x),
            stride(weight), stride(operands.scale), stride(operands.zero_point), stride(low.up), low.rank,
            BITS=product.weight.bits, GROUP=where.group, ALIGNED=where.aligned,
            SETS=where.sets, FLOAT32=wide, STEPS=where.steps(shape.BK),
            STAGES=shape.num_stages, **shape._asdict(),
        )  # fmt: skip
    return y


def _divided(x: Tensor, divisor: Tensor) -> Tensor:
    """Return ``x / divisor`` in bfloat16 if ``x`` is, else in float32."""
    return torch.div(x, divisor, out=torch.empty_like(x)) if x.dtype == torch.bfloat16 else x / divisor


KERNEL = Kernel("triton-weight-only", "cuda", missing, refuses, lambda *size: True, run, rotates=False)
