"""Config files of the SegQuant reference implementation become recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hfquant import recipes
from hfquant.config import ConfigError
from hfquant.recipes import segquant

SECTIONS = {"calib": {"type": "gptq"}, "input_quant": {"type": "int8"}, "weight_quant": {"type": "int4", "axis": 1}}
EXPERIMENTS = {
    "smooth": {
        "default": {
            "enable": True,
            "seglinear": True,
            "search_patterns": ["linear_to_chunk", "activation_to_linear"],
            "real_quant": True,
            "opt": {
                "type": "smooth",
                "alpha": 0.5,
                "search_alpha_config": {"enable": True, "min": 0.0, "max": 1.0, "step": 0.1, "alpha": 0.5},
                "verbose": True,
            },
            **SECTIONS,
        },
        "*.attn.*": {"enable": False},
    },
    "low-rank": {
        "default": {
            "opt": {"type": "svd", "low_rank": 64, "precision": "float32"},
            **SECTIONS,
            "calib": {"type": "gptq", "cpu_storage": True},
            "input_quant": {"type": "int8", "axis": -1},
            "affine": "tac",
        }
    },
    "rotated": {
        "default": {
            "opt": {
                "type": "givens",
                "sub_optimizer_type": "smooth",
                "sub_optimizer_kwargs": {"alpha": 0.4, "verbose": True},
                "givens_num": 100,
            },
            **SECTIONS,
        }
    },
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config" / "flux" / "dit" / "intw4a8.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(EXPERIMENTS))
    return path


def test_family_is_that_of_the_folders(file):
    assert segquant.family_of(file) == "flux"
    assert segquant.family_of(Path("/somewhere/else.yaml")) is None


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("family", segquant.FAMILIES)
def test_each_experiment_is_a_recipe(file, name, family, tmp_path):
    made = segquant.convert(name, segquant.experiments(file)[name], family)
    (tmp_path / "made.yaml").write_text(made.text())
    recipe = recipes.load(tmp_path / "made.yaml")
    assert recipe.loads == segquant.FAMILIES[family][1]
    assert list(recipe.components) == [segquant.FAMILIES[family][2]]


def test_the_config_is_carried_over(file):
    found = segquant.experiments(file)
    made = recipes.parsed(segquant.convert("smooth", found["smooth"], "sd3").recipe)
    rules = made.components["transformer"].rules()
    assert [p.value for p in rules.default.search_patterns] == ["linear2chunk", "activation2linear"]
    assert rules.default.opt.search_alpha_config.step == 0.1
    assert rules.default.calib.type == "gptq"
    assert not rules.resolve("blocks.0.attn.to_q").enable


def test_what_is_lost_is_named(file):
    found = segquant.experiments(file)
    lost = {name: "\n".join(segquant.convert(name, found[name], "flux").left) for name in found}
    assert "default.opt.verbose=True" in lost["smooth"]
    assert "search_alpha_config.alpha" in lost["smooth"]
    assert "default.opt.precision='float32'" in lost["low-rank"]
    assert "default.calib.cpu_storage=True" in lost["low-rank"]
    assert "axis=-1 without dynamic" in lost["low-rank"]
    assert "Givens rotations" in lost["rotated"]
    assert all("COCO" in lines for lines in lost.values())


def test_an_affiner_and_a_replaced_rotation(file):
    found = segquant.experiments(file)
    low_rank = recipes.parsed(segquant.convert("low-rank", found["low-rank"], "flux").recipe)
    assert low_rank.affiner_config().type == "tac"
    rotated = recipes.parsed(segquant.convert("rotated", found["rotated"], "flux").recipe)
    assert rotated.components["transformer"].rules().default.opt.alpha == 0.4


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "models: {sd3: {repo_id: x}}"])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x.yaml"):
        segquant.experiments(tmp_path / "x.yaml")


def test_unknown_family_and_bad_config(file):
    with pytest.raises(ConfigError, match="unknown model 'wan'; the reference has sd3, flux, sdxl"):
        segquant.convert("smooth", EXPERIMENTS["smooth"], "wan")
    with pytest.raises(ConfigError, match="int9"):
        segquant.convert("odd", {"default": {"weight_quant": {"type": "int9"}}}, "sd3")
