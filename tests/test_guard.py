"""The guard: injected faults are named and repaired, and healthy models are left alone."""

from __future__ import annotations

import copy
import logging
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hfquant
from hfquant import CalibrationError, HfQuantConfig, guard, ptq
from hfquant.guard import _peers, far_off, nominal_error_of
from hfquant.layer_config import LayerConfig, WeightQuant
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import quant_layers
from hfquant.run import Settings
from tests.integrations import small_models

#: The preset itself would detect that one scale per tensor does not work.
STATIC = copy.deepcopy(hfquant.PRESETS["w8a8"])
STATIC["default"]["input_quant"] = {"type": "int8"}
WIDTH = 64


class Net(nn.Module):
    """Three linears with a norm in between, so that one layer's fault does not hide another's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.third = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.norm(self.first(x))))


def batches(count: int = 3, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(4, 16, WIDTH, generator=source) for _ in range(count)]


def with_outlier(data: list[Tensor], channel: int = 5, value: float = 1e4) -> list[Tensor]:
    data = [batch.clone() for batch in data]
    for batch in data:
        batch[..., channel] = value * torch.randn(batch.shape[:-1], generator=torch.Generator().manual_seed(1))
    return data


def error_of(model: nn.Module, reference: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        right = torch.cat([reference(x) for x in data])
        return float((torch.cat([model(x) for x in data]) - right).norm() / right.norm())


def faults(model: nn.Module) -> dict[str, str]:
    return {r.name: r.guard for r in model.quant_report.layers if r.guard}


def test_a_scale_that_lacks_the_outlier_is_put_to_the_token():
    """The held-out inputs exceed the calibrated scale by a factor of 100."""
    net = Net()
    held_out = [100 * x for x in batches(1, seed=3)]
    broken = hfquant.quantize(copy.deepcopy(net), batches(), HfQuantConfig(STATIC, guard=False))
    assert error_of(broken.first, net.first, held_out) > 0.9
    model = hfquant.quantize(copy.deepcopy(net), batches(), STATIC, held_out=held_out)
    assert list(faults(model)) == ["first"]
    assert "static scale saturates" in faults(model)["first"]
    assert "per-token input scales" in faults(model)["first"]
    assert error_of(model.first, net.first, held_out) < 0.05
    assert model.second.plan.static_input
    quant = model.first.plan.config.input_quant
    assert quant is not None
    assert (quant.dynamic, quant.axis) == (True, -1)
    # Only the input scale is gone; the weights are the solved ones.
    assert torch.equal(model.first.weight, broken.first.weight)
    assert torch.equal(model.first.smooth, broken.first.smooth)


def test_an_outlier_channel_that_drowns_the_others_is_named():
    net = Net()
    with torch.no_grad():
        net.first.weight[:, 5] *= 1e-6
    data = with_outlier(batches())
    config = {"default": {"opt": {"type": "default"}, "calib": {"type": "gptq"}, "weight_quant": {"axis": -1}}}
    broken = hfquant.quantize(copy.deepcopy(net), data, HfQuantConfig(config, guard=False))
    assert error_of(broken.first, net.first, data) > 0.5
    model = hfquant.quantize(copy.deepcopy(net), data, config)
    assert list(faults(model)) == ["first"]
    assert "outlier channel 5 in the input" in faults(model)["first"]
    assert error_of(model.first, net.first, data) < 0.05
    assert error_of(model, net, data) < 0.1


def test_an_outlier_in_the_weights_with_groups_that_it_kills():
    net = Net()
    with torch.no_grad():
        net.first.weight[:, 5] = 1e4
    data = [x.clone() for x in batches()]
    for x in data:
        x[..., 5] = 0
    config = {
        "default": {
            "opt": {"type": "default"},
            "calib": {"type": "gptq"},
            "weight_quant": {"type": "int4", "axis": -1},
            "input_quant": None,
        }
    }
    # GPTQ treats columns that calibration never used as dead, so only the check reveals the fault.
    model = hfquant.quantize(copy.deepcopy(net), data, config)
    assert list(faults(model)) == ["first"]
    assert "outlier channel 5 in the weights" in faults(model)["first"]
    assert "left in full precision" in faults(model)["first"]
    assert type(model.first) is nn.Linear
    assert error_of(model.first, net.first, data) == 0


def test_dead_groups_are_named_and_mended(monkeypatch: pytest.MonkeyPatch):
    """All codes of a layer are zero, as a scale that is far too large would cause."""
    solve = ptq.solve

    def killing(name: str, *args: Any) -> Any:
        solution = solve(name, *args)
        if name == "second":
            solution.tensors["weight"].zero_()
        return solution

    monkeypatch.setattr(ptq, "solve", killing)
    net = Net()
    # No zero points: with them, a code of zero would represent another value.
    config = {"weight_quant": {"type": "int4", "group_size": 64}, "input_quant": {"type": "int8"}}
    model = hfquant.quantize(copy.deepcopy(net), batches(), {"default": config})
    assert list(faults(model)) == ["second"]
    assert f"dead groups: {WIDTH} groups" in faults(model)["second"]
    assert model.second.plan.config.weight_quant.format.bits == 8
    assert error_of(model, net, batches()) < 0.4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_named_where_they_arise(value: float, monkeypatch: pytest.MonkeyPatch):
    """Later layers, which receive the NaN, are not blamed."""
    solve = ptq.solve

    def spoiling(name: str, *args: Any) -> Any:
        solution = solve(name, *args)
        if name == "first":
            solution.tensors["weight_scale"][3] = value
        return solution

    monkeypatch.setattr(ptq, "solve", spoiling)
    net = Net()
    model = hfquant.quantize(copy.deepcopy(net), batches(), "w8a8-smooth")
    assert list(faults(model)) == ["first"]
    assert faults(model)["first"].startswith("NaN or Inf")
    assert error_of(model, net, batches()) < 0.05


def test_the_guard_is_off_where_the_config_says_so_and_without_data():
    held_out = [100 * x for x in batches(1, seed=3)]
    model = hfquant.quantize(Net(), batches(), HfQuantConfig(STATIC, guard=False), held_out=held_out)
    assert not faults(model)
    assert model.first.plan.static_input
    assert HfQuantConfig.from_dict(HfQuantConfig(STATIC, guard=False).to_dict()).guard is False
    with pytest.raises(hfquant.ConfigError, match="guard: expected True or False, got 1"):
        HfQuantConfig(STATIC, guard=1)


def test_one_forward_and_hooks_are_gone():
    counts = []
    for on in (False, True):
        net, calls = Net(), []
        net.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        hfquant.quantize(net, batches(3), HfQuantConfig(STATIC, guard=on))
        counts.append(len(calls))
        assert not any(layer._forward_hooks for layer in quant_layers(net).values())
    assert counts[1] == counts[0] + 1


def test_held_out_data_is_checked_as_calibration_data_is():
    with pytest.raises(CalibrationError, match="only once"):
        hfquant.quantize(Net(), batches(), STATIC, held_out=iter(batches(1)))


def test_undone_whole_where_finishing_fails():
    net = Net()
    modules = dict(net.named_modules())
    rules, settings = HfQuantConfig(STATIC).rules, Settings(held_out=[100 * batches(1)[0]])

    def failing(applied: ptq.Applied) -> None:
        assert applied.report.layers[0].guard
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        ptq.quantize(net, batches(), rules, settings, finish=failing)
    assert dict(net.named_modules()) == modules
    applied = ptq.quantize(net, batches(), rules, settings)
    applied.undo(net)
    assert dict(net.named_modules()) == modules


@pytest.mark.parametrize("fault", ["token", "float"])
def test_what_was_mended_is_saved_and_reloads(fault: str, tmp_path, monkeypatch: pytest.MonkeyPatch, caplog):
    """The stored plan differs from the config's rule, so that a reload builds the same modules."""
    from transformers import LlamaForCausalLM

    if fault == "float":
        monkeypatch.setattr(guard, "LADDER", {})
    solve, name = ptq.solve, "model.layers.1.mlp.down_proj"

    def saturating(layer: str, *args: Any) -> Any:
        solution = solve(layer, *args)
        if layer == name:
            solution.tensors["input_scale"] /= 100
        return solution

    monkeypatch.setattr(ptq, "solve", saturating)
    model = small_models.llama()
    data = [small_models.transformers_inputs(model)]
    with caplog.at_level(logging.WARNING, "hfquant"):
        hfquant.quantize(model, data, STATIC)
    assert f"layer {name!r} failed the check after quantization: error" in caplog.text
    assert list(faults(model)) == [name]
    stored = model.config.quantization_config
    assert isinstance(model.get_submodule(name), QuantLinear) == (fault == "token")
    assert (name in stored.skipped) == (fault == "float")
    model.save_pretrained(tmp_path)
    small_models.assert_same(LlamaForCausalLM.from_pretrained(tmp_path), model, data[0])


