"""C++ kernels for CPUs, one per instruction set.

Weights of 2 to 8 bits are multiplied as integers, with inputs of at most 8 bits or with float inputs converted to
16-bit integers (input.h). Other weights (FP8, FP16, BF16, INT16) are decoded to floats one panel at a time; FP8 inputs
are rounded on the fly (floats.h).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from hfquant.formats.base import NumberFormat
from hfquant.formats.columns import expand_columns, split_columns
from hfquant.formats.integer import IntegerFormat
from hfquant.kernels.base import Kernel, Op, Operands, Product, product_of
from hfquant.kernels.cpu.build import INSTRUCTION_SETS, BuildError, load

logger = logging.getLogger(__name__)

#: The instruction set with bfloat16 products.
BFLOAT16 = "avx512_bf16"
#: Weight formats that are decoded to floats, with their numbers in job.h.
DECODED = {"fp8e4m3": 1, "fp8e5m2": 2, "fp16": 3, "bf16": 4, "int16": 5}
#: Input formats that C++ rounds itself for these weights; :class:`InputRule` quantizes the others.
ROUNDED = ("fp8e4m3", "fp8e5m2")
#: Input dtypes that C++ reads without conversion.
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _missing() -> str:
    """Load the library; return why it cannot be loaded, "" if it can."""
    try:
        load()
    except (BuildError, OSError) as error:
        logger.warning("quantized layers run on torch's own ops, more slowly: %s", error)
        return f"the C++ kernels could not be compiled or loaded: {error}"
    return ""


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Keep ``torch.jit.trace`` from recording what runs once only: a layer's first call may be traced."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


@cache
def _instruction_sets() -> int:
    """Return the instruction sets of this CPU, as bits."""
    with _unrecorded():
        found: int = torch.ops.hfquant_cpu.instruction_sets()
    return found


@cache
def _lacks(number: int) -> str:
    if why := _missing():
        return why
    name = INSTRUCTION_SETS[number]
    # Intel's CPUs have it too, at less than the speed of float32.
    return "" if _instruction_sets() >> number & 1 else f"this CPU has no {'fast ' if name == BFLOAT16 else ''}{name}"


def multiplies_bfloat16() -> bool:
    """Return whether bfloat16 products are faster than float32 ones on this CPU."""
    return BFLOAT16 in INSTRUCTION_SETS and not _lacks(INSTRUCTION_SETS.index(BFLOAT16))


def _refuses(product: Product) -> str:
    form, rule = product.weight, product.input
    if _group_size(product) is None:
        return "blocks of columns are not groups of equal size"
    if form.name in DECODED:
        return "" if product.symmetric else f"{form.name} weights have zero points"
    if not isinstance(form, IntegerFormat) or form.bits > 8:
        return f"weights are {form.name}, not integers of at most 8 bits"
    if rule is not None and (not isinstance(rule.format, IntegerFormat) or rule.format.bits > 8):
        return f"inputs are {rule.format.name}, not floats or integers of at most 8 bits"
    return ""


def _group_size(product: Product) -> int | None:
    """Return the group size, 0 if each segment is a single block, None if the blocks are not groups of one size."""
    if product.columns == product.segments:
        return 0
    size = max(product.columns)
    return size if split_columns(product.segments, size) == product.columns else None


@lru_cache(maxsize=4096)
def spec_of(key: str) -> Tensor:
    """Return the product encoded as the ``spec`` that native.cpp reads."""
    product = product_of(key)
    done = product.weight.name in DECODED and _quantized_before(product)
    rule, rotation = (None, 0) if done else (product.input, product.rotation)
    bits, per_token = (0, True) if rule is None else (_code(rule.format), rule.per_token)
    dual = rule.dual if rule is not None else (False,) * len(product.segments)
    head = [_code(product.weight), _group_size(product) or 0, bits, per_token, len(product.columns), rotation]
    with _unrecorded():
        return torch.tensor([*head, len(product.segments), *product.segments, *dual], dtype=torch.int64)


def _code(form: NumberFormat) -> int:
    """Return the bits of an integer format, or minus the number of a format in :data:`DECODED`."""
    return -DECODED[form.name] if form.name in DECODED else form.bits


def _quantized_before(product: Product) -> bool:
    """Return whether only :class:`InputRule` can quantize the input of a weight in :data:`DECODED`."""
    return product.input is not None and product.input.format.name not in ROUNDED


@cache
def _native() -> Op:
    # The overload itself: resolving it at each call takes as long as a small product.
    overload: Op = torch.ops.hfquant_cpu.linear.default
    return overload


def _run(number: int, x: Tensor, operands: Operands, product: Product) -> Tensor:
    dtype, spec = x.dtype, spec_of(product.key)
    if product.weight.name in DECODED and _quantized_before(product):
        raw = x.float()
        values, scale = operands.quantized_input(raw, product)
        values = values if scale is None else values * expand_columns(scale, product.segments)
        bare = Operands(operands.weight, operands.scale, operands.scale_row)
        return operands.added(raw, _native()(values.contiguous(), *bare, spec, number)).to(dtype)
    if dtype in TYPES:
        return _native()(x.contiguous(), *operands, spec, number)
    # A float64 model has a bias and a low-rank branch of that dtype too.
    narrow = (t.float() if t is not None and t.dtype == torch.float64 else t for t in operands)
    return _native()(x.float().contiguous(), *narrow, spec, number).to(dtype)


def _direct(number: int, product: Product, dtype: torch.dtype) -> tuple[Op, tuple[Any, ...]] | None:
    if dtype not in TYPES or (product.weight.name in DECODED and _quantized_before(product)):
        return None
    return _native(), (spec_of(product.key), number)


def _kernel(number: int, name: str) -> Kernel:
    how = partial(_run, number)
    return Kernel(
        name, "cpu", partial(_lacks, number), _refuses, lambda *size: True, how, direct=partial(_direct, number)
    )


#: Widest instruction set first.
KERNELS = [_kernel(number, name) for number, name in reversed(list(enumerate(INSTRUCTION_SETS)))]
