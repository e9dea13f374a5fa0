"""Shared by the tests of kernels: products that are exact in float32 sums, with their result in float64.

Scales are powers of two and inputs are whole numbers of steps, so quantizing them loses nothing and the exact result is
the float64 product of the input and the dequantized weight. If a kernel adds floats (several scales per row, 16-bit
input codes), inputs are thinned out until every partial sum has at most 24 bits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from hfquant.formats import FORMATS, InputRule, split_columns
from hfquant.formats.packing import pack
from hfquant.kernels import cpu
from hfquant.kernels.base import Operands, Product

#: The C++ kernels, widest first.
NAMES = [kernel.name for kernel in cpu.KERNELS]
#: Largest code of a float input in a weight-only product, and the number of columns that share its unit.
FLOAT_LIMIT, FLOAT_BLOCK = 32639, 128
#: Largest integer below which bfloat16 holds all.
BFLOAT16_LIMIT = 256
#: Number of columns whose sum a kernel holds in a 32-bit integer.
WIDEST = 1 << 15


def require(name: str) -> None:
    """Skip the test if this machine cannot run kernel ``name``."""
    kernel = next(k for k in cpu.KERNELS if k.name == name)
    if why := kernel.missing():
        pytest.skip(why)


@pytest.fixture(params=NAMES)
def kernel(request, monkeypatch) -> str:
    """Force every product of the test to one C++ kernel, and return its name."""
    require(request.param)
    monkeypatch.setenv("HFQUANT_KERNEL", request.param)
    return request.param


@dataclass(frozen=True)
class Spec:
    """A kind of product.

    Attributes:
        bits: bits of the weight's codes.
        segments: sizes of the input segments.
        group: columns that share a scale of the weight; 0 for one scale per segment.
        input: "token", "tensor", "static", or "float" for a weight-only product.
        asymmetric, two_level: whether there are zero points, and two-level scales (one byte per group).
        dual: exponent e of the second scale, for negative inputs; 0 for none.
        out: rows of the weight.
        input_bits: bits of the input's codes.
    """

    bits: int = 8
    segments: tuple[int, ...] = (64,)
    group: int = 0
    input: str = "token"
    asymmetric: bool = False
    two_level: bool = False
    dual: int = 0
    out: int = 37
    input_bits: int = 8

    def product(self) -> Product:
        columns = split_columns(self.segments, self.group) if self.group else self.segments
        form, inputs = FORMATS[f"int{self.bits}"], FORMATS[f"int{self.input_bits}"]
        dual = (self.dual > 0,) * len(self.segments)
        rule = InputRule(inputs, self.input != "static", self.input == "token", self.segments, dual)
        return Product(form, columns, self.segments, None if self.input == "float" else rule, not self.asymmetric)

    @property
    def exact_as_integers(self) -> bool:
        """Whether a row's sum stays an integer throughout, so that inputs may be arbitrarily large."""
        one_scale = len(self.segments) == 1 and (not self.group or self.group >= sum(self.segments))
        return one_scale and self.input != "float" and not self.dual and sum(self.segments) <= WIDEST


@dataclass(frozen=True)
class Sample:
    """A product with its tensors, an input, and the exact result."""

    product: Product
    operands: Operands
    x: Tensor
    expected: Tensor


