"""HfQuantConfig: one class for both libraries, and what it writes to config.json."""

import copy
import inspect
import json

import diffusers.quantizers.auto
import pytest
import transformers.quantizers.auto
from diffusers import PipelineQuantizationConfig
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from torch import nn
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersMixin

import hfquant
from hfquant import ConfigError, HfQuantConfig
from hfquant.integrations.config import FORMAT_VERSION

CONFIG = {
    "default": {"opt": {"type": "default"}, "weight_quant": {"type": "int4", "group_size": 8}},
    "*.fc": {"enable": False},
}
LAYERS = {"a.proj": {"input_segments": [3, 5], "dual": [False, True]}}


class Uncopyable:
    """Calibration data that must be passed on as is, never copied or stored."""

    def __deepcopy__(self, memo):
        raise AssertionError("the calibration data was copied")


def test_defaults() -> None:
    assert HfQuantConfig().rules.raw == hfquant.PRESETS["w8a8-dynamic"]
    assert HfQuantConfig.of(None).rules.raw == {}
    assert HfQuantConfig.of("w4a16").rules.raw == hfquant.PRESETS["w4a16"]
    own = HfQuantConfig("w8a8")
    assert HfQuantConfig.of(own) is own
    with pytest.raises(TypeError, match="an HfQuantConfig or None, got int"):
        HfQuantConfig.of(3)


def test_dict_and_json_round_trip() -> None:
    config = HfQuantConfig(CONFIG, modules_to_not_convert=("head", "*.gate"), per_layer_mode=True)
    config.layers, config.skipped = copy.deepcopy(LAYERS), {"lm_head": "the model's output head"}
    stored = config.to_dict()
    assert stored == {
        "quant_method": "hfquant",
        "format_version": FORMAT_VERSION,
        "config": CONFIG,
        "modules_to_not_convert": ["head", "*.gate"],
        "per_layer_mode": True,
        "layers": LAYERS,
        "skipped": {"lm_head": "the model's output head"},
    }
    for again in (
        HfQuantConfig.from_dict(stored),
        HfQuantConfig.from_dict(json.loads(config.to_json_string())),
        AutoQuantizationConfig.from_dict(json.loads(json.dumps(stored))),
        DiffusersAutoQuantizer.from_dict(stored),
    ):
        assert isinstance(again, HfQuantConfig)
        assert again == config
        assert again.to_dict() == config.to_diff_dict() == dict(again) == stored


def test_to_dict_gives_no_way_in() -> None:
    config = HfQuantConfig(CONFIG, modules_to_not_convert=["head"])
    config.layers, config.skipped = copy.deepcopy(LAYERS), {"lm_head": "the model's output head"}
    stored = config.to_dict()
    stored["config"]["default"]["opt"]["type"] = "svd"
    stored["layers"]["a.proj"]["dual"].append(True)
    assert config.to_dict()["config"] == CONFIG
    assert config.to_dict()["layers"] == LAYERS


def test_data_is_shared_by_copies_and_never_stored() -> None:
    config = HfQuantConfig("w8a8", calibration=Uncopyable(), modules_to_not_convert=["head"])
    config.layers = copy.deepcopy(LAYERS)
    twin = copy.deepcopy(config)
    assert twin.calibration is config.calibration
    assert twin == config
    twin.layers["a.proj"]["dual"] = []
    twin.modules_to_not_convert.append("x")
    twin.rules.raw["default"] = {}
    assert config.layers == LAYERS
    assert config.modules_to_not_convert == ["head"]
    assert config.rules.raw == hfquant.PRESETS["w8a8"]
    assert "calibration" not in config.to_dict()
    assert "calibration" not in repr(config)
    assert "calibration" not in dict(config)


def test_a_models_own_copy() -> None:
    config = HfQuantConfig("w8a8", calibration=Uncopyable(), modules_to_not_convert=["*.gate"])
    skipped = {"lm_head": "the model's output head", "b.gate": "in modules_to_not_convert"}
    own = config.for_model(copy.deepcopy(LAYERS), skipped)
    assert (own.layers, own.skipped, own.modules_to_not_convert) == (LAYERS, skipped, ["*.gate"])
    assert own.calibration is None
    assert (config.layers, config.skipped, config.modules_to_not_convert) == ({}, {}, ["*.gate"])
    assert isinstance(config.calibration, Uncopyable)


