"""Checkpoints that differ from the model they are loaded into: other classes, older names, ties, fused tensors."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, initialization
from transformers.models.llama.modeling_llama import LlamaMLP

import hfquant
from benchmarks import tiny_transformers
from hfquant import HfQuantConfig
from hfquant.nn.modules import quant_layers, quant_modules
from tests.integrations import small_models
from tests.integrations.small_models import assert_same, outputs, sqnr, transformers_inputs
from tests.integrations.test_transformers import WEIGHT_ONLY, ids


def test_base_model_reads_a_task_models_checkpoint_and_back(checkpoint, tmp_path, caplog):
    rules = {"default": WEIGHT_ONLY, "model.layers.0.mlp.*": {"enable": False}, "layers.1.*": {"real_quant": True}}
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=HfQuantConfig(rules))
    model.save_pretrained(tmp_path / "causal")
    base = AutoModel.from_pretrained(tmp_path / "causal")
    assert {f"model.{n}": m.real_quant for n, m in quant_layers(base).items()} == {
        n: m.real_quant for n, m in quant_layers(model).items()
    }
    assert len(quant_layers(base)) == 11
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
    assert len(quant_layers(classifier)) == 11
    assert classifier.score.weight.isfinite().all()
    assert_comes_back(classifier, tmp_path / "classifier", ids())


def test_base_model_with_a_pooler_the_checkpoint_lacks(tmp_path):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=30
    )
    model = hfquant.quantize(transformers.BertForMaskedLM(config).eval(), None, "w8a16")
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base.pooler.dense) is nn.Linear
    assert len(quant_layers(base)) == 6
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    assert torch.equal(outputs(base, inputs), outputs(model.bert, inputs))
    assert_comes_back(base, tmp_path / "base", inputs)
    assert base.config.quantization_config.skipped["pooler.dense"] == "the checkpoint has no weight for it"


def assert_comes_back(model, folder, inputs):
    """Save a model with layers that its checkpoint did not have, and reload it with them."""
    model.eval().save_pretrained(folder)
    assert_same(type(model).from_pretrained(folder), model, inputs)


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


SIZES = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 30}
PATCHES = {"image_size": 8, "patch_size": 4, "use_swiglu_ffn": True}
#: The class of a checkpoint, a class that it is loaded into, and the layer that it has no tensors of.
LACKING = [
    ("BertForMaskedLM", "BertModel", "BertConfig", SIZES, "pooler.dense"),
    ("BertModel", "BertForQuestionAnswering", "BertConfig", SIZES, "qa_outputs"),
    ("LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaConfig", SIZES, "score"),
    # Tensors that are renamed, merged into those of all experts, or split.
    ("ViTForImageClassification", "ViTModel", "ViTConfig", SIZES | PATCHES, "pooler.dense"),
    ("MixtralModel", "MixtralForSequenceClassification", "MixtralConfig", SIZES | {"num_local_experts": 2}, "score"),
    ("Dinov2Model", "Dinov2ForImageClassification", "Dinov2Config", SIZES | PATCHES, "classifier"),
]


@pytest.mark.parametrize(("stored", "loaded", "config", "sizes", "lacking"), LACKING, ids=[row[1] for row in LACKING])
def test_a_layer_that_a_float_checkpoint_lacks_stays_float(stored, loaded, config, sizes, lacking, tmp_path):
    config = getattr(transformers, config)(**sizes, num_key_value_heads=2, pad_token_id=0)
    getattr(transformers, stored)(config).save_pretrained(tmp_path / "float")
    rules = HfQuantConfig({"default": WEIGHT_ONLY | {"include": ["output_heads"]}})
    cls = getattr(transformers, loaded)
    planned = hfquant.plan(cls(config), rules).layers
    assert lacking in planned
    model, info = cls.from_pretrained(tmp_path / "float", quantization_config=rules, output_loading_info=True)
    layer, reason = model.get_submodule(lacking), "the checkpoint has no weight for it"
    assert type(layer) is nn.Linear
    assert layer.weight.std().item() == pytest.approx(config.initializer_range, rel=0.5)
    assert info["missing_keys"] == {f"{lacking}.{key}" for key in layer.state_dict()}
    assert [name for name, why in model.config.quantization_config.skipped.items() if why == reason] == [lacking]
    experts = {f"{name}.{p}" for name, m in quant_modules(model).items() for p in getattr(m, "plans", ())}
    assert {*quant_layers(model), *experts} == planned.keys() - {lacking}
    model.save_pretrained(tmp_path / "quantized")
    assert_same(cls.from_pretrained(tmp_path / "quantized"), model, transformers_inputs(model))


def test_names_mapped_by_the_user_are_not_missing(tmp_path):
    config = transformers.BertConfig(**SIZES)
    other = transformers.BertModel(config)
    other.save_pretrained(
        tmp_path, state_dict={f"mine.{k}": v for k, v in other.state_dict().items() if "pool" not in k}
    )
    model = transformers.BertForQuestionAnswering.from_pretrained(
        tmp_path, quantization_config=HfQuantConfig({"default": WEIGHT_ONLY}), key_mapping={"^mine": "bert"}
    )
    assert len(quant_layers(model)) == 6


@pytest.mark.parametrize("ignore", [True, False])
def test_a_head_for_other_labels(ignore, checkpoint):
    """Initializing it is up to transformers, as in float."""
    load = functools.partial(
        transformers.ViTForImageClassification.from_pretrained,
        checkpoint("vit"),
        num_labels=7,
        ignore_mismatched_sizes=ignore,
        output_loading_info=True,
        quantization_config=HfQuantConfig({"default": WEIGHT_ONLY}),
    )
    if not ignore:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            load()
        return
    model, info = load()
    assert type(model.classifier) is nn.Linear
    assert model.classifier.weight.shape == (7, 36)
    assert model.classifier.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.5)
    assert {key for key, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert not info["missing_keys"]
    assert "another number of outputs" in model.config.quantization_config.skipped["classifier"]
    assert len(quant_layers(model)) == 12


def test_base_model_whose_tensors_are_stored_under_older_names(checkpoint, tmp_path):
    model = transformers.ViTForImageClassification.from_pretrained(
        checkpoint("vit"), quantization_config=HfQuantConfig("w8a16")
    )
    model.save_pretrained(tmp_path)
    assert any("encoder.layer" in name for name in load_file(tmp_path / "model.safetensors"))
    base = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert len(quant_layers(base)) == 12
    assert_same(base, model.vit, transformers_inputs(model))


def test_modules_to_not_convert_adds_to_the_defaults(checkpoint, tmp_path):
    config = HfQuantConfig("w8a16", modules_to_not_convert=["mlp", "model.layers.1.self_attn.q_proj", "*.0.*.k_proj"])
    model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
    expected = {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"}
    expected -= {"model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.k_proj"}
    assert set(quant_layers(model)) == expected
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


@pytest.mark.parametrize("preset", ["w8a16", "w4a16"])
def test_renamings_of_an_architecture_that_would_lose_scales(preset, tmp_path):
    """On loading, Inkling 2 adds ".weight" to names, also in the middle of longer ones."""
    model = next(tiny_transformers.small("inkling2_text", 150_000_000)).eval()
    model.save_pretrained(tmp_path / "float")
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig(preset))
    at_once = hfquant.quantize(model, None, preset)
    for i, quantized in enumerate((loaded, at_once)):
        assert any(name.endswith("sconv.weight_proj") for name in quant_modules(quantized))
        quantized.save_pretrained(tmp_path / f"quantized-{i}")
        again = type(model).from_pretrained(tmp_path / f"quantized-{i}")
        assert_same(again, quantized, {"input_ids": torch.arange(8)[None]})
    floats = at_once.dequantize()
    floats.save_pretrained(tmp_path / "dequantized")
    assert_same(type(model).from_pretrained(tmp_path / "dequantized"), floats, {"input_ids": torch.arange(8)[None]})
