"""Merging LoRA into the codes with the layer's own recipe, and unmerging it."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import (
    LoraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hfquant import QuantLinear
from hfquant.integrations.adapters import LoraQuantLinear
from hfquant.nn.modules import quant_layers
from tests.integrations import small_models
from tests.integrations.lora_models import (
    add_adapter,
    lora_layers,
    quantized,
)
from tests.integrations.small_models import inputs_of, outputs, sqnr
from tests.nn.linear_cases import cases, layer_of, rank, weight_by_hand


@pytest.mark.parametrize("dtype", ["int4", "int6", "int8", "fp8e4m3"])
def test_merging_requantizes_each_kind_of_layer(dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for name, case in cases(dtype).items():
        plan = case.plan()
        layer, tensors = layer_of(plan)
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        adapted = LoraQuantLinear(layer, "a", "block.linear", config=LoraConfig(), r=3, lora_alpha=6)
        nn.init.normal_(adapted.lora_B["a"].weight, std=0.3)
        change = 2 * adapted.lora_B["a"].weight.detach().double() @ adapted.lora_A["a"].weight.detach().double()
        target = effective_by_hand(plan, tensors) + change.numpy()
        adapted.merge()
        for key in before.keys() - {"weight", "weight_scale", "weight_scale_row", "weight_zero_point"}:
            assert torch.equal(layer.state_dict()[key], before[key]), (name, key)
        merged = {k: v for k, v in layer.solved_tensors().items() if k != "weight"} | {"weight": layer.codes()}
        noise = effective_by_hand(plan, merged) - target
        # Random codes fill their range, so requantizing them costs as much as any rounding.
        floor = {"int4": 14, "int6": 26, "int8": 38, "fp8e4m3": 24}[dtype]
        assert 20 * np.log10(np.linalg.norm(target) / np.linalg.norm(noise)) > floor, name
        logged = caplog.messages[-1]
        weight = 20 * np.log10(np.linalg.norm(target) / np.linalg.norm(noise))
        found = effective_by_hand(plan, merged) - effective_by_hand(plan, tensors)
        kept = 100 * (found * change.numpy()).sum() / (change.numpy() ** 2).sum()
        # Four standard errors, for noise that is independent of the change.
        assert abs(kept - 100) < 400 * np.linalg.norm(noise) / np.linalg.norm(change) / noise.size**0.5, name
        assert logged == (
            f"block.linear: merged a; SQNR of the weight {weight:.1f} dB, {kept:.0f} % of what the adapters change kept"
        )
        adapted.unmerge()
        after = layer.state_dict()
        assert all(torch.equal(after[k], before[k]) and after[k].dtype == before[k].dtype for k in before), name


def effective_by_hand(plan: Any, tensors: dict[str, Tensor]) -> np.ndarray:
    """Return the weight as applied to the raw input, in float64."""
    weight, start = weight_by_hand(plan, tensors), 0
    for i, rows in enumerate(plan.row_groups):
        block = slice(start, start + rows)
        if "smooth" in tensors:
            weight[block] /= tensors["smooth"].double().numpy().reshape(-1, plan.in_features)[i]
        if rank(plan):
            down = tensors["svd_down"].double().numpy().reshape(-1, rank(plan), plan.in_features)[i]
            weight[block] += tensors["svd_up"].double().numpy()[block] @ down
        start += rows
    return weight


@pytest.mark.parametrize(("name", "preset"), [("llama", "w8a8"), ("llama", "fp8"), ("flux", "svdquant")])
def test_merged_models_run_and_unmerge_exactly(name: str, preset: str) -> None:
    model = quantized(name, preset)
    inputs = inputs_of(model)
    plain, state = outputs(model, inputs), copy.deepcopy(model.state_dict())
    add_adapter(model, lora_alpha=40)
    adapted = outputs(model, inputs)
    for layer in lora_layers(model):
        layer.merge()
    merged = outputs(model, inputs)
    # Closer to the adapted model than the adapted model is to the plain one.
    assert sqnr(adapted, merged) > sqnr(adapted, plain) + 3
    for layer in lora_layers(model):
        layer.unmerge()
    assert torch.equal(outputs(model, inputs), adapted)
    found = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k}
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) and found[k].dtype == state[k].dtype for k in state)


def test_several_adapters_merge_as_if_at_once() -> None:
    model = quantized("llama", "w4a16")
    add_adapter(model, "a")
    add_adapter(model, "b", seed=6)
    layer = lora_layers(model)[0]
    layer.merge(adapter_names=["a", "b"])
    at_once = copy.deepcopy(layer.base_layer.state_dict())
    layer.unmerge()
    layer.merge(adapter_names=["a"])
    with pytest.warns(UserWarning, match="additionally merging b"):
        layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["a", "b"]
    assert all(torch.equal(v, at_once[k]) for k, v in layer.base_layer.state_dict().items())
    with pytest.warns(UserWarning, match="nothing to do"):
        layer.merge(adapter_names=["b"])
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_merge_and_unload_leaves_a_quantized_model_that_reloads(tmp_path) -> None:
    model = quantized("llama", "w4a16")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    inputs = inputs_of(model)
    wanted = outputs(model, inputs)
    merged = adapted.merge_and_unload(safe_merge=True)
    assert not lora_layers(merged)
    assert len(quant_layers(merged)) == 14
    result = outputs(merged, inputs)
    assert sqnr(wanted, result) > 5
    merged.save_pretrained(tmp_path)
    small_models.assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), merged)


def test_adapters_with_nan_are_refused_and_nothing_changes() -> None:
    model = quantized("llama", "w4a16")
    own, other = add_adapter(model, "a"), add_adapter(model, "b")
    next(iter(other.values())).data[0, 0] = torch.nan
    assert own.keys() != other.keys()
    layer = lora_layers(model)[0]
    layer.merge(adapter_names=["a"])
    state = copy.deepcopy(layer.base_layer.state_dict())
    for safe in (False, True):
        with (
            pytest.warns(UserWarning, match="additionally merging"),
            pytest.raises(ValueError, match=r"adapter b seems to be broken|q_proj \+ a \+ b'.* NaN or Inf"),
        ):
            layer.merge(safe_merge=safe, adapter_names=["b"])
        assert layer.merged_adapters == ["a"]
        assert isinstance(layer.base_layer, QuantLinear)
        assert all(torch.equal(v, state[k]) for k, v in layer.base_layer.state_dict().items())


def test_offloaded_weights_are_not_merged() -> None:
    layer, _ = layer_of(cases("int8")["channel"].plan())
    adapted = LoraQuantLinear(layer.to("meta"), "a", "block.linear", config=LoraConfig(), r=3)
    with pytest.raises(ValueError, match=r"block\.linear: its weight is offloaded"):
        adapted.merge()


def test_offloaded_models_merge_and_unmerge() -> None:
    model = quantized("llama", "w4a16")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    inputs = inputs_of(model)
    wanted = outputs(model, inputs)
    adapted.merge_adapter()
    merged = outputs(model, inputs)
    adapted.unmerge_adapter()
    cpu_offload(adapted, torch.device("cpu"), offload_buffers=True)
    assert all(layer.base_layer.weight.is_meta for layer in lora_layers(model))
    assert torch.equal(outputs(model, inputs), wanted)
    adapted.merge_adapter()
    assert torch.equal(outputs(model, inputs), merged)
    adapted.unmerge_adapter()
    assert torch.equal(outputs(model, inputs), wanted)
