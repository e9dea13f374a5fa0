"""Float product with the weight dequantized block by block, so that the whole weight never exists in float.

It computes every product on every device. In fake quantization it is the only kernel; otherwise it is the last resort.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hfquant.formats import CastFormat, expand_columns
from hfquant.formats.rotation import rotated
from hfquant.kernels import cpu
from hfquant.kernels.base import Kernel, Operands, Product, over_tokens

#: Weights per block on a CPU: 2 MB of float32, within a core's L2 cache.
BLOCK = 1 << 19
#: Weights per block on other devices: enough work for each of the calls that a block takes.
DEVICE_BLOCK = 1 << 24


def blocks(operands: Operands, product: Product) -> Iterator[tuple[slice, Tensor]]:
    """Yield row slices and their float32 weights [rows, in] (transformed, without the low-rank branch)."""
    out = len(operands.weight)
    count = max((BLOCK if operands.weight.is_cpu else DEVICE_BLOCK) // product.in_features, 16)
    for start in range(0, out, count):
        rows = slice(start, min(start + count, out))
        part = operands.rows(rows) if count < out else operands
        yield rows, part.grid(product).dequantize(part.codes(product))


@over_tokens
def run(x: Tensor, operands: Operands, product: Product) -> Tensor:
    """Return ``x`` [tokens, in] times the weight, [tokens, out]."""
    raw = x.float()
    values, scale = operands.quantized_input(raw, product)
    late = _scales_later(x, product)
    if scale is not None and not late:
        values = values * expand_columns(scale, product.segments)
    values = values.to(_dtype(x, operands, product))
    y = values.new_empty(len(x), len(operands.weight))
    for rows, weight in blocks(operands, product):
        weight = weight.to(values.dtype)
        if weight.shape[0] == y.shape[1]:
            y = values @ weight.T
        else:
            torch.mm(values, weight.T, out=y[:, rows])
    if scale is not None and late:
        y = y * scale
    return operands.added(raw, y).to(x.dtype)


def _scales_later(x: Tensor, product: Product) -> bool:
    """Return whether to scale the output, not the input: FP8 codes are exact in bfloat16 until they are scaled."""
    rule = product.input
    eights = rule is not None and rule.format.bits == 8 and not rule.format.is_integer
    return eights and len(product.segments) == 1 and x.dtype == torch.bfloat16 and not x.is_cpu


def _dtype(x: Tensor, operands: Operands, product: Product) -> torch.dtype:
    """Return the dtype of the product: float32, but on other devices than CPUs that of ``x`` if little is lost.

    A divided input may not fit float16, bfloat16 would round codes times scales to as few bits as the codes have, and
    weights of 16 bits are exact in one dtype at most.
    """
    form, half = product.weight, x.dtype
    undivided, unscaled = operands.divisor is None, product.input is None or _scales_later(x, product)
    fits = (half == torch.float16 and undivided) or (half == torch.bfloat16 and unscaled)
    exact = form.bits <= 8 or (isinstance(form, CastFormat) and form.dtype == half)
    return half if fits and exact and not x.is_cpu else torch.float32


def gradient(grad: Tensor, operands: Operands, product: Product) -> Tensor:
    """Return the input gradient [tokens, in] for an output gradient [tokens, out].

    Rounding of activations counts as the identity (straight-through), so this is the product with the effective weight.
    """
    g = grad.to(gradient_dtype(grad))
    total = g.new_zeros(len(g), product.in_features, dtype=torch.float32)
    for rows, weight in blocks(operands, product):
        _add_product(total, g[:, rows], weight)
    total = rotated(total, product.rotation)
    if operands.divisor is not None:
        total /= operands.divisor
    if operands.down is not None and operands.up is not None:
        _add_product(total, g @ operands.up.to(g.dtype), operands.down)
    return total.to(grad.dtype)


def gradient_dtype(grad: Tensor) -> torch.dtype:
    """Return the dtype of products in the backward pass: that of ``grad`` if the device is fast at it, or float32."""
    half = grad.dtype in (torch.bfloat16, torch.float16)
    fast = grad.dtype == torch.bfloat16 and cpu.multiplies_bfloat16() if grad.is_cpu else half
    return grad.dtype if fast else torch.float32


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total``, computed in the dtype of ``a`` and summed over calls in float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b.to(a.dtype))
    else:
        total += a @ b.to(a.dtype)


KERNEL = Kernel("dequantize", "", lambda: "", lambda product: "", lambda *size: True, run)
