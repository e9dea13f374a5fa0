"""``torch._int_mm``, int8 x int8 to int32: on CPUs with VNNI, where it is fast, and on CUDA without Triton.

Everything else uses torch ops: ``InputRule`` quantizes the input, and the sums are scaled afterwards. It is the kernel
for machines without a compiler for a faster one. Without VNNI ``_int_mm`` is still correct, but 20x to 50x slower than
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfquant.kernels.base import Kernel, Operands, Product, over_tokens

#: Sums computed at a time on the CPU: 1 MB of int32, which stays in a core's L2 cache until it is scaled.
BLOCK = 1 << 18


def refuses(product: Product) -> str:
    """Return why the product is not int8 x int8 with one weight scale per row and segment; "" if it is."""
    rule, form = product.input, product.weight
    if rule is None:
        return "the input is not quantized"
    if not form.is_integer or form.bits != 8:
        return f"the weight is {form.name}, not int8"
    if not rule.format.is_integer or rule.format.bits > 8:
        return f"the input is {rule.format.name}, not integers of up to 8 bits"
    if any(rule.dual):
        return "the input has dual scales, whose codes have 16 bits"
    if product.columns != product.segments:
        return "the weight has several scales per row and segment"
    if min(product.segments) == 1:
        # Seen with torch 2.13 on a CPU with VNNI: it reads the transpose of a contiguous [N, 1] with a wrong stride.
        return "torch._int_mm is wrong for one column"
    # A code minus its zero point takes 9 bits.
    if product.in_features * 128 * 255 >= 2**31:
        return f"sums over {product.in_features} columns may not fit 32 bits"
    return ""


def refuses_on_cuda(product: Product) -> str:
    """Return the reason from :func:`refuses`, or that a segment is not a multiple of 8 columns, as cuBLAS requires."""
    uneven = next((size for size in product.segments if size % 8), 0)
    return refuses(product) or (f"{uneven} columns are not a multiple of 8" if uneven else "")


def missing_on_cpu() -> str:
    """Return what this CPU lacks; "" if nothing."""
    return "" if torch.cpu._is_vnni_supported() else "this CPU has no VNNI"


def missing_on_cuda() -> str:
    """Return what this machine lacks; "" if nothing."""
    if torch.version.hip is not None:
        return "it has not been tried on AMD devices"
    return "" if torch.cuda.is_available() else "there is no CUDA device"


@over_tokens
def run(x: Tensor, operands: Operands, product: Product) -> Tensor:
    """Return ``x`` [tokens, in] times the weight, [tokens, out].

    Raises:
        ValueError: on CUDA, the number of output features is not a multiple of 8 (only if this kernel is forced).
    """
    raw = x.float()
    values, scale = operands.quantized_input(raw, product)
    assert scale is not None
    # A token with a NaN has no valid codes: propagate the NaN to its scale, so that its output is NaN.
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
    """Return the float32 output: int32 sums per segment, corrected for zero points and scaled, plus branch and bias."""
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
        raise ValueError(f"int_mm on CUDA: {weight.shape[1]} output features are not a multiple of 8")
    # On CUDA ``_int_mm`` requires more than 16 rows.
    few = max(17 - len(codes), 0)
    return torch._int_mm(pad(codes, (0, 0, 0, few)) if few else codes, weight)[: len(codes)]


def _pays_on_cuda(product: Product, dtype: torch.dtype, tokens: int, out: int) -> bool:
    return out % 8 == 0


KERNEL = Kernel("int-mm", "cpu", missing_on_cpu, refuses, lambda *size: True, run)
CUDA = Kernel("int-mm-cuda", "cuda", missing_on_cuda, refuses_on_cuda, _pays_on_cuda, run)
