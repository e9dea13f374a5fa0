"""The bundled recipes: each is valid, fits the published configs, and runs on a model of its class."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import hfquant
from hfquant import recipes
from hfquant.config import ConfigError
from hfquant.integrations.examples import example_inputs
from hfquant.integrations.skeleton import skeleton
from hfquant.nn.modules import quant_layers
from hfquant.recipes.run import check_fits, planned
from hfquant.recipes.schema import Recipe
from tests.recipes.tiny import PUBLISHED, tiny_model

NAMES = recipes.names()
#: One target of each family always runs; the others are slow tests.
ONE_EACH = {name.rpartition("-")[0]: name for name in sorted(NAMES, key=lambda n: ("w4a8" in n, "w4a16" in n))}


def folder(recipe: Recipe) -> str:
    return str(PUBLISHED / recipe.models[0].rpartition("/")[2])


def by_family() -> list[object]:
    """Return all names, with all but one per family marked slow."""
    return [n if n in ONE_EACH.values() else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]


def random_like(value: object) -> object:
    """Return inputs of the same shapes with other numbers."""
    if isinstance(value, Tensor):
        return torch.randn(value.shape) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: random_like(item) for key, item in value.items()}
    return type(value)(map(random_like, value)) if isinstance(value, (list, tuple)) else value


def test_there_is_a_recipe_for_every_family():
    assert len(ONE_EACH) >= 21
    for target in ("w8a8", "w4a8", "w4a16", "fp8"):
        assert any(name.endswith(f"-{target}") for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_valid_and_says_what_comes_of_it(name):
    recipe = recipes.load(name)
    assert all(part.expected is not None for part in recipe.components.values())
    assert recipe.affiner is None or recipe.is_pipeline


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_each_fits_the_published_configs(name, skeletons):
    recipe = recipes.load(name)
    check_fits(recipe, skeletons(folder(recipe)))


@pytest.fixture(scope="module")
def skeletons():
    known = {}
    return lambda path: known.setdefault(path, None) or known.update({path: skeleton(path)}) or known[path]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_size_and_share_are_as_it_says(name, skeletons):
    recipe = recipes.load(name)
    for component, sizes in planned(recipe, skeletons(folder(recipe))).items():
        expected = recipe.components[component].expected
        assert sizes.share == pytest.approx(expected.share, abs=0.005)
        assert sizes.after == pytest.approx(expected.size, rel=0.01)


def test_size_and_share_of_one(skeletons):
    recipe = recipes.load("pixart-sigma-w4a8")
    sizes = planned(recipe, skeletons(folder(recipe)))["transformer"]
    expected = recipe.components["transformer"].expected
    assert sizes.share == pytest.approx(expected.share, abs=0.005)
    assert sizes.after == pytest.approx(expected.size, rel=0.01)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", by_family())
def test_each_runs_on_a_small_model_of_its_class(name, tmp_path):
    recipe = recipes.load(name)
    for component, part in recipe.components.items():
        model = tiny_model(recipe.models[0], component)
        inputs = random_like(example_inputs(model))
        config = part.quant_config()
        hfquant.quantize(model, [inputs] if config.needs_data else None, config)
        layers = quant_layers(model)
        assert layers
        assert not [layer for layer in layers if any(layer == glob for glob in part.skip)]
        outputs = [_tensor(model(**inputs)), _reloaded(model, inputs, tmp_path / component)]
        assert outputs[0].isfinite().all()
        assert outputs[0].equal(outputs[1])


def _reloaded(model: nn.Module, inputs: dict[str, Tensor], path) -> Tensor:
    model.save_pretrained(path)
    return _tensor(type(model).from_pretrained(path).eval()(**inputs))


def _tensor(output: object) -> Tensor:
    """Return the first floating-point tensor of an output."""
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (list, tuple)) else [output]
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if isinstance(value, (list, tuple)) or hasattr(value, "values"):
            return _tensor(value)
    raise AssertionError("no tensor")


def test_the_schema_for_editors_is_that_of_the_code():
    stored = json.loads((recipes.folder() / "recipe.schema.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(Recipe.model_json_schema()))


class TestBadRecipes:
    def test_unknown_name(self):
        with pytest.raises(ConfigError, match=r"unknown recipe 'flux1-w4'; did you mean .*flux1-w4a"):
            recipes.load("flux1-w4")
        with pytest.raises(ConfigError, match="unknown recipe 'zzz'; available:"):
            recipes.load("zzz")

    def test_not_a_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            recipes.load(tmp_path / "none.yaml")

    @pytest.mark.parametrize("text", ["a: [", "\x00", "- 1", "", "title: x: y"])
    def test_no_recipe(self, text, tmp_path):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"r.yaml"):
            recipes.load(tmp_path / "r.yaml")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"titel": "x"}, "titel: unknown key; allowed are title, models, loads"),
            ({"models": []}, "models: "),
            ({"loads": 3}, r"loads: .*got 3"),
            ({"components": {}}, "components: "),
            ({"components": {"model": {}}}, "components.model.config: is missing"),
            (
                {"components": {"model": {"config": "w8a16", "expected": {"bytes": 9, "size": "9 MB", "share": 0.5}}}},
                "components.model.expected.bytes: unknown key; allowed are size, share",
            ),
            ({"components": {"text": {"config": "w8a16"}}}, 'its only component is "model"'),
            ({"components": {"model": {"config": "w8a9"}}}, "unknown preset 'w8a9' .did you mean"),
            ({"components": {"model": {"config": {"default": {"bits": 3}}}}}, "bits: unknown key"),
            ({"components": {"model": {"config": "w8a16", "expected": {"size": "9", "share": 0.5}}}}, "such as"),
            ({"calibration": {"data": {"colum": "x", "dataset": "y"}}}, "calibration.colum: unknown key"),
            (
                {"calibration": {"data": {"dataset": "y"}, "sampler": {"type": "uniform", "mean": 0.3}}},
                "normal sampler",
            ),
            ({"affiner": {"type": "blockwise"}}, "not a diffusion pipeline"),
            (
                {"loads": "FluxPipeline", "calibration": {"call": {"height": 8}}, "affiner": {"type": "blockwise"}},
                "affiner: fitting one needs calibration data",
            ),
        ],
    )
    def test_each_fault_is_named(self, change, message):
        good = {
            "title": "t",
            "models": ["m"],
            "loads": "LlamaForCausalLM",
            "components": {"model": {"config": "w8a16"}},
        }
        recipes.parsed(good)
        with pytest.raises(ConfigError, match=message):
            recipes.parsed({**good, **change})


class TestFit:
    def test_another_class(self, skeletons):
        found = skeletons(str(PUBLISHED / "Qwen3-8B"))
        with pytest.raises(ConfigError, match="for a LlamaForCausalLM, and this is a Qwen3ForCausalLM"):
            check_fits(recipes.load("llama3-w8a8"), found)

    def test_a_glob_that_matches_nothing(self, skeletons):
        found = skeletons(str(PUBLISHED / "Qwen3-8B"))
        content = recipes.load("qwen3-w8a8").model_dump(exclude_unset=True)
        content["components"]["model"].pop("expected")
        content["components"]["model"]["skip"] = {"model.layers.*.mlp.up": "no such layer"}
        with pytest.raises(ConfigError, match=r"'model.layers.\*.mlp.up' matches no module of Qwen3ForCausalLM"):
            check_fits(recipes.parsed(content), found)

    def test_a_component_that_is_not_there(self, skeletons):
        found = skeletons(str(PUBLISHED / "PixArt-Sigma-XL-2-1024-MS"))
        content = recipes.load("pixart-sigma-w8a8").model_dump(exclude_unset=True)
        content["components"] = {"unet": {"config": "w8a16"}}
        with pytest.raises(ConfigError, match=r"components.unet: a PixArtSigmaPipeline has no such model"):
            check_fits(recipes.parsed(content), found)
