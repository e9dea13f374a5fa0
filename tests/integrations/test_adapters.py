"""LoRA on quantized models: peft's options, saving and loading, refusals, and dequantizing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import Linear
from peft.tuners.lora.model import LoraModel
from torch import nn
from transformers import AutoModelForCausalLM

import hfquant
from hfquant.integrations import compat
from hfquant.integrations.adapters import LoraQuantLinear
from hfquant.nn.modules import quant_layers
from tests.integrations import small_models
from tests.integrations.lora_models import (
    add_adapter,
    copy_adapter,
    cosine,
    gradients,
    lora_layers,
    quantized,
    targets_of,
)
from tests.integrations.small_models import inputs_of, outputs, sqnr
from tests.nn.linear_cases import cases, layer_of

#: Options of peft; each is compared with plain linears of the same weights.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 3},
    "bias": {"lora_bias": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize(
    ("option", "preset"), [(o, p) for o in OPTIONS for p in ("w8a16", "w4a16") if p == "w8a16" or o == "dora"]
)
def test_options_do_what_they_do_on_the_dequantized_model(option: str, preset: str) -> None:
    ours = quantized("flux", preset)
    theirs = hfquant.dequantize(copy.deepcopy(ours))
    torch.manual_seed(0)
    own = add_adapter(ours, **OPTIONS[option])
    float_own = add_adapter(theirs, targets=targets_of(ours), **OPTIONS[option])
    copy_adapter(own, float_own)
    inputs = inputs_of(ours)
    expected = outputs(theirs, inputs)
    assert sqnr(expected, outputs(ours, inputs)) > 70
    target = torch.randn(expected.shape, dtype=torch.float64)
    assert cosine(gradients(ours, own, target), gradients(theirs, float_own, target)) > 0.9999
    state = copy.deepcopy(ours.state_dict())
    for name, layer in ours.named_modules():
        if not isinstance(layer, LoraQuantLinear):
            continue
        other = theirs.get_submodule(name)
        layer.merge()
        other.merge()
        assert sqnr(other.base_layer.weight, layer.base_layer.effective_weight()) > {"w8a16": 38, "w4a16": 14}[preset]
        if other.base_layer.bias is not None:
            torch.testing.assert_close(layer.base_layer.bias, other.base_layer.bias, rtol=1e-6, atol=1e-6)
        layer.unmerge()
    assert all(torch.equal(v, state[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize(("preset", "dtype"), [("w8a8-dynamic", torch.float16), ("svdquant", torch.bfloat16)])
def test_adapters_on_models_of_half_precision(preset: str, dtype: torch.dtype) -> None:
    model = quantized("llama", preset, dtype)
    inputs = inputs_of(model)
    plain = outputs(model, inputs)
    assert plain.dtype == dtype
    own = add_adapter(model)
    adapted = outputs(model, inputs)
    assert adapted.dtype == dtype
    assert not torch.equal(adapted, plain)
    gradients(model, own, torch.zeros(()))
    assert all(p.grad.isfinite().all() and p.grad.any() for p in own.values())
    state = copy.deepcopy(model.state_dict())
    for layer in lora_layers(model):
        layer.merge()
        assert layer.base_layer.bias is None
    assert outputs(model, inputs).isfinite().all()
    for layer in lora_layers(model):
        layer.unmerge()
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in model.state_dict().items())


def test_saved_adapters_load_on_the_saved_model(tmp_path) -> None:
    model = quantized("llama", "svdquant")
    inputs = inputs_of(model)
    model.save_pretrained(tmp_path / "model")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    wanted = outputs(model, inputs)
    adapted.save_pretrained(tmp_path / "adapter")
    for load in (PeftModel.from_pretrained, load_adapter):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        load(again, tmp_path / "adapter")
        assert len(lora_layers(again)) == 14
        assert torch.equal(outputs(again, inputs), wanted)


def load_adapter(model: Any, folder: Any) -> None:
    model.load_adapter(str(folder))


def test_transformers_own_methods_add_switch_and_delete_adapters(tmp_path) -> None:
    model = quantized("llama", "w8a8-dynamic")
    inputs = inputs_of(model)
    plain, state = outputs(model, inputs), copy.deepcopy(model.state_dict())
    for name in ("a", "b"):
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model.add_adapter(config, adapter_name=name)
    b = outputs(model, inputs)
    model.set_adapter("a")
    a = outputs(model, inputs)
    model.save_pretrained(tmp_path)  # saves only the active adapter
    model.disable_adapters()
    assert torch.equal(outputs(model, inputs), plain)
    model.enable_adapters()
    assert torch.equal(outputs(model, inputs), a)
    assert not torch.equal(a, b)
    model.delete_adapter("b")
    model.delete_adapter("a")
    again = quantized("llama", "w8a8-dynamic")
    again.load_adapter(str(tmp_path), adapter_name="a")
    assert torch.equal(outputs(again, inputs), a)
    base = {k.replace(".base_layer", ""): v for k, v in again.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(base[k], state[k]) for k in state)


def test_initial_values_taken_from_the_weight_are_refused() -> None:
    model = quantized("llama", "w8a8-dynamic")
    bits = {"loftq_config": {"loftq_bits": 4}}
    for initial, options in (("pissa", {}), ("pissa_niter_4", {}), ("olora", {}), ("loftq", bits)):
        expected = (
            rf"model\.layers\.0\.self_attn\.q_proj: init_lora_weights='{initial}' moves a part of the base weight"
        )
        with pytest.raises(ValueError, match=expected):
            add_adapter(model, init_lora_weights=initial, **options)


def test_adapters_of_other_kinds_run_and_cannot_put_floats_where_codes_are() -> None:
    from peft import LoHaConfig

    model = quantized("llama", "w8a8-dynamic")
    inputs = inputs_of(model)
    plain, state = outputs(model, inputs), copy.deepcopy(model.state_dict())
    adapted = get_peft_model(model, LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False))
    assert not torch.equal(outputs(model, inputs), plain)
    with pytest.raises(RuntimeError, match="can't be cast"):
        adapted.merge_adapter()
    restored = adapted.unload()
    assert torch.equal(outputs(restored, inputs), plain)
    assert all(torch.equal(v, state[k]) for k, v in restored.state_dict().items())


def test_an_adapter_of_another_model_is_refused_and_can_be_taken_off(tmp_path) -> None:
    other = small_models.llama_of_64()
    get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = quantized("llama", "w4a16")
    inputs = inputs_of(model)
    plain, state = outputs(model, inputs), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"(?s)size mismatch.*q_proj.*\[2, 64\].*\[2, 40\]"):
        PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    with pytest.raises(RuntimeError):
        model.load_adapter(str(tmp_path))
    base = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(base[k], state[k]) for k in state)
    model.delete_adapter("default")
    assert torch.equal(outputs(model, inputs), plain)


@pytest.mark.parametrize("dora", [False, True])
def test_adapted_layers_compile_to_one_graph(dora: bool) -> None:
    layer, _ = layer_of(cases("int4")["all at once"].plan())
    adapted = LoraQuantLinear(layer, "a", config=LoraConfig(use_dora=dora, init_lora_weights="gaussian"), r=3)
    compiled = torch.compile(adapted, backend="eager", fullgraph=True)
    x = torch.randn(5, layer.in_features)
    torch.testing.assert_close(compiled(x), adapted(x))
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), adapted.lora_B["a"].weight)
    (expected,) = torch.autograd.grad(adapted(x).square().sum(), adapted.lora_B["a"].weight)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dora", [False, True])
def test_dequantizing_keeps_adapters(dora: bool) -> None:
    model = quantized("llama", "w8a16")
    add_adapter(model, use_dora=dora)
    inputs = inputs_of(model)
    adapted = outputs(model, inputs)
    hfquant.dequantize(model)
    assert not quant_layers(model)
    assert sqnr(adapted, outputs(model, inputs)) > 80
    for layer in lora_layers(model):
        layer.merge()
    assert sqnr(adapted, outputs(model, inputs)) > 80
    for layer in lora_layers(model):
        layer.unmerge()
    for initial in ("orthogonal", "olora"):  # these read the weight and change it
        assert add_adapter(model, initial, targets=["q_proj"], use_dora=dora, init_lora_weights=initial)


def test_models_with_adapters_are_not_quantized() -> None:
    model = small_models.llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "style")
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has adapters \(style\)"):
        hfquant.quantize(model, None, "w4a16")
    assert not quant_layers(model)
    assert model.state_dict().keys() == before.keys()
    model.delete_adapter("style")
    hfquant.quantize(model, None, "w4a16")
    assert len(quant_layers(model)) == 14


def test_without_hfquants_layers_nothing_of_peft_changes() -> None:
    model = small_models.llama()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__module__ == "peft.tuners.lora.layer"


def test_peft_asks_before_it_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraModel, "_check_merge_allowed", LoraModel._check_merge_allowed)
    model, asked = nn.Sequential(nn.Linear(4, 4)), []
    compat.check_before_merging(asked.append)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    adapted.merge_and_unload()
    assert asked == [model, model]


def test_peft_wraps_registered_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        pass

    class OwnLora(Linear):
        pass

    monkeypatch.setattr(LoraModel, "_create_new_module", vars(LoraModel)["_create_new_module"])
    compat.register_lora_layers({Own: OwnLora})
    model = nn.Sequential(Own(4, 4), nn.Linear(4, 4))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "1"]), model)
    assert [type(m) for m in model] == [OwnLora, Linear]
