"""A card's statements match the model: everything is recounted here from the float model and the tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hfquant
from hfquant import HfQuantConfig
from hfquant.integrations.sharing.facts import of_models, preset_of, tags_of
from hfquant.nn.modules import quant_layers
from tests.integrations import small_models

MIXED = {
    "default": {"opt": {"type": "default"}, "weight_quant": {"type": "int4", "group_size": 8}, "input_quant": None},
    "*down_proj": {"weight_quant": {"type": "fp8e4m3", "axis": 1}, "input_quant": {"type": "int8", "dynamic": True}},
    "*o_proj": {"enable": False},
}


def load(checkpoint: Callable[[str], Path], name: str, config: Any, **options: Any) -> tuple[Any, Any]:
    original = getattr(small_models, name)()
    cls = type(original)
    return original, cls.from_pretrained(checkpoint(name), quantization_config=HfQuantConfig(config, **options))


@pytest.mark.parametrize(("name", "config"), [("llama", MIXED), ("bart", "w4a16"), ("dit", "w6a16")])
def test_sizes_add_up(checkpoint: Callable[[str], Path], name: str, config: Any) -> None:
    original, model = load(checkpoint, name, config)
    (component,) = of_models(model).components
    assert component.parameters == original.num_parameters()  # packed codes and tied weights are counted correctly
    stored = model.state_dict()
    computed = sum(buffer.nbytes for key, buffer in model.named_buffers() if key not in stored)
    assert component.bytes == model.get_memory_footprint() - computed
    layers = quant_layers(model)
    assert sum(row.layers for row in component.rows) == len(layers)
    for row in component.rows:
        names = [n for n, layer in layers.items() if row.weights.startswith(f"{layer.plan.config.weight_quant.type},")]
        weights = [original.get_submodule(name).weight.numel() for name in names]
        assert (row.layers, row.bits) == (len(weights), 8 * row.bytes / sum(weights))


@pytest.mark.parametrize("preset", ["w8a16", "w8a8-dynamic"])
def test_codes_that_two_layers_share_are_counted_once(preset: str) -> None:
    original = small_models.llama()
    original.config.tie_word_embeddings = True
    original.tie_weights()
    config = {"default": {**hfquant.PRESETS[preset]["default"], "include": ["embeddings", "output_heads"]}}
    parameters = original.num_parameters()
    model = hfquant.quantize(original, None, config)
    assert "lm_head" in quant_layers(model)
    (component,) = of_models(model).components
    assert component.parameters == parameters
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert component.bytes == sum(tensors.values())


def test_rows_and_reasons(checkpoint: Callable[[str], Path]) -> None:
    _, model = load(checkpoint, "llama", MIXED, modules_to_not_convert=["v_proj"])
    (component,) = of_models(model).components
    assert [(row.weights, row.inputs) for row in component.rows] == [
        ("fp8e4m3, one scale per channel", "int8, one scale per tensor, dynamic"),
        ("int4, groups of 8", "float"),
    ]
    assert component.preset is None
    reasons = {name: left.why for left in component.left for name in left.names}
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert names - quant_layers(model).keys() <= reasons.keys()
    assert {reasons[name] for name in names if name.endswith("o_proj")} == {"enable=False"}
    assert "modules_to_not_convert" in reasons[next(name for name in names if name.endswith("v_proj"))]
    assert reasons["model.norm"] == "LlamaRMSNorm, not quantized"
    assert tags_of(model) == ["hfquant", "4-bit", "8-bit"]


def test_the_recipe_makes_the_same_model(checkpoint: Callable[[str], Path]) -> None:
    _, model = load(checkpoint, "llama", MIXED, modules_to_not_convert=["v_proj"], per_layer_mode=True)
    (component,) = of_models(model).components
    recipe = json.loads(component.recipe_json)
    _, again = load(checkpoint, "llama", **recipe)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_presets_are_recognized_by_what_they_say() -> None:
    for name in hfquant.PRESETS:
        assert preset_of(HfQuantConfig(name)) == name
        assert preset_of(HfQuantConfig.from_dict(HfQuantConfig(name).to_dict())) == name
    assert preset_of(HfQuantConfig({})) is None


def test_what_was_measured(checkpoint: Callable[[str], Path]) -> None:
    original = small_models.llama()
    assert of_models(load(checkpoint, "llama", "w4a16")[1]).components[0].measured is None
    data = [small_models.transformers_inputs(original) for _ in range(2)]
    hfquant.quantize(original, data, "w4a16-gptq")
    (component,) = of_models(original).components
    assert component.measured is not None
    decibels = sorted(-20 * math.log10(layer.error) for layer in original.quant_report.layers)
    middle = len(decibels) // 2
    assert component.measured.sqnr == pytest.approx(sum(decibels[middle - 1 : middle + 1]) / 2)
    assert [layer.sqnr for layer in component.measured.worst] == pytest.approx(decibels[:5])
    assert component.data == {"class": "list", "batches": 2}
