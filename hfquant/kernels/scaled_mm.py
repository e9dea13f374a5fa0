"""``torch._scaled_mm``, FP8 x FP8, on CUDA devices that multiply FP8 (compute capability 8.9 and above).

In bfloat16 models, E4M3 weights with one scale per row are multiplied by a whole input in one call, which also scales
and adds the bias. Everything else is multiplied without scales into float32, one input segment at a time, and scaled
afterwards: torch scales by row only if the output is bfloat16, and not per segment. The sums are as precise as the
device's tensor cores (``use_fast_accum`` is off).
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor

from hfquant.formats import FloatFormat
from hfquant.kernels.base import Kernel, Operands, Product, over_tokens
from hfquant.kernels.triton import host, quantize

#: cuBLAS requires columns and output features to be multiples of this.
MULTIPLE = 16


def missing() -> str:
    """Return what this machine lacks; "" if nothing."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "AMD devices have other FP8 formats"
    major, minor = torch.cuda.get_device_capability()
    return "" if (major, minor) >= (8, 9) else f"it needs compute capability 8.9, this device has {major}.{minor}"


def refuses(product: Product) -> str:
    """Return why the product is not FP8 x FP8 with one weight scale per row and segment; "" if it is."""
    rule, form = product.input, product.weight
    if rule is None:
        return "the input is not quantized"
    for which, name in (("weight", form.name), ("input", rule.format.name)):
        if name not in quantize.MANTISSA:
            return f"the {which} is {name}, not FP8"
    if form.name == rule.format.name == "fp8e5m2":
        return "cuBLAS does not multiply E5M2 by E5M2"
    if product.columns != product.segments:
        return "the weight has several scales per row and segment"
    if any(size % MULTIPLE for size in product.segments):
        return f"segments {list(product.segments)} are not all multiples of {MULTIPLE}"
    return ""


@over_tokens
def run(x: Tensor, operands: Operands, product: Product) -> Tensor:
    """Return ``x`` [tokens, in] times the weight, [tokens, out].

    Raises:
        ValueError: on CUDA, the number of output features is not a multiple of 16 (only if this kernel is forced).
    """
    out = len(operands.weight)
    if x.is_cuda and out % MULTIPLE:
        raise ValueError(f"scaled_mm: {out} output features are not a multiple of {MULTIPLE}")
    codes, scale = _quantized(x, operands, product)
    if scales_in_product(x, product):
        y, operands = _scaled_product(codes, scale, operands, product), operands._replace(bias=None)
        if operands.down is None:
            return y
    else:
        y = _product(codes, scale, operands, product)
    return operands.added(x if operands.down is None else x.float(), y).to(x.dtype)


def scales_in_product(x: Tensor, product: Product) -> bool:
    """Return whether torch's product can also scale by row and by token; torch for Windows is built without it."""
    whole = len(product.segments) == 1 and product.weight.name == "fp8e4m3"
    return whole and x.dtype == torch.bfloat16 and sys.platform != "win32"


def _scaled_product(codes: Tensor, scale: Tensor, operands: Operands, product: Product) -> Tensor:
    """Return the scaled product plus the bias, [tokens, out] bfloat16."""
    weight, row, bias = *_weight(operands, product), operands.bias
    per_token = scale.reshape(-1, 1).expand(len(codes), 1).contiguous()
    bias = None if bias is None else bias.bfloat16()
    return torch._scaled_mm(codes, weight.T, per_token, row.view(1, -1), bias=bias, out_dtype=torch.bfloat16)


def _product(codes: Tensor, scale: Tensor, operands: Operands, product: Product) -> Tensor:
    """Return the sum of the segments' scaled products, [tokens, out] float32."""
    weight, row = _weight(operands, product)
    # Not kept between calls: a CUDA graph must not own a tensor that is.
    one, start = scale.new_ones(()), 0
    y: Tensor | None = None
    for i, size in enumerate(product.segments):
        columns = slice(start, start + size)
        part = torch._scaled_mm(codes[:, columns], weight[:, columns].T, one, one, out_dtype=torch.float32)
        part.mul_(row[:, i]).mul_(scale[..., i : i + 1])
        y, start = part if y is None else y.add_(part), start + size
    assert y is not None
    return y


def _weight(operands: Operands, product: Product) -> tuple[Tensor, Tensor]:
    """Return the weight codes [out, in] in an FP8 dtype and their scales [out, segments] float32."""
    row = operands.grid(product).scale
    assert isinstance(product.weight, FloatFormat)
    assert row is not None
    return operands.weight.view(product.weight.dtype), row


def _quantized(x: Tensor, operands: Operands, product: Product) -> tuple[Tensor, Tensor]:
    """Return codes [tokens, in] in an FP8 dtype and their scale, [tokens, segments] or [segments] float32."""
    rule = product.input
    assert rule is not None
    assert isinstance(rule.format, FloatFormat)
    if x.is_cuda and not _missing_triton():
        x = x if x.dtype in host.DTYPES else x.float()
        codes, scale = quantize.quantize(x, operands, product)
        return codes[0].view(rule.format.dtype), scale
    values, given = operands.quantized_input(x.float(), product)
    assert given is not None
    return values.to(rule.format.dtype), given


_missing_triton = lru_cache(maxsize=1)(host.missing)


def _pays(product: Product, dtype: torch.dtype, tokens: int, out: int) -> bool:
    return out % MULTIPLE == 0


KERNEL = Kernel("scaled-mm", "cuda", missing, refuses, _pays, run, rotates=False)
