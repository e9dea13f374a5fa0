"""The ablation's configs: each differs from the preset, or from the bare config, in exactly one option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from benchmarks import metrics, models, options
from hfquant.config import parse
from tests.integrations import small_models


def changed(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    """Return the paths of the fields that differ."""
    found = set()
    for key in a.keys() | b.keys():
        of_a, of_b = a.get(key), b.get(key)
        if isinstance(of_a, dict) and isinstance(of_b, dict):
            found |= {f"{key}.{inner}" for inner in changed(of_a, of_b)}
        elif of_a != of_b:
            found.add(key)
    return found


@pytest.mark.parametrize("config", options.CONFIGS)
def test_rows_are_apart_by_one_option(config: str) -> None:
    rows = {name: whole["default"] for name, whole in options.configs(config).items()}
    names = options.options(config)
    assert len(rows) == (2 * len(names) + 2 if names else 1)
    for row in rows.values():
        parse({"default": row})
    assert rows[options.WHOLE] == options.CONFIGS[config]
    for name in names:
        off, alone = changed(rows[options.WHOLE], rows[f"without {name}"]), changed(rows["bare"], rows[f"only {name}"])
        assert off
        assert alone
        assert off & alone or {p.partition(".")[0] for p in off} == {p.partition(".")[0] for p in alone}


def test_the_bare_config_rounds_to_nearest_with_nothing_on() -> None:
    bare = options.configs("w4a4-gptq")["bare"]["default"]
    assert bare["opt"] == {"type": "default"}
    assert bare["calib"] == {"type": "amax"}
    assert bare["weight_quant"]["symmetric"]
    assert bare["weight_quant"]["group_size"] == 64
    assert bare["input_quant"]["segments"] == 1
    assert options.options("w4a16") == ["groups of 32, not 64", "zero points", "clipping", "INT8 ends"]


def test_the_page_has_scores_beside_each_other() -> None:
    rows = {
        "smollm2: w8a8-dynamic: whole": {"KL": 0.5, "KL error": 0.25},
        "smollm2: w8a8-dynamic: bare": {"KL": 1.0, "KL error": 0.125},
        "smollm2: w8a8-dynamic: only rotation": {"KL": 0.75, "KL error": 0.0625},
        "minilm: w8a8-dynamic: without rotation": {"mean cosine": 0.875},
    }
    page = options.markdown(rows)
    assert "| smollm2: only it | smollm2: all but it | minilm: only it | minilm: all but it |" in page
    assert "| nothing; everything | 1.0000 ± 0.1250 | 0.5000 ± 0.2500 |  |  |" in page
    assert "| rotation | 0.7500 ± 0.0625 |  |  | 0.8750 |" in page


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """A stand-in for SmolLM2, evaluated on one window."""
    model = small_models.llama_of_64()
    ids = small_models.transformers_inputs(model)["input_ids"]
    monkeypatch.setattr(models, "smollm2", lambda *_: (model, None))
    monkeypatch.setattr(models, "token_batches", lambda *_, count: [{"input_ids": ids}] * count)
    monkeypatch.setattr(metrics, "evaluation_windows", lambda *_, **__: [ids[:1]])
    return model


def test_rows_are_added_to_a_file(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    run = ["--models", "smollm2", "--samples", "1", "--json", str(file), "--configs"]
    assert options.main([*run, "fp8-dynamic"]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert rows.keys() == {f"smollm2: fp8-dynamic: {row}" for row in options.configs("fp8-dynamic")}
    assert all(scores["KL"] > 0 for scores in rows.values())
    assert options.main([*run, "fp8-dynamic", "w8a16"]) == 0
    after = json.loads(file.read_text())["rows"]
    assert rows.items() < after.items()
    assert options.markdown(after) == file.with_suffix(".md").read_text()
