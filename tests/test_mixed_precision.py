"""Layers that cost almost nothing get INT8 instead of fewer bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hfquant
from hfquant import HfQuantConfig
from hfquant.nn.modules import quant_modules
from tests.integrations import small_models

FOUR = {
    "default": {
        "opt": {"type": "default"},
        "weight_quant": {"type": "int4", "group_size": 32, "int8_share": 0.01},
        "input_quant": {"type": "int4", "axis": -1, "dynamic": True, "segments": 256, "int8_share": 0.05},
    }
}


class Denoiser(nn.Module):
    """Blocks whose inputs are modulated by one vector per image, and a narrow last projection."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(128, 128) for _ in range(4))
        self.modulations = nn.ModuleList(nn.Linear(128, 256) for _ in range(4))
        self.last = nn.Linear(128, 4)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block, modulation in zip(self.blocks, self.modulations, strict=True):
            scale, shift = modulation(condition)[:, None].chunk(2, -1)
            x = x + block(x * (1 + scale) + shift).tanh()
        return self.last(x)


def example(tokens: int = 64) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    return {"x": torch.randn(2, tokens, 128, generator=source), "condition": torch.randn(2, 128, generator=source)}


def types(model: nn.Module, config: Any, inputs: Any = None) -> dict[str, tuple[str, str | None]]:
    """Return the weight and input type of each layer in the plan."""
    configs = {name: p.config for name, p in hfquant.plan(model, config, inputs).layers.items()}
    return {n: (c.weight_quant.type, c.input_quant and c.input_quant.type) for n, c in configs.items()}


def test_the_last_projection_and_what_runs_once_a_picture():
    found = types(Denoiser(), FOUR, example())
    assert found["last"] == ("int8", "int8")
    # 4 * 256 / (4 * 256 + 64 * (4 * 128 + 4)) = 3 % of all multiplications, counting the rows that each layer sees.
    assert {found[f"modulations.{i}"] for i in range(4)} == {("int4", "int8")}
    assert {found[f"blocks.{i}"] for i in range(4)} == {("int4", "int4")}


def test_the_share_is_of_all_and_the_smallest_come_first():
    # With few tokens per image, modulations do most of the work, and only the last projection fits the share.
    found = types(Denoiser(), FOUR, example(tokens=1))
    assert [name for name, (_, inputs) in found.items() if inputs == "int8"] == ["last"]
    config = copy.deepcopy(FOUR)
    config["default"]["input_quant"]["int8_share"] = config["default"]["weight_quant"]["int8_share"] = 1.0
    assert set(types(Denoiser(), config, example()).values()) == {("int4", "int8"), ("int8", "int8")}
    config["default"]["input_quant"]["int8_share"] = config["default"]["weight_quant"]["int8_share"] = 0.0
    assert set(types(Denoiser(), config, example()).values()) == {("int4", "int4")}


def test_without_a_forward_layers_count_by_their_weights():
    found = types(Denoiser(), FOUR)
    assert [name for name, (_, inputs) in found.items() if inputs == "int8"] == ["last"]


def test_of_equal_layers_the_last_comes_first():
    # Flux's first and last linear have equally many weights, and one of them fits the share.
    found = types(small_models.flux(), "w4a16", small_models.inputs_of(small_models.flux()))
    assert (found["x_embedder"][0], found["proj_out"][0]) == ("int4", "int8")


@pytest.mark.parametrize("kind", ["int8", "fp8e4m3"])
def test_what_has_eight_bits_stays(kind):
    config = {
        "default": {
            "weight_quant": {"type": kind, "axis": -1, "int8_share": 1.0},
            "input_quant": {"type": kind, "axis": -1, "dynamic": True, "int8_share": 1.0},
            "opt": {"type": "default"},
        }
    }
    assert set(types(Denoiser(), config, example()).values()) == {(kind, kind)}


def test_globs_say_what_a_layer_is():
    config = {**FOUR, "last": {"weight_quant": {"int8_share": 0.0}, "input_quant": {"int8_share": 0.0}}}
    assert types(Denoiser(), config, example())["last"] == ("int4", "int4")


EIGHT = {"default": {"float_share": 0.01, "opt": {"type": "default"}, "input_quant": None}}


def test_small_ends_stay_in_float():
    found = hfquant.plan(Denoiser(), EIGHT, example())
    assert {n: why for n, why in found.skipped.items() if "float_share" in why} == {
        "last": "0.26% of all weights, within float_share"
    }
    assert len(found.layers) == 8
    assert "last" not in found.layers