def test_from_dict_takes_run_time_arguments() -> None:
    data = ["text"]
    config, unused = HfQuantConfig.from_dict({"config": "w8a8"}, return_unused_kwargs=True, calibration=data, other=1)
    assert config.calibration is data
    assert unused == {"other": 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format_version": FORMAT_VERSION - 1}, "quantize the model again"),
        (
            {"format_version": FORMAT_VERSION + 1},
            f"reads version {FORMAT_VERSION}, the checkpoint has {FORMAT_VERSION + 1}; upgrade",
        ),
        ({"format_version": 0}, "format_version"),
        ({"format_version": "1"}, "format_version"),
        ({"format_version": True}, "format_version"),
        ({"quant_method": "gptq"}, "quant_method: expected 'hfquant', got 'gptq'"),
        ({"bits": 4}, r"unknown keys \['bits'\]; allowed are config, calibration"),
        ({"layers": []}, "layers: expected a dict of dicts"),
        ({"layers": {"a": 3}}, "layers: expected a dict of dicts"),
        ({"config": {"default": {"bits": 4}}}, "bits: unknown key"),
        ({"config": "w2a2"}, "unknown preset"),
        ({"per_layer_mode": 1}, "per_layer_mode: expected True or False, got 1"),
        ({"modules_to_not_convert": "lm_head"}, "expected a list of names, got 'lm_head'"),
    ],
)
def test_stored_configs_that_are_refused(change, says) -> None:
    with pytest.raises(ConfigError, match=says):
        HfQuantConfig.from_dict({**HfQuantConfig().to_dict(), **change})


def test_a_stored_config_without_its_rules_is_refused() -> None:
    stored = HfQuantConfig("w4a16").to_dict()
    del stored["config"]
    with pytest.raises(ConfigError, match="lacks its key 'config'"):
        HfQuantConfig.from_dict(stored)


@pytest.mark.parametrize("wrong", ["lm_head", 3, {"lm_head": 1}, ["a", 3], [None], {"a"}])
def test_modules_to_not_convert_is_a_list_of_names(wrong) -> None:
    with pytest.raises(ConfigError, match="modules_to_not_convert: expected a list of names"):
        HfQuantConfig(modules_to_not_convert=wrong)
    config = HfQuantConfig(modules_to_not_convert=["head"])
    with pytest.raises(ConfigError, match="modules_to_not_convert: expected a list of names"):
        config.modules_to_not_convert = wrong
    assert config.modules_to_not_convert == config.rules.excluded == ["head"]


def test_modules_to_not_convert_can_be_set_later() -> None:
    original = HfQuantConfig("w8a16")
    config = copy.copy(original)
    config.modules_to_not_convert = ["0"]
    assert original.modules_to_not_convert is None
    plan = hfquant.plan(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), config)
    assert list(plan.layers) == ["1"]
    config.modules_to_not_convert = None
    assert config.to_dict()["modules_to_not_convert"] is None


def test_needs_data() -> None:
    assert HfQuantConfig("w8a8").needs_data
    assert not HfQuantConfig("w4a16").needs_data
    assert HfQuantConfig({**hfquant.PRESETS["w4a16"], "l.[01]": {"calib": {"type": "gptq"}}}).needs_data


def test_one_class_for_both_libraries() -> None:
    assert issubclass(HfQuantConfig, TransformersMixin)
    signature = inspect.signature(HfQuantConfig.__init__)
    assert list(signature.parameters) == [
        "self", "config", "calibration", "modules_to_not_convert", "per_layer_mode", "guard",
    ]  # fmt: skip
    assert transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING["hfquant"] is HfQuantConfig
    assert diffusers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING["hfquant"] is HfQuantConfig
    assert HfQuantConfig().quant_method == "hfquant"
    assert HfQuantConfig().quant_method.value == "hfquant"


def test_pipeline_config_by_backend_and_by_mapping() -> None:
    by_name = PipelineQuantizationConfig(
        quant_backend="hfquant", quant_kwargs={"config": "w4a16"}, components_to_quantize=["transformer"]
    )
    for is_diffusers in (True, False):
        resolved = by_name._resolve_quant_config(is_diffusers=is_diffusers, module_name="transformer")
        assert resolved == HfQuantConfig("w4a16")
    config = HfQuantConfig("w8a8", calibration=Uncopyable())
    by_mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    assert by_mapping._resolve_quant_config(is_diffusers=True, module_name="transformer") is config


def test_what_the_data_was_is_kept_and_checked() -> None:
    config = HfQuantConfig("w8a8")
    assert "provenance" not in config.to_dict()
    config.provenance = {"dataset": "texts", "seed": 0}
    again = HfQuantConfig.from_dict(config.to_dict())
    assert again.provenance == config.provenance
    copied = copy.deepcopy(again)
    copied.provenance["seed"] = 1
    assert again.provenance["seed"] == 0
    with pytest.raises(ConfigError, match="provenance: expected a dict"):
        HfQuantConfig.from_dict(config.to_dict() | {"provenance": []})