@cache
def sample(spec: Spec, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Sample:
    """Make tensors for ``spec``, an input [tokens, in] of ``dtype`` and the product in float64.

    Results are cached and shared by all kernels; do not write to them.
    """
    generator = torch.Generator().manual_seed(seed)
    product = spec.product()
    operands, weight, step = _weight(spec, product, generator)
    x, units = _input(spec, tokens, step, generator, seed, BFLOAT16_LIMIT if dtype == torch.bfloat16 else FLOAT_LIMIT)
    if spec.input == "static":
        scale = torch.tensor(units)
        operands = operands._replace(input_scale=scale, input_scale_neg=scale / 2**spec.dual if spec.dual else None)
    expected = x.double() @ weight.T
    if not spec.exact_as_integers:
        bias = torch.randint(-8, 9, (spec.out,), generator=generator).float()
        operands, expected = operands._replace(bias=bias), expected + bias
    assert torch.equal(x.to(dtype).float(), x), "the input is not exact in this dtype"
    return Sample(product, operands, x.to(dtype), expected.float().to(dtype))


def adversarial(rows: int, columns: int, low: int, high: int, generator: torch.Generator, first: int = 0) -> Tensor:
    """Return codes [rows, columns] int64: rows of all ``high``, all ``low``, alternating both ways, and random."""
    codes = torch.randint(low, high + 1, (rows, columns), generator=generator)
    odd = torch.arange(columns) % 2 == 1
    extremes = [
        torch.full((columns,), high),
        torch.full((columns,), low),
        torch.where(odd, low, high),
        torch.where(odd, high, low),
    ]
    for row in range(rows):
        if (row + first) % 7 < len(extremes):
            codes[row] = extremes[(row + first) % 7]
    return codes


def _weight(spec: Spec, product: Product, generator: torch.Generator) -> tuple[Operands, Tensor, float]:
    """Return operands, the float64 weight, and the most of its smallest steps that its largest value can have."""
    columns, half = product.columns, 2 ** (spec.bits - 1)
    groups = len(columns)
    # Include the lowest code even for symmetric weights: nothing checks for it.
    codes = adversarial(spec.out, product.in_features, -half, half - 1, generator)
    smaller = torch.randint(0, 2, (spec.out, groups), generator=generator)
    row = 2.0 ** -torch.randint(0, 3, (spec.out, 1), generator=generator)
    scale = row * 2.0**-smaller
    zero = torch.zeros(spec.out, groups, dtype=torch.int64)
    if spec.asymmetric:
        zero = adversarial(groups, spec.out, -half, half - 1, generator, first=3).T.contiguous()
    index = torch.repeat_interleave(torch.arange(groups), torch.tensor(columns))
    weight = (codes - zero[:, index]).double() * scale[:, index]

    def stored(codes: Tensor) -> Tensor:
        codes = codes.to(torch.int8)
        return pack(codes, spec.bits) if spec.bits < 8 else codes

    operands = Operands(
        stored(codes),
        # 32 e stands for 2^(e - 7).
        (32 * (7 - smaller)).to(torch.uint8) if spec.two_level else scale,
        scale_row=row if spec.two_level else None,
        zero_point=stored(zero) if spec.asymmetric else None,
    )
    return operands, weight, 2.0 * (2 * half - 1)


def _input(
    spec: Spec, tokens: int, weight_steps: float, generator: torch.Generator, seed: int, most: int
) -> tuple[Tensor, list[float]]:
    """Return the input [tokens, in] float32 and the unit of each segment."""
    width = sum(spec.segments)
    limit = most if spec.input == "float" else 2 ** (spec.input_bits - 1) - 1
    codes = adversarial(tokens, width, -limit, limit, generator, first=seed).float()
    # The largest magnitude of each sign determines a scale, so it must be present.
    kept = torch.zeros(tokens, width, dtype=torch.bool)
    if spec.input == "float":
        units = [1.0] * len(spec.segments)
        for token in range(tokens):
            start = (token + seed) % -(-width // FLOAT_BLOCK) * FLOAT_BLOCK
            codes[token, :start] = codes[token, start + FLOAT_BLOCK :] = 0
            codes[token, start], kept[token, start] = limit, True
    else:
        units, start = [2.0 ** -(i % 3) for i in range(len(spec.segments))], 0
        for size, unit in zip(spec.segments, units, strict=True):
            part, keep = codes[:, start : start + size], kept[:, start : start + size]
            part[:, 0], keep[:, 0] = limit, True
            if spec.dual and size > 1:
                part[:, 1], keep[:, 1] = -limit, True
            part.copy_(torch.where(part < 0, part * unit / 2**spec.dual, part * unit))
            start += size
    if not spec.exact_as_integers:
        room = (2.0**24 - 1024) * min(units) / 2**spec.dual / weight_steps
        codes = _thinned(codes, kept, room, seed)
    return codes, units


def _thinned(x: Tensor, kept: Tensor, room: float, seed: int) -> Tensor:
    """Zero ``x`` except ``kept`` and a run of columns whose magnitudes add up to at most ``room``."""
    first = (seed * 131) % x.shape[1]
    rolled = x.abs().masked_fill(kept, 0).roll(-first, 1)
    forced = (x.abs() * kept).sum(1, keepdim=True)
    assert bool((forced <= room).all()), "no room for an exact sum"
    fits = (rolled.cumsum(1) + forced <= room).roll(first, 1)
    return torch.where(fits | kept, x, torch.zeros_like(x))


def identity(width: int, segments: tuple[int, ...], rule: InputRule) -> tuple[Operands, Product]:
    """Return the product that reproduces its quantized input."""
    product = Product(FORMATS["int8"], segments, segments, rule)
    return Operands(torch.eye(width, dtype=torch.int8), torch.ones(width, len(segments))), product


def bits_equal(y: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal in values, dtype and shape, with NaN equal to NaN."""
    return y.dtype == expected.dtype and torch.equal(y.nan_to_num(nan=1234.5), expected.nan_to_num(nan=1234.5))


def cpu_flags() -> set[str]:
    """Return the CPU's flags and its vendor in /proc/cpuinfo; empty unless on Linux and x86."""
    if not os.path.exists("/proc/cpuinfo"):
        return set()
    with open("/proc/cpuinfo") as file:
        lines: Sequence[str] = file.readlines()
    found = [set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "vendor_id"))]
    return set().union(*found)
