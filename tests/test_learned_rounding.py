"""Learned rounding changes codes by at most one, only where blocks come closer to the float model's."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hfquant
from hfquant import learned_rounding
from hfquant.calibration.batches import evaluating
from hfquant.distillation import _frozen
from hfquant.formats import expand_columns
from hfquant.learned_rounding import learn_rounding, weight_gradient
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import quant_layers, tie
from tests.integrations import small_models

WIDTH = 32
INT3 = {"default": {"weight_quant": {"type": "int3", "group_size": 16, "symmetric": False}, "input_quant": None}}


class Block(nn.Module):
    """Two linears and a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        y = x + self.second(torch.relu(self.first(x))) * gain
        return y, y.sum()


class Net(nn.Module):
    """Repeated blocks between two linears; the middle block runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.end = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x, gain = self.start(x), torch.ones((), dtype=x.dtype)
        for i in (0, 1, 1, 2):
            x, _ = self.blocks[i](x, gain=gain)
        return self.end(x)


def batches(count: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return inputs of correlated channels, as all real ones are."""
    source = torch.Generator().manual_seed(seed)
    mixed = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(9))
    return [
        (torch.randn(2, 16, 8, generator=source) @ mixed + 0.3 * torch.randn(2, 16, WIDTH, generator=source)).to(dtype)
        for _ in range(count)
    ]


def pair(config: Any = INT3, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = Net().to(dtype).eval()
    return hfquant.quantize(copy.deepcopy(net), batches(dtype=dtype), config), net


def learned(model: nn.Module, net: nn.Module, data: Any = None, steps: int = 60) -> Any:
    data = data or batches(80, dtype=next(net.parameters()).dtype)
    with evaluating(model), evaluating(net), _frozen(model), _frozen(net):
        return learn_rounding(model, net, data, steps, seed=0)


def error(model: nn.Module, net: nn.Module) -> float:
    x = torch.cat(batches(16, 2, next(net.parameters()).dtype))
    with torch.no_grad():
        right = net(x).double()
        return ((model(x).double() - right).norm() / right.norm()).item()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.codes().clone() for name, layer in quant_layers(model).items()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(INT3, id="int3"),
        pytest.param("w3a16-gptq", id="w3a16-gptq"),
        pytest.param("w4a8-dynamic", id="w4a8-dynamic"),
        pytest.param({"default": {**INT3["default"], "opt": {"type": "smooth", "alpha": 0.3}}}, id="smooth"),
        pytest.param({"default": {"weight_quant": {"type": "int2", "axis": -1}, "input_quant": None}}, id="int2"),
    ],
)
def test_the_error_on_unseen_data_falls(config: Any, dtype: torch.dtype) -> None:
    model, net = pair(config, dtype)
    before, first, was = state(model), codes(model), error(model, net)
    restore = learned(model, net)
    assert error(model, net) < 0.97 * was
    after, now = state(model), codes(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved
    assert moved <= {f"blocks.{i}.{name}.weight" for i in range(3) for name in ("first", "second")}
    for name in first:
        assert (now[name].int() - first[name].int()).abs().max() <= 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *net.modules()])
    assert not any(p.requires_grad for m in quant_layers(model).values() for p in m.parameters())
    restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_stay_within_their_range(symmetric: bool) -> None:
    """Clipped weights pull at the ends of the range, and a code beyond it would be stored as one of the other end."""
    weight = {"type": "int2", "group_size": 16, "symmetric": symmetric, "clip": "mse"}
    model, net = pair({"default": {"weight_quant": weight, "input_quant": None}})
    first = codes(model)
    learned(model, net)
    now = codes(model)
    found = torch.cat([layer.flatten() for layer in now.values()])
    assert found.min() == (-1 if symmetric else -2)
    assert found.max() == 1
    assert max((now[name].int() - first[name].int()).abs().max() for name in now) == 1


@pytest.mark.parametrize("opt", ["default", "smooth", "hadamard", "smooth_hadamard"])
def test_gradients_of_weights_are_those_of_a_float_emulation(opt: str) -> None:
    model, _ = pair({"default": {**INT3["default"], "opt": {"type": opt}}})
    layer = model.get_submodule("blocks.0.first")
    assert isinstance(layer, QuantLinear)
    x, pull = batches(1)[0], torch.randn(2, 16, 2 * WIDTH, generator=torch.Generator().manual_seed(3))
    weight = layer.dequantize().double().requires_grad_()
    # The layer's transform is a linear map of its input.
    basis = layer.plan.transform.restored(torch.eye(WIDTH), layer._buffers, [WIDTH]).double()
    ((x.double() @ basis.T @ weight.T) * pull.double()).sum().backward()
    assert weight.grad is not None
    found = weight_gradient(layer, x, pull).double()
    assert torch.allclose(found, weight.grad, rtol=1e-4, atol=1e-5 * weight.grad.abs().max().item())


