"""Anything wrong with a checkpoint gives one clear error, and leaves nothing half done.

A state dict that was saved as it is, without ``save_pretrained``, is not wrong.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet1DModel
from huggingface_hub import save_torch_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

import hfquant
from hfquant import PRESETS, CalibrationError, ConfigError, HfQuantConfig
from hfquant.integrations.apply import inner_configs
from hfquant.integrations.checkpoint import CheckpointError
from hfquant.nn.modules import quant_layers, quant_modules
from tests.integrations import small_models
from tests.integrations.small_models import assert_same, denoiser_inputs, inputs_of, outputs, transformers_inputs
from tests.integrations.test_placement import MODELS as BLOCKS
from tests.integrations.test_placement import device_map

LIBRARIES = {"transformers": "llama", "diffusers": "dit"}
CLASSES: dict[str, Any] = {"transformers": LlamaForCausalLM, "diffusers": DiTTransformer2DModel}
WEIGHTS = {"transformers": "model.safetensors", "diffusers": "diffusion_pytorch_model.safetensors"}
#: A quantized linear that is neither a head nor tied, in each library's small model.
LAYER = {"transformers": "model.layers.0.mlp.down_proj", "diffusers": "transformer_blocks.0.attn1.to_q"}

#: "w8a8" with static scales whatever the inputs: so few rows do not yield a usable scale.
STATIC = copy.deepcopy(PRESETS["w8a8"])
STATIC["default"]["input_quant"] = {"type": "int8"}

both_libraries = pytest.mark.parametrize("library", LIBRARIES)


def inputs(library: str) -> dict[str, Any]:
    model = small_models.llama() if library == "transformers" else small_models.dit()
    return transformers_inputs(model) if library == "transformers" else denoiser_inputs(model)


@pytest.fixture(scope="module")
def static_folders(checkpoint, tmp_path_factory) -> dict[str, Path]:
    made = {}
    for library, name in LIBRARIES.items():
        config = HfQuantConfig(STATIC, calibration=[inputs(library)])
        model = CLASSES[library].from_pretrained(checkpoint(name), quantization_config=config)
        made[library] = tmp_path_factory.mktemp(library)
        model.save_pretrained(made[library])
    return made


def damaged(folder: Path, library: str, to: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / WEIGHTS[library])
    change(tensors)
    save_file(tensors, to / WEIGHTS[library], {"format": "pt"})
    return to


def edited(folder: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    change(config["quantization_config"])
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("calibration", [None, "self", {"source": "self"}])
def test_a_component_that_is_to_make_its_own_data_is_refused_before_weights_are_read(calibration, checkpoint, tmp_path):
    """A denoiser alone has no prompts to run on; transformers models generate their own data (test_self_made.py)."""
    library = "diffusers"
    folder = tmp_path / "no_weights"
    shutil.copytree(checkpoint(LIBRARIES[library]), folder)
    (folder / WEIGHTS[library]).write_bytes(b"not read")
    for preset in ("w8a8", "fp8", "w4a16-gptq"):
        config = HfQuantConfig(preset, calibration=calibration)
        with pytest.raises(CalibrationError, match=r"needs calibration data.*hfquant.quantize_pipeline\(pipe, None"):
            CLASSES[library].from_pretrained(folder, quantization_config=config)


@both_libraries
def test_unusable_data_on_load(library, checkpoint):
    def load(data: Any) -> Any:
        config = HfQuantConfig("w8a8", calibration=data)
        return CLASSES[library].from_pretrained(checkpoint(LIBRARIES[library]), quantization_config=config)

    good = inputs(library)
    with pytest.raises(ValueError, match="empty"):
        load([])
    with pytest.raises(CalibrationError, match="once"):
        load(b for b in [good])
    with pytest.raises(CalibrationError):
        load(7)
    if library == "diffusers":
        bad = {**good, "hidden_states": torch.full_like(good["hidden_states"], float("nan"))}
        with pytest.raises(CalibrationError, match=r"layer '.*'.* NaN or Inf .*batch 1"):
            load([good, bad])


@both_libraries
@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("preset", ["w8a8-dynamic", "w8a8"])
def test_bad_weights_name_the_layer(library, value, preset, checkpoint, tmp_path):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER[library]}.weight"][1, 2] = float(value)

    folder = damaged(checkpoint(LIBRARIES[library]), library, tmp_path / "bad", spoil)
    config = HfQuantConfig(preset, calibration=None if "dynamic" in preset else [inputs(library)])
    with pytest.raises(ValueError, match=rf"'{LAYER[library]}'.*NaN or Inf|NaN or Inf in calibration"):
        CLASSES[library].from_pretrained(folder, quantization_config=config)


@both_libraries
def test_float_checkpoint_with_a_missing_or_misshapen_weight(library, checkpoint, tmp_path):
    key = f"{LAYER[library]}.weight"
    changes: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        "missing": lambda t: t.pop(key),
        "narrow": lambda t: t.update({key: t[key][:, :-1].contiguous()}),
        "flat": lambda t: t.update({key: t[key].flatten()}),
    }
    for what, change in changes.items():
        folder = damaged(checkpoint(LIBRARIES[library]), library, tmp_path / what, change)
        with pytest.raises(ValueError, match=key):
            CLASSES[library].from_pretrained(folder, quantization_config=HfQuantConfig("w8a16"))


STORED = ("weight", "weight_scale", "input_scale", "smooth")


@both_libraries
@pytest.mark.parametrize("tensor", STORED)
def test_quantized_checkpoint_with_a_damaged_tensor(library, tensor, static_folders, tmp_path):
    key = f"{LAYER[library]}.{tensor}"
    wrong = torch.float32 if tensor == "weight" else torch.float16
    changes: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        "missing": lambda t: t.pop(key),
        "longer": lambda t: t.update({key: torch.cat([t[key], t[key]])}),
        "flat": lambda t: t.update({key: t[key].flatten()[None, None]}),
        "shorter": lambda t: t.update({key: t[key][..., :0].contiguous()}),
        "wrong dtype": lambda t: t.update({key: t[key].to(wrong)}),
        "integers": lambda t: t.update({key: t[key].to(torch.int32)}),
    }
    for what, change in changes.items():
        folder = damaged(static_folders[library], library, tmp_path / what, change)
        with pytest.raises(CheckpointError, match=LAYER[library]) as caught:
            CLASSES[library].from_pretrained(folder)
        assert tensor in str(caught.value), what
        if what in ("wrong dtype", "integers"):
            # The requested dtype does not repair it during loading.
            with pytest.raises(CheckpointError, match=LAYER[library]):
                CLASSES[library].from_pretrained(folder, torch_dtype=torch.float16)


@both_libraries
def test_quantized_checkpoint_without_a_bias_or_a_whole_layer(library, static_folders, tmp_path):
    if library == "diffusers":
        folder = damaged(static_folders[library], library, tmp_path / "bias", lambda t: t.pop(f"{LAYER[library]}.bias"))
        with pytest.raises(CheckpointError, match=rf"{LAYER[library]}.bias"):
            CLASSES[library].from_pretrained(folder)

    def drop(tensors: dict[str, Tensor]) -> None:
        for key in [k for k in tensors if k.startswith(LAYER[library])]:
            del tensors[key]

    folder = damaged(static_folders[library], library, tmp_path / "layer", drop)
    with pytest.raises(CheckpointError, match=LAYER[library]):
        CLASSES[library].from_pretrained(folder)


@both_libraries
def test_stored_config_of_a_stranger(library, static_folders, tmp_path):
    def load(name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        CLASSES[library].from_pretrained(edited(static_folders[library], tmp_path / name, change))

    layer = LAYER[library]
    cases: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
        "newer": (lambda c: c.update(format_version=99), "upgrade hfquant"),
        "version": (lambda c: c.update(format_version="1"), "format_version"),
        "unknown": (lambda c: c.update(colour="red"), "colour"),
        "field": (lambda c: c["config"]["default"].update(colour="red"), "colour"),
        "value": (lambda c: c["config"]["default"]["weight_quant"].update(type="int9"), "int9"),
        "layers": (lambda c: c.update(layers=[1]), "layers"),
        "sum": (lambda c: c["layers"].update({layer: {"input_segments": [1, 2]}}), rf"{layer}.*do not sum"),
        "plan": (lambda c: c["layers"].update({layer: {"rank": 3}}), rf"{layer}.*rank"),
        "dual": (lambda c: c["layers"].update({layer: {"dual": [True, False, True]}}), rf"{layer}.*dual"),
        "layer": (lambda c: c["layers"].update({layer: {"config": {"enable": "yes"}}}), "enable"),
        "nothing": (lambda c: c.pop("config"), "config"),
    }
    for name, (change, message) in cases.items():
        with pytest.raises(ConfigError, match=message):
            load(name, change)


@both_libraries
def test_stored_plan_for_a_layer_that_is_not_there(library, static_folders, tmp_path):
    """A config of another model, whose rules would quantize layers stored in float, or the other way round."""
    folder = edited(
        static_folders[library],
        tmp_path / "less",
        lambda c: c.update(modules_to_not_convert=[*(c["modules_to_not_convert"] or []), LAYER[library]]),
    )
    with pytest.raises((RuntimeError, ValueError)):
        CLASSES[library].from_pretrained(folder)


@both_libraries
def test_a_quantized_model_is_not_quantized_again(library, static_folders):
    model = CLASSES[library].from_pretrained(static_folders[library])
    before = outputs(model, inputs(library))
    with pytest.raises(ValueError, match="already quantized"):
        hfquant.quantize(model, None, "w8a16")
    assert torch.equal(outputs(model, inputs(library)), before)


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[str, int, bool, int]], dict[str, Any]]:
    modules = [
        (n, id(m), m.training, len(m._forward_hooks) + len(m._forward_pre_hooks)) for n, m in model.named_modules()
    ]
    attributes = {k: v for k, v in vars(model).items() if not k.startswith("_")}
    return {k: v.clone() for k, v in model.state_dict().items()}, modules, attributes


@pytest.mark.sampled(2)
@both_libraries
@pytest.mark.parametrize("per_layer_mode", [False, True])
def test_a_failing_quantize_leaves_the_model_as_it_was(library, per_layer_mode, tmp_path):
    model = small_models.llama() if library == "transformers" else small_models.dit()
    part = model.model.layers[1] if library == "transformers" else model.transformer_blocks[1]
    model.train()
    part.eval()
    last = part.mlp.down_proj if library == "transformers" else model.proj_out_2
    good = inputs(library)
    config = {"default": {"weight_quant": {"type": "int8", "axis": -1}}}

    def fails(loader: Any, error: type[Exception], message: str) -> None:
        tensors, modules, attributes = snapshot(model)
        with pytest.raises(error, match=message):
            hfquant.quantize(model, loader, config, per_layer_mode)
        after, modules_after, attributes_after = snapshot(model)
        assert all(torch.equal(tensors[k].nan_to_num(7), after[k].nan_to_num(7)) for k in tensors)
        assert tensors.keys() == after.keys()
        assert modules_after == modules
        assert attributes_after.keys() == attributes.keys()
        assert not hasattr(model, "hf_quantizer")
        assert "quantization_config" not in (model.config if library == "diffusers" else model.config.to_dict())

    fails([], ValueError, "empty")
    fails((b for b in [good]), CalibrationError, "only once")
    if library == "diffusers":
        fails(None, CalibrationError, "needs calibration data.*quantize_pipeline")
    fails([good, "text"], CalibrationError, "sample")
    fails([good, {"hidden_statez": torch.ones(1, 1)}], Exception, "hidden_state|exactly one of input_ids")

    class Interrupted(list):
        def __iter__(self):
            yield good
            raise OSError("the disk is gone")

    fails(Interrupted([good]), OSError, "the disk is gone")
    with torch.no_grad():
        weight = last.weight[0, 0].item()
        last.weight[0, 0] = float("nan")
        fails([good], ValueError, "NaN or Inf")
        last.weight[0, 0] = weight
    assert quant_layers(hfquant.quantize(model, [good], config, per_layer_mode))
    assert all(m.training for m in model.modules() if m is not part and m not in set(part.modules()))
    assert not any(m.training for m in part.modules())


@both_libraries
def test_no_pickles(library, static_folders, tmp_path):
    model = CLASSES[library].from_pretrained(static_folders[library])
    if library == "diffusers":
        with pytest.raises(ValueError, match="safetensors"):
            model.save_pretrained(tmp_path, safe_serialization=False)
    model.save_pretrained(tmp_path)
    assert {f.suffix for f in tmp_path.iterdir()} == {".json", ".safetensors"}


VALUES: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "scale nan": ("weight_scale", lambda t: torch.full_like(t, torch.nan), "finite and positive"),
    "scale inf": ("weight_scale", lambda t: torch.full_like(t, torch.inf), "finite and positive"),
    "scale zero": ("weight_scale", torch.zeros_like, "finite and positive"),
    "scale negative": ("weight_scale", torch.neg, "finite and positive"),
    "input scale zero": ("input_scale", torch.zeros_like, "finite and positive"),
    "divisor negative": ("smooth", torch.neg, "finite and positive"),
    "bias nan": ("bias", lambda t: torch.full_like(t, torch.nan), "NaN or Inf"),
    "bias bool": ("bias", lambda t: t > 0, "bias"),
    "bias int": ("bias", lambda t: t.to(torch.int32), "bias"),
}


@pytest.fixture(scope="module")
def biased_folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for library, model in (("transformers", small_models.llama(mlp_bias=True)), ("diffusers", small_models.dit())):
        hfquant.quantize(model, [inputs(library)], STATIC)
        made[library] = tmp_path_factory.mktemp(library)
        model.save_pretrained(made[library])
    return made


@both_libraries
@pytest.mark.parametrize("case", VALUES)
def test_values_of_a_stored_tensor_are_checked(library, case, biased_folders, tmp_path):
    tensor, change, says = VALUES[case]
    key = f"{LAYER[library]}.{tensor}"
    folder = damaged(biased_folders[library], library, tmp_path / "x", lambda t: t.update({key: change(t[key])}))
    with pytest.raises(CheckpointError, match=says) as caught:
        CLASSES[library].from_pretrained(folder)
    assert LAYER[library] in str(caught.value)
    assert tensor in str(caught.value)


@both_libraries
def test_a_tensor_that_the_config_does_not_explain(library, static_folders, tmp_path):
    """A smoothed checkpoint read as a plain one would silently lose 11 dB."""

    def plain(config: dict[str, Any]) -> None:
        config["config"]["default"]["opt"] = {"type": "default"}

    folder = edited(static_folders[library], tmp_path / "plain", plain)
    with pytest.raises(CheckpointError, match=r"smooth.*does not explain"):
        CLASSES[library].from_pretrained(folder)
    folder = damaged(
        static_folders[library], library, tmp_path / "x", lambda t: t.update({f"{LAYER[library]}.extra": torch.ones(1)})
    )
    with pytest.raises(CheckpointError, match=rf"{LAYER[library]}.extra"):
        CLASSES[library].from_pretrained(folder)


@both_libraries
def test_int8_and_fp8_are_not_taken_for_each_other(library, static_folders, tmp_path):
    model = small_models.llama() if library == "transformers" else small_models.dit()
    hfquant.quantize(model, None, "fp8-dynamic").save_pretrained(tmp_path / "fp8")
    key = f"{LAYER[library]}.weight"
    assert load_file(tmp_path / "fp8" / WEIGHTS[library])[key].dtype == torch.uint8
    assert load_file(static_folders[library] / WEIGHTS[library])[key].dtype == torch.int8

    def to_int8(config: dict[str, Any]) -> None:
        config["config"]["default"]["weight_quant"]["type"] = "int8"

    with pytest.raises(CheckpointError, match=r"expected.*torch.int8, got.*torch.uint8"):
        CLASSES[library].from_pretrained(edited(tmp_path / "fp8", tmp_path / "int8", to_int8))


@pytest.mark.parametrize("config", ["w4a16", "w8a8-dynamic"])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_tensor_that_the_index_lists_and_its_shard_lacks(config, quantized, tmp_path):
    model = small_models.dit()
    if quantized:
        hfquant.quantize(model, None, config)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads(next(tmp_path.glob("*.index.json")).read_text())["weight_map"]
    key = f"{LAYER['diffusers']}.weight"
    tensors = load_file(tmp_path / index[key])
    del tensors[key]
    save_file(tensors or {"unrelated": torch.ones(1)}, tmp_path / index[key], {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"no file has: {key}"):
        DiTTransformer2DModel.from_pretrained(
            tmp_path, quantization_config=None if quantized else HfQuantConfig(config)
        )


def test_a_user_pattern_is_a_pattern_and_a_skipped_name_is_exact(tmp_path):
    model = small_models.llama()
    # A checkpoint that skips "proj" by its exact name does not skip another module's "block.proj".
    hfquant.quantize(model, None, HfQuantConfig("w8a16", modules_to_not_convert=["*.layers.0.*"])).save_pretrained(
        tmp_path
    )
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["modules_to_not_convert"] == ["*.layers.0.*"]
    assert "model.layers.0.mlp.down_proj" in stored["skipped"]
    assert "model.layers.1.mlp.down_proj" not in stored["skipped"]
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert quant_layers(again).keys() == quant_layers(model).keys()

    def skip_bare_name(config: dict[str, Any]) -> None:
        config["skipped"]["down_proj"] = "its exact name, of another model"

    same = LlamaForCausalLM.from_pretrained(edited(tmp_path, tmp_path / "other", skip_bare_name))
    assert quant_layers(same).keys() == quant_layers(model).keys()


FLOATS = r"the checkpoint's weights are float, but .* remove quantization_config from the config \(config.json, or the"


TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@both_libraries
def test_a_float_model_of_a_quantized_model_s_config_is_saved_as_what_it_is(library, static_folders, tmp_path):
    if library == "transformers":
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(static_folders[library]))
    else:
        model = CLASSES[library].from_config(CLASSES[library].load_config(static_folders[library]))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in config_in(tmp_path)
    stays = dict(model.config) if library == "diffusers" else model.config.to_dict()
    assert stays["quantization_config"]["quant_method"] == "hfquant"
    again = CLASSES[library].from_pretrained(tmp_path)
    assert not quant_layers(again)
    assert torch.equal(outputs(again, inputs(library)), outputs(model.eval(), inputs(library)))


def test_neither_do_the_configs_of_its_parts(tmp_path):
    config = CLIPConfig(text_config=TINY, vision_config=TINY, projection_dim=8)
    ours, other = HfQuantConfig("w8a16").to_dict(), {"quant_method": "other"}
    model = CLIPModel(config)
    config.text_config.quantization_config, config.vision_config.quantization_config = ours, other
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in config_in(tmp_path)["text_config"]
    assert config_in(tmp_path)["vision_config"]["quantization_config"] == other
    assert config.text_config.quantization_config is ours


class ConfigOfTwoNames(LlamaConfig):
    """Has the config of its one part under two names, as those of some models outside of transformers."""

    model_type = "two_names"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.llm_config = self.text_config = LlamaConfig(**TINY)


def test_a_config_that_is_held_under_two_names_is_restored(tmp_path):
    config, ours = ConfigOfTwoNames(**TINY, vocab_size=8), HfQuantConfig("w8a16").to_dict()
    model = LlamaForCausalLM(config)
    config.quantization_config = config.llm_config.quantization_config = ours
    assert inner_configs(config) == [config.llm_config]
    model.save_pretrained(tmp_path)
    assert "hfquant" not in json.dumps(config_in(tmp_path))
    assert config.quantization_config is config.llm_config.quantization_config is ours


@both_libraries
def test_floats_where_the_config_says_codes(library, static_folders, checkpoint, tmp_path):
    if library == "transformers":
        config = AutoConfig.from_pretrained(static_folders[library])
        with pytest.raises(CheckpointError, match=FLOATS):
            AutoModelForCausalLM.from_pretrained(checkpoint(LIBRARIES[library]), config=config)
    shutil.copytree(checkpoint(LIBRARIES[library]), tmp_path / "both")
    shutil.copy(static_folders[library] / "config.json", tmp_path / "both")
    with pytest.raises(CheckpointError, match=FLOATS):
        CLASSES[library].from_pretrained(tmp_path / "both")


def test_floats_in_place_of_the_codes_of_one_layer(static_folders, tmp_path):
    key = f"{LAYER['transformers']}.weight"
    folder = damaged(
        static_folders["transformers"], "transformers", tmp_path / "a", lambda t: t.update({key: t[key].float()})
    )
    with pytest.raises(CheckpointError, match=rf"{key}: expected .* of torch.int8, got .*float32$"):
        LlamaForCausalLM.from_pretrained(folder)


def saved_plainly(model: Any, library: str, folder: Path, **options: Any) -> Path:
    """Save a ``state_dict()`` as it is, as accelerate's ``save_model`` does, and the model's config next to it."""
    pattern = WEIGHTS[library].replace(".safetensors", "{suffix}.safetensors")
    folder.mkdir()
    save_torch_model(model, folder, filename_pattern=pattern, **options)
    (model.config.save_pretrained if library == "transformers" else model.save_config)(folder)
    return folder


@pytest.mark.parametrize(
    ("library", "name", "preset"),
    [
        ("transformers", "llama", "w4a16"),
        ("transformers", "mixtral", "w8a16"),
        ("diffusers", "dit", "fp8-dynamic"),
        ("diffusers", "unet", "w4a16"),
    ],
)
@pytest.mark.parametrize("shard", ["10KB", "1GB"])
def test_a_plain_state_dict_is_a_checkpoint(library, name, preset, shard, tmp_path):
    model = hfquant.quantize(getattr(small_models, name)(), None, preset)
    folder = saved_plainly(model, library, tmp_path / "plain", max_shard_size=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "10KB")
    again = type(model).from_pretrained(folder)
    assert_same(again, model)
    again.save_pretrained(tmp_path / "again")
    assert_same(type(model).from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize(("library", "name"), [("transformers", "llama"), ("diffusers", "flux")])
def test_a_plain_state_dict_can_stay_on_disk(library, name, tmp_path):
    model = hfquant.quantize(getattr(small_models, name)(), None, "w8a16")
    folder, where = saved_plainly(model, library, tmp_path / "plain"), device_map(model, BLOCKS[name])
    again = type(model).from_pretrained(folder, device_map=where, offload_folder=tmp_path / "offload")
    assert any(layer.weight.is_meta for layer in quant_layers(again).values())
    assert torch.equal(outputs(again, inputs_of(model)), outputs(model, inputs_of(model)))


@both_libraries
def test_a_plain_state_dict_must_fit(library, static_folders, tmp_path):
    model, key = CLASSES[library].from_pretrained(static_folders[library]), f"{LAYER[library]}.weight"
    folder = saved_plainly(model, library, tmp_path / "plain")
    changes: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        "narrow": lambda t: t.update({key: t[key][:, :-1].contiguous()}),
        "turned": lambda t: t.update({key: t[key].T[:-1].contiguous()}),
        "wrong dtype": lambda t: t.update({key: t[key].view(torch.uint8)}),
        "float": lambda t: t.update({key: t[key].float()}),
    }
    for what, change in changes.items():
        with pytest.raises(CheckpointError, match=LAYER[library]):
            CLASSES[library].from_pretrained(damaged(folder, library, tmp_path / what, change))


def test_a_plain_state_dict_has_a_layer_with_one_output(tmp_path):
    """In memory, its codes have a leading dimension of 1, as all have on disk."""
    blocks = {"down_block_types": ["DownBlock1D"] * 2, "up_block_types": ["UpBlock1D"] * 2}
    sizes = {"in_channels": 2, "out_channels": 1, "block_out_channels": [8, 8], "extra_in_channels": 16}
    rule = PRESETS["w8a16"]["default"] | {"include": ["edge_convs"]}
    model = hfquant.quantize(UNet1DModel(16, **sizes, **blocks), None, {"default": rule})
    assert any(tuple(layer.weight.shape) == (1, 40, 1) for layer in quant_modules(model).values())
    again, tensors = UNet1DModel.from_pretrained(saved_plainly(model, "diffusers", tmp_path / "a")), model.state_dict()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in again.state_dict().items())
