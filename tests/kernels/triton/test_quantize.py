"""Fused quantization of activations, bit for bit equal to InputRule.quantize."""

import pytest
import torch

from hfquant.formats import FORMATS, InputRule
from hfquant.kernels.base import Operands, Product
from hfquant.kernels.triton import quantize
from tests.kernels.triton.layers import DEVICE

pytest.importorskip("triton")
SEGMENTS = {"one": (37,), "three": (5, 21, 11)}


def product(rule: InputRule) -> Product:
    return Product(FORMATS["int8"], rule.segments, rule.segments, rule)


def rule_of(form: str, mode: str, segments: tuple[int, ...], dual: bool) -> InputRule:
    flags = tuple(dual and i != 1 for i in range(len(segments)))
    return InputRule(FORMATS[form], mode != "static", mode == "token", segments, flags)


def given(rule: InputRule) -> dict[str, torch.Tensor]:
    if not rule.static:
        return {}
    scale = torch.rand(len(rule.segments)) / rule.format.qmax + 0.001
    if not any(rule.dual):
        return {"input_scale": scale}
    exponent = torch.tensor([3 if flag else 0 for flag in rule.dual])
    return {"input_scale": scale, "input_scale_neg": scale / 2**exponent}


def numbers(codes: torch.Tensor, rule: InputRule) -> torch.Tensor:
    """Return the numbers that the planes represent."""
    if not rule.format.is_integer:
        return rule.format.values(codes[0])
    planes = codes.int()
    return (planes[0] + 256 * planes[1] if len(codes) == 2 else planes[0]).float()


def check(x: torch.Tensor, rule: InputRule, divisor: torch.Tensor | None = None) -> None:
    operands = Operands(torch.empty(0), divisor=divisor, **given(rule))
    values, scale = operands.quantized_input(x.float(), product(rule))
    on_device = Operands(*[None if t is None else t.to(DEVICE) for t in operands])
    codes, scales = (t.cpu() for t in quantize.quantize(x.to(DEVICE), on_device, product(rule)))
    assert codes.shape == (2 if any(rule.dual) else 1, *x.shape)
    torch.testing.assert_close(numbers(codes, rule), values, rtol=0, atol=0)
    torch.testing.assert_close(scales, scale.expand_as(scales), rtol=0, atol=0)


def samples(width: int) -> torch.Tensor:
    """Return rows of every kind: plain, one-sided, zeros, tiny, huge, with a large positive side, all halves."""
    x = torch.randn(9, width)
    x[1], x[2], x[3] = x[1].abs(), -x[2].abs(), 0
    x[4] *= 1e-40
    x[5] *= 1e38 / x[5].abs().max()
    x[6] = torch.nn.functional.silu(x[6] * 4)
    x[7] = torch.arange(width) / 2 - width // 4
    x[8, 0] = 3.4028234663852886e38
    return x


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("mode", ["token", "tensor", "static"])
@pytest.mark.parametrize(("form", "dual"), [("int8", False), ("int8", True), ("int6", True), ("int4", True)])
def test_integers(form, dual, mode, segments) -> None:
    x = samples(sum(segments))
    check(x[:-2] if mode == "tensor" else x, rule_of(form, mode, segments, dual))


@pytest.mark.parametrize("mode", ["token", "tensor", "static"])
@pytest.mark.parametrize("form", ["fp8e4m3", "fp8e5m2"])
def test_fp8(form, mode) -> None:
    check(samples(37), rule_of(form, mode, (37,), False))


@pytest.mark.parametrize("form", ["fp8e4m3", "fp8e5m2"])
def test_every_fp8_code_and_what_lies_between(form) -> None:
    codes = torch.arange(256).to(torch.int8)
    values = FORMATS[form].values(codes)
    values = values[values.isfinite()].sort().values
    between = (values[1:] + values[:-1]) / 2
    row = torch.cat([values, between, torch.nextafter(between, values[1:]), torch.nextafter(between, values[:-1])])
    rule = rule_of(form, "static", (len(row),), False)
    operands = Operands(torch.empty(0), input_scale=torch.ones(1, device=DEVICE))
    found, _ = quantize.quantize(row[None].to(DEVICE), operands, product(rule))
    assert torch.equal(found[0].cpu(), rule.format.quantize(row[None], torch.ones(1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["token", "static"])
def test_half_precision_and_divisor(mode, dtype) -> None:
    x = torch.randn(4, 37).to(dtype)
    check(x, rule_of("int8", mode, (30, 7), True), torch.rand(37) + 0.5)
    check(x.T.contiguous().T, rule_of("int8", mode, (37,), False))
    check(torch.randn(4, 74).to(dtype)[:, ::2], rule_of("int8", mode, (37,), False))
    check(torch.randn(4, 74).to(dtype)[:, :37], rule_of("int8", mode, (37,), False))


@pytest.mark.parametrize("mode", ["token", "tensor", "static"])
def test_segments_longer_than_a_block(mode, monkeypatch) -> None:
    monkeypatch.setattr(quantize, "BLOCK", 16)
    check(samples(40)[:-2], rule_of("int8", mode, (36, 4), True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("block", [16, 8192])
@pytest.mark.parametrize("mode", ["token", "tensor", "static"])
def test_what_is_not_finite_spoils_its_token(mode, block, bad, monkeypatch) -> None:
    monkeypatch.setattr(quantize, "BLOCK", block)
    rule = rule_of("int8", mode, (24, 16), True)
    x = torch.randn(3, 40)
    x[1, 20] = bad
    operands = Operands(torch.empty(0), **{k: v.to(DEVICE) for k, v in given(rule).items()})
    _, scales = quantize.quantize(x.to(DEVICE), operands, product(rule))
    expected = torch.zeros(3, 2, dtype=torch.bool)
    expected[1, 0] = True
    if mode == "tensor":
        expected[:, 0] = True
    assert torch.equal(scales.cpu().isnan(), expected)


@pytest.mark.parametrize("low", [1e-44, 1e-39, 1.1e-38, 0.1, 0.25, 0.3, 1.0])
@pytest.mark.parametrize("high", [3e-44, 5e-39, 1.0, 0.99, 1e30])
def test_exponent_of_the_second_scale(low, high) -> None:
    check(torch.tensor([[high, -low, 0.0], [low, -high, 0.0]]), rule_of("int8", "token", (3,), True))


def test_refusals() -> None:
    assert [name for name, form in FORMATS.items() if not quantize.refuses(form)] == [
        *(f"int{bits}" for bits in range(2, 9)), "fp8e4m3", "fp8e5m2",
    ]  # fmt: skip
    assert quantize.refuses(FORMATS["int16"]) == "codes of int16 are not one byte"
