"""LoRA on each kind of quantized layer, and what is refused: convolutions, embeddings, tied heads, experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

import hfquant
from hfquant.integrations.adapters import OnCodes
from hfquant.nn.conv import QuantConv
from hfquant.nn.conv1d import QuantConv1D
from hfquant.nn.embedding import QuantEmbedding
from hfquant.nn.modules import quant_layers
from tests.integrations import small_models
from tests.integrations.lora_models import add_adapter, copy_adapter, cosine, gradients, quantized, targets_of
from tests.integrations.mixtures import mixture, tokens
from tests.integrations.small_models import assert_same, inputs_of, outputs, sqnr

WEIGHTS = {"opt": {"type": "default"}, "input_quant": None, "weight_quant": {"type": "int8", "axis": -1}}
DYNAMIC = {**WEIGHTS, "input_quant": {"type": "int8", "axis": -1, "dynamic": True}}
GROUPS = {**WEIGHTS, "weight_quant": {"type": "int4", "group_size": 16, "symmetric": False, "clip": "mse"}}
EVERYTHING = {"default": {**WEIGHTS, "include": ["embeddings", "output_heads", "edge_convs"]}}


def with_adapter(model: nn.Module, name: str, **options: Any) -> OnCodes:
    """Return layer ``name`` with a random adapter that changes the weight by about its own magnitude."""
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=[name], **options), model, adapter_name="a")
    layer = model.get_submodule(name)
    for key, value in layer.named_parameters():
        if "lora_" in key:
            nn.init.normal_(value, std=0.3)
    return layer


def state_of(layer: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(layer.state_dict()))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) and found[k].dtype == expected[k].dtype for k in expected)


def check_merge(layer: OnCodes, change: Tensor, floor: float) -> None:
    """Check that the merged weight is within ``floor`` dB of the sum, and that unmerging restores it bit for bit."""
    base, state = layer.base_layer, state_of(layer.base_layer)
    target = base.float_weight(base.effective_weight().double(), change.shape) + change
    layer.merge()
    found = base.float_weight(base.effective_weight(), change.shape)
    assert sqnr(target, found) > floor
    layer.unmerge()
    assert_equal(state_of(base), state)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), (2, 6, 11)),
    "2d": (lambda: nn.Conv2d(6, 10, (3, 2), stride=2), (2, 6, 9, 8)),
    "1x1": (lambda: nn.Conv2d(6, 10, 1, bias=False), (2, 6, 5, 4)),
    "3d": (lambda: nn.Conv3d(6, 10, 2), (1, 6, 3, 4, 5)),
}


@pytest.mark.parametrize("config", [WEIGHTS, DYNAMIC, GROUPS], ids=["weight-only", "w8a8", "groups"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_merge_and_unmerge(name: str, config: dict[str, Any]) -> None:
    make, shape = CONVOLUTIONS[name]
    model, x = nn.Sequential(make()).eval(), torch.randn(shape)
    hfquant.quantize(model, None, {"default": {**config, "include": ["edge_convs"]}})
    plain = model(x)
    layer = with_adapter(model, "0")
    assert isinstance(layer.base_layer, QuantConv)
    adapted = model(x)
    up, down = (getattr(layer, key)["a"].weight.detach().double() for key in ("lora_B", "lora_A"))
    check_merge(layer, 2 * torch.einsum("or,r...->o...", up.flatten(1), down), 14 if config is GROUPS else 38)
    assert torch.equal(model(x), adapted)
    layer.merge()
    assert sqnr(adapted, model(x)) > sqnr(adapted, plain) + 10


def test_a_convolution_takes_biases_and_refuses_dora() -> None:
    model, x = nn.Sequential(nn.Conv2d(6, 10, 3)), torch.randn(1, 6, 5, 5)
    hfquant.quantize(model, None, {"default": {**WEIGHTS, "include": ["edge_convs"]}})
    with pytest.raises(ValueError, match=r"^0: DoRA only works on quantized linears, and this is a QuantConv2d"):
        with_adapter(copy.deepcopy(model), "0", use_dora=True)
    layer = with_adapter(model, "0", lora_bias=True)
    adapted, bias = model(x), layer.base_layer.bias.clone()
    layer.merge()
    assert sqnr(adapted, model(x)) > 30
    torch.testing.assert_close(layer.base_layer.bias, bias + 2 * layer.lora_B["a"].bias)
    layer.unmerge()
    assert torch.equal(layer.base_layer.bias, bias)


def test_embeddings_merge_and_unmerge() -> None:
    model, ids = small_models.llama(tie_word_embeddings=False), torch.tensor([[3, 99, 7]])
    hfquant.quantize(model, None, EVERYTHING)
    layer = with_adapter(model, "model.embed_tokens")
    assert isinstance(layer.base_layer, QuantEmbedding)
    adapted = layer(ids)
    change = 2 * (layer.lora_embedding_B["a"] @ layer.lora_embedding_A["a"]).detach().double().T
    check_merge(layer, change, 38)
    layer.merge()
    assert sqnr(adapted, layer(ids)) > 38


@pytest.mark.parametrize("option", [True, False])
def test_weights_of_gpt2_merge_whatever_the_config_says_of_their_layout(option: bool) -> None:
    """peft expects ``fan_in_fan_out=True`` if a weight is [in, out], but codes are not stored that way."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=12, n_layer=1, n_head=2)).eval()
    hfquant.quantize(model, None, "w8a16")
    layer = with_adapter(model, "transformer.h.0.attn.c_proj", fan_in_fan_out=option)
    assert isinstance(layer.base_layer, QuantConv1D)
    x = torch.randn(5, 12)
    adapted = layer(x)
    layer.merge()
    assert sqnr(adapted, layer(x)) > 35
    layer.unmerge()
    assert torch.equal(layer(x), adapted)
    hfquant.dequantize(model)
    layer.merge()
    assert sqnr(adapted, layer(x)) > 80


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_nothing_is_merged_into_codes_that_two_layers_share(name: str, tmp_path) -> None:
    model = hfquant.quantize(small_models.llama(), None, EVERYTHING)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    other = "'model.embed_tokens'" if name == "lm_head" else "a layer that is tied to it"
    for shared in (model, loaded):
        inputs = inputs_of(shared)
        plain = outputs(shared, inputs)
        targets = [name, "model.layers.0.self_attn.q_proj"]
        adapted = get_peft_model(shared, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        wanted, state = outputs(shared, inputs), state_of(shared)
        assert not torch.equal(wanted, plain)
        for merge in (adapted.merge_adapter, adapted.merge_and_unload, shared.get_submodule(name).merge):
            with pytest.raises(ValueError, match=f"{name}: it shares its codes with {other}"):
                merge()
            assert_equal(state_of(shared), state)
            assert torch.equal(outputs(shared, inputs), wanted)
        shared.get_submodule("model.layers.0.self_attn.q_proj").merge()
        adapted.unmerge_adapter()
        assert torch.equal(outputs(adapted.unload(), inputs), plain)


@pytest.mark.parametrize("name", ["gemma", "bart"])
def test_an_adapter_on_scaled_embeddings_is_scaled_as_they_are(name: str) -> None:
    torch.manual_seed(0)
    if name == "gemma":
        config = Gemma3TextConfig(
            vocab_size=50, hidden_size=20, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, tie_word_embeddings=False,
        )  # fmt: skip
        model, target = Gemma3ForCausalLM(config).eval(), "model.embed_tokens"
    else:
        model, target = small_models.bart(scale_embedding=True, tie_word_embeddings=False), "model.decoder.embed_tokens"
    exact = copy.deepcopy(model)
    hfquant.quantize(model, None, EVERYTHING)
    layer, other = with_adapter(model, target), with_adapter(exact, target)
    for key in ("lora_embedding_A", "lora_embedding_B"):
        getattr(other, key)["a"].data.copy_(getattr(layer, key)["a"].data)
    ids = torch.tensor([[3, 41, 7]])
    adapted = layer(ids)
    assert sqnr(other(ids), adapted) > 38
    layer.merge()
    assert sqnr(adapted, layer(ids)) > 38


def test_merged_heads_and_embeddings_of_their_own_are_saved(tmp_path) -> None:
    model = hfquant.quantize(small_models.llama(tie_word_embeddings=False), None, EVERYTHING)
    inputs = inputs_of(model)
    config = LoraConfig(r=2, target_modules=["lm_head", "embed_tokens"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    wanted = outputs(model, inputs)
    merged = adapted.merge_and_unload()
    assert sqnr(wanted, outputs(merged, inputs)) > 25
    merged.save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), merged)


def test_parameters_of_quantized_experts_take_no_adapter() -> None:
    model, ids = mixture("MixtralForCausalLM"), tokens()
    hfquant.quantize(model, None, "w8a8-dynamic")
    with torch.no_grad():
        plain = model(ids).logits
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down_proj: adapter 'default' targets"):
        get_peft_model(model, config)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)
    # Attention layers accept an adapter.
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, plain)
        adapted.merge_adapter()
        adapted.unmerge_adapter()
        assert torch.equal(adapted.unload()(ids).logits, plain)


