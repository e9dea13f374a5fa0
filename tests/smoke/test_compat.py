"""What integrations/compat.py needs from the libraries; ``make test-floors`` runs it on the oldest versions."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming

import hfquant
from hfquant.integrations import compat


@pytest.fixture
def llama() -> transformers.LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))


def test_modules_kept_in_float32_are_named_by_the_class() -> None:
    assert "wo" in compat.keep_in_fp32(transformers.T5EncoderModel(transformers.T5Config(d_model=8, num_layers=1)))
    assert compat.keep_in_fp32(nn.Linear(2, 2)) == []


def test_what_is_marked_is_not_initialized(llama: transformers.LlamaForCausalLM) -> None:
    linear, other = llama.model.layers[0].mlp.up_proj, llama.model.layers[0].mlp.down_proj
    for module in (linear, other):
        module.weight.data.zero_()
        module._is_hf_initialized = False
        for owner in llama.modules():
            owner._is_hf_initialized = False
    for parameter in llama.parameters():
        parameter._is_hf_initialized = False
    compat.mark_initialized(linear.weight)
    assert compat.is_marked_initialized(linear.weight)
    assert not compat.is_marked_initialized(other.weight)
    llama.initialize_weights()
    assert not linear.weight.any()
    assert other.weight.any()


def test_a_config_says_that_its_model_is_quantized(llama: transformers.LlamaForCausalLM) -> None:
    compat.set_quantized(llama, True)
    assert llama.config._is_quantized
    compat.set_quantized(llama, False)
    assert not llama.config._is_quantized
    assert "experts_implementation" not in llama.config.to_dict()
    compat.set_quantized(llama, False)


def test_a_config_says_that_its_model_needs_hfquant(
    llama: transformers.LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, classes = type(llama.config), type(llama)
    compat.set_quantized(llama, True)
    stored = llama.config.to_diff_dict()
    assert stored["experts_implementation"] == compat.NEEDS_HFQUANT
    classes(copy.deepcopy(llama.config))  # has no effect in memory

    registered = transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS._global_mapping
    monkeypatch.delitem(registered, compat.NEEDS_HFQUANT, raising=False)
    with pytest.raises(ValueError, match="hfquant: pip install hfquant, and import hfquant before loading"):
        classes(config.from_dict(stored))
    compat.allow_needs_hfquant()
    classes(config.from_dict(stored))
    loaded = config.from_dict(stored)
    compat.drop_needs_hfquant(loaded)
    assert loaded._experts_implementation is None
    chosen = config.from_dict(stored, experts_implementation="eager")
    compat.drop_needs_hfquant(chosen)
    assert chosen._experts_implementation == "eager"


def test_the_quantization_config_enters_and_leaves_a_frozen_config() -> None:
    model = diffusers.DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=4)
    before = dict(model.config)
    model.config.norm_type = "changed"  # as an IP-Adapter does to another field; models read the attribute
    for value in ({"a": 1}, {"a": 2}):
        compat.set_quantization_config(model, value)
        assert dict(model.config) == before | {"quantization_config": value}
        assert (model.config.quantization_config, model.config.norm_type) == (value, "changed")
    compat.set_quantization_config(model, None)
    assert dict(model.config) == before
    assert not hasattr(model.config, "quantization_config")
    assert model.config.norm_type == "changed"


def test_converters_go_and_renamings_stay(llama: transformers.LlamaForCausalLM) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=32, num_local_experts=2, **sizes, num_key_value_heads=1)
    mixtral = transformers.MixtralForCausalLM(config)
    compat.save_as_named(mixtral)
    kept = mixtral._weight_conversions
    assert not any(isinstance(c, WeightConverter) for c in kept)
    assert all(type(c) is WeightRenaming for c in kept)
    compat.save_as_named(llama)  # nothing to convert


def test_names_are_those_of_the_model(llama: transformers.LlamaForCausalLM) -> None:
    name = "layers.0.mlp.up_proj.weight"
    assert compat.names_in_model(llama, [f"model.{name}"]) == {f"model.{name}": f"model.{name}"}
    assert compat.names_in_model(llama.model, [f"model.{name}"]) == {f"model.{name}": name}


def test_names_that_a_renaming_would_take_out_of_the_model_stay() -> None:
    """Legacy names of Swin's projections within MaskFormer are those of the model."""
    each = {"depths": [1] * 4, "num_heads": [1] * 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    swin = transformers.SwinConfig(embed_dim=8, image_size=32, window_size=2, **each)
    with torch.device("meta"):
        model = transformers.MaskFormerModel(transformers.MaskFormerConfig(backbone_config=swin))
    names = list(model.state_dict())
    assert compat.names_in_model(model, names) == {name: name for name in names}


def test_tensors_are_stored_under_the_names_of_save_pretrained(llama: transformers.LlamaForCausalLM, tmp_path) -> None:
    assert compat.stored_names(llama, llama.state_dict()).keys() == llama.state_dict().keys()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = {"vocab_size": 32, "num_key_value_heads": 1} | sizes, {"image_size": 16, "patch_size": 8} | sizes
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**vision)
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    assert compat.stored_names(model, model.state_dict()).keys() == load_file(tmp_path / "model.safetensors").keys()


