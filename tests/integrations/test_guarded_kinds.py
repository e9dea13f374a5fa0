"""The guard on layers other than linears: convolutions, experts and embeddings of real classes, with one spoiled."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hfquant
from hfquant import HfQuantConfig, guard, ptq
from hfquant.nn.conv import QuantConv
from hfquant.nn.experts import QuantExperts
from hfquant.nn.linear import QuantLinear
from tests.integrations import small_models
from tests.integrations.mixtures import mixture, tokens
from tests.integrations.test_kinds import denoiser_inputs, tiny_sdxl, tiny_unet

#: One calibrated scale per tensor everywhere, which can saturate.
STATIC = {"weight_quant": {"type": "int8", "axis": -1}, "opt": {"type": "smooth"}}
FOUR = {"weight_quant": {"type": "int4", "group_size": 8}, "input_quant": None, "opt": {"type": "smooth"}}
BLOCK, CONV = "down_blocks.*", "down_blocks.0.resnets.0.conv1"
MIXTURES = ["MixtralForCausalLM", "Qwen3MoeForCausalLM"]
EXPERTS = "model.layers.1.mlp.experts"
#: Calibrated presets that differ most; the others are slow tests.
DISTINCT = ("w8a8", "w8a8-gptq", "w4a4-gptq", "w3a16-gptq", "fp8")
CALIBRATED = [
    pytest.param(p, marks=[] if p in DISTINCT else [pytest.mark.slow])
    for p in hfquant.PRESETS
    if HfQuantConfig(p).needs_data
]


def only(config: dict[str, Any], names: str) -> dict[str, Any]:
    """Return a config for some layers that leaves the others in float; a preset's config is used whole."""
    preset = config if "default" in config else {"default": config}
    return copy.deepcopy(preset) | {"*": {"enable": False}, names: {"enable": True}}


Spoil = Callable[[dict[str, Tensor]], None]


def saturates(tensors: dict[str, Tensor]) -> None:
    tensors["input_scale"] /= 200


def dies(tensors: dict[str, Tensor]) -> None:
    tensors["weight"].zero_()


def overflows(tensors: dict[str, Tensor]) -> None:
    tensors["weight_scale"][1] = torch.inf


def faults(model: nn.Module) -> dict[str, str]:
    return {r.name: r.guard for r in model.quant_report.layers if r.guard}


def spoiling(monkeypatch: pytest.MonkeyPatch, how: Mapping[str, Spoil]) -> None:
    """Spoil the solved tensors of some layers."""
    solve = ptq.solve

    def spoilt(layer: str, *args: Any) -> Any:
        solution = solve(layer, *args)
        how.get(layer, lambda tensors: None)(solution.tensors)
        return solution

    monkeypatch.setattr(ptq, "solve", spoilt)


