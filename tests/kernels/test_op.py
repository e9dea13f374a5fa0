"""``torch.ops.hfquant.linear``: traced, exported, differentiated, in threads, and with arguments it must refuse."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hfquant.formats import FORMATS, InputRule, rotation
from hfquant.kernels import cpu, dequantize
from hfquant.kernels.base import Operands, Product
from hfquant.kernels.op import linear
from hfquant.kernels.triton import host
from hfquant.layer_config import InputQuant
from hfquant.layer_plan import LayerPlan
from tests import oracle
from tests.formats.test_rotation import by_hand
from tests.kernels.products import NAMES, Spec, kernel, sample
from tests.nn.linear_cases import IN, OUT, cases, layer_of, rank, some_input, weight_by_hand

__all__ = ["kernel"]

ROOT = Path(__file__).parents[2]
INPUTS = {
    "float": None,
    "static": InputQuant(),
    "tensor": InputQuant(dynamic=True),
    "token": InputQuant(dynamic=True, axis=-1),
}
both_modes = pytest.mark.parametrize("real", [False, True])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference relative to the norm of ``expected``."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def emulated(plan: LayerPlan, tensors, x: torch.Tensor) -> torch.Tensor:
    """Run the layer in float64 and differentiably: the backward pass treats rounding of the input as the identity."""
    weight, quant = torch.from_numpy(weight_by_hand(plan, tensors)), plan.config.input_quant
    segments, parts, start = plan.input_segments, [], 0
    for i, rows in enumerate(plan.row_groups):
        values = x / tensors["smooth"].double().view(-1, plan.in_features)[i] if "smooth" in tensors else x
        if quant is not None:
            raw = values.detach().float().numpy()
            if quant.dynamic:
                rounded, _ = oracle.activation(raw, quant.type, quant.axis, segments, plan.dual)
            else:
                column = np.repeat(np.arange(len(segments)), segments)
                scale = tensors["input_scale"].view(-1, len(segments))[i].numpy()[column]
                if "input_scale_neg" in tensors:
                    negative = tensors["input_scale_neg"].view(-1, len(segments))[i].numpy()[column]
                    scale = np.where(raw < 0, negative, scale)
                rounded = oracle.codes_of(raw, scale, quant.type) * scale.astype(np.float64)
            values = values + (torch.from_numpy(rounded) - values).detach()
        block = slice(start, start + rows)
        y = values @ weight[block].T
        if rank(plan):
            down = tensors["svd_down"].double().view(-1, rank(plan), plan.in_features)[i]
            y = y + x @ down.T @ tensors["svd_up"].double()[block].T
        parts.append(y)
        start += rows
    y = torch.cat(parts, -1)
    return y + tensors["bias"].double() if "bias" in tensors else y


@both_modes
@pytest.mark.parametrize("quant", INPUTS)
@pytest.mark.parametrize("dtype", ["int2", "int3", "int4", "int5", "int6", "int8", "fp8e4m3", "bf16"])
def test_result_and_gradient_are_those_of_an_emulation(dtype, quant, real) -> None:
    for name, case in cases(dtype).items():
        plan = case.plan(INPUTS[quant], real)
        layer, tensors = layer_of(plan)
        for lead in ((5,), (2, 9)):
            x = some_input(*lead)
            ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
            y, expected = layer(ours), emulated(plan, tensors, theirs)
            assert distance(y.detach(), expected.detach()) < 1e-4, name
            grad = torch.randn(*lead, OUT)
            y.backward(grad)
            expected.backward(grad.double())
            assert ours.grad.dtype == torch.float32
            assert distance(ours.grad, theirs.grad) < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_other_float_types(dtype) -> None:
    layer, _ = layer_of(cases("int8")["all at once"].plan(INPUTS["token"], True))
    x, grad = some_input(4).to(dtype), torch.randn(4, OUT).to(dtype)
    ours = x.clone().requires_grad_()
    layer(ours).backward(grad)
    exact = x.float().requires_grad_()
    layer(exact).backward(grad.float())
    assert ours.grad.dtype == dtype
    # Each group of rows rounds its contribution to the dtype.
    assert distance(ours.grad, exact.grad) < 2 * torch.finfo(dtype).eps + 1e-6


@both_modes
def test_kernels_that_do_not_rotate_get_what_is_rotated(real, monkeypatch) -> None:
    """As CUDA's do; here the fallback kernel is modified to be one of them, and forced."""
    given = []

    def run(x: torch.Tensor, operands: Operands, product: Product) -> torch.Tensor:
        given.append((x.dtype, operands.divisor, product.rotation))
        return dequantize.run(x, operands, product)

    lacking = replace(dequantize.KERNEL, run=run, rotates=False)
    rule = InputRule(FORMATS["int8"], True, True, (40,), (False,))
    product = Product(FORMATS["int8"], (40,), (40,), rule, rotation=16)
    codes, divisor = torch.randint(-128, 128, (7, 40), dtype=torch.int8), torch.rand(40) + 0.5
    operands, x = Operands(codes, torch.rand(7, 1), divisor=divisor), torch.randn(5, 40)
    expected = dequantize.run(x, operands, product)
    monkeypatch.setattr(dequantize, "KERNEL", lacking)
    monkeypatch.setattr("hfquant.kernels.op.pick", lambda *of: lacking)
    torch.testing.assert_close(linear(x, operands, product, real), expected)
    half = linear(x.bfloat16(), operands, product, real)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    assert given == [(torch.float32, None, 0)] * 2


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_rotated_input_that_is_not_quantized_stays_bfloat16(dtype, size, divided, gpu, monkeypatch) -> None:
    """On a GPU, whose products in that dtype are faster."""
    given = []
    if gpu:
        monkeypatch.setattr("hfquant.kernels.op._IN_FLOAT32", ())

    def run(x: torch.Tensor, operands: Operands, product: Product) -> torch.Tensor:
        given.append(x)
        return dequantize.run(x, operands, product)

    monkeypatch.setattr("hfquant.kernels.op.pick", lambda *of: replace(dequantize.KERNEL, run=run, rotates=False))
    product = Product(FORMATS["int8"], (80,), (80,), None, rotation=size)
    codes, divisor = torch.randint(-128, 128, (7, 80), dtype=torch.int8), torch.rand(80) + 0.5
    x = torch.randn(5, 80).to(dtype)
    y = linear(x, Operands(codes, torch.rand(7, 1), divisor=divisor if divided else None), product, True)
    assert y.dtype == dtype
    raw = x.double() / divisor.double() if divided else x.double()
    exact = raw @ torch.from_numpy(by_hand(80, size))
    assert given[0].dtype == (torch.bfloat16 if gpu and dtype == torch.bfloat16 else torch.float32)
    # Rounded once, at the end.
    torch.testing.assert_close(given[0].double(), exact, rtol=torch.finfo(given[0].dtype).eps / 2 + 1e-6, atol=1e-6)