def test_a_folded_layer_left_in_float_keeps_what_was_folded_around_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "LADDER", {})
    solve, name = ptq.solve, "model.layers.0.mlp.gate_proj"

    def killing(layer: str, *args: Any) -> Any:
        solution = solve(layer, *args)
        if layer == name:
            solution.tensors["weight"].zero_()
        return solution

    monkeypatch.setattr(ptq, "solve", killing)
    model = small_models.llama()
    data = small_models.transformers_inputs(model)
    config = copy.deepcopy(hfquant.PRESETS["w8a8-smooth"])
    config["default"]["opt"]["fold"] = True
    expected = copy.deepcopy(model)(**data).logits
    hfquant.quantize(model, [data], config)
    assert list(faults(model)) == [name]
    assert model.get_submodule("model.layers.0.mlp.up_proj").plan.folded
    logits = model(**data).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.1


CALIBRATED = [p for p in hfquant.PRESETS if HfQuantConfig(p).needs_data]
SEARCHING = "w4-auto"  # takes many times as long as the others


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "preset", [pytest.param(p, marks=[pytest.mark.slow] if p == SEARCHING else []) for p in CALIBRATED]
)
def test_healthy_models_are_left_alone(preset: str):
    """For each calibrated preset, on small models of several kinds."""
    for build in (small_models.llama_of_64, small_models.vit):
        model = build()
        hfquant.quantize(model, [small_models.transformers_inputs(model)] * 2, preset)
        assert not faults(model), build.__name__


