"""The template: every part renders to Markdown that states what is known and nothing else."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard

import hfquant
from hfquant.affiner import BlockwiseAffiner
from hfquant.calibration import BaseCalibSet
from hfquant.integrations import note_distillation
from hfquant.integrations.sharing.card import _count, content_of
from hfquant.integrations.sharing.facts import of_affiner, of_models, of_set
from hfquant.integrations.sharing.merge import sections
from hfquant.integrations.sharing.origin import Origin
from tests.integrations import small_models


@pytest.fixture(scope="module")
def content() -> str:
    model = small_models.dit()
    hfquant.quantize(model, None, "w8a8-dynamic")
    return content_of(of_models(model), "model", "org/name", Origin("base/model", {"license": "mit"}), None)


def test_metadata(content: str) -> None:
    assert ModelCard(content).data.to_dict() == {
        "library_name": "diffusers",
        "base_model": "base/model",
        "base_model_relation": "quantized",
        "license": "mit",
        "tags": ["hfquant", "8-bit", "w8a8-dynamic"],
    }


def test_sections(content: str) -> None:
    found = dict(sections(ModelCard(content).text.partition("<!--")[0]))
    # Nothing was measured and no data was needed, so neither has a section.
    assert list(found) == ["", "How to load", "Quantization", "Left in full precision", "Versions"]
    assert found[""].startswith("# name\n\n[base/model](https://huggingface.co/base/model), a diffusers model")
    code = re.findall(r"```python\n(.*?)```", found["How to load"], re.DOTALL)
    compile(code[0], "card", "exec")
    assert code[0].startswith("import hfquant")
    for package in ("hfquant", "torch", "diffusers"):
        assert importlib.metadata.version(package) in found["Versions"]


def test_every_table_is_one(content: str) -> None:
    """Each row has as many cells as its table's header, and a blank line precedes the table."""
    lines = content.splitlines()
    tables = [i for i, line in enumerate(lines) if re.fullmatch(r"\|( ?-+:? ?\|)+", line.strip())]
    assert len(tables) == 3
    for start in tables:
        cells = lines[start].count("|")
        assert lines[start - 2] == ""
        rows = [start - 1]
        while lines[rows[-1]].startswith("|"):
            assert lines[rows[-1]].strip().count("|") == cells
            rows.append(rows[-1] + 1)
        assert len(rows) > 3


def test_numbers_as_people_read_them() -> None:
    assert [_count(n) for n in (999, 1_500, 2_500_000, 7_000_000_000)] == ["999", "1.5 k", "2.5 M", "7.0 B"]


def test_what_the_guard_did_is_said() -> None:
    model = small_models.llama()
    hfquant.quantize(model, [small_models.transformers_inputs(model)], "w8a8-smooth")
    layers = model.quant_report.layers
    layers[2] = replace(layers[2], guard="error 0.9 (a static scale saturates): per-token input scales, error 0.01")
    text = content_of(of_models(model), "model", "org/name", Origin(None, {}), None)
    said = dict(sections(ModelCard(text).text.partition("<!--")[0]))["Measured while quantizing"]
    assert f"- `{layers[2].name}`: {layers[2].guard}" in said
    assert said.count("error 0.9") == 1


def test_data_that_the_model_made_are_called_so() -> None:
    model = small_models.llama()
    hfquant.quantize(model, {"source": "self", "samples": 2, "seqlen": 16, "seed": 3}, "w8a8-smooth")
    text = content_of(of_models(model), "model", "org/name", Origin(None, {}), None)
    said = dict(sections(ModelCard(text).text.partition("<!--")[0]))["Calibration data"]
    assert "Self-generated, without any dataset" in said
    assert "- seed: `3`" in said
    hfquant.quantize(fed := small_models.llama(), [small_models.transformers_inputs(fed)], "w8a8-smooth")
    text = content_of(of_models(fed), "model", "org/name", Origin(None, {}), None)
    assert "Self-generated" not in text


