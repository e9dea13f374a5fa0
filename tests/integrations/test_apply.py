"""Parts of quantized models, and models with quantized parts, are saved with a config of their own."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hfquant
from hfquant.integrations.apply import described
from hfquant.nn.modules import quant_modules
from tests.integrations import small_models, tiny_transformers

IDS = torch.arange(3, 21).view(2, 9)
PIXELS = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


def llava() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    images = {**text, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8, "model_type": "clip_vision_model"}
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config={**text, "num_key_value_heads": 2, "vocab_size": 200, "model_type": "llama"},
        vision_config=images,
        image_token_index=7,
        image_seq_length=16,
    )
    return LlavaForConditionalGeneration(config).eval()


def quantized(model: nn.Module, preset: Any) -> Any:
    hfquant.quantize(model, None, preset)
    return model


def output(model: nn.Module, *inputs: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(*inputs, **kwargs)[0]


def assert_comes_back(part: Any, folder: Path, *inputs: Any, ours: bool = False, **kwargs: Any) -> None:
    """Save, load without a config, and compare tensors and outputs."""
    before = dict(vars(part.config))
    if ours:
        hfquant.save_pretrained(part, folder)
    else:
        part.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "hfquant"
    assert vars(part.config).get("quantization_config") == before.get("quantization_config")
    loaded = type(part).from_pretrained(folder)
    mine, theirs = part.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert torch.equal(output(loaded, *inputs, **kwargs), output(part, *inputs, **kwargs))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("preset", ["w8a8-dynamic", "w4a16"])
def test_parts_of_a_model_come_back(preset: str, ours: bool, tmp_path: Path) -> None:
    """Without a config, INT8 codes would load as float weights."""
    model = quantized(llava(), preset)
    assert_comes_back(model.model.language_model, tmp_path / "text", IDS, ours=ours)
    assert_comes_back(model.model.vision_tower, tmp_path / "images", PIXELS, ours=ours)
    model.save_pretrained(tmp_path / "whole")
    again = type(model).from_pretrained(tmp_path / "whole")
    assert "quantization_config" not in vars(model.config.text_config) | vars(again.config.text_config)
    assert torch.equal(output(again, IDS), output(model, IDS))
    if ours:
        assert "language_model" not in (tmp_path / "text" / "README.md").read_text()


def test_a_part_that_shares_the_config_of_the_whole_comes_back(tmp_path: Path) -> None:
    model = quantized(small_models.llama_of_64(), "w4a16")
    whole = model.config.quantization_config
    assert_comes_back(model.model, tmp_path, IDS)
    assert model.config.quantization_config is whole
    small_models.assert_same(model, _reloaded(model, tmp_path / "whole"))


def test_an_encoder_comes_back(tmp_path: Path) -> None:
    assert_comes_back(quantized(small_models.t5(), "w8a8-dynamic").get_encoder(), tmp_path, IDS)


def test_experts_of_a_part_come_back(tmp_path: Path) -> None:
    model = quantized(small_models.mixtral(), "w8a8-dynamic")
    assert_comes_back(model.model, tmp_path, IDS)


def test_layers_in_other_formats_are_described(tmp_path: Path) -> None:
    rules = {"default": {"weight_quant": {"type": "int8"}}, "*.mlp.*": {"weight_quant": {"type": "int4"}}}
    model = quantized(small_models.llama(), {**rules, "*.o_proj": {"enable": False}})
    assert_comes_back(model.model, tmp_path, IDS)
    config = described(model.model)
    assert config.skipped["layers.0.self_attn.o_proj"] == "not quantized"
    plans = {name: layer.plan.config for name, layer in quant_modules(model.model).items()}
    assert {str(plan.weight_quant.type) for plan in plans.values()} == {"int4", "int8"}


def test_models_of_quantized_parts_come_back(tmp_path: Path) -> None:
    from transformers import EncoderDecoderModel

    halves = {}
    for name in ("encoder", "decoder"):
        halves[name] = tmp_path / name
        quantized(small_models.bert(), "w8a8-dynamic").save_pretrained(halves[name])
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(halves["encoder"], halves["decoder"]).eval()
    assert len(quant_modules(model)) > 20
    assert_comes_back(model, tmp_path / "both", IDS, decoder_input_ids=IDS)

    outer = llava()
    quantized(outer.model.language_model, "w8a8-dynamic")
    assert_comes_back(outer, tmp_path / "llava", IDS)


def test_a_model_with_one_quantized_block_comes_back(tmp_path: Path) -> None:
    model = small_models.llama()
    hfquant.quantize(model.model.layers[1], None, "w8a8-dynamic")
    assert_comes_back(model, tmp_path, IDS)


def test_a_denoiser_with_one_quantized_block_comes_back(tmp_path: Path) -> None:
    denoiser = small_models.dit()
    hfquant.quantize(denoiser.transformer_blocks[0], None, "w8a8-dynamic")
    denoiser.save_pretrained(tmp_path)
    assert "quantization_config" not in denoiser.config
    small_models.assert_same(denoiser, type(denoiser).from_pretrained(tmp_path))


@pytest.mark.parametrize("left", ["*.down_proj", "*.gate_up_proj"])
def test_experts_in_part_quantized_come_back(left: str, tmp_path: Path) -> None:
    model = quantized(small_models.mixtral(), {"default": {}, left: {"enable": False}})
    assert_comes_back(model.model, tmp_path, IDS)


def test_a_part_and_the_whole_are_saved_at_the_same_time(tmp_path: Path) -> None:
    """They share a config."""
    model = quantized(small_models.llama(), "w8a16")
    names = [(thing, tmp_path / f"{kind}{i}") for i in range(10) for kind, thing in (("a", model), ("b", model.model))]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda item: item[0].save_pretrained(item[1]), names))
    for thing, folder in names:
        small_models.assert_same(thing, type(thing).from_pretrained(folder))


def test_a_given_state_dict_is_saved(tmp_path: Path) -> None:
    for number, model in enumerate((small_models.llama(), small_models.llama())):
        hfquant.quantize(model if number else model.model.layers[1], None, "w8a16")
        given = {k: torch.full_like(v, 5) if v.dtype == torch.float32 else v for k, v in model.state_dict().items()}
        model.save_pretrained(tmp_path / str(number), state_dict=given)
        loaded = type(model).from_pretrained(tmp_path / str(number)).state_dict()
        assert loaded.keys() == given.keys()
        assert all(torch.equal(tensor, given[name]) for name, tensor in loaded.items())


def test_a_model_of_quantized_parts_is_dequantized(tmp_path: Path) -> None:
    model = llava()
    quantized(model.model.language_model, "w8a8-dynamic")
    loaded = hfquant.dequantize(_reloaded(model, tmp_path / "quantized"))
    assert not quant_modules(loaded)
    assert "hfquant" not in json.dumps(loaded.config.to_dict())
    again = _reloaded(loaded, tmp_path / "float")
    assert torch.equal(output(again, IDS), output(loaded, IDS))


def test_codes_of_a_layer_outside_cannot_be_saved(tmp_path: Path) -> None:
    rules = {
        "default": {
            "weight_quant": {"type": "int8"},
            "calib": {"type": "amax"},
            "opt": {"type": "default"},
            "input_quant": None,
            "include": ["embeddings", "output_heads"],
        }
    }
    model = quantized(small_models.t5(), rules)
    encoder = model.get_encoder()
    with pytest.raises(ValueError, match="'embed_tokens' shares the codes of a layer outside of this T5Stack"):
        encoder.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    small_models.assert_same(model, _reloaded(model, tmp_path / "whole"))


def _reloaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def two_towers(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 200, "max_position_embeddings": 40, "eos_token_id": 2, "bos_token_id": 1}
    images = {**SIZES, "image_size": 32, "patch_size": 8}
    if kind == "CLIP":
        text, images = {**text, "projection_dim": 48}, {**images, "projection_dim": 48}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=images)
    if kind == "CLIP":
        config.projection_dim = 48
    return getattr(transformers, f"{kind}Model")(config).eval()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("preset", ["w8a16", "w8a8", "w4a8-gptq"])
@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_tower_is_loaded_from_the_folder_of_the_whole(kind: str, preset: str, tmp_path: Path) -> None:
    import transformers

    model, inputs = two_towers(kind), {"input_ids": IDS, "pixel_values": PIXELS.expand(2, -1, -1, -1)}
    hfquant.quantize(model, [inputs] * 2, preset)
    before = {name: dict(vars(part)) for name, part in vars(model.config).items() if hasattr(part, "sub_configs")}
    assert len(before) == 2
    model.save_pretrained(tmp_path)
    assert all(vars(getattr(model.config, name)) == part for name, part in before.items())
    for name, tower, given in (("Text", model.text_model, IDS), ("Vision", model.vision_model, PIXELS)):
        loaded = getattr(transformers, f"{kind}{name}Model").from_pretrained(tmp_path)
        assert quant_modules(loaded).keys() == quant_modules(tower).keys()
        assert torch.equal(output(loaded, given), output(tower, given))
        assert_comes_back(loaded, tmp_path / name, given)
        saved = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert saved["skipped"]
        assert {*saved["layers"], *saved["skipped"]} <= {n for n, _ in loaded.named_modules()}  # under one name each
    with torch.no_grad():
        found = model(**inputs)
    if kind == "CLIP":
        whole = {"Text": (IDS, model.get_text_features(IDS)), "Vision": (PIXELS, model.get_image_features(PIXELS))}
        for name, (given, features) in whole.items():
            loaded = getattr(transformers, f"CLIP{name}ModelWithProjection").from_pretrained(tmp_path)
            assert torch.equal(output(loaded, given), features.pooler_output)
            assert {*loaded.config.quantization_config.skipped} <= {n for n, _ in loaded.named_modules()}
    again = type(model).from_pretrained(tmp_path)
    assert "hfquant" not in json.dumps([again.config.text_config.to_dict(), again.config.vision_config.to_dict()])
    for loaded in (again, _reloaded(again, tmp_path / "again")):
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits_per_image, found.logits_per_image)


def test_older_folders_of_a_whole_and_a_float_tower_are_loaded(tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPVisionModel

    model = two_towers("CLIP")
    hfquant.quantize(model, None, {"default": {"weight_quant": {"type": "int8"}}, "vision_model.*": {"enable": False}})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config["vision_config"]
    tower = CLIPVisionModel.from_pretrained(tmp_path)
    assert not quant_modules(tower)
    assert torch.equal(output(tower, PIXELS), output(model.vision_model, PIXELS))
    del config["text_config"]["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = CLIPModel.from_pretrained(tmp_path)
    assert quant_modules(again).keys() == quant_modules(model).keys()


def assert_same_tensors(model: nn.Module, other: nn.Module) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("kind", ["CLIP", "Llava"])
def test_without_the_config_of_the_whole_those_of_its_parts_do_not_count(kind: str, tmp_path: Path) -> None:
    """transformers takes the text model's for that of the whole if the whole has none."""
    from transformers import AutoConfig

    model = two_towers("CLIP") if kind == "CLIP" else llava()
    before = model.state_dict()
    model.save_pretrained(tmp_path / "float")
    quantized(model, "w8a16").save_pretrained(tmp_path / "quantized")
    config = AutoConfig.from_pretrained(tmp_path / "quantized")
    assert config.text_config.quantization_config
    del config.quantization_config
    loaded = type(model).from_pretrained(tmp_path / "float", config=config)
    assert not quant_modules(loaded)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    again = hfquant.HfQuantConfig("w8a16")
    loaded = type(model).from_pretrained(tmp_path / "float", config=config, quantization_config=again)
    assert quant_modules(loaded).keys() == quant_modules(model).keys()