def test_the_gradient_is_rotated_back() -> None:
    product = Product(FORMATS["int8"], (40,), (40,), None, rotation=16)
    codes, divisor = torch.randint(-128, 128, (7, 40), dtype=torch.int8), torch.rand(40) + 0.5
    x, grad = torch.randn(5, 40, requires_grad=True), torch.randn(5, 7)
    linear(x, Operands(codes, torch.ones(7, 1), divisor=divisor), product, True).backward(grad)
    exact = (grad.double() @ codes.double()) @ torch.from_numpy(by_hand(40, 16)) / divisor.double()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), exact, rtol=1e-4, atol=1e-4)


def test_with_a_gradient_it_computes_what_it_does_without(kernel) -> None:
    for case in cases("int8").values():
        layer, _ = layer_of(case.plan(INPUTS["token"], True))
        x = some_input(3)
        assert torch.equal(layer(x), layer(x.clone().requires_grad_()).detach())


def arguments(case: str, quant: str, real: bool, dtype: str = "int4"):
    """Return the op's arguments for a layer with one group of rows."""
    layer, _ = layer_of(cases(dtype)[case].plan(INPUTS[quant], real))
    return layer.operands(0, slice(None)), layer.product


@pytest.mark.sampled(2)
@both_modes
@pytest.mark.parametrize("quant", INPUTS)
@pytest.mark.parametrize("case", ["dual", "svd"])
def test_torch_finds_nothing_wrong_with_the_op(case, quant, real) -> None:
    operands, product = arguments(case, quant, real)
    for x in (some_input(3), some_input(2, 3).requires_grad_(), some_input(0)):
        torch.library.opcheck(torch.ops.hfquant.linear.default, (x, *operands, product.key, real))


def test_fakes_have_the_shape_of_the_result() -> None:
    for case in ("channel", "asymmetric", "svd"):
        operands, product = arguments(case, "token", True)
        meta = Operands(*[None if t is None else t.to("meta") for t in operands])
        for lead in ((), (3,), (2, 3), (0,)):
            for dtype in (torch.float32, torch.bfloat16):
                x = some_input(*lead).to(dtype)
                y, fake = linear(x, operands, product, True), linear(x.to("meta"), meta, product, True)
                assert fake.is_meta
                assert (fake.shape, fake.dtype, fake.stride()) == (y.shape, y.dtype, y.stride())


