"""Which kernel runs a product: the widest, the requested one, or none, with an error that names the problem."""

import shutil

import pytest
import torch

from hfquant.formats import FORMATS, InputRule
from hfquant.kernels import table
from hfquant.kernels.base import Kernel, Product
from hfquant.kernels.cpu.build import HERE, wheel_name
from hfquant.kernels.op import linear
from hfquant.kernels.table import KERNELS, obstacle, pick
from tests.kernels.products import NAMES, Spec, cpu_flags, sample

INT8 = FORMATS["int8"]
W8A8 = Product(INT8, (64,), (64,), InputRule(INT8, True, True, (64,), (False,)))
AVX512_VNNI = {"avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
#: By their names in /proc/cpuinfo.
NEEDED = {
    "avx512_bf16": AVX512_VNNI | {"avx512_bf16", "AuthenticAMD"},
    "avx512_vnni": AVX512_VNNI,
    "avxvnni": {"avx2", "fma", "f16c", "bmi2", "avx_vnni"},
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "scalar": set(),
}
can_compile = pytest.mark.skipif(
    not ((HERE / wheel_name()).exists() or shutil.which("g++") or shutil.which("clang++")),
    reason="there is no C++ compiler",
)
has_flags = pytest.mark.skipif(not cpu_flags(), reason="no /proc/cpuinfo of an x86 CPU")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Record the names of the kernels that run."""
    names: list[str] = []

    def noting(kernel: Kernel):
        def run(*arguments):
            names.append(kernel.name)
            return kernel.run(*arguments)

        return run

    noted = {k.name: Kernel(k.name, k.device, k.missing, k.refuses, k.pays, noting(k)) for k in KERNELS.values()}
    monkeypatch.setattr(table, "KERNELS", noted)
    table._pick.cache_clear()
    yield names
    table._pick.cache_clear()


@can_compile
@has_flags
def test_every_kernel_that_the_cpu_can_run_is_there() -> None:
    here = {name: cpu_flags() >= flags for name, flags in NEEDED.items()}
    assert {name: KERNELS[name].missing() for name in NEEDED if here[name]} == {n: "" for n in NEEDED if here[n]}
    for name in NEEDED:
        if not here[name]:
            assert name in KERNELS[name].missing()
    assert list(NEEDED) == NAMES


@can_compile
@has_flags
@pytest.mark.parametrize("tokens", [1, 2, 64, 1000])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_widest_path_is_taken(calls, bits, tokens, monkeypatch) -> None:
    monkeypatch.delenv("HFQUANT_KERNEL", raising=False)
    widest = next(name for name, flags in NEEDED.items() if cpu_flags() >= flags)
    for spec in (Spec(bits, (64,)), Spec(bits, (192,), 64, "float", True, True), Spec(bits, (20, 44), 0, "static")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            made = sample(spec, tokens)
            linear(made.x.to(dtype), made.operands, made.product, True)
            assert calls.pop() == widest, (spec, dtype)
            assert not calls


def test_not_faked_in_any_other_way(calls) -> None:
    made = sample(Spec(4, (64,)), 3)
    linear(made.x, made.operands, made.product, False)
    assert calls == []  # fake quantization does not consult the table
    single = linear(made.x, made.operands, made.product, True)
    double = linear(made.x.double(), made.operands, made.product, True)
    assert calls[0] == calls[1]
    assert double.equal(single.double())


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_can_be_forced(calls, name, monkeypatch) -> None:
    if KERNELS[name].missing():
        pytest.skip(KERNELS[name].missing())
    made = sample(Spec(4, (64,), 16), 3)
    for forced in (name, "reference", "dequantize", name):
        monkeypatch.setenv("HFQUANT_KERNEL", forced)
        linear(made.x, made.operands, made.product, True)
        assert calls.pop() == forced


def test_an_unknown_name_lists_the_known(monkeypatch) -> None:
    for name in ("avx9", "AVX2", "cpu", " avx2"):
        monkeypatch.setenv("HFQUANT_KERNEL", name)
        with pytest.raises(ValueError) as caught:
            pick(W8A8, "cpu", torch.float32, 1, 1)
        assert f"HFQUANT_KERNEL={name}: unknown kernel" in str(caught.value)
        assert all(known in str(caught.value) for known in KERNELS)
    monkeypatch.setenv("HFQUANT_KERNEL", "")
    assert pick(W8A8, "cpu", torch.float32, 1, 1).name in KERNELS


def test_one_that_cannot_run_here_is_refused_by_name(monkeypatch) -> None:
    absent = Kernel(
        "absent", "cpu", lambda: "this CPU has no absent", lambda p: "", lambda *size: True, lambda *a: a[0]
    )
    monkeypatch.setitem(KERNELS, "absent", absent)
    monkeypatch.setenv("HFQUANT_KERNEL", "absent")
    with pytest.raises(ValueError, match=r"HFQUANT_KERNEL=absent cannot compute .*int8.*: this CPU has no absent"):
        pick(W8A8, "cpu", torch.float32, 2, 2)
    monkeypatch.setenv("HFQUANT_KERNEL", NAMES[-1])
    with pytest.raises(ValueError, match=rf"HFQUANT_KERNEL={NAMES[-1]} cannot compute .*runs on cpu, not cuda"):
        pick(W8A8, "cuda", torch.float32, 2, 2)
    monkeypatch.delenv("HFQUANT_KERNEL")
    monkeypatch.setattr(table, "KERNELS", {"absent": absent, "reference": KERNELS["reference"]})
    assert pick(W8A8, "cpu", torch.float32, 3, 2).name == "reference"


@pytest.mark.parametrize(
    ("product", "why"),
    [
        (Product(INT8, (64,), (64,), InputRule(FORMATS["int16"], True, True, (64,), (False,))), "inputs are int16"),
        (Product(INT8, (64,), (64,), InputRule(FORMATS["fp8e4m3"], True, True, (64,), (False,))), "inputs are fp8e4m3"),
        (Product(FORMATS["int16"], (64,), (64,), None, symmetric=False), "int16 weights have zero points"),
        (Product(INT8, (16, 48), (64,), None), "not groups of equal size"),
        (Product(INT8, (20, 40, 4), (64,), None), "not groups of equal size"),
        (Product(INT8, (32, 8, 16), (40, 16), None), None),
    ],
)
def test_one_that_is_not_exact_is_refused_by_name(product, why, monkeypatch) -> None:
    for name in NAMES:
        if KERNELS[name].missing():
            continue
        monkeypatch.setenv("HFQUANT_KERNEL", name)
        if why is None:
            assert obstacle(KERNELS[name], product, "cpu") == ""
            continue
        with pytest.raises(ValueError, match=rf"HFQUANT_KERNEL={name} cannot compute .*{why}"):
            pick(product, "cpu", torch.float32, 1, 1)
    monkeypatch.delenv("HFQUANT_KERNEL", raising=False)
    assert pick(product, "cpu", torch.float32, 1, 1).name in KERNELS


def test_the_last_kernels_compute_everything() -> None:
    for weight in FORMATS.values():
        for inputs in FORMATS.values():
            product = Product(weight, (20, 44), (64,), InputRule(inputs, True, True, (64,), (False,)))
            for name in ("dequantize", "reference"):
                assert obstacle(KERNELS[name], product, "cpu") == ""


@pytest.mark.parametrize("name", KERNELS)
def test_inputs_of_any_rank(name) -> None:
    """Leading dimensions are preserved, also for inputs that are not contiguous."""
    made = sample(Spec(8, (64,)), 6)
    kernel = KERNELS[name]
    if obstacle(kernel, made.product, "cpu"):
        assert kernel.missing() or kernel.refuses(made.product) or kernel.device == "cuda"
        return
    flat = kernel.run(made.x, made.operands, made.product)
    assert torch.equal(kernel.run(made.x.view(2, 3, 64), made.operands, made.product), flat.view(2, 3, -1))
    assert torch.equal(kernel.run(made.x[:1].view(64), made.operands, made.product), flat[0])
    turned = made.x.view(2, 3, 64).transpose(0, 1)
    assert not turned.is_contiguous()
    y = kernel.run(turned, made.operands, made.product)
    assert torch.equal(y, flat.view(2, 3, -1).transpose(0, 1))
