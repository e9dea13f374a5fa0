"""diffusers models end to end: quantize in from_pretrained, save, reload, dequantize."""

from __future__ import annotations

import copy
import gc
import json
import logging
import weakref

import diffusers
import pytest
import torch
from diffusers import (
    AutoModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from safetensors.torch import load_file
from torch import nn

import hfquant
from hfquant import PRESETS, BaseCalibSet, HfQuantConfig, QuantLinear
from hfquant.integrations.checkpoint import CheckpointError
from hfquant.nn.modules import quant_layers
from tests.integrations import lora_pipelines, small_models, tiny_pipelines
from tests.integrations.small_models import assert_same, denoiser_inputs, outputs, sqnr
from tests.integrations.tiny_pipelines import CASES

INT4 = {
    "opt": {"type": "default"},
    "weight_quant": {"type": "int4", "axis": -1, "symmetric": False},
    "input_quant": {"type": "int8", "axis": -1, "dynamic": True},
}
#: Number of quantized linears. The last projection is excluded if it is a small part of the model.
COUNTS = {"unet": 51, "sd3": 31, "flux": 33, "pixart": 26, "dit": 20, "wan": 24}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", small_models.DIFFUSERS)
def test_quantized_on_load_as_in_memory_and_after_reload(name, checkpoint, tmp_path):
    cls = type(model := small_models.DIFFUSERS[name]())
    in_memory = hfquant.quantize(small_models.DIFFUSERS[name](), None, "w8a8-dynamic")
    loaded = cls.from_pretrained(checkpoint(name), quantization_config=HfQuantConfig("w8a8-dynamic"))
    assert len(quant_layers(loaded)) == COUNTS[name]
    assert loaded.config["quantization_config"].to_dict() == in_memory.config["quantization_config"].to_dict()
    inputs = denoiser_inputs(model)
    assert_same(loaded, in_memory, inputs)
    assert loaded.num_parameters() == model.num_parameters()
    for layer_name, layer in quant_layers(loaded).items():
        assert sqnr(model.get_submodule(layer_name).weight, layer.to_float(torch.float32).weight) >= 35
    assert sqnr(outputs(model, inputs), outputs(loaded, inputs)) > 30
    assert model.get_memory_footprint() / loaded.get_memory_footprint() >= 1.2

    loaded.save_pretrained(tmp_path / "loaded")
    again = cls.from_pretrained(tmp_path / "loaded")
    assert_same(again, loaded, inputs)
    assert not any(m.training for m in again.modules())
    in_memory.save_pretrained(tmp_path / "in_memory")
    assert_same(AutoModel.from_pretrained(str(tmp_path / "in_memory")), loaded, inputs)


@pytest.mark.parametrize("name", ["flux", "unet"])
def test_four_bits_in_bfloat16_and_shards(name, checkpoint, tmp_path):
    cls = type(model := small_models.DIFFUSERS[name]())
    inputs = denoiser_inputs(model)
    model.save_pretrained(tmp_path / "float", max_shard_size="6KB")
    assert len(list((tmp_path / "float").glob("*.safetensors"))) > 5
    config, dtype = HfQuantConfig({"default": INT4}), torch.bfloat16
    loaded = cls.from_pretrained(tmp_path / "float", quantization_config=config, torch_dtype=dtype)
    assert_same(loaded, hfquant.quantize(copy.deepcopy(model).to(dtype), None, config), inputs)
    assert loaded.dtype == dtype
    layers = quant_layers(loaded)
    assert len(layers) == COUNTS[name] + (name == "flux")  # this config leaves no last projection in float
    for layer_name, layer in layers.items():
        assert layer.weight_scale.dtype == torch.float32
        assert layer.bias is None or layer.bias.dtype == dtype
        assert sqnr(model.get_submodule(layer_name).weight, layer.to_float(torch.float32).weight) >= 14
    y = outputs(loaded, inputs)
    assert y.dtype == dtype
    assert sqnr(outputs(model, inputs), y) > 10

    loaded.save_pretrained(tmp_path / "single")
    loaded.save_pretrained(tmp_path / "sharded", max_shard_size="3KB")
    index = json.loads((tmp_path / "sharded" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 5
    for folder in ("single", "sharded"):
        assert_same(cls.from_pretrained(tmp_path / folder, torch_dtype=dtype), loaded, inputs)
    # As in transformers, a wider dtype widens everything but codes and scales.
    wide = cls.from_pretrained(tmp_path / "sharded", torch_dtype=torch.float32)
    assert wide.dtype == torch.float32
    for layer_name, layer in quant_layers(wide).items():
        assert torch.equal(layer.weight, layers[layer_name].weight)
        assert torch.equal(layer.weight_scale, layers[layer_name].weight_scale)
    assert sqnr(outputs(wide, inputs), y) > 20


def test_bias_in_another_shard_than_its_weight(tmp_path):
    model = small_models.dit()
    model.save_pretrained(tmp_path / "float")
    tensors = load_file(tmp_path / "float" / "diffusion_pytorch_model.safetensors")
    from safetensors.torch import save_file

    for order in (("bias", "weight"), ("weight", "bias")):
        folder = tmp_path / "-".join(order)
        folder.mkdir()
        (folder / "config.json").write_bytes((tmp_path / "float" / "config.json").read_bytes())
        weight_map = {}
        for i, kind in enumerate(order):
            part = {k: v for k, v in tensors.items() if k.endswith("bias") == (kind == "bias")}
            file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        )
        loaded = type(model).from_pretrained(folder, quantization_config=HfQuantConfig("w8a16"))
        assert_same(loaded, hfquant.quantize(small_models.dit(), None, "w8a16"), denoiser_inputs(model))


def test_modules_kept_in_float32(checkpoint, tmp_path):
    class_list = list(WanTransformer3DModel._keep_in_fp32_modules)
    config, inputs = HfQuantConfig("w8a8-dynamic"), denoiser_inputs(small_models.wan())
    model = WanTransformer3DModel.from_pretrained(
        checkpoint("wan"), quantization_config=config, torch_dtype=torch.bfloat16
    )
    embedder = model.condition_embedder.time_embedder
    assert [(type(m), m.weight.dtype) for m in (embedder.linear_1, embedder.linear_2)] == [
        (nn.Linear, torch.float32)
    ] * 2
    assert model.scale_shift_table.dtype == torch.float32
    assert model.blocks[0].attn1.to_q.bias.dtype == torch.bfloat16
    assert isinstance(model.blocks[0].attn1.to_q, QuantLinear)
    model.save_pretrained(tmp_path)
    again = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert_same(again, model, inputs)
    assert WanTransformer3DModel._keep_in_fp32_modules == class_list


@pytest.mark.parametrize("preset", ["w8a8", "fp8"])
def test_static_preset_with_data(preset, checkpoint, tmp_path):
    inputs = denoiser_inputs(small_models.sd3())
    config = HfQuantConfig(preset, calibration=[inputs, inputs])
    model = SD3Transformer2DModel.from_pretrained(checkpoint("sd3"), quantization_config=config)
    assert_same(model, hfquant.quantize(small_models.sd3(), [inputs, inputs], preset), inputs)
    model.save_pretrained(tmp_path)
    assert_same(SD3Transformer2DModel.from_pretrained(tmp_path), model, inputs)


class Recorded(list):
    """A list of batches that can be weakly referenced."""


def test_users_config_is_left_alone_and_the_data_let_go(checkpoint, tmp_path):
    inputs = denoiser_inputs(small_models.dit())
    data = Recorded([inputs])
    config = HfQuantConfig("w8a8", calibration=data, modules_to_not_convert=["proj_out_2"])
    before = config.to_dict()
    models = [type(small_models.dit()).from_pretrained(checkpoint("dit"), quantization_config=config) for _ in range(2)]
    assert config.to_dict() == before
    assert config.calibration is data
    assert_same(*models, inputs)
    held = weakref.ref(data)
    del config, data
    gc.collect()
    assert held() is None
    for model in models:
        assert model.hf_quantizer.quantization_config is model.config["quantization_config"]
        assert model.hf_quantizer.pre_quantized
    models[0].save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["config"] == PRESETS["w8a8"]
    assert stored["modules_to_not_convert"] == ["proj_out_2"]
    assert "calibration" not in stored


def test_modules_to_not_convert_and_overrides(checkpoint, tmp_path):
    rules = {"default": INT4, "*.ff.*": {"enable": False}, "proj_out": {"weight_quant": {"type": "int16"}}}
    config = HfQuantConfig(rules, modules_to_not_convert=["attn.to_q", "x_embedder"])
    model = FluxTransformer2DModel.from_pretrained(checkpoint("flux"), quantization_config=config)
    left = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert left == {n for n in left if ".ff." in n or n.endswith("attn.to_q") or n == "x_embedder"}
    assert len(left) == 2 + 3 + 1
    assert model.proj_out.weight.dtype == torch.int16
    model.save_pretrained(tmp_path)
    assert_same(FluxTransformer2DModel.from_pretrained(tmp_path), model, denoiser_inputs(model))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(device_map, checkpoint, tmp_path):
    inputs = denoiser_inputs(small_models.dit())
    cls, config = type(small_models.dit()), HfQuantConfig("w8a16")
    if device_map == "auto" and not torch.cuda.is_available():
        device_map = {"": torch.device("cpu")}
    expected = cls.from_pretrained(checkpoint("dit"), quantization_config=config)
    model = cls.from_pretrained(checkpoint("dit"), quantization_config=config, device_map=device_map)
    assert_same(model, expected, inputs)
    model.save_pretrained(tmp_path)
    assert_same(cls.from_pretrained(tmp_path, device_map=device_map), expected, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_model_is_a_plain_one(dtype, checkpoint, tmp_path):
    cls, config = type(small_models.pixart()), HfQuantConfig("w8a16")
    model = cls.from_pretrained(checkpoint("pixart"), quantization_config=config, torch_dtype=dtype)
    weights = {name: layer.effective_weight().to(dtype) for name, layer in quant_layers(model).items()}
    plain = model.dequantize()
    assert plain is model
    for name, weight in weights.items():
        assert type(plain.get_submodule(name)) is nn.Linear
        assert torch.equal(plain.get_submodule(name).weight, weight)
    assert all(p.requires_grad and p.dtype == dtype for p in plain.parameters())
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = cls.from_pretrained(tmp_path, torch_dtype=dtype)
    assert not quant_layers(again)
    assert_same(again, plain, denoiser_inputs(plain))
    assert len(quant_layers(hfquant.quantize(plain.float(), None, "w8a16"))) == COUNTS["pixart"]


def test_casting_a_quantized_model_is_refused(checkpoint):
    cls, config = type(small_models.dit()), HfQuantConfig("w8a8-dynamic")
    model = cls.from_pretrained(checkpoint("dit"), quantization_config=config)
    inputs = denoiser_inputs(model)
    y = outputs(model, inputs)
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()):
        with pytest.raises(ValueError, match=r"unsupported|not supported"):
            cast(model)
    assert torch.equal(outputs(model.to("cpu"), inputs), y)
    # Casting a pipeline reaches the model through nn.Module's own method.
    inner = nn.ModuleList([copy.deepcopy(model)]).to(torch.bfloat16)[0]
    assert all(layer.weight_scale.dtype == torch.float32 for layer in quant_layers(inner).values())
    assert all(layer.weight.dtype == torch.int8 for layer in quant_layers(inner).values())
    assert sqnr(y, outputs(inner, inputs)) > 20
    twin = copy.deepcopy(model)
    assert_same(twin, model, inputs)


@pytest.mark.parametrize("name", ["unet", "flux", "sd3", "pixart"])
def test_fusing_projections_of_a_quantized_model_raises_and_changes_nothing(name, checkpoint):
    # diffusers concatenates the weights into a new nn.Linear, which cannot hold codes.
    model = type(small_models.DIFFUSERS[name]()).from_pretrained(
        checkpoint(name), quantization_config=HfQuantConfig("w8a16")
    )
    expected = copy.deepcopy(model)
    with pytest.raises(ValueError, match="fuse the projections before quantizing"):
        model.fuse_qkv_projections()
    assert_same(model, expected, denoiser_inputs(model))


@pytest.fixture
def one_file(tmp_path):
    """A float model's folder, its only file of weights, and inputs."""
    model = lora_pipelines.qwen_image()
    model.save_pretrained(tmp_path / "float")
    return tmp_path / "float", tmp_path / "float" / "diffusion_pytorch_model.safetensors", denoiser_inputs(model)


@pytest.mark.parametrize("preset", ["w8a8-dynamic", "w8a8"])
def test_single_file_is_quantized_as_a_folder_is(preset, one_file, tmp_path):
    folder, file, inputs = one_file
    config = HfQuantConfig(preset, calibration=[inputs] if preset == "w8a8" else None)
    options = {"quantization_config": config, "torch_dtype": torch.bfloat16}
    loaded = QwenImageTransformer2DModel.from_single_file(file, config=str(folder), **options)
    assert quant_layers(loaded)
    assert_same(loaded, QwenImageTransformer2DModel.from_pretrained(folder, **options), inputs)
    loaded.save_pretrained(tmp_path / "quantized")
    dtype = {"torch_dtype": torch.bfloat16}
    assert_same(QwenImageTransformer2DModel.from_pretrained(tmp_path / "quantized", **dtype), loaded, inputs)


@pytest.mark.parametrize("preset", ["w8a8-dynamic", "w8a8"])
def test_quantized_single_file_loads_with_its_own_config(preset, one_file, tmp_path):
    folder, _, inputs = one_file
    config = HfQuantConfig(preset, calibration=[inputs] if preset == "w8a8" else None)
    quantized = QwenImageTransformer2DModel.from_pretrained(folder, quantization_config=config)
    quantized.save_pretrained(tmp_path / "quantized")
    file = tmp_path / "quantized" / "diffusion_pytorch_model.safetensors"
    own = HfQuantConfig.from_dict(quantized.config["quantization_config"])
    again = QwenImageTransformer2DModel.from_single_file(file, config=str(folder), quantization_config=own)
    assert_same(again, quantized, inputs)


@pytest.mark.parametrize("name", ["img_in.weight", "img_in.bias", "txt_norm.weight", "img_in.weight_scale"])
def test_single_file_without_a_tensor_is_rejected(name, one_file, tmp_path):
    folder, file, inputs = one_file
    configs = [HfQuantConfig("w8a8-dynamic"), HfQuantConfig("w8a8", calibration=[inputs])]
    quantized = QwenImageTransformer2DModel.from_pretrained(folder, quantization_config=configs[0])
    quantized.save_pretrained(tmp_path / "quantized")
    own = HfQuantConfig.from_dict(quantized.config["quantization_config"])
    cases = [(file, config) for config in configs if name != "img_in.weight_scale"]
    for stored, config in [*cases, (tmp_path / "quantized" / file.name, own)]:
        tensors = load_file(stored)
        del tensors[name]
        with pytest.raises(CheckpointError, match=rf"lacks 1 tensor \({name}\)"):
            QwenImageTransformer2DModel.from_single_file(tensors, config=str(folder), quantization_config=config)


def test_share_is_said_on_load(checkpoint, caplog):
    with caplog.at_level(logging.INFO, "hfquant"):
        for name in ("unet", "dit"):
            cls = type(small_models.DIFFUSERS[name]())
            cls.from_pretrained(checkpoint(name), quantization_config=HfQuantConfig("w8a16"))
    unet, dit = [r for r in caplog.records if "layers quantized" in r.message]
    assert unet.levelno == dit.levelno == logging.INFO
    assert "51 layers quantized, 100 % of" in unet.message, "convolutions and all"


@pytest.mark.parametrize("preset", ["w8a16", "w8a8"])
def test_model_with_nothing_to_quantize_is_loaded_with_a_warning(preset, tmp_path, caplog):
    model = diffusers.AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).eval()
    model.save_pretrained(tmp_path)
    inputs = {"sample": torch.randn(1, 3, 16, 16)}
    config = HfQuantConfig(preset, calibration=[inputs])
    with caplog.at_level(logging.WARNING, "hfquant"):
        loaded = diffusers.AutoencoderTiny.from_pretrained(tmp_path, quantization_config=config)
    (warned,) = [record.message for record in caplog.records if "nothing to quantize" in record.message]
    assert len(warned) < 300
    assert_same(loaded, model, inputs)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(diffusers.AutoencoderTiny.from_pretrained(tmp_path / "again"), model, inputs)


def test_save_twice_writes_the_same(checkpoint, tmp_path):
    cls = type(small_models.dit())
    model = cls.from_pretrained(checkpoint("dit"), quantization_config=HfQuantConfig("w8a16"))
    model.save_pretrained(tmp_path)
    first = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    model.save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == first


def test_weights_read_outside_their_forward_stay_float_without_data(tmp_path):
    """HunyuanDiT's pooler passes the weights of its projections to a functional attention."""
    from benchmarks.tiny_diffusers import build
    from hfquant.integrations.examples import example_inputs

    model = build("HunyuanDiT2DModel").to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(0, 0.02, generator=generator)
    model.save_pretrained(tmp_path)
    quantized = diffusers.HunyuanDiT2DModel.from_pretrained(tmp_path, quantization_config=HfQuantConfig("w8a16"))
    skipped = quantized.config["quantization_config"].skipped
    reads = [name for name, why in skipped.items() if why == "its weight is read outside its own forward"]
    assert any("pooler" in name for name in reads)
    inputs = example_inputs(quantized)
    with torch.no_grad():
        assert quantized(**inputs).sample.isfinite().all()
    quantized.save_pretrained(tmp_path / "q")
    again = diffusers.HunyuanDiT2DModel.from_pretrained(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(again(**inputs).sample, quantized(**inputs).sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_ip_adapter_in_another_dtype_is_cast_to_that_of_its_quantized_unet(dtype: torch.dtype) -> None:
    case = CASES["ip-adapter"]
    pipe, exact = (tiny_pipelines.stable_diffusion("StableDiffusionPipeline").to(dtype) for _ in range(2))
    hfquant.quantize(pipe.unet, None, "w8a16")
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    batch = {name: value.to(dtype) for name, value in tiny_pipelines.batches(case, 1)[0].items()}
    embeds = [case.call["ip_adapter_image_embeds"][0].to(dtype)]
    call = {**case.call, "ip_adapter_image_embeds": embeds, "num_inference_steps": 1}
    for given in (torch.float32, torch.bfloat16, torch.float16):
        for low in (True, False):
            images = []
            for each in (exact, pipe):
                tiny_pipelines.with_ip_adapter(each, given, low_cpu_mem_usage=low)
                images.append(each(**batch, **call, generator=torch.Generator().manual_seed(0))[0])
            assert sqnr(*images) > 25, (given, low)
            added = {name: value for name, value in pipe.unet.state_dict().items() if name not in before}
            assert any("to_k_ip" in name for name in added)
            assert any("encoder_hid_proj" in name for name in added)
            assert {value.dtype for value in added.values()} == {dtype}
    pipe.unload_ip_adapter()
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(value.dtype == before[name].dtype and torch.equal(value, before[name]) for name, value in after.items())


def test_a_dict_names_a_recorded_set(tmp_path):
    model = small_models.flux()
    inputs = [denoiser_inputs(model) for _ in range(2)]
    inputs[1]["hidden_states"] = 100 * inputs[1]["hidden_states"]
    model.save_pretrained(tmp_path / "float")
    BaseCalibSet.from_samples(inputs).save(tmp_path / "set")

    def quantized(calibration):
        config = HfQuantConfig("w8a8", calibration=calibration)
        return type(model).from_pretrained(tmp_path / "float", quantization_config=config)

    first = quantized({"dataset": str(tmp_path / "set"), "samples": 1})
    assert_same(first, quantized(inputs[:1]))
    whole = quantized({"dataset": str(tmp_path / "set")})
    assert_same(whole, quantized(inputs))
    assert not torch.equal(outputs(first, inputs[0]), outputs(whole, inputs[0]))
