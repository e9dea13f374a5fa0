"""The C++ kernels against float64, on every instruction set that this machine has."""

import itertools
from pathlib import Path

import pytest
import torch

from hfquant.formats import FORMATS, InputRule
from hfquant.kernels.base import Operands
from hfquant.kernels.op import linear
from tests.kernels.products import (
    FLOAT_LIMIT,
    WIDEST,
    Spec,
    bits_equal,
    identity,
    kernel,
    sample,
)

__all__ = ["kernel"]

INPUTS = ("token", "tensor", "static", "float")
#: Column layouts: segments and group size.
COLUMNS = {
    "1": ((1,), 0),
    "2": ((2,), 0),
    "31": ((31,), 0),
    "64": ((64,), 0),
    "129": ((129,), 0),
    "1000": ((1000,), 0),
    "16s": ((64,), 16),
    "16s, short last": ((203,), 16),
    "32s": ((512,), 32),
    "32s, odd": ((333,), 32),
    "48s": ((240,), 48),
    "48s, short last": ((250,), 48),
    "64s": ((320,), 64),
    "128s": ((640,), 128),
    "128s, short last": ((700,), 128),
    "192s": ((700,), 192),
    "one group": ((100,), 128),
    "segments": ((13, 11), 0),
    "segments of vectors": ((128, 256, 128), 0),
    "segments of one": ((1, 1, 5), 0),
    "16s in segments": ((64, 32), 16),
    "32s in uneven segments": ((50, 7, 96), 32),
    "64s in segments": ((128, 192), 64),
    "128s in segments": ((256, 384), 128),
    "segments of lanes": ((24, 40, 8), 0),
    "32s in segments of lanes": ((96, 96, 192), 32),
    "64s in uneven segments of lanes": ((200, 64, 120), 64),
}
#: On both sides of where tiles begin, which depends on the format, and not multiples of a tile's tokens.
TOKENS = (1, 2, 3, 7, 8, 17, 64)


