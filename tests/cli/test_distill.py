"""`hfquant distill` on a language model and on a pipeline's denoiser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import hfquant
from hfquant.cli import app
from hfquant.nn.modules import quant_layers
from tests.cli.conftest import lines


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def quantized(model: Path, out: Path, *more: object) -> Path:
    result = run("quantize", model, "--preset", "w3a16-gptq", "--out", out, *more)
    assert result.exit_code == 0, result.output
    return out


def test_a_language_model_on_a_text(llama, text, tmp_path):
    data = ("--calibration", text, "--samples", 24, "--seqlen", 8)
    student = quantized(llama, tmp_path / "student", *data)
    result = run("distill", student, llama, "--out", tmp_path / "out", *data, "--steps", 60, "--learning-rate", 1e-2)
    assert result.exit_code == 0, result.output
    assert re.search(r"kept +yes", result.output)
    assert re.search(r"distilling: 60 steps on 18 samples, 6 held out, about \d+ s", result.output)
    before, after = (load_file(folder / "model.safetensors") for folder in (student, tmp_path / "out"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.norm.weight" in moved
    assert not any(name.endswith("proj.weight") for name in moved)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(quant_layers(model)) == 14
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").exists()


def test_figures_are_those_of_the_function(llama, text, tmp_path):
    data = ("--calibration", text, "--samples", 8, "--seqlen", 8)
    student, more = quantized(llama, tmp_path / "student", *data), ("--seed", 5, "--rounding-steps", 4)
    result = run("distill", student, llama, "--out", tmp_path / "out", *data, "--steps", 3, *more, "--json")
    assert result.exit_code == 0, result.output
    model, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (student, llama))
    spec = {"dataset": str(text), "samples": 8, "seqlen": 8, "seed": 5}
    found = hfquant.distill(model, teacher, spec, steps=3, seed=5, rounding_steps=4)
    said = json.loads(result.stdout)
    assert (said["before"], said["after"], said["kept"]) == (found.before, found.after, found.kept)


def test_the_rounding_alone(llama, text, tmp_path):
    data = ("--calibration", text, "--samples", 8, "--seqlen", 8)
    student = quantized(llama, tmp_path / "student", *data)
    nothing = run("distill", student, llama, "--out", tmp_path / "out", *data, "--steps", 0)
    assert nothing.exit_code == 2
    assert "with 0 steps, --rounding-steps must say how many" in " ".join(nothing.stderr.replace("│", " ").split())
    result = run("distill", student, llama, "--out", tmp_path / "out", *data, "--steps", 0, "--rounding-steps", 4)
    assert result.exit_code == 0, result.output
    before, after = (load_file(folder / "model.safetensors") for folder in (student, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith("proj.weight"))


def test_a_pipeline_on_a_calibration_set(digits, labels, tmp_path):
    calls = ("--steps", 4, "--timesteps", 4)
    made = run("calibrate", digits, "--source", labels, "--column", "label", "--out", tmp_path / "set", *calls)
    assert made.exit_code == 0, made.output
    student = tmp_path / "student"
    result = run("quantize", digits, "--preset", "w4a16", "--out", student)
    assert result.exit_code == 0, result.output
    (student / "affiner").mkdir()
    more = ("--calibration", tmp_path / "set", "--steps", 40, "--learning-rate", 2e-3, "--json")
    result = run("distill", student, digits, "--out", tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    assert "affiner: not copied, because it corrects the model before distillation" in result.stderr
    assert "for 40 steps" in (tmp_path / "out" / "README.md").read_text()
    said = json.loads(result.stdout)
    assert said["kept"]
    assert said["after"] < 0.9 * said["before"]


def test_the_first_samples_of_a_calibration_set(llama, text, tmp_path):
    made = run("calibrate", llama, "--source", text, "--out", tmp_path / "set", "--samples", 12, "--seqlen", 8)
    assert made.exit_code == 0, made.output
    student = quantized(llama, tmp_path / "student", "--calibration", text, "--samples", 4, "--seqlen", 8)
    data = ("--calibration", tmp_path / "set", "--steps", 2)
    result = run("distill", student, llama, "--out", tmp_path / "out", *data, "--samples", 8)
    assert result.exit_code == 0, result.output
    assert "2 steps on 6 samples, 2 held out" in result.output
    result = run("distill", student, llama, "--out", tmp_path / "no", *data, "--seqlen", 4, "--column", "text")
    assert result.exit_code == 1
    assert "is a calibration set, ready to use, so 'column' and 'seqlen' cannot apply" in result.stderr
    assert len(lines(result.stderr)) == 1


def test_bad_input_is_one_line(digits, llama, text, tmp_path):
    student = quantized(llama, tmp_path / "student", "--calibration", text, "--samples", 4, "--seqlen", 8)
    pipeline, recorded = tmp_path / "pipeline", tmp_path / "set"
    hfquant.generate_calibrate_set(
        torch.nn.Linear(4, 4), hfquant.LanguageModelSampler(), [torch.ones(1, 4)], "", recorded
    )
    assert run("quantize", digits, "--preset", "w4a16", "--out", pipeline).exit_code == 0
    for arguments, message in (
        ((llama, llama), "has no quantized layer"),
        ((student, student), "is quantized; pass the float model"),
        ((student, digits), "one is a pipeline, the other is not"),
        ((pipeline, digits), "a pipeline needs a calibration set"),
        ((pipeline, digits, "--calibration", text), "a pipeline needs a calibration set"),
        ((pipeline, digits, "--calibration", recorded, "--component", "unet"), "--component unet"),
        ((student, llama, "--calibration", tmp_path / "none.txt"), "none.txt"),
    ):
        result = run("distill", *arguments, "--out", tmp_path / "out")
        assert result.exit_code == 1, result.output
        assert message in result.stderr
        assert len(lines(result.stderr)) == 1
        assert not (tmp_path / "out").exists()
