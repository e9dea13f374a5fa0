"""Checkpoints that differ from the model they are loaded into: other classes, older names, ties, fused tensors."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, initialization
from transformers.models.llama.modeling_llama import LlamaMLP

import hfquant
from hfquant import HfQuantConfig
from hfquant.nn.modules import quant_linears
from tests.integrations import small_models
from tests.integrations.small_models import assert_same, outputs, sqnr, transformers_inputs
from tests.integrations.test_transformers import WEIGHT_ONLY, ids


def test_base_model_reads_a_task_models_checkpoint_and_back(checkpoint, tmp_path, caplog):
    rules = {"default": WEIGHT_ONLY, "model.layers.0.mlp.*": {"enable": False}, "layers.1.*": {"real_quant": True}}
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=HfQuantConfig(rules))
    model.save_pretrained(tmp_path / "causal")
    base = AutoModel.from_pretrained(tmp_path / "causal")
    assert {f"model.{n}": m.real_quant for n, m in quant_linears(base).items()} == {
        n: m.real_quant for n, m in quant_linears(model).items()
    }
    assert len(quant_linears(base)) == 11
    assert_same(base, model.model, ids())
    base.save_pretrained(tmp_path / "base")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), model)
    # Quantized as a base model, then loaded with the (tied) head.
    config = HfQuantConfig("w8a16")
    AutoModel.from_pretrained(checkpoint("llama"), quantization_config=config).save_pretrained(tmp_path / "base")
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert_same(head, AutoModelForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config))
    # A head that the checkpoint does not contain stays float, for the user to train.
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "causal")
    assert type(classifier.score) is nn.Linear
    assert len(quant_linears(classifier)) == 11
    assert classifier.score.weight.isfinite().all()


def test_base_model_with_a_pooler_the_checkpoint_lacks(tmp_path):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=30
    )
    model = hfquant.quantize(transformers.BertForMaskedLM(config).eval(), None, "w8a16")
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base.pooler.dense) is nn.Linear
    assert len(quant_linears(base)) == 6
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    assert torch.equal(outputs(base, inputs), outputs(model.bert, inputs))


class Seeded(LlamaModel):
    """Initializes a layer along with its parent module, by the layer's shape (as Nemotron's upsampler does)."""

    # transformers also calls this for its own classes' modules without parameters.
    __module__ = LlamaModel.__module__

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LlamaMLP):
            weight = torch.zeros_like(module.down_proj.weight)
            weight[:, module.intermediate_size - 1] = 1
            initialization.copy_(module.down_proj.weight, weight)


@pytest.mark.parametrize("preset", ["w4a16", "w8a8-dynamic"])
def test_a_class_that_initializes_by_the_shape_of_float_weights(preset, tmp_path):
    model = Seeded(small_models.llama().config).eval()
    model.save_pretrained(tmp_path / "float")
    quantized = Seeded.from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig(preset))
    quantized.save_pretrained(tmp_path / "quantized")
    inputs = transformers_inputs(model)
    assert sqnr(outputs(model, inputs), outputs(quantized, inputs)) > 10
    assert_same(Seeded.from_pretrained(tmp_path / "quantized"), quantized, inputs)


def test_base_model_whose_tensors_are_stored_under_older_names(checkpoint, tmp_path):
    model = transformers.ViTForImageClassification.from_pretrained(
        checkpoint("vit"), quantization_config=HfQuantConfig("w8a16")
    )
    model.save_pretrained(tmp_path)
    assert any("encoder.layer" in name for name in load_file(tmp_path / "model.safetensors"))
    base = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert len(quant_linears(base)) == 12
    assert_same(base, model.vit, transformers_inputs(model))


def test_modules_to_not_convert_adds_to_the_defaults(checkpoint, tmp_path):
    config = HfQuantConfig("w8a16", modules_to_not_convert=["mlp", "model.layers.1.self_attn.q_proj", "*.0.*.k_proj"])
    model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
    expected = {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"}
    expected -= {"model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.k_proj"}
    assert set(quant_linears(model)) == expected
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("on_load", [True, False])
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_tied_head_is_quantized_where_asked(name, on_load, checkpoint, tmp_path):
    config = HfQuantConfig({"default": WEIGHT_ONLY, "lm_head": {"enable": True}})
    original = small_models.TRANSFORMERS[name]()
    if on_load:
        model = type(original).from_pretrained(checkpoint(name), quantization_config=config)
    else:
        model = hfquant.quantize(small_models.TRANSFORMERS[name](), None, config)
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding.weight, original.get_input_embeddings().weight)
    assert sqnr(embedding.weight, model.lm_head.dequantize()) > 35
    assert sqnr(outputs(original, transformers_inputs(original)), outputs(model, transformers_inputs(original))) > 30
    model.save_pretrained(tmp_path)
    again = type(original).from_pretrained(tmp_path)
    assert_same(again, model)
    again.save_pretrained(tmp_path)
    assert_same(type(original).from_pretrained(tmp_path), model)
    if name == "llama":
        assert not again.config.tie_word_embeddings
        again.tie_weights()
        assert_same(again, model)


def test_checkpoint_that_fuses_what_the_model_splits(tmp_path):
    """This architecture's original format has one linear for two of the model's, with their rows concatenated."""
    config = transformers.Dinov2Config(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        use_swiglu_ffn=True,
        layerscale_value=0.7,
    )
    torch.manual_seed(0)
    original = transformers.Dinov2Model(config).eval()
    original.save_pretrained(tmp_path / "float")
    stored = load_file(tmp_path / "float" / "model.safetensors")
    assert any("weights_in" in name for name in stored)
    for rules in ({"default": WEIGHT_ONLY}, {"default": WEIGHT_ONLY, "*.gate_proj": {"enable": False}}):
        in_memory = hfquant.quantize(copy.deepcopy(original), None, HfQuantConfig(rules))
        loaded = AutoModel.from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig(rules))
        inputs = transformers_inputs(original)
        assert_same(loaded, in_memory, inputs)
        for model in (loaded, in_memory):
            model.save_pretrained(tmp_path / "quantized")
            assert_same(AutoModel.from_pretrained(tmp_path / "quantized"), loaded, inputs)