def assert_exact(spec: Spec, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    made = sample(spec, tokens, dtype, seed)
    y = linear(made.x, made.operands, made.product, True)
    assert bits_equal(y, made.expected), (spec, tokens, dtype, (y.double() - made.expected.double()).abs().max())


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_parts_are_exact(kernel, bits, columns) -> None:
    segments, group = COLUMNS[columns]
    for i, tokens in enumerate(TOKENS):
        # Over all bits and columns, every pair of options occurs, and every option with every number of tokens.
        turn = i + bits + list(COLUMNS).index(columns)
        for inputs in INPUTS:
            dual = 3 if inputs != "float" and turn % 3 == 0 and bits < 7 else 0
            spec = Spec(bits, segments, group, inputs, bool(turn % 2), bool(turn // 2 % 2), dual)
            assert_exact(spec, tokens, seed=turn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_float_types_are_rounded_once(kernel, dtype) -> None:
    for bits in (4, 6, 8):
        for inputs in ("token", "tensor", "static"):
            for segments, group in (((96,), 0), ((96,), 16), ((70, 33), 32)):
                for tokens in (1, 5, 33):
                    assert_exact(Spec(bits, segments, group, inputs, out=50), tokens, dtype, tokens)


@pytest.mark.parametrize("input_bits", [2, 3, 4, 6])
def test_inputs_of_fewer_bits(kernel, input_bits) -> None:
    for inputs in ("token", "tensor", "static"):
        for dual in (0, 3):
            for segments, group in (((96,), 0), ((256,), 32), ((70, 33), 32)):
                for tokens in (1, 6, 20):
                    assert_exact(Spec(4, segments, group, inputs, dual=dual, input_bits=input_bits), tokens)


@pytest.mark.parametrize("out", [1, 2, 3, 4, 5, 15, 17, 47, 49, 101, 1000])
def test_any_number_of_rows(kernel, out) -> None:
    for bits in (3, 4, 6, 8):
        for tokens in (1, 7, 11):
            assert_exact(Spec(bits, (200,), 0, "token", out=out), tokens)
            assert_exact(Spec(bits, (192,), 64, "token", True, True, out=out), tokens)
            assert_exact(Spec(bits, (192,), 32, "float", True, out=out), tokens)


@pytest.mark.parametrize("width", [511, 1024, 2047, 4096, 8191, 8192, 40_001])
def test_wide_products(kernel, width) -> None:
    for bits in (2, 4, 5, 6, 7, 8):
        for tokens in (1, 3, 17):
            assert_exact(Spec(bits, (width,), 0, "token", bits == 6), tokens)
            assert_exact(Spec(bits, (width,), 0, "static", bits == 4), tokens)
            assert_exact(Spec(bits, (width,), 128, "token", bits == 8), tokens)
            assert_exact(Spec(bits, (width,), 64, "float", True, True), tokens)


@pytest.mark.parametrize("tokens", [100, 257, pytest.param(4096, marks=pytest.mark.slow)])
def test_many_tokens(kernel, tokens) -> None:
    for bits in (4, 8):
        assert_exact(Spec(bits, (640,), 0, "token", out=65), tokens)
        assert_exact(Spec(bits, (321,), 32, "tensor", True, out=65), tokens)
        assert_exact(Spec(bits, (320,), 64, "float", out=65), tokens)


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width(kernel, bits) -> None:
    for width in [*range(1, 300), *range(1000, 8193, 799)]:
        for inputs in ("token", "float"):
            for tokens in (1, 9):
                assert_exact(Spec(bits, (width,), 0, inputs, bool(width % 2), out=9), tokens, seed=width)
                assert_exact(Spec(bits, (width,), 16, inputs, not width % 2, out=9), tokens, seed=width)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 64, 300])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_combination(kernel, bits, columns, tokens) -> None:
    segments, group = COLUMNS[columns]
    for inputs in INPUTS:
        for asymmetric in (False, True):
            for two_level in (False, True):
                for dual in (0, 3) if inputs != "float" and bits < 7 else (0,):
                    spec = Spec(bits, segments, group, inputs, asymmetric, two_level, dual)
                    assert_exact(spec, tokens, seed=tokens)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_sums_do_not_overflow(kernel, bits, tokens) -> None:
    """The largest magnitudes, beyond the range of 32 bits: sums are split in two, and both halves are equal floats."""
    half = 2 ** (bits - 1)
    for width in (WIDEST, 2 * WIDEST):
        for code, zero in ((-half, half - 1), (half - 1, -half)):
            spec = Spec(bits, (width,), 0, "token", asymmetric=True, out=3)
            made = sample(spec, tokens)
            fill, shift = (torch.full((3, width), code).to(torch.int8), torch.full((3, 1), zero).to(torch.int8))
            form = made.product.weight
            operands = Operands(form.pack(fill), torch.ones(3, 1), zero_point=form.pack(shift))
            for sign in (1, -1):
                y = linear(torch.full((tokens, width), 127.0 * sign), operands, made.product, True)
                assert (y == float(127 * sign * (code - zero) * width)).all()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_sums_of_words_do_not_overflow(kernel, bits, asymmetric) -> None:
    """The largest magnitudes: sums of bytes in 16 bits, which only some instruction sets have, hold few words."""
    half, rows, width = 2 ** (bits - 1), 3, 352
    edges = ((-half, half - 1), (half - 1, -half)) if asymmetric else ((1 - half, 0), (half - 1, 0))
    for group, tokens in itertools.product((0, 32, 64), (1, 9, 20)):
        spec = Spec(bits, (width,), group, "token", asymmetric, out=rows)
        made = sample(spec, tokens)
        form, groups = made.product.weight, -(-width // group) if group else 1
        for (code, zero), sign in itertools.product(edges, (1, -1)):
            codes, zeros = (torch.full((rows, n), v).to(torch.int8) for n, v in ((width, code), (groups, zero)))
            zero_point = form.pack(zeros) if asymmetric else None
            operands = Operands(form.pack(codes), torch.ones(rows, groups), zero_point=zero_point)
            y = linear(torch.full((tokens, width), 127.0 * sign), operands, made.product, True)
            assert (y == float(127 * sign * (code - zero) * width)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_sums_of_long_codes_do_not_overflow(kernel, bits) -> None:
    """Extreme 16-bit input codes, 127 * 2^8 with dual scale, or floats, against extreme weights."""
    half = 2 ** (bits - 1)
    for inputs, value in (("token", 127.0 * 2**8), ("float", float(FLOAT_LIMIT))):
        for width in (128, 512):
            spec = Spec(bits, (width,), 0, inputs, asymmetric=True, dual=0 if inputs == "float" else 8, out=3)
            product = spec.product()
            form = product.weight
            fill = torch.full((3, width), -half).to(torch.int8)
            zero = form.pack(torch.full((3, 1), half - 1).to(torch.int8))
            operands = Operands(form.pack(fill), torch.ones(3, 1), zero_point=zero)
            for tokens in (1, 9):
                y = linear(torch.full((tokens, width), value), operands, product, True)
                exact = value * -(2 * half - 1) * width
                # The integer parts are exact; their sums are floats, within one ulp for each 128 columns of a row.
                assert ((y.double() - exact).abs() <= abs(exact) * 2**-23).all()


# Layouts of inputs.


def test_strided_and_nested_inputs(kernel) -> None:
    for spec in (Spec(8, (96,)), Spec(4, (96,), 32, "tensor", True), Spec(6, (96,), 0, "float")):
        made = sample(spec, 24)
        x, expected = made.x, made.expected

        def run(x, made=made):
            return linear(x, made.operands, made.product, True)

        assert bits_equal(run(x.view(2, 3, 4, 96)), expected.view(2, 3, 4, -1))
        assert bits_equal(run(x.T.contiguous().T), expected)
        assert bits_equal(run(x.view(4, 6, 96).transpose(0, 1)), expected.view(4, 6, -1).transpose(0, 1))
        padded = torch.full((24, 200), torch.nan)
        padded[:, 3:195:2] = x
        assert bits_equal(run(padded[:, 3:195:2]), expected)
        assert bits_equal(run(padded.unflatten(0, (2, 12))[:, :, 3:195:2]), expected.view(2, 12, -1))
        assert bits_equal(run(x[:1].expand(5, 96)), expected[:1].expand(5, -1))
        if spec.input != "tensor":
            assert bits_equal(run(x[::2]), expected[::2])
            assert bits_equal(run(x[5]), expected[5])
        for lead in ((0,), (0, 3), (2, 0, 3)):
            assert run(x.new_zeros(*lead, 96)).shape == (*lead, spec.out)


def test_what_is_no_number_stays_in_its_call(kernel) -> None:
    """Buffers are reused: a NaN must not remain in the padding of a narrower product."""
    for bits, inputs in itertools.product((4, 6, 8), ("token", "float")):
        for group in (0, 32):
            before, after = sample(Spec(bits, (640,), group, inputs), 3), sample(Spec(bits, (330,), group, inputs), 3)
            bad = linear(torch.full_like(before.x, torch.nan), before.operands, before.product, True)
            assert bad.isnan().all()
            assert bits_equal(linear(after.x, after.operands, after.product, True), after.expected)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_an_infinite_scale_spoils_its_own_row_alone(kernel, bits) -> None:
    for tokens, asymmetric in itertools.product((1, 4, 9), (False, True)):
        made = sample(Spec(bits, (96,), 32, asymmetric=asymmetric), tokens)
        assert made.operands.scale is not None
        for row in (1, 16, 36):
            scale = made.operands.scale.clone()
            scale[row] = torch.inf
            y = linear(made.x, made.operands._replace(scale=scale), made.product, True)
            others = torch.arange(len(scale)) != row
            assert bits_equal(y[:, others], made.expected[:, others]), (tokens, row)


def near_ties(scale: torch.Tensor, limit: int) -> torch.Tensor:
    """Return inputs [3, 2 limit + 6] halfway between two codes times ``scale``, and one ulp to either side."""
    middle = (torch.arange(-limit - 3, limit + 3) + 0.5) * scale
    away = torch.full_like(middle, torch.inf)
    return torch.stack([middle, middle.nextafter(away), middle.nextafter(-away)])


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_codes_of_the_input_are_those_of_its_rule(kernel, bits) -> None:
    form = FORMATS[f"int{bits}"]
    limit = int(form.qmax)
    width = 2 * limit + 6
    for scale in [1.0, 1 / 3, 0.1, 7.77e-5, 1e-30, 3e30, 2.0**-126, *torch.rand(20).tolist()]:
        x = near_ties(torch.tensor(scale), limit)
        x = torch.cat([x, torch.randn(3, width) * scale * limit / 2])
        static = InputRule(form, False, False, (width,), (False,))
        for rule, given in ((static, torch.tensor([scale])), (InputRule(form, True, True, (width,), (False,)), None)):
            if given is None:
                x = torch.cat([x.clamp(-limit * scale, limit * scale), torch.full((len(x), 1), limit * scale)], 1)[
                    :, -width:
                ]
            operands, product = identity(width, (width,), rule)
            operands = operands._replace(input_scale=given)
            values, found = rule.quantize(x, given)
            assert bits_equal(linear(x, operands, product, True), values * found), (scale, rule)
            assert bits_equal(linear(x.repeat(2, 1), operands, product, True), (values * found).repeat(2, 1))


@pytest.mark.parametrize("dynamic", ["token", "tensor", "static"])
def test_codes_of_segments_of_every_width(kernel, dynamic) -> None:
    """Segments end within vectors: the next one must not affect a scale, a code or a sum, nor be overwritten."""
    form, segments = FORMATS["int8"], (*range(1, 36), 72, 130, 129)
    width = sum(segments)
    rule = InputRule(form, dynamic != "static", dynamic == "token", segments, (False,) * len(segments))
    for tokens in (1, 9, 20):
        # Neighboring segments have very different magnitudes.
        sizes = 10.0 ** torch.randint(-6, 6, (len(segments),))
        x = torch.randn(tokens, width) * torch.repeat_interleave(sizes, torch.tensor(segments))
        given = sizes * 0.01 if dynamic == "static" else None
        operands, product = identity(width, segments, rule)
        values, found = rule.quantize(x, given)
        expected = values * torch.repeat_interleave(found, torch.tensor(segments), -1)
        assert bits_equal(linear(x, operands._replace(input_scale=given), product, True), expected)


@pytest.mark.parametrize("dynamic", ["token", "tensor", "static"])
def test_codes_of_dual_scales_and_segments(kernel, dynamic) -> None:
    form, segments = FORMATS["int8"], (100, 31, 69)
    for dual in ((True, True, True), (True, False, True), (False, False, False)):
        rule = InputRule(form, dynamic != "static", dynamic == "token", segments, dual)
        for seed in range(10):
            torch.manual_seed(seed)
            x = torch.nn.functional.silu(torch.randn(12, 200) * 4) * 10.0 ** torch.randint(-9, 9, (1,))
            x[3] = x[3].abs()
            x[4] = -x[4].abs()
            x[5, :100] = 0
            given = torch.tensor([0.03, 0.02, 0.05]) * x.abs().max() / 10
            fine = torch.where(torch.tensor(dual), given / 2.0 ** torch.tensor([0, 3, 8]), given)
            scales = (given, fine if any(dual) else None) if dynamic == "static" else (None, None)
            operands, product = identity(200, segments, rule)
            operands = operands._replace(input_scale=scales[0], input_scale_neg=scales[1])
            values, found = rule.quantize(x, *scales)
            expected = values * torch.repeat_interleave(found, torch.tensor(segments), -1)
            assert bits_equal(linear(x, operands, product, True), expected), (dual, seed)
            if dynamic != "tensor":
                assert bits_equal(linear(x[:5], operands, product, True), expected[:5])


SMAPS = Path("/proc/self/smaps")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages")
def test_large_outputs_ask_for_huge_pages(kernel) -> None:
    """Memory above 32 MB is mapped anew each time; its pages need not be faulted one by one."""
    made = sample(Spec(8, (8,), 0, out=4001), 2200)
    y = linear(made.x, made.operands, made.product, True)
    assert torch.equal(y[-3:], linear(made.x[-3:], made.operands, made.product, True))
    middle, flags, here = y.data_ptr() + y.nbytes // 2, "", False
    for line in SMAPS.read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(address, 16) for address in first.split("-"))
            here = start <= middle < end
        elif here and first == "VmFlags:":
            flags = line
    assert "hg" in flags.split()