# ------------------------------------------------------------------------------------------------------------ the rule


def plans(*types: str) -> dict[str, Any]:
    found = {}
    for i, kind in enumerate(types):
        weight = WeightQuant(type=kind)
        config = LayerConfig(weight_quant=weight, input_quant=None)
        found[str(i)] = type("Plan", (), {"config": config})()
    return found


def test_off_is_beyond_nominal_error_and_peers_and_a_half():
    four, eight = plans(*["int4"] * 5), plans(*["int8"] * 5)
    errors = dict(zip("01234", [0.02, 0.02, 0.02, 0.02, 0.6], strict=True))
    assert far_off(errors, eight) == ["4"]
    # If four times 4 bits' nominal error is below 0.6, the layer is off.
    assert (far_off(errors, four) == ["4"]) == (4 * nominal_error_of(four["0"].config) < 0.6)
    assert far_off({**errors, "4": 0.45}, eight) == []
    # If its peers are no better, a layer is not blamed, unless its error exceeds the whole output.
    assert far_off(dict.fromkeys("01234", 0.6), eight) == []
    assert far_off(dict.fromkeys("01234", 1.01), eight) == list("01234")
    assert far_off({"0": torch.inf}, four) == ["0"]


def test_a_layer_is_no_peer_of_itself():
    """The median of the others equals the one found by sorting them each time."""
    errors = dict(zip("0123456", [0.9, 0.1, 0.3, 0.2, 0.7, 0.3, 0.05], strict=True))
    for count in range(1, 8):
        some = {name: errors[name] for name in "0123456"[:count]}
        for name, peers in _peers(some, plans(*["int8"] * 7)).items():
            others = [e for n, e in some.items() if n != name]
            assert peers == (statistics.median(others) if others else 0)
    mixed = plans("int8", "int4", "int8")
    assert _peers({"0": 0.1, "1": 0.9, "2": 0.3}, mixed) == {"0": 0.3, "1": 0, "2": 0.1}


def test_nominal_error_is_that_of_normally_distributed_values():
    """A uniform quantizer's noise is step / sqrt(12), and the largest sample determines the step."""
    step = 3.49 / 127
    config = plans("int8")["0"].config
    assert nominal_error_of(config) == pytest.approx(step / 12**0.5, rel=0.05)
    assert nominal_error_of(plans("bf16")["0"].config) < 0.003
