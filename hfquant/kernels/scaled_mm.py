"""``torch._scaled_mm``, FP8 x FP8, on CUDA devices that multiply FP8 (compute capability 8.9 and above).

Codes are multiplied without scales into float32, one input segment at a time, and scaled afterwards. One code path thus
serves per-tensor, per-token and per-row scales, whichever of them the cuBLAS version supports. The sums are as precise
as the device's tensor cores (``use_fast_accum`` is off).
"""

from __future__ import annotations

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
    weight, out = operands.weight, len(operands.weight)
    if x.is_cuda and out % MULTIPLE:
        raise ValueError(f"scaled_mm: {out} output features are not a multiple of {MULTIPLE}")
    codes, scale = _quantized(x, operands, product)
    form, row = product.weight, operands.grid(product).scale
    assert isinstance(form, FloatFormat)
    assert row is not None
    floats, one, start = weight.view(form.dtype), _one(x.device), 0
    y: Tensor | None = None
    for i, size in enumerate(product.segments):
        columns = slice(start, start + size)
        part = torch._scaled_mm(codes[:, columns], floats[:, columns].T, one, one, out_dtype=torch.float32)
        part.mul_(row[:, i]).mul_(scale[..., i : i + 1])
        y, start = part if y is None else y.add_(part), start + size
    assert y is not None
    return operands.added(x.float(), y).to(x.dtype)


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


@lru_cache(maxsize=64)
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def _pays(product: Product, dtype: torch.dtype, tokens: int, out: int) -> bool:
    return out % MULTIPLE == 0


KERNEL = Kernel("scaled-mm", "cuda", missing, refuses, _pays, run, rotates=False)
