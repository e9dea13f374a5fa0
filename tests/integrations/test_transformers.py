"""transformers end to end: quantize in from_pretrained, save, reload, dequantize."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hfquant
from hfquant import PRESETS, HfQuantConfig
from hfquant.integrations.compat import NEEDS_HFQUANT
from hfquant.nn.modules import quant_layers
from tests.integrations import small_models
from tests.integrations.small_models import assert_same, outputs, sqnr, transformers_inputs
from tests.schemes import SVDQUANT

DATA_FREE = [name for name in PRESETS if not HfQuantConfig(name).needs_data]
WEIGHT_ONLY = {"opt": {"type": "default"}, "calib": {"type": "amax"}, "input_quant": None}
#: Number of quantized linears and of all linears; the rest are heads, tied weights and fp32 modules.
COUNTS = {
    "llama": (14, 15),
    "phi3": (8, 9),
    "t5_encoder": (12, 14),
    "bart": (16, 17),
    "clip_text": (12, 12),
    "bert": (13, 13),
    "mixtral": (4, 5),
    "vit": (12, 13),
}


def ids() -> dict[str, torch.Tensor]:
    return transformers_inputs(small_models.llama())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", small_models.TRANSFORMERS)
def test_quantized_on_load_as_in_memory_and_after_reload(name, checkpoint, tmp_path):
    cls = type(model := small_models.TRANSFORMERS[name]())
    in_memory = hfquant.quantize(small_models.TRANSFORMERS[name](), None, "w8a8-dynamic")
    loaded = cls.from_pretrained(checkpoint(name), quantization_config=HfQuantConfig("w8a8-dynamic"))
    linears = [m for m in loaded.modules() if isinstance(m, nn.Linear)]
    assert (len(quant_layers(loaded)), len(linears)) == COUNTS[name]
    assert loaded.config.quantization_config.to_dict() == in_memory.config.quantization_config.to_dict()
    assert_same(loaded, in_memory)
    assert loaded.num_parameters() == model.num_parameters()
    exact = outputs(model, transformers_inputs(model))
    assert sqnr(exact, outputs(loaded, transformers_inputs(model))) > 30

    loaded.save_pretrained(tmp_path)
    assert_same(cls.from_pretrained(tmp_path), loaded)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("preset", DATA_FREE)
def test_every_data_free_preset(preset, checkpoint, tmp_path):
    folder = checkpoint("llama_of_64")
    loaded = LlamaForCausalLM.from_pretrained(folder, quantization_config=HfQuantConfig(preset))
    assert_same(loaded, hfquant.quantize(small_models.llama_of_64(), None, preset))
    loaded.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same(again, loaded)

    model = small_models.llama_of_64()
    layers = quant_layers(again)
    assert len(layers) == 14
    floor = {"w8": 35, "w6": 24, "w4": 14, "fp": 28}[preset[:2]]
    for name, layer in layers.items():
        assert sqnr(model.get_submodule(name).weight, layer.effective_weight()) >= floor, name
    assert model.get_memory_footprint() / again.get_memory_footprint() >= 1.2
    if preset[:2] in ("w8", "fp"):
        assert again.num_parameters() == model.num_parameters()


def test_sharded_checkpoints_on_both_sides(tmp_path, checkpoint):
    small_models.llama().save_pretrained(tmp_path / "float", max_shard_size="5KB")
    assert len(list((tmp_path / "float").glob("*.safetensors"))) > 5
    config = HfQuantConfig("w8a8-dynamic")
    whole = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
    sharded = LlamaForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert_same(sharded, whole)
    # Weights and their scales end up in different files.
    sharded.save_pretrained(tmp_path / "quantized", max_shard_size="4KB")
    index = json.loads((tmp_path / "quantized" / "model.safetensors.index.json").read_text())["weight_map"]
    parts = [(file, index[f"{name}_scale"]) for name, file in index.items() if f"{name}_scale" in index]
    assert any(weight != scale for weight, scale in parts)
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "quantized"), whole)
    sharded.save_pretrained(tmp_path / "quantized")
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "quantized"), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "auto"])
def test_dtype(dtype, checkpoint, tmp_path):
    expected = torch.float32 if dtype == "auto" else dtype
    config = HfQuantConfig("w8a8-dynamic")
    model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config, dtype=dtype)
    assert model.dtype == expected
    for name, tensor in model.state_dict().items():
        if "scale" in name:
            assert tensor.dtype == torch.float32
        elif not name.endswith("proj.weight"):
            assert tensor.dtype == expected
    y = outputs(model, ids())
    assert y.dtype == expected
    assert y.isfinite().all()
    model.save_pretrained(tmp_path)
    for stored in (None, "auto", expected):
        assert_same(LlamaForCausalLM.from_pretrained(tmp_path, dtype=stored), model)
    wide = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert sqnr(outputs(wide, ids()), y) > 25


def test_t5_keeps_wo_in_float32(checkpoint, tmp_path):
    config = HfQuantConfig("w8a8-dynamic")
    model = transformers.T5EncoderModel.from_pretrained(
        checkpoint("t5_encoder"), quantization_config=config, dtype=torch.float16
    )
    kept = [m for n, m in model.named_modules() if n.endswith(".wo")]
    assert [(type(m), m.weight.dtype) for m in kept] == [(nn.Linear, torch.float32)] * 2
    model.save_pretrained(tmp_path)
    assert_same(transformers.T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float16), model)
    # It also works when requested: the layer reads the weight's dtype and handles int8.
    asked = HfQuantConfig({"default": WEIGHT_ONLY, "*.wo": {"enable": True}})
    model = transformers.T5EncoderModel.from_pretrained(checkpoint("t5_encoder"), quantization_config=asked)
    assert len(quant_layers(model)) == 14
    assert outputs(model, transformers_inputs(model)).isfinite().all()


LLAMA_PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, dict.fromkeys(LLAMA_PARTS, "cpu")])
def test_device_map(device_map, checkpoint, tmp_path):
    config = HfQuantConfig("w8a16")
    expected = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
    model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config, device_map=device_map)
    assert_same(model, expected)
    model.save_pretrained(tmp_path)
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path, device_map=device_map), expected)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_quantized_checkpoint_offloaded_to_disk(offload_buffers, checkpoint, tmp_path):
    config = HfQuantConfig({"default": WEIGHT_ONLY | {"weight_quant": {"type": "int4", "axis": -1}}})
    expected = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
    expected.save_pretrained(tmp_path / "quantized")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "quantized",
        device_map=dict.fromkeys(LLAMA_PARTS, "cpu") | {"model.layers.0": "disk"},
        offload_folder=tmp_path / "offload",
        offload_buffers=offload_buffers,
    )
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(outputs(model, ids()), outputs(expected, ids()))
    with pytest.warns(UserWarning, match="offloaded"):
        model.save_pretrained(tmp_path / "again")
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "again"), expected)
    plain = model.dequantize()
    assert not quant_layers(plain)
    assert torch.equal(outputs(plain, ids()), outputs(expected.dequantize(), ids()))


def test_float_model_offloaded_to_disk_is_quantized_in_memory(checkpoint, tmp_path):
    model = LlamaForCausalLM.from_pretrained(
        checkpoint("llama"),
        device_map=dict.fromkeys(LLAMA_PARTS, "cpu") | {"model.layers.0": "disk"},
        offload_folder=tmp_path / "offload",
    )
    expected = hfquant.quantize(small_models.llama(), [ids()], "w8a8")
    assert hfquant.quantize(model, [ids()], "w8a8") is model
    assert torch.equal(outputs(model, ids()), outputs(expected, ids()))
    with pytest.warns(UserWarning, match="offloaded"):
        model.save_pretrained(tmp_path / "quantized")
    # In any other shape they could load as plain weights.
    stored = load_file(tmp_path / "quantized" / "model.safetensors")
    assert all(t.shape[0] == 1 and t.dim() == 3 for t in stored.values() if t.dtype == torch.int8)
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "quantized"), expected)


def test_a_small_share_of_quantized_parameters_is_warned_about(checkpoint, caplog):
    with caplog.at_level(logging.INFO, "hfquant"):
        transformers.MixtralForCausalLM.from_pretrained(
            checkpoint("mixtral"), quantization_config=HfQuantConfig("w8a16", modules_to_not_convert=["experts"])
        )
        (share,) = [r for r in caplog.records if "layers quantized" in r.message]
        assert share.levelno == logging.WARNING
        assert "experts" in share.message
        caplog.clear()
        LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=HfQuantConfig("w8a16"))
        (share,) = [r for r in caplog.records if "layers quantized" in r.message]
        assert share.levelno == logging.INFO
        assert "14 layers quantized" in share.message


@pytest.mark.parametrize("preset", ["w8a16", "w8a8"])
def test_model_without_linears_is_loaded_with_a_warning(preset, tmp_path, caplog):
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=0, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()  # only embeddings and a head
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.arange(6)[None]}
    config = HfQuantConfig(preset, calibration=[inputs])
    with caplog.at_level(logging.WARNING, "hfquant"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    (warned,) = [record.message for record in caplog.records if "nothing to quantize" in record.message]
    assert "2 layers: an embedding; 1 layer: the model's output head" in warned
    assert_same(loaded, model, inputs)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model, inputs)
    with pytest.raises(ValueError, match="nothing to quantize"):
        hfquant.quantize(model, None, "w8a16")


def test_config_json_is_enough_and_holds_nothing_else(checkpoint, tmp_path):
    data = [ids()]
    config = HfQuantConfig("w8a8", calibration=data)
    model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert set(stored) == {
        "quant_method",
        "format_version",
        "config",
        "modules_to_not_convert",
        "per_layer_mode",
        "layers",
        "skipped",
        "provenance",
    }
    assert stored["provenance"] == {"class": "list", "batches": 1}
    assert stored["quant_method"] == "hfquant"
    assert stored["config"] == PRESETS["w8a8"]
    assert stored["modules_to_not_convert"] is None
    assert stored["skipped"] == {"lm_head": "the model's output head", "model.embed_tokens": "an embedding"}
    assert set(stored["layers"]) <= set(quant_layers(model))
    rebuilt = HfQuantConfig.from_dict(stored)
    assert rebuilt.calibration is None
    assert rebuilt.to_dict() == model.config.quantization_config.to_dict()
    first = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    model.save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == first


def test_generation(checkpoint):
    config = HfQuantConfig("w8a8-dynamic")
    model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
    tokens = model.generate(**ids(), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    # Greedy decoding by hand, without a cache.
    expected = ids()["input_ids"]
    for _ in range(6):
        logits = outputs(model, {"input_ids": expected})[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_model_is_a_plain_one(dtype, checkpoint, tmp_path):
    config = HfQuantConfig("w8a16")
    model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config, dtype=dtype)
    weights = {name: layer.effective_weight().to(dtype) for name, layer in quant_layers(model).items()}
    model.save_pretrained(tmp_path / "quantized")
    plain = model.dequantize()
    assert plain is model
    for name, weight in weights.items():
        linear = plain.get_submodule(name)
        assert type(linear) is nn.Linear
        assert torch.equal(linear.weight, weight)
    assert all(p.dtype == dtype and p.requires_grad for p in plain.parameters())
    assert not plain.is_quantized
    assert not hasattr(plain, "hf_quantizer")
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert not quant_layers(again)
    assert_same(again, plain)
    # It can be cast and quantized again.
    assert len(quant_layers(hfquant.quantize(plain.float(), None, "w8a16"))) == 14


def test_casting_moves_activations_and_never_codes_or_scales(checkpoint):
    config = HfQuantConfig("w8a8-dynamic")
    model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
    exact = outputs(model, ids())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = copy.deepcopy(model).to(dtype)
        assert cast.dtype == dtype
        for name, layer in quant_layers(cast).items():
            original = model.get_submodule(name)
            assert torch.equal(layer.weight, original.weight)
            assert layer.weight_scale.dtype == torch.float32
            assert torch.equal(layer.weight_scale, original.weight_scale)
        y = outputs(cast, ids())
        assert y.dtype == dtype
        assert sqnr(exact, y) > 30
    for method in ("half", "float"):
        with pytest.raises(ValueError, match="not supported for quantized"):
            getattr(model, method)()
    assert torch.equal(outputs(model, ids()), exact)


def test_copies_and_training_flag(checkpoint):
    config = HfQuantConfig("w8a8-dynamic")
    model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
    twin = copy.deepcopy(model)
    assert_same(twin, model)
    assert not {id(t) for t in model.state_dict(keep_vars=True).values()} & {
        id(t) for t in twin.state_dict(keep_vars=True).values()
    }
    twin.dequantize()
    assert len(quant_layers(model)) == 14
    assert not any(m.training for m in model.modules())
    model.train()
    assert all(layer.training for layer in quant_layers(model).values())
    assert not any(p.requires_grad for layer in quant_layers(model).values() for p in layer.parameters())
    fresh = small_models.llama().train()
    assert all(m.training for m in hfquant.quantize(fresh, None, config).modules())


def test_another_config_for_a_quantized_checkpoint_is_ignored_with_a_warning(checkpoint, tmp_path):
    config = HfQuantConfig("w8a16")
    model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=HfQuantConfig("fp8-dynamic"))
    assert_same(again, model)


@pytest.mark.parametrize("name", ["t5_encoder", "clip_text"])
def test_pre_quantized_models_are_offloaded_to_disk(name, checkpoint, tmp_path):
    """Their weight initialization touches the weight of each linear, including those of offloaded modules."""
    kind = type(getattr(small_models, name)())
    model = kind.from_pretrained(checkpoint(name), quantization_config=HfQuantConfig("w8a16"))
    model.save_pretrained(tmp_path / "q")
    parts = {n: "disk" for n, _ in model.named_children()}
    again = kind.from_pretrained(tmp_path / "q", device_map=parts, offload_folder=tmp_path / "offload")
    assert any(layer.weight.is_meta for layer in quant_layers(again).values())
    inputs = transformers_inputs(model)
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


def test_low_rank_models_are_bit_identical_after_reload(checkpoint, tmp_path):
    model = LlamaForCausalLM.from_pretrained(
        checkpoint("llama"), quantization_config=HfQuantConfig(SVDQUANT, calibration=[ids()])
    )
    for layer in quant_layers(model).values():
        assert layer.svd_up.is_contiguous()
        assert layer.svd_down.is_contiguous()
    model.save_pretrained(tmp_path)
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path), model)


def test_the_choice_of_experts_stays_the_librarys(checkpoint, tmp_path):
    """config.json names one that only hfquant has, so loading without it fails; no model should run on it."""
    cls = type(small_models.mixtral())
    model = cls.from_pretrained(checkpoint("mixtral"), quantization_config=HfQuantConfig("w8a8-dynamic"))
    model.save_pretrained(tmp_path)
    for options in ({}, {"experts_implementation": "eager"}):
        expected = cls.from_pretrained(checkpoint("mixtral"), **options).config._experts_implementation
        loaded = cls.from_pretrained(tmp_path, **options)
        assert loaded.config._experts_implementation == expected
        loaded.save_pretrained(tmp_path / "again")
        stored = json.loads((tmp_path / "again" / "config.json").read_text())
        assert stored["experts_implementation"] == NEEDS_HFQUANT


def test_tables_in_the_dtype_of_the_first_parameter_are_the_float_models(tmp_path):
    """Swin v2 casts its coordinate tables to that dtype when it is built, which no trace of a forward can see."""
    torch.manual_seed(0)
    config = transformers.Swinv2Config(
        image_size=16, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=2
    )
    model = transformers.Swinv2Model(config).eval()
    model.save_pretrained(tmp_path / "float")
    config = HfQuantConfig("w8a8-dynamic")
    quantized = transformers.Swinv2Model.from_pretrained(tmp_path / "float", quantization_config=config)
    quantized.save_pretrained(tmp_path / "quantized")
    tables = {name: buffer for name, buffer in model.named_buffers() if name.endswith("relative_coords_table")}
    assert tables
    for other in (quantized, transformers.Swinv2Model.from_pretrained(tmp_path / "quantized")):
        assert {name.rpartition(".")[0] + ".continuous_position_bias_mlp.0" for name in tables} <= quant_layers(
            other
        ).keys()
        assert all(torch.equal(other.get_buffer(name), table) for name, table in tables.items())