@both_modes
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["channel", "all at once"])
def test_compiles_whole_and_equals_eager(case, backend, real) -> None:
    for quant in ("static", "token") if backend == "aot_eager" else INPUTS:
        torch._dynamo.reset()
        layer, _ = layer_of(cases("int4")[case].plan(INPUTS[quant], real))
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        for tokens in (3, 1, 12):
            x = some_input(tokens)
            assert distance(compiled(x), layer(x)) < 1e-6
    x = some_input(3)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(ours).sum().backward()
    layer(theirs).sum().backward()
    assert distance(ours.grad, theirs.grad) < 1e-6


def test_tracing_creates_what_kernels_keep(monkeypatch) -> None:
    """On a GPU, a CUDA graph would own what its first call creates."""
    monkeypatch.setattr("hfquant.kernels.op._KEEPING", ("cpu",))
    rule = InputRule(FORMATS["int8"], True, True, (16, 27), (False,) * 2)
    product = Product(FORMATS["int8"], (16, 27), (16, 27), rule, rotation=16)
    codes = torch.randint(-128, 128, (7, 43), dtype=torch.int8)
    operands, x = Operands(codes, torch.rand(7, 2)), torch.randn(3, 43)
    caches = (rotation._kept, host.layout, host.segments_of)
    for kept in caches:
        kept.cache_clear()
    sizes = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        sizes.extend(kept.cache_info().currsize for kept in caches)
        return graph

    torch._dynamo.reset()
    torch.compile(lambda x: linear(x, operands, product, False), fullgraph=True, backend=backend)(x)
    # Three matrices of two dtypes: 43 channels are rotated in blocks of 16, 8 and 2.
    assert sizes == [6, 1, 1]
    bounds = host.layout(product, codes.device).blocks, host.segments_of(product, codes.device).bounds
    matrices = [rotation._kept(size, codes.device, dtype) for size in (16, 8, 2) for dtype in (x.dtype, torch.bfloat16)]
    assert rotation._kept.cache_info().misses == 6
    assert all(type(tensor) is torch.Tensor for tensor in (*bounds, *matrices))


@both_modes
def test_is_exported_as_one_node(real) -> None:
    layer, _ = layer_of(cases("int4")["all at once"].plan(INPUTS["token"], real))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (some_input(4),), dynamic_shapes=({0: batch},))
    ours = [n for n in program.graph.nodes if n.op == "call_function" and "hfquant" in str(n.target)]
    assert len(ours) == len(layer._row_groups) == 2
    assert layer.product.key in ours[0].args
    for tokens in (1, 4, 9):
        x = some_input(tokens)
        assert torch.equal(program.module()(x), layer(x))


def test_autocast_changes_nothing(kernel) -> None:
    operands, product = arguments("svd", "token", True)
    x = some_input(4)
    expected = linear(x, operands, product, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, operands, product, True), expected)
        assert torch.equal(linear(x.clone().requires_grad_(), operands, product, True), expected)


# What it refuses.


def wrong_operands() -> dict[str, tuple[str, object, str]]:
    """Map a description to the operand, its wrong value, and the error."""
    return {
        "rows": ("weight", torch.zeros(OUT, 11, dtype=torch.int8), r"weight: expected shape \(10, 12\)"),
        "code dtype": ("weight", torch.zeros(OUT, 12), "weight: expected torch.int8, got torch.float32"),
        "rank": ("weight", torch.zeros(OUT * 12, dtype=torch.int8), "expected a weight of rank 2"),
        "no scale": ("scale", None, "scale: expected a tensor"),
        "scale dtype": ("scale", torch.zeros(OUT, 6), "scale: expected torch.uint8"),
        "scale shape": ("scale", torch.zeros(OUT, 5, dtype=torch.uint8), r"scale: expected shape \(10, 6\)"),
        "row scale": ("scale_row", torch.zeros(OUT), r"scale_row: expected shape \(10, 1\)"),
        "no row scale": ("scale_row", None, "scale: expected torch.float32"),
        "zero point": ("zero_point", torch.zeros(OUT, 6, dtype=torch.int8), r"zero_point: expected shape \(10, 3\)"),
        "no zero point": ("zero_point", None, "zero_point: expected a tensor"),
        "input scale": ("input_scale", torch.ones(1), "input_scale: expected none"),
        "divisor": ("divisor", torch.ones(IN + 1), r"divisor: expected shape \(24,\)"),
        "half a branch": ("down", torch.ones(3, IN), "down: expected none"),
        "bias": ("bias", torch.ones(OUT, dtype=torch.int64), "bias: expected a float dtype"),
        "meta": ("weight", torch.zeros(OUT, 12, dtype=torch.int8, device="meta"), "weight: is on meta"),
    }  # fmt: skip