def test_offloaded_parameters_are_read(llama: transformers.LlamaForCausalLM, tmp_path) -> None:
    weight = llama.model.layers[0].mlp.up_proj.weight.detach().clone()
    llama.save_pretrained(tmp_path / "model")
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    again = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=parts | {"model.layers.0": "disk"}, offload_folder=tmp_path / "offload"
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert again.get_parameter(name).is_meta
    assert torch.equal(compat.load_offloaded_parameter(again, name), weight)


def test_published_names_are_those_of_the_class_whatever_a_model_is_saved_by() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=32, num_key_value_heads=1, num_local_experts=2, **sizes)
    model = transformers.MixtralForCausalLM(config)
    fused = {"model.layers.0.mlp.experts.gate_up_proj": model.model.layers[0].mlp.experts.gate_up_proj}
    compat.save_as_named(model)
    names = {f"model.layers.0.block_sparse_moe.experts.{i}.{own}.weight" for i in (0, 1) for own in ("w1", "w3")}
    for _ in range(2):
        found = compat.published_names(model, fused)
        assert found.keys() == names
    assert torch.equal(found["model.layers.0.block_sparse_moe.experts.1.w3.weight"], next(iter(fused.values()))[1, 24:])
    assert len(compat.stored_names(model, fused)) == 1


def test_some_experts_are_replaced_in_quantized_checkpoints() -> None:
    experts = type("Llama4TextExperts", (nn.Module,), {})()
    assert compat.replaced_when_quantized(experts, "compressed-tensors")
    assert not compat.replaced_when_quantized(experts, "hfquant")
    assert not compat.replaced_when_quantized(nn.Linear(2, 2), "compressed-tensors")