def test_experts_that_stay_in_float_take_one() -> None:
    model, ids = mixture("MixtralForCausalLM"), tokens()
    hfquant.quantize(model, None, {"default": WEIGHTS, "*.experts.*": {"enable": False}})
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        wanted = adapted(ids).logits
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(ids).logits, wanted, rtol=1e-3, atol=1e-3)


OPTIONS = {"dora": {"use_dora": True}, "rank-stabilised": {"use_rslora": True, "lora_alpha": 3}}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("preset", ["w8a16", "w4a16"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_at_bfloat16(option: str, preset: str) -> None:
    """Equal to the dequantized model of the same dtype, up to bfloat16's resolution."""
    ours = quantized("llama", preset, torch.bfloat16)
    theirs = hfquant.dequantize(copy.deepcopy(ours))
    own = add_adapter(ours, **OPTIONS[option])
    float_own = add_adapter(theirs, targets=targets_of(ours), **OPTIONS[option])
    assert all(p.dtype == torch.float32 for p in own.values())
    theirs.get_parameter(next(iter(float_own)))
    for value in float_own.values():
        value.data = value.data.float()
    copy_adapter(own, float_own)
    inputs = inputs_of(ours)
    expected = outputs(theirs, inputs)
    assert expected.dtype == torch.bfloat16
    assert sqnr(expected, outputs(ours, inputs)) > 35
    target = torch.randn(expected.shape, dtype=torch.float64)
    found, wanted = gradients(ours, own, target), gradients(theirs, float_own, target)
    assert found.isfinite().all()
    assert cosine(found, wanted) > 0.999
    state = state_of(ours)
    for name, layer in ours.named_modules():
        if isinstance(layer, OnCodes):
            other = theirs.get_submodule(name)
            layer.merge()
            other.merge()
            merged = layer.base_layer.effective_weight()
            assert sqnr(other.base_layer.weight, merged) > {"w8a16": 37, "w4a16": 14}[preset]
    assert outputs(ours, inputs).isfinite().all()
    for layer in ours.modules():
        if isinstance(layer, OnCodes):
            layer.unmerge()
    assert_equal(state_of(ours), state)
    assert len(quant_layers(ours)) == 14


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("option", "value"),
    [("modules_to_save", ["embed_tokens"]), ("modules_to_save", ["mlp"]), ("trainable_token_indices", [1, 2])],
)
def test_codes_are_not_trained_themselves(option: str, value: Any, tied: bool) -> None:
    model = hfquant.quantize(small_models.llama(tie_word_embeddings=tied), None, EVERYTHING)
    with pytest.raises(
        ValueError, match=r"would train the weight of a Quant.*, whose codes are integers: leave the la"
    ):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], **{option: value}))


@pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [1, 2]}])
def test_embeddings_in_float_are_trained_as_usual(options: dict[str, Any]) -> None:
    model = hfquant.quantize(small_models.llama(tie_word_embeddings=False), None, {"default": WEIGHTS})
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options))
    adapted(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    assert any(p.grad is not None and "embed_tokens" in name for name, p in adapted.named_parameters())
