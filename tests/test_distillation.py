"""Distillation trains vectors, not codes, and leaves a model unchanged that does not improve."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import hfquant
from hfquant.distillation import _attach, _divergence
from hfquant.nn.modules import quant_modules
from tests.integrations import small_models
from tests.schemes import SVDQUANT

WIDTH = 64
INT3 = {"default": {"weight_quant": {"type": "int3", "group_size": 32}, "input_quant": None, "opt": {"type": "smooth"}}}


class Net(nn.Module):
    """Linears with and without a bias, a norm, and a bare vector."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(3 * WIDTH)
        nn.init.normal_(self.norm.bias)
        self.second = nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.nn.functional.gelu(self.norm(self.first(x)))) * self.gain


def batches(count: int = 12, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    return [torch.randn(4, 8, WIDTH, generator=source).to(dtype) for _ in range(count)]


def quantized(config: Any, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = Net().to(dtype).eval()
    return hfquant.quantize(copy.deepcopy(net), batches(dtype=dtype), config), net


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_on_unseen_data_falls_and_codes_stay(dtype):
    model, net = quantized(INT3, dtype)
    before = state(model)
    found = hfquant.distill(model, net, batches(dtype=dtype), steps=60, learning_rate=5e-3)
    assert found.kept
    assert len(found.losses) == 60
    assert found.after < 0.9 * found.before
    after = state(model)
    assert list(after) == list(before)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {"first.bias", "norm.weight", "norm.bias", "gain"} <= moved
    assert {f"{layer}.{name}" for layer in ("first", "second") for name in ("weight_scale_row", "smooth")} <= moved
    assert {"first.weight_scale", "second.weight_scale"} <= moved
    assert not any(name.endswith(".weight_zero_point") for name in moved)
    assert not {"first.weight", "second.weight"} & moved
    # Unlike the data used for training and evaluation.
    fresh = 2 * torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(9)).to(dtype)
    with torch.no_grad():
        right = net(fresh).double()
        error = (model(fresh).double() - right).norm() / right.norm()
        model.load_state_dict(before)
        assert error < 0.95 * ((model(fresh).double() - right).norm() / right.norm())


def test_what_is_reported_is_what_the_model_gives():
    model, net = quantized(INT3)
    data = batches()
    found = hfquant.distill(model, net, data, steps=20, learning_rate=5e-3)
    x = torch.cat(data[3::4])
    with torch.no_grad():
        right, got = net(x).double().flatten(1), model(x).double().flatten(1)
    expected = ((got - right).square().sum(1) / right.square().sum(1)).mean().item()
    assert found.after == pytest.approx(expected, rel=1e-3)
    assert not any(parametrize.is_parametrized(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "config",
    [
        *("w4a16-gptq", "w4a16", "w8a8", "w8a8-dynamic", "w8a8-smooth", "fp8-dynamic"),
        pytest.param(SVDQUANT, id="svdquant"),
        {"default": {"weight_quant": {"type": "fp16"}, "input_quant": None, "opt": {"type": "default"}}},
        {"default": {"weight_quant": {"type": "int8", "axis": -1}, "input_quant": {"type": "int8"}}},
    ],
    ids=str,
)
def test_folded_values_do_what_hooks_did(config):
    model, _ = quantized(config)
    hfquant.set_real_quant(model, False)
    x = batches(1)[0]
    source = torch.Generator().manual_seed(1)
    with torch.no_grad(), ExitStack() as stack:
        was = model(x)
        values, folds = _attach(model, stack)
        assert torch.equal(model(x), was)
        for value in values:
            value.copy_(0.2 * torch.randn(value.shape, generator=source))
        hooked = model(x)
        for fold in folds:
            fold()
    assert (hooked - was).norm() > 0.05 * was.norm()
    # If inputs are rounded, applying a factor before or within the division may change a code.
    assert (model(x) - hooked).norm() < 3e-3 * hooked.norm()


def test_a_low_rank_branch_has_the_factors_too():
    config = {
        "default": {
            "opt": {"type": "svd", "low_rank": 4},
            "weight_quant": {"type": "int4", "group_size": 32},
            "input_quant": None,
        }
    }
    model, _ = quantized(config)
    layer = quant_modules(model)["first"]
    x = batches(1)[0]
    with torch.no_grad(), ExitStack() as stack:
        values, folds = _attach(model, stack)
        # Bare vector first, then groups, rows and bias of `first` (not its inputs, which the branch reads), then norm.
        first = [(3 * WIDTH, 2), (3 * WIDTH,), (3 * WIDTH,)]
        assert [tuple(v.shape) for v in values] == [(WIDTH,), *first, *[(3 * WIDTH,)] * 2, (WIDTH, 6), (WIDTH,)]
        values[2].copy_(torch.linspace(-0.5, 0.5, 3 * WIDTH))
        hooked = layer(x)
        folds[2]()
    assert torch.allclose(layer(x), hooked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", ["float32", "two_level"])
@pytest.mark.parametrize("opt", ["default", "smooth", "hadamard", "smooth_hadamard"])
def test_gradients_of_groups_are_those_of_a_float_emulation(opt: str, scale: str) -> None:
    weight = {"type": "int4", "group_size": 24, "symmetric": False, "scale": scale}
    model, _ = quantized({"default": {"weight_quant": weight, "input_quant": None, "opt": {"type": opt}}})
    layer = quant_modules(model)["first"]
    x, pull = batches(2)
    with ExitStack() as stack:
        values, _ = _attach(model, stack)
        groups = next(v for v in values if v.dim() == 2)
        assert groups.shape == (3 * WIDTH, 3)  # 24, 24, and a short one
        for _ in range(2):  # called twice, like a shared block: gradients add up
            (layer(x.clone().requires_grad_()) * pull.repeat(1, 1, 3)).sum().backward()
    logs = torch.zeros(3 * WIDTH, 3, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([24, 24, 16])
    grown = layer.dequantize().double() * logs.exp().repeat_interleave(sizes, 1)
    # The weight as applied to the raw input, in float64; the layer's transform is a linear map of that input.
    basis = layer.plan.transform.restored(torch.eye(WIDTH), layer._buffers, [WIDTH]).double()
    (2 * (x.double() @ (grown @ basis).T) * pull.double().repeat(1, 1, 3)).sum().backward()
    assert logs.grad is not None
    assert groups.grad is not None
    assert torch.allclose(groups.grad.double(), logs.grad, rtol=1e-4, atol=1e-4 * logs.grad.abs().max().item())


def test_gradients_do_not_shrink_with_the_number_of_tokens() -> None:
    """Otherwise those of long windows would vanish in float16."""
    net = small_models.llama()
    ids = torch.randint(5, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    model = hfquant.quantize(copy.deepcopy(net), [{"input_ids": ids}], "w3a16-gptq")
    largest: list[float] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: largest.append(grad.abs().max().item()))

    handle = model.get_submodule("lm_head").register_forward_hook(note)
    for repeats in (1, 8):
        hfquant.distill(copy.deepcopy(model), net, [{"input_ids": ids.repeat(repeats, 1)}] * 4, 1, 1e-9)
    handle.remove()
    assert len(largest) == 2
    assert largest[1] == pytest.approx(largest[0], rel=1e-5)


def test_without_a_gain_nothing_changes(caplog):
    model, net = quantized(INT3)
    before = state(model)
    with caplog.at_level("INFO", "hfquant"):
        found = hfquant.distill(model, net, batches(), steps=2, learning_rate=1e-9)
    assert not found.kept
    assert "left unchanged" in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_a_failure_leaves_the_model_as_it_was():
    model, net = quantized(INT3)
    before, learning = state(model), [p.requires_grad for p in model.parameters()]
    data = batches()
    data[4] = data[4] * torch.inf
    with pytest.raises(FloatingPointError, match=r"the loss of step \d+ is nan"):
        hfquant.distill(model, net, data, steps=20)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    assert [p.requires_grad for p in model.parameters()] == learning
    assert all(p.requires_grad for p in net.parameters())


def test_a_language_model_is_trained_by_the_divergence_of_its_logits(tmp_path):
    from transformers import LlamaForCausalLM

    float_model = small_models.llama()
    with torch.no_grad():  # otherwise all tokens are about equally likely
        for parameter in float_model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    source = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(5, 60, (2, 24), generator=source)} for _ in range(48)]
    data[-1]["attention_mask"] = torch.ones(2, 24, dtype=torch.int64)
    data[-1]["attention_mask"][:, 20:] = 0
    model = hfquant.quantize(copy.deepcopy(float_model), data, "w3a16-gptq")
    found = hfquant.distill(model, float_model, data, steps=40, learning_rate=3e-3)
    assert found.kept
    with torch.no_grad():
        sample = data[-1]
        p, q = (m(**sample).logits[:, :20].double().log_softmax(-1) for m in (float_model, model))
        expected = (p.exp() * (p - q)).sum(-1).mean(1)
        assert torch.allclose(_divergence(model, float_model, sample).double(), expected, rtol=1e-3)
        model.save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(**sample).logits, model(**sample).logits)


def test_a_model_makes_its_own_data():
    float_model = small_models.llama()
    model = hfquant.quantize(copy.deepcopy(float_model), None, "w4a16")
    found = hfquant.distill(model, float_model, {"source": "self", "samples": 8, "seqlen": 16}, steps=2)
    assert len(found.losses) == 2
    with pytest.raises(hfquant.CalibrationError, match="can generate their own"):
        hfquant.distill(*quantized(INT3), None)


def test_refusals():
    model, net = quantized(INT3)
    with pytest.raises(ValueError, match="model: Net has no quantized layer"):
        hfquant.distill(net, net, batches())
    with pytest.raises(ValueError, match="teacher: Net is quantized; pass the float model"):
        hfquant.distill(model, model, batches())
    shared = copy.deepcopy(net)
    shared.norm = model.norm
    with pytest.raises(ValueError, match=r"teacher: shares 'norm\.weight' with the model"):
        hfquant.distill(model, shared, batches())
    with pytest.raises(TypeError, match="expected a torch"):
        hfquant.distill(model, None, batches())
    model.norm.to("meta")
    with pytest.raises(ValueError, match="is offloaded"):
        hfquant.distill(model, net, batches())
