"""``torch._int_mm``, int8 times int8 to int32: on CPUs with VNNI, where it is fast, and on CUDA without Triton.

The rest is torch's own ops: the input is quantized by ``InputRule``, the sums are scaled after. So it is the kernel of
machines that have no compiler for a faster one. Without VNNI ``_int_mm`` is right too, and 20 to 50 times slower than
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfquant.kernels.base import Kernel, Operands, Product, over_tokens

#: Sums at a time on the CPU: 1 MB of int32, within a core's second-level cache until they are scaled.
BLOCK = 1 << 18


def refuses(product: Product) -> str:
    """Return why the product is not one of int8 by int8 with one scale a row and segment; "" where it is."""
    rule, form = product.input, product.weight
    if rule is None:
        return "the input is not quantized"
    if not form.is_integer or form.bits != 8:
        return f"the weight is {form.name}, not int8"
    if not rule.format.is_integer or rule.format.bits > 8:
        return f"the input is {rule.format.name}, not integers of up to 8 bits"
    if any(rule.dual):
        return "the input has dual scale, codes of 16 bits"
    if product.columns != product.segments:
        return "the weight has several scales a row and segment"
    if min(product.segments) == 1:
        # Seen with torch 2.13 on a CPU with VNNI: the transpose of a contiguous [N, 1] is read with a wrong stride.
        return "torch._int_mm is wrong for one column"
    # Less a zero point, a code takes 9 bits.
    if product.in_features * 128 * 255 >= 2**31:
        return f"sums over {product.in_features} columns may not fit 32 bits"
    return ""


def refuses_on_cuda(product: Product) -> str:
    """Return :func:`refuses`, or that the columns are not a multiple of 8, as cuBLAS wants them."""
    uneven = next((size for size in product.segments if size % 8), 0)
    return refuses(product) or (f"{uneven} columns are no multiple of 8" if uneven else "")


def missing_on_cpu() -> str:
    """Return what this CPU lacks; "" where nothing."""
    return "" if torch.cpu._is_vnni_supported() else "this CPU has no VNNI"


def missing_on_cuda() -> str:
    """Return what this machine lacks; "" where nothing."""
    return "" if torch.cuda.is_available() else "there is no CUDA device"


@over_tokens
def run(x: Tensor, operands: Operands, product: Product) -> Tensor:
    """Return ``x`` [tokens, in] times the weight, [tokens, out].

    Raises:
        ValueError: on CUDA, the output's features are no multiple of 8 (only where this kernel is forced).
    """
    raw = x.float()
    values, scale = operands.quantized_input(raw, product)
    assert scale is not None
    # A token with a NaN has no codes; its scale makes NaN of whatever they are.
    scale = scale + values.sum(-1, keepdim=True) * 0
    codes, out = values.to(torch.int8), len(operands.weight)
    if x.is_cuda:
        return _scaled(codes, scale, raw, operands, product).to(x.dtype)
    y = x.new_empty(len(x), out)
    count = max(BLOCK // out, 16)
    for start in range(0, len(x), count):
        rows = slice(start, start + count)
        y[rows] = _scaled(codes[rows], scale[rows], raw[rows], operands, product)
    return y


def _scaled(codes: Tensor, scale: Tensor, raw: Tensor, operands: Operands, product: Product) -> Tensor:
    """Return the output, float32: int32 sums of each segment, less the zero point's share, scaled, all else added."""
    grid = operands.grid(product)
    assert grid.scale is not None
    multiply = _sums_on_cuda if codes.is_cuda else torch._int_mm
    sizes, y = list(product.segments), raw.new_zeros(())
    for i, (x, weight) in enumerate(zip(codes.split(sizes, 1), operands.weight.split(sizes, 1), strict=True)):
        sums = multiply(x, weight.T)
        if grid.zero_point is not None:
            sums = sums - x.sum(-1, keepdim=True, dtype=torch.int32) * grid.zero_point[:, i]
        part = sums.float().mul_(grid.scale[:, i]).mul_(scale[..., i : i + 1])
        y = part.add_(y)
    return operands.added(raw, y)


def _sums_on_cuda(codes: Tensor, weight: Tensor) -> Tensor:
    """Return ``codes`` [tokens, in] times ``weight`` [in, out], int32."""
    if weight.shape[1] % 8:
        raise ValueError(f"int_mm on CUDA: {weight.shape[1]} output features are no multiple of 8")
    # It takes more than 16 rows.
    few = max(17 - len(codes), 0)
    return torch._int_mm(pad(codes, (0, 0, 0, few)) if few else codes, weight)[: len(codes)]


def _pays_on_cuda(product: Product, dtype: torch.dtype, tokens: int, out: int) -> bool:
    return out % 8 == 0


KERNEL = Kernel("int-mm", "cpu", missing_on_cpu, refuses, lambda *size: True, run)
CUDA = Kernel("int-mm-cuda", "cuda", missing_on_cuda, refuses_on_cuda, _pays_on_cuda, run)