def test_classes_declare_how_they_keep_experts() -> None:
    """With attributes of their modules, and with a method for the gate, which reads them."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GptOssConfig(vocab_size=32, num_local_experts=2, **sizes, num_key_value_heads=1)
    mlp = transformers.GptOssForCausalLM(config).model.layers[0].mlp
    assert compat.declares_experts(mlp.experts)
    assert not compat.declares_experts(mlp.router)
    assert (mlp.experts.has_gate, mlp.experts.is_transposed, mlp.experts.has_post_expert_norm) == (True, True, False)
    halves = torch.tensor([[2.0, 3.0]])
    expected = (3.0 + 1) * 2.0 * torch.sigmoid(torch.tensor(2.0 * config.swiglu_alpha))
    assert compat.apply_gate(type(mlp.experts), mlp.experts, halves).item() == pytest.approx(expected.item())


class Packed(nn.Linear):
    """A linear whose stored weight does not have the matrix's shape."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.matrix = self.weight.detach().clone()
        self.weight = nn.Parameter(torch.zeros(rows, columns // 2, dtype=torch.int8), requires_grad=False)


@pytest.fixture
def flux_loader(monkeypatch: pytest.MonkeyPatch) -> type:
    from diffusers.loaders import lora_pipeline

    loader = lora_pipeline.FluxLoraLoaderMixin
    for name in ("_calculate_module_shape", "_maybe_expand_lora_state_dict"):
        monkeypatch.setattr(loader, name, vars(loader)[name])
    name = "_maybe_dequantize_weight_for_expanded_lora"
    monkeypatch.setattr(lora_pipeline, name, getattr(lora_pipeline, name))
    compat.register_lora_base(Packed, lambda module: module.matrix)
    return loader


def test_the_flux_loader_sees_the_matrix_of_a_packed_linear(flux_loader: type) -> None:
    from diffusers.loaders import lora_pipeline

    model = nn.ModuleDict({"packed": Packed(6, 4), "plain": nn.Linear(6, 4)})
    model.dtype = torch.bfloat16
    for name, module in model.items():
        assert flux_loader._calculate_module_shape(model=model, base_module=module) == (4, 6)
        assert flux_loader._calculate_module_shape(model=model, base_weight_param_name=f"{name}.weight") == (4, 6)
    found = lora_pipeline._maybe_dequantize_weight_for_expanded_lora(model, model["packed"])
    assert torch.equal(found, model["packed"].matrix.bfloat16())
    assert lora_pipeline._maybe_dequantize_weight_for_expanded_lora(model, model["plain"]).shape == (4, 6)


def test_the_flux_loader_pads_an_adapter_to_a_packed_linear(flux_loader: type) -> None:
    model = nn.ModuleDict({"packed": Packed(6, 4), "plain": nn.Linear(6, 4)})
    lora = {f"transformer.{name}.lora_A.weight": torch.ones(2, 5) for name in model}
    for value in flux_loader._maybe_expand_lora_state_dict(model, lora).values():
        assert torch.equal(value, torch.ones(2, 6) * (torch.arange(6) < 5))


def test_a_cast_to_its_own_dtype_or_none_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.modeling_utils import ModelMixin

    monkeypatch.setattr(ModelMixin, "to", ModelMixin.to)
    compat.accept_own_dtype()
    model = diffusers.DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=4)
    model.is_quantized = True
    assert model.to(dtype=None) is model
    assert model.to("cpu", dtype=None) is model
    for call in (lambda: model.to(torch.float16), lambda: model.to(dtype=torch.float32)):
        with pytest.raises(ValueError, match="Casting a quantized model"):
            call()
    ours = hfquant.quantize(
        diffusers.DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=4),
        None,
        "w8a16",
    )
    for same in (ours.to(torch.float32), ours.to("cpu", torch.float32), ours.to(dtype=torch.float32)):
        assert same is ours
    for call in (lambda: ours.to(torch.float16), lambda: ours.to("cpu", torch.bfloat16)):
        with pytest.raises(ValueError, match="Casting a quantized model"):
            call()


def test_an_ip_adapter_is_cast_and_modules_in_another_dtype_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.loaders.unet import UNet2DConditionLoadersMixin

    name = "_load_ip_adapter_weights"

    def load(self: nn.Module, weights: nn.Module) -> None:
        self.encoder_hid_proj = weights

    monkeypatch.setattr(UNet2DConditionLoadersMixin, name, load)
    compat.cast_ip_adapters()
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
    model = diffusers.UNet2DConditionModel(block_out_channels=(8,), **kinds).to(torch.bfloat16)
    model.conv_norm_out.float()
    model._load_ip_adapter_weights(nn.Linear(2, 2))
    assert model.encoder_hid_proj.weight.dtype == torch.float32  # a float model is left to diffusers
    hfquant.quantize(model, None, "w8a16")
    model._load_ip_adapter_weights(nn.Sequential(nn.Linear(2, 2)))
    assert model.encoder_hid_proj[0].weight.dtype == torch.bfloat16
    assert model.conv_norm_out.weight.dtype == torch.float32
