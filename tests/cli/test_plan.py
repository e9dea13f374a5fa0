"""`hfquant plan` from configs alone."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from diffusers import MultiControlNetModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import hfquant
from hfquant.cli import app, options
from hfquant.recipes.run import check_fits
from hfquant.schema import ConfigError
from tests.cli.conftest import lines
from tests.integrations import small_models
from tests.integrations.test_pipelines import sd3
from tests.integrations.test_skeleton import audio_ldm2
from tests.integrations.tiny_pipelines import CASES
from tests.recipes.tiny import PUBLISHED


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_a_published_model():
    result = plan(PUBLISHED / "SmolLM2-1.7B-Instruct", "--preset", "w4a16-gptq")
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM" in result.output
    assert "168" in result.output
    assert "lm_head" in result.output


def test_as_json_with_every_layer_and_an_estimate(llama):
    result = plan(llama, "--preset", "w4a16-gptq", "--json", "--layers", "--estimate", "--dtype", "float32")
    found = json.loads(result.stdout)["model"]
    assert found["layers"] == len(found["plan"]) == 14
    assert found["bytes_after"] < found["bytes_before"]
    assert found["share"] == 1
    assert set(found["skipped"]) == {"lm_head", "model.embed_tokens"}
    assert found["calibration"]["passes"] == 1


def test_full_precision_is_that_of_the_config(llama):
    def before(*options: str) -> int:
        return json.loads(plan(llama, "--preset", "w4a16", "--json", *options).stdout)["model"]["bytes_before"]

    assert json.loads((llama / "config.json").read_text())["dtype"] == "float32"
    assert before() == before("--dtype", "float32") == 2 * before("--dtype", "bfloat16")


def test_what_is_quantized_is_not_planned(llama, tmp_path):
    pipe = sd3()
    hfquant.quantize(pipe.transformer, None, "w4a16")
    pipe.save_pretrained(tmp_path / "pipe")
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=hfquant.HfQuantConfig("w4a16"))
    hfquant.save_pretrained(model, tmp_path / "model")
    for name, kind in (("model", "LlamaForCausalLM"), ("pipe", "SD3Transformer2DModel")):
        for command in (["plan"], ["quantize", "--out", str(tmp_path / "q")]):
            result = CliRunner().invoke(app, [*command, str(tmp_path / name), "--preset", "w8a16"])
            assert result.exit_code == 1, result.output
            assert f"{kind} is already quantized; pass the model in full precision" in result.stderr
            assert len(lines(result.stderr)) == 1
    result = plan(tmp_path / "pipe", "--preset", "w8a16", "--component", "text_encoder")
    assert result.exit_code == 0, result.output


def test_a_key_that_matches_no_layer_is_named(llama, tmp_path, caplog):
    (tmp_path / "config.json").write_text('{"defualt": {"weight_quant": {"type": "int4"}}}')
    assert plan(llama, "--config", tmp_path / "config.json").exit_code == 0
    assert "config['defualt'] matches no layer" in caplog.text


def test_a_search_is_said_to_decide_later(llama):
    result = plan(llama, "--preset", "w4-auto")
    assert result.exit_code == 0, result.output
    assert "not final: quantizing chooses each layer's format on the data, within the bytes of w4a16-gptq" in " ".join(
        result.output.split()
    )


def test_one_or_all_of_several_controlnets(tmp_path):
    pipe = CASES["sd-controlnet"].build()
    pipe.controlnet = MultiControlNetModel([pipe.controlnet, CASES["sd-controlnet"].build().controlnet])
    pipe.save_pretrained(tmp_path)

    def planned(*names: str) -> set[str]:
        words = (word for name in names for word in ("--component", name))
        result = plan(tmp_path, "--preset", "w8a16", "--json", *words)
        assert result.exit_code == 0, result.output
        return set(json.loads(result.stdout))

    assert planned("unet", "controlnet.nets.1") == {"unet", "controlnet.nets.1"}
    assert planned("controlnet") == {"controlnet.nets.0", "controlnet.nets.1"}


def test_a_denoiser_that_is_defined_in_the_module_of_a_pipeline(tmp_path):
    audio_ldm2(tmp_path)
    result = plan(tmp_path, "--preset", "w8a16", "--json")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)) == {"unet"}
    audio_ldm2(tmp_path, "w8a16")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["unet"]["class"] == "AudioLDM2UNet2DConditionModel"


def test_a_pipeline_without_a_known_denoiser(tmp_path):
    audio_ldm2(tmp_path)
    file = tmp_path / "model_index.json"
    file.write_text(file.read_text().replace('"unet": [', '"generator": ['))
    (tmp_path / "unet").rename(tmp_path / "generator")
    result = plan(tmp_path, "--preset", "w8a16")
    assert result.exit_code == 1
    assert "AudioLDM2Pipeline has no component that is known to be a denoiser (transformer, " in result.stderr
    assert "choose from its models with --component: generator, projection_model" in result.stderr
    assert len(lines(result.stderr)) == 1
    assert plan(tmp_path, "--preset", "w8a16", "--component", "generator").exit_code == 0


def test_a_recipe_for_a_pipeline():
    result = plan(PUBLISHED / "PixArt-Sigma-XL-2-1024-MS", "--recipe", "pixart-sigma-w8a8")
    assert result.exit_code == 0, result.output
    assert "transformer" in result.output
    assert "text_encoder" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "llama3-w8a8"), "a recipe for a LlamaForCausalLM, and this is a PixArtSigmaPipeline"),
        (("--component", "unet"), "a PixArtSigmaPipeline has no such model"),
        (("--dtype", "int4"), "not a floating-point dtype"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = plan(PUBLISHED / "PixArt-Sigma-XL-2-1024-MS", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(lines(result.stderr)) == 1


def test_what_is_skipped_may_be_in_one_component_or_an_experts_parameter():
    unet, text, experts = small_models.unet(), small_models.llama(), small_models.mixtral()
    found = SimpleNamespace(kind="APipeline", models={"unet": unet, "text": text, "experts": experts})
    skip = ["conv_in", "*.experts.gate_up_proj"]
    recipe = options.chosen_recipe(found, list(found.models), None, "w4a16", None, skip)
    check_fits(recipe, found)
    left = {name: list(component.skip) for name, component in recipe.components.items()}
    assert left == {"unet": ["conv_in"], "text": [], "experts": ["*.experts.gate_up_proj"]}
    with pytest.raises(ConfigError, match=r"--skip: 'conv_out' matches no module of LlamaForCausalLM"):
        options.chosen_recipe(found, ["text"], None, "w4a16", None, ["conv_out"])