def test_blocks_that_do_not_come_closer_keep_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, net = pair()
    first = codes(model)
    finish = learned_rounding._Block.finish

    def finish_worse(block: Any) -> bool:
        if block.layers[0].layer is model.get_submodule("blocks.0.first"):
            assert len(block.gains) == 16
            block.gains.append(-2 * sum(block.gains))
        return finish(block)

    monkeypatch.setattr(learned_rounding._Block, "finish", finish_worse)
    learned(model, net)
    now = codes(model)
    same = {name for name in now if torch.equal(now[name], first[name])}
    assert same == {"start", "end", "blocks.0.first", "blocks.0.second"}


def test_a_layer_with_another_weight_keeps_its_codes() -> None:
    """Its teacher's weight does not tell where its codes should be."""
    model, net = pair()
    first = codes(model)
    with torch.no_grad():
        net.get_submodule("blocks.0.first").weight.mul_(torch.linspace(-2, 2, WIDTH))
    learned(model, net)
    now = codes(model)
    assert torch.equal(now["blocks.0.first"], first["blocks.0.first"])
    assert not torch.equal(now["blocks.0.second"], first["blocks.0.second"])


def test_layers_with_folded_divisors_are_trained() -> None:
    """Their weights start where the divided weights of the float model lie between the codes."""
    net = small_models.llama_of_64()
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source).exp() if parameter.dim() == 1 else parameter)
    data = [{"input_ids": torch.randint(5, 60, (2, 24), generator=source)} for _ in range(40)]
    smooth = {**INT3["default"], "opt": {"type": "smooth", "alpha": 0.5, "fold": True}}
    model = hfquant.quantize(copy.deepcopy(net), data[:8], {"default": smooth})
    block, layers = "model.layers.0", quant_layers(model)
    # All that a norm's divisor alone was folded into; the rows of v_proj and up_proj are divided too.
    for norm, name in (
        ("input_layernorm", "q_proj"),
        ("input_layernorm", "k_proj"),
        ("post_attention_layernorm", "gate_proj"),
    ):
        gain, divided = (of.get_parameter(f"{block}.{norm}.weight").detach() for of in (net, model))
        divisor = gain / divided
        assert divisor.max() > 10 * divisor.min()
        path = next(path for path in layers if path.startswith(block) and path.endswith(name))
        layer, weight = layers[path], net.get_parameter(f"{path}.weight").detach()
        grid, columns = layer.grid(), layer.plan.columns
        exact = (weight * divisor) / expand_columns(grid.scale, columns) + expand_columns(grid.zero_point, columns)
        found = learned_rounding._Offsets(layer, weight).values.detach()
        assert (found - (exact - layer.codes()).clamp(-0.49, 0.49)).abs().mean() < 0.05
    first = codes(model)
    learned(model, net, data, steps=20)
    now = codes(model)
    assert all(not torch.equal(now[name], first[name]) for name in now)


def test_a_failure_restores_the_codes() -> None:
    model, net = pair()
    before, data = state(model), batches(100)
    # Seen when the first block is trained and judged.
    bad = torch.randperm(100, generator=torch.Generator().manual_seed(0))[90]
    data[bad] = data[bad] * torch.inf
    with pytest.raises(FloatingPointError, match="the error of a block is nan"):
        learned(model, net, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *net.modules()])


def test_padding_does_not_count() -> None:
    """A causal model's padding at the end changes no other token, so the codes do not depend on it either."""
    net = small_models.llama_of_64()
    source = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 60, (40, 2, 24), generator=source)
    mask = (torch.arange(24) < torch.tensor([24, 11])[:, None]).long()

    def codes_with(padding: int) -> dict[str, Tensor]:
        padded = torch.where(mask == 0, torch.tensor(padding), tokens)
        model = hfquant.quantize(copy.deepcopy(net), None, INT3)
        learned(model, net, [{"input_ids": ids, "attention_mask": mask} for ids in padded], steps=20)
        return codes(model)

    one, other = codes_with(0), codes_with(61)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], layer) for name, layer in codes(hfquant.quantize(net, None, INT3)).items())