def test_distillation_is_described() -> None:
    model, teacher = small_models.llama(), small_models.llama()
    data = {"source": "self", "samples": 64, "seqlen": 64}
    hfquant.quantize(model, data, "w3a16-gptq")
    assert "Distilled" not in content_of(of_models(model), "model", "org/name", Origin(None, {}), None)
    found = hfquant.distill(model, teacher, data, steps=60, learning_rate=3e-3)
    assert found.kept
    text = content_of(of_models(model), "model", "org/name", Origin(None, {}), None)
    said = dict(sections(ModelCard(text).text.partition("<!--")[0]))
    assert "for 60 steps" in said["Distilled"]
    assert f"{found.before:.3g} before, {found.after:.3g} after" in said["Distilled"]
    assert "- samples: `64`" in said["Distilled"]
    assert "distilled" not in said["Calibration data"]


@pytest.mark.parametrize("make", [small_models.llama, small_models.dit, lambda: torch.nn.Linear(2, 2)])
def test_distillation_of_a_part_of_a_model_is_not_recorded(make: Callable[[], torch.nn.Module]) -> None:
    model = make()
    before = str(getattr(model, "config", None))
    note_distillation(model, {"steps": 1}, [])
    assert str(getattr(model, "config", None)) == before


def snippet(text: str) -> str:
    found = dict(sections(ModelCard(text).text.partition("<!--")[0]))
    (code,) = re.findall(r"```python\n(.*?)```", found["How to load"], re.DOTALL)
    return str(code)


@pytest.mark.parametrize("layer", ["", "model.layers.0"])
def test_the_snippet_of_a_calibration_set_runs(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_models.llama()
    part = model.get_submodule(layer)
    made = BaseCalibSet.from_samples([{"x": torch.ones(1)}])
    made.provenance = {"layer": layer, "model": {"class": "LlamaForCausalLM", "name": "me/llama", "weights": "0a"}}
    loaded: list[str] = []
    monkeypatch.setattr(type(model), "from_pretrained", lambda name: loaded.append(name) or model)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: "calibration")
    monkeypatch.setattr(hfquant, "load_calibrate_set", lambda folder: made)
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(hfquant, "quantize", lambda *args: calls.append(args))
    exec(snippet(content_of(of_set(made), "calibration set", "me/set", Origin(), None)), {})  # noqa: S102
    assert loaded == ["me/llama"]
    ((quantized, _, preset),) = calls
    assert quantized is part
    assert preset in hfquant.presets.PRESETS


def test_the_snippet_of_a_pipelines_calibration_set_takes_its_component() -> None:
    made = BaseCalibSet.from_samples([{"x": torch.ones(1)}])
    made.provenance = {"layer": "unet.mid_block", "model": {"class": "DDPMPipeline", "name": "me/ddpm", "weights": ""}}
    code = snippet(content_of(of_set(made), "calibration set", "me/set", Origin(), None))
    assert "from diffusers import DDPMPipeline\n" in code
    assert 'model = DDPMPipeline.from_pretrained("me/ddpm").unet.get_submodule("mid_block")' in code


@pytest.mark.parametrize("provenance", [{}, {"layer": "", "model": {"class": "Net", "name": "", "weights": ""}}])
def test_the_snippet_of_a_set_of_an_unknown_model_says_what_to_load(provenance: dict[str, object]) -> None:
    made = BaseCalibSet.from_samples([{"x": torch.ones(1)}])
    made.provenance = provenance
    code = snippet(content_of(of_set(made), "calibration set", "me/set", Origin(), None))
    compile(code, "card", "exec")
    assert re.search(r"^model = \.\.\.  # ", code, re.MULTILINE)


def test_the_snippet_of_an_affiner_has_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, attached = object(), []
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda name: pipe)
    affiner = SimpleNamespace(attach=attached.append)
    monkeypatch.setattr(BlockwiseAffiner, "from_pretrained", lambda name: affiner)
    trained = BlockwiseAffiner({"solver": {"blocksize": 2}})
    trained.observe(10.0, torch.ones(1, 2, 2), torch.ones(1, 2, 2))
    trained.solve(10.0)
    exec(snippet(content_of(of_affiner(trained), "affiner", "me/affiner", Origin(), None)), {})  # noqa: S102
    assert attached == [pipe]