@both_modes
@pytest.mark.parametrize("wrong", wrong_operands())
def test_operands_of_another_product_are_refused(wrong, real) -> None:
    operands, product = arguments("asymmetric", "token", real)
    name, value, why = wrong_operands()[wrong]
    with pytest.raises((ValueError, TypeError), match=why):
        torch.ops.hfquant.linear(some_input(3), *operands._replace(**{name: value}), product.key, real)


@both_modes
def test_inputs_that_do_not_fit_are_refused(real) -> None:
    operands, product = arguments("asymmetric", "token", real)
    for x, why in (
        (torch.zeros(3, IN, dtype=torch.int8), "floating-point input, got torch.int8"),
        (torch.zeros(3, IN + 1), "input of 24 features"),
        (torch.zeros(()), "input of 24 features"),
        (torch.zeros(3, IN, dtype=torch.complex64), "floating-point"),
    ):
        with pytest.raises((ValueError, TypeError), match=why):
            torch.ops.hfquant.linear(x, *operands, product.key, real)
    freed = torch.zeros(3, IN)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="data of a tensor was freed"):
        torch.ops.hfquant.linear(freed, *operands, product.key, real)
    with pytest.raises(ValueError, match="not a quantized product"):
        torch.ops.hfquant.linear(torch.zeros(3, IN), *operands, "int4", real)
    plain, other = arguments("group", "token", real)
    with pytest.raises(ValueError, match="zero_point: expected none"):
        torch.ops.hfquant.linear(torch.zeros(3, IN), *plain._replace(zero_point=operands.zero_point), other.key, real)


needs_cpu_kernel = pytest.mark.skipif(bool(cpu.KERNELS[-1].missing()), reason="the C++ kernels cannot be compiled")


@needs_cpu_kernel
@pytest.mark.parametrize("op", ["linear", "cpu"])
@pytest.mark.parametrize("calls", [400, pytest.param(10000, marks=pytest.mark.slow)])
def test_no_call_crashes_the_process(op, calls) -> None:
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-W",
        "ignore",
        "-m",
        "tests.kernels.fuzz_job",
        op,
        str(calls),
        "0",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    right, errors = (int(word) for word in done.stdout.split() if word.isdigit())
    assert right + errors == calls
    assert min(right, errors) > calls // 10


# Threads.


@pytest.mark.parametrize("torch_threads", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_several_threads_at_once(name, torch_threads, monkeypatch) -> None:
    if next(k for k in cpu.KERNELS if k.name == name).missing():
        pytest.skip("this machine cannot run it")
    monkeypatch.setenv("HFQUANT_KERNEL", name)
    specs = [
        Spec(8, (512,)), Spec(4, (384,), 32, "token", True, True), Spec(6, (100, 31), 0, "tensor"),
        Spec(4, (256,), 64, "float"), Spec(8, (1024,), 128, "static"), Spec(4, (70, 58), 16, "token", dual=3),
    ]  # fmt: skip
    made = [sample(spec, tokens) for spec in specs for tokens in (1, 5, 40)]
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    try:

        def work(first: int) -> list[bool]:
            turns = [made[(first + i) % len(made)] for i in range(3 * len(made))]
            return [torch.equal(linear(m.x, m.operands, m.product, True), m.expected) for m in turns]

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(work, range(0, 12, 3)))
    finally:
        torch.set_num_threads(before)
    assert all(all(result) for result in results)


@pytest.mark.parametrize("torch_threads", [1, 2, 3])
def test_every_number_of_threads_gives_the_same(kernel, torch_threads) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    try:
        for spec in (
            Spec(8, (2048,), out=301),
            Spec(4, (1000,), 32, "token", True, out=301),
            Spec(6, (512,), 0, "float"),
        ):
            for tokens in (1, 7, 65):
                made = sample(spec, tokens)
                assert torch.equal(linear(made.x, made.operands, made.product, True), made.expected)
    finally:
        torch.set_num_threads(before)


def test_threads_differentiate_too() -> None:
    layer, _ = layer_of(cases("int8")["all at once"].plan(INPUTS["token"], True))
    x = some_input(6)
    expected = x.clone().requires_grad_()
    layer(expected).sum().backward()

    def work(_: int) -> torch.Tensor:
        ours = x.clone().requires_grad_()
        layer(ours).sum().backward()
        return ours.grad

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(grad, expected.grad) for grad in pool.map(work, range(40)))