def test_a_part_keeps_its_own_config_when_the_whole_is_saved(tmp_path: Path) -> None:
    """Both a whole without a config and one whose config says that the part is in float."""
    model = llava()
    quantized(model.model.language_model, "w8a16")
    model = _reloaded(model, tmp_path / "text")
    tower = quantized(model.model.vision_tower, "w4a16")
    own, whole = tower.config.quantization_config, model.config.quantization_config
    assert_same_tensors(model, _reloaded(model, tmp_path / "both"))
    assert tower.config.quantization_config is own
    assert model.config.quantization_config is whole
    assert_comes_back(tower, tmp_path / "tower", PIXELS)


def test_a_part_that_is_no_longer_quantized_is_saved_in_float(tmp_path: Path) -> None:
    model = _reloaded(quantized(llava(), "w8a16"), tmp_path / "quantized")
    layers = len(quant_modules(model))
    hfquant.dequantize(model.model.vision_tower.encoder.layers[0].mlp)
    assert len(quant_modules(model)) == layers - 2
    assert_same_tensors(model, _reloaded(model, tmp_path / "less"))


@pytest.mark.parametrize("include", [[], ["embeddings"]])
def test_a_tower_whose_class_does_not_name_its_part_is_loaded(include: list[str], tmp_path: Path) -> None:
    """``base_model_prefix`` is that of the whole, so its layers have the whole's names."""
    import transformers

    torch.manual_seed(0)
    model = tiny_transformers.build("ClapModel", "cpu").eval()
    plain = {"opt": {"type": "default"}, "calib": {"type": "amax"}, "input_quant": None, "include": include}
    hfquant.quantize(model, None, {"default": {"weight_quant": {"type": "int8"}, **plain}})
    model.save_pretrained(tmp_path)
    for name in ("Text", "Audio"):
        loaded = getattr(transformers, f"Clap{name}ModelWithProjection").from_pretrained(tmp_path)
        mine, theirs = quant_modules(model), quant_modules(loaded)
        starts = (f"{name.lower()}_model.", f"{name.lower()}_projection.")
        assert theirs.keys() == {key for key in mine if key.startswith(starts)}
        assert all(torch.equal(layer.weight, mine[key].weight) for key, layer in theirs.items())
        assert_same_tensors(loaded, _reloaded(loaded, tmp_path / name))