@pytest.mark.parametrize("entry", [{"float_share": 0.0}, {"float_share": 0.002}, {"enable": True}])
def test_an_entry_of_its_own_quantizes_an_end(entry):
    assert "last" in hfquant.plan(Denoiser(), {**EIGHT, "last": entry}, example()).layers


def test_a_tied_weight_does_not_stay_in_float_for_one_of_its_layers():
    model = Denoiser()
    model.add_module("again", nn.Linear(128, 4))
    model.again.weight = model.last.weight
    config = {**EIGHT, "last": {"enable": True}, "again": {"enable": True}}
    assert not any("float_share" in why for why in hfquant.plan(model, config).skipped.values())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("preset", hfquant.PRESETS)
def test_presets_give_ends_more_bits(preset):
    """Float if the other layers' error is small or inputs are rounded too; otherwise INT8."""
    layers = hfquant.plan(Denoiser(), preset, example()).layers
    if preset in ("w4a16", "w4a16-gptq", "w4-auto", "w3a16-gptq", "w4a4-gptq", "w4a4-dynamic"):
        assert layers["last"].config.weight_quant.type == "int8"
    else:
        assert "last" not in layers


@pytest.mark.parametrize("preset", ["w8a8-dynamic", "w8a16", "fp8-dynamic"])
def test_eight_bits_leave_the_last_projection_in_float(preset, tmp_path):
    model = small_models.flux()
    inputs = small_models.inputs_of(model)
    right = small_models.outputs(model, inputs)
    without = copy.deepcopy(hfquant.PRESETS[preset])
    without["default"]["float_share"] = 0.0
    ended = hfquant.quantize(copy.deepcopy(model), None, preset)
    errors = [(small_models.outputs(m, inputs) - right).norm() for m in (ended, hfquant.quantize(model, None, without))]
    assert type(ended.proj_out) is nn.Linear
    assert errors[0] < errors[1]
    ended.save_pretrained(tmp_path)
    again = type(ended).from_pretrained(tmp_path)
    assert type(again.proj_out) is nn.Linear
    assert torch.equal(small_models.outputs(again, inputs), small_models.outputs(ended, inputs))


def test_language_models_keep_one_format():
    # Layers that engines fuse, such as q, k and v, must have the same weight format.
    for make in (small_models.llama, small_models.mixtral, small_models.bert):
        found = types(make(), "w4a16")
        assert {weight for name, (weight, _) in found.items() if ".layer" in name} == {"int4"}


def test_experts_of_a_parameter_stay_alike():
    config = copy.deepcopy(FOUR)
    config["default"]["input_quant"]["int8_share"] = 0.9
    found = types(small_models.mixtral(), config)
    assert {inputs for name, (_, inputs) in found.items() if "experts" in name} == {"int4"}
    assert "int8" in {inputs for name, (_, inputs) in found.items() if "experts" not in name}


def test_quantized_saved_and_reloaded(tmp_path):
    model = small_models.dit()
    inputs = small_models.inputs_of(model)
    float_model = copy.deepcopy(model)
    config = copy.deepcopy(FOUR)
    config["default"]["weight_quant"]["int8_share"] = config["default"]["input_quant"]["int8_share"] = 0.3
    hfquant.quantize(model, [inputs], config)
    layer = quant_modules(model)["proj_out_2"]
    assert layer.plan.config.weight_quant.type == "int8"
    assert layer.plan.config.input_quant.type == "int8"
    plain = copy.deepcopy(config)
    plain["default"]["weight_quant"]["int8_share"] = plain["default"]["input_quant"]["int8_share"] = 0.0
    without = hfquant.quantize(copy.deepcopy(float_model), [inputs], plain)
    right = small_models.outputs(float_model, inputs)
    errors = [(small_models.outputs(m, inputs) - right).norm() for m in (model, without)]
    assert errors[0] < 0.7 * errors[1]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert quant_modules(again)["proj_out_2"].plan == layer.plan
    assert torch.equal(small_models.outputs(again, inputs), small_models.outputs(model, inputs))


def test_shares_are_shares():
    with pytest.raises(hfquant.ConfigError, match="int8_share"):
        HfQuantConfig({"default": {"weight_quant": {"type": "int4", "int8_share": 2.0}}})
    with pytest.raises(hfquant.ConfigError, match="float_share"):
        HfQuantConfig({"default": {"float_share": -0.1}})