def test_layers_that_share_codes_are_left_alone() -> None:
    model, net = pair()
    other = quant_layers(model)["blocks.2.first"]
    other.plan = replace(other.plan, tied="blocks.0.first")
    tie(model)
    first = codes(model)
    learned(model, net)
    now = codes(model)
    for i in range(3):
        assert torch.equal(now[f"blocks.{i}.first"], first[f"blocks.{i}.first"]) == (i != 1)
        assert not torch.equal(now[f"blocks.{i}.second"], first[f"blocks.{i}.second"])


def test_distilling_trains_the_rounding_first(tmp_path: Any) -> None:
    net = small_models.llama_of_64()
    with torch.no_grad():  # otherwise all tokens are about equally likely
        for parameter in net.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    source = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(5, 60, (2, 24), generator=source)} for _ in range(48)]
    model = hfquant.quantize(copy.deepcopy(net), data, INT3)
    first = codes(model)
    plain = hfquant.distill(copy.deepcopy(model), net, data, steps=30)
    found = hfquant.distill(model, net, data, steps=30, rounding_steps=60)
    assert found.kept
    assert found.before == plain.before
    assert found.after < 0.95 * plain.after
    assert len(found.losses) == 30
    now = codes(model)
    assert any(not torch.equal(now[name], first[name]) for name in now)
    model.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**data[0]).logits, model(**data[0]).logits)
    assert again.config.quantization_config.provenance["distilled"]["rounding_steps"] == 60


def test_rounding_is_kept_if_vectors_do_not_improve_it() -> None:
    model, net = pair()
    first = state(model)
    found = hfquant.distill(model, net, batches(), steps=1, learning_rate=1e-12, rounding_steps=60)
    assert found.kept
    held = torch.cat(batches()[3::4])
    with torch.no_grad():
        right, got = net(held).double().flatten(1), model(held).double().flatten(1)
    assert found.after == pytest.approx(((got - right).square().sum(1) / right.square().sum(1)).mean().item(), rel=1e-3)
    assert found.after < found.before
    moved = {name for name, tensor in state(model).items() if not torch.equal(tensor, first[name])}
    assert moved
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in moved)


def test_a_failure_after_the_rounding_restores_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, net = pair()
    before = state(model)

    def fail(*_: Any) -> list[float]:
        raise FloatingPointError("the loss of step 0 is nan")

    monkeypatch.setattr("hfquant.distillation._train", fail)
    with pytest.raises(FloatingPointError, match="step 0"):
        hfquant.distill(model, net, batches(), steps=5, rounding_steps=20)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "name",
    [
        *small_models.TRANSFORMERS,
        *(
            name if name in ("unet", "flux") else pytest.param(name, marks=pytest.mark.slow)
            for name in small_models.DIFFUSERS
        ),
    ],
)
def test_models_of_all_kinds(name: str) -> None:
    """Blocks with several outputs, encoders and decoders, skips from block to block, fused experts."""
    model = {**small_models.TRANSFORMERS, **small_models.DIFFUSERS}[name]()
    inputs = small_models.inputs_of(model)
    config = {"default": {**INT3["default"], "opt": {"type": "default"}}}
    quantized = hfquant.quantize(copy.deepcopy(model), None, config)
    before = state(quantized)
    learned(quantized, model, [inputs], steps=30)
    moved = {name for name, tensor in state(quantized).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(isinstance(quantized.get_submodule(name.rpartition(".")[0]), QuantLinear) for name in moved)
    assert all(name.endswith(".weight") for name in moved)


class Keywords(nn.Module):
    """A linear called by keyword, as in diffusers' UNetMotionModel, and a result that is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Inner() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(input=x)
        y += x
        return torch.relu_(self.second(torch.relu_(y)))


@pytest.mark.parametrize("opt", ["default", "smooth"])
def test_layers_called_by_keyword_and_changed_in_place(opt: str) -> None:
    torch.manual_seed(0)
    net = Keywords().eval()
    config = {"default": {**INT3["default"], "opt": {"type": opt}}}
    model = hfquant.quantize(copy.deepcopy(net), batches(), config)
    first, was = codes(model), error(model, net)
    found = hfquant.distill(model, net, batches(80), steps=30, rounding_steps=40)
    assert found.kept
    assert error(model, net) < 0.9 * was
    now = codes(model)
    assert any(not torch.equal(now[name], first[name]) for name in now)


def test_rounding_alone() -> None:
    model, net = pair()
    before = state(model)
    found = hfquant.distill(model, net, batches(), steps=0, rounding_steps=60)
    assert found.kept
    assert found.after < found.before
    assert found.losses == []
    moved = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in moved)