def unet_data(width: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    return [denoiser_inputs(width)]


def unet() -> nn.Module:
    torch.manual_seed(1)
    return tiny_unet().eval()


def error_of(model: nn.Module, reference: nn.Module, inputs: dict[str, Any]) -> float:
    right = small_models.outputs(reference, inputs)
    return float((small_models.outputs(model, inputs) - right).norm() / right.norm())


# ------------------------------------------------------------------------------------------------------- convolutions


@pytest.mark.parametrize(
    ("config", "how", "cause", "remedy"),
    [
        (STATIC, saturates, "static scale saturates", "per-token input scales"),
        (STATIC, overflows, "formats are too coarse", "8 bits, round-to-nearest"),
        (FOUR, dies, "dead groups: 1152 groups", "8 bits, round-to-nearest"),
    ],
    ids=["scale", "infinite", "dead"],
)
def test_a_convolution_that_is_off_is_named_and_mended(
    config, how, cause, remedy, monkeypatch, tmp_path, caplog
) -> None:
    """Only that one is repaired, and the repaired model is saved and reloaded bit for bit."""
    model, data = unet(), unet_data()
    reference = copy.deepcopy(model)
    config = only(config, BLOCK)
    sound = hfquant.quantize(copy.deepcopy(model), data, config)
    assert not faults(sound)
    spoiling(monkeypatch, {CONV: how})
    with caplog.at_level(logging.WARNING, "hfquant"):
        hfquant.quantize(model, data, config)
    assert [*faults(model)] == [CONV]
    assert cause in faults(model)[CONV]
    assert remedy in faults(model)[CONV]
    assert f"layer {CONV!r} failed the check after quantization: " in caplog.text
    layer = model.get_submodule(CONV)
    assert isinstance(layer, QuantConv)
    assert isinstance(layer, nn.Conv2d)
    assert error_of(model, reference, data[0]) < 1.2 * error_of(sound, reference, data[0])
    hfquant.save_pretrained(model, tmp_path)
    small_models.assert_same(type(model).from_pretrained(tmp_path), model, data[0])
    assert f"- `{CONV}`: {faults(model)[CONV]}" in (tmp_path / "README.md").read_text()


def test_an_outlier_channel_of_a_convolution_is_named() -> None:
    """It drowns out the other channels under any per-row scale, though it contributes little to the output."""
    model, data = unet(), unet_data()
    resnet = model.get_submodule(CONV.rpartition(".")[0])
    with torch.no_grad():
        resnet.norm2.weight[7] = 1e5
        resnet.conv2.weight[:, 7] *= 1e-6
    name, reference = CONV.replace("conv1", "conv2"), copy.deepcopy(model)
    hfquant.quantize(model, data, only(STATIC | {"opt": {"type": "default"}}, BLOCK))
    assert [*faults(model)] == [name]
    # The channels of a window's first position come first.
    channel = int(faults(model)[name].partition("outlier channel ")[2].partition(" in the input")[0])
    assert channel % 32 == 7
    assert "8-bit weights, float inputs" in faults(model)[name]
    assert error_of(model, reference, data[0]) < 0.05


def test_a_convolution_left_in_float_is_the_float_one(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(guard, "LADDER", {})
    model, data = unet(), unet_data()
    original = model.get_submodule(CONV)
    spoiling(monkeypatch, {CONV: saturates})
    hfquant.quantize(model, data, only(STATIC, BLOCK))
    assert model.get_submodule(CONV) is original
    assert faults(model)[CONV].endswith("left in full precision, error 0")
    assert model.quant_report.skipped[CONV].startswith("guard: error")
    hfquant.save_pretrained(model, tmp_path)
    small_models.assert_same(type(model).from_pretrained(tmp_path), model, data[0])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("preset", CALIBRATED)
def test_sound_convolutions_are_left_alone(preset: str) -> None:
    """For each calibrated preset, including the one that searches for bits."""
    torch.manual_seed(2)
    model = tiny_sdxl().eval()
    hfquant.quantize(model, unet_data(24), only(hfquant.PRESETS[preset], BLOCK + "conv*"))
    assert sum(isinstance(m, QuantConv) for m in model.modules()) >= 6
    assert not faults(model)


# ------------------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    ("config", "projection", "how", "cause", "remedy"),
    [
        (STATIC, "gate_up_proj", saturates, "static scale saturates", "per-token input scales"),
        (FOUR, "down_proj", dies, "dead groups: 48 groups", "8 bits, round-to-nearest"),
    ],
    ids=["scale", "dead"],
)
def test_an_expert_that_is_off_is_named_and_its_projection_mended(
    name, config, projection, how, cause, remedy, monkeypatch, tmp_path, caplog
) -> None:
    """One expert fails: its whole projection switches to a safer format, and the module's other projections stay."""
    model, data = mixture(name), [{"input_ids": tokens(8, 40)}]
    reference, parameter = copy.deepcopy(model), f"{EXPERTS}.{projection}"
    config = only(config, "*experts*")
    sound = hfquant.quantize(copy.deepcopy(model), data, config)
    assert not faults(sound)
    spoiling(monkeypatch, {f"{parameter}.1": how})
    with caplog.at_level(logging.WARNING, "hfquant"):
        hfquant.quantize(model, data, config)
    assert [*faults(model)] == [f"{parameter}.1"]
    assert cause in faults(model)[f"{parameter}.1"]
    assert remedy in faults(model)[f"{parameter}.1"]
    assert f"layer '{parameter}.1' failed the check after quantization: " in caplog.text
    assert f"(and with it all of {parameter})" in caplog.text
    experts, before = model.get_submodule(EXPERTS), sound.get_submodule(EXPERTS)
    assert isinstance(experts, QuantExperts)
    changed = {p for p, plan in experts.plans.items() if plan != before.plans[p]}
    assert changed == {projection}
    if how is saturates:
        assert torch.equal(experts.get_parameter(projection), before.get_parameter(projection)), "as solved"
        assert not experts.plans[projection].static_input
    else:
        assert experts.plans[projection].config.weight_quant.format.bits == 8
    told = {r.name: r.what for r in model.quant_report.layers if r.name.startswith(parameter)}
    assert len(told) == experts.expert_count
    assert len({*told.values()}) == 1, "what each expert is now"
    assert error_of(model, reference, data[0]) < 1.2 * error_of(sound, reference, data[0])
    hfquant.save_pretrained(model, tmp_path)
    small_models.assert_same(type(model).from_pretrained(tmp_path), model, data[0])
    assert f"- `{parameter}.1`: {faults(model)[f'{parameter}.1']}" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("projections", [["gate_up_proj"], ["gate_up_proj", "down_proj"]])
def test_experts_left_in_float(projections, monkeypatch, tmp_path) -> None:
    """For one projection, or for all, which restores the original float module."""
    monkeypatch.setattr(guard, "LADDER", {})
    model, data = mixture("MixtralForCausalLM"), [{"input_ids": tokens(8, 40)}]
    original = model.get_submodule(EXPERTS)
    before = {p: original.get_parameter(p).detach().clone() for p in projections}
    spoiling(monkeypatch, {f"{EXPERTS}.{p}.2": dies for p in projections})
    hfquant.quantize(model, data, only(FOUR, "*experts*"))
    experts = model.get_submodule(EXPERTS)
    assert {*faults(model)} == {f"{EXPERTS}.{p}.2" for p in projections}
    for projection, weight in before.items():
        assert torch.equal(experts.get_parameter(projection), weight)
        why = model.config.quantization_config.skipped[f"{EXPERTS}.{projection}"]
        assert why.startswith(f"guard: {EXPERTS}.{projection}.2 error 1 (dead groups")
    if len(projections) == 2:
        assert experts is original
    else:
        assert [*experts.plans] == ["down_proj"]
    hfquant.save_pretrained(model, tmp_path)
    small_models.assert_same(type(model).from_pretrained(tmp_path), model, data[0])


def test_two_experts_go_as_far_as_the_worse_has_to(monkeypatch) -> None:
    model, data = mixture("Qwen3MoeForCausalLM"), [{"input_ids": tokens(8, 40)}]
    spoiling(monkeypatch, {f"{EXPERTS}.gate_up_proj.0": saturates, f"{EXPERTS}.gate_up_proj.3": overflows})
    hfquant.quantize(model, data, only(STATIC, "*experts*"))
    found = faults(model)
    assert [*found] == [f"{EXPERTS}.gate_up_proj.0", f"{EXPERTS}.gate_up_proj.3"]
    assert all("8 bits, round-to-nearest" in said for said in found.values())
    assert "saturates" in found[f"{EXPERTS}.gate_up_proj.0"]
    assert found[f"{EXPERTS}.gate_up_proj.3"].startswith("NaN or Inf")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("preset", CALIBRATED)
@pytest.mark.parametrize("name", MIXTURES)
def test_sound_experts_are_left_alone(name: str, preset: str) -> None:
    model = mixture(name)
    config = only(hfquant.PRESETS[preset], "*layers.1.mlp.experts*")
    hfquant.quantize(model, [{"input_ids": tokens(8, 40, seed)} for seed in range(2)], config)
    assert any(isinstance(m, QuantExperts) for m in model.modules())
    assert not faults(model)


# ---------------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_mended_unless_they_are_tied(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied embedding shares its codes with a head that may be fine, so it is neither blamed nor changed."""
    model = small_models.llama(tie_word_embeddings=tied)
    data = [small_models.transformers_inputs(model)]
    spoiling(monkeypatch, {"model.embed_tokens": dies})
    hfquant.quantize(model, data, {"default": STATIC | {"include": ["embeddings", "output_heads"]}})
    if tied:
        assert not faults(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        return
    assert [*faults(model)] == ["model.embed_tokens"]
    # Of 101 rows, the padding row is zero in float too.
    assert "dead groups: 100 groups" in faults(model)["model.embed_tokens"]
    # It already had 8 bits, rounded to nearest.
    assert type(model.model.embed_tokens) is nn.Embedding
    assert isinstance(model.lm_head, QuantLinear)
