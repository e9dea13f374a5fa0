"""The command line on real folders: the digits pipeline, and a tiny Llama with a word-level tokenizer."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import typer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner, Result

import hfquant
from hfquant.calibration import BaseSampler, CalibSetError, NormalSampler, storage
from hfquant.cli import app
from hfquant.cli.errors import command
from hfquant.integrations.hub import load
from hfquant.integrations.skeleton import skeleton
from hfquant.nn.modules import quant_layers
from hfquant.remote_code import remote_code
from tests.cli.conftest import lines, make_llama
from tests.integrations.own_models import edit, own_model
from tests.integrations.test_pipelines import sd3


def calibrate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def of_digits(digits: Path, labels: Path, out: Path, *more: object) -> Result:
    return calibrate(
        *(digits, "--source", labels, "--out", out, "--column", "label", "--batch-size", 4, "--steps", 6), *more
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_pipeline_from_a_folder_to_a_quantized_denoiser(digits, labels, tmp_path) -> None:
    more = ("--guidance-scale", 2, "--timesteps", 4, "--chunk-size", 5, "--arg", "eta=0.5", "--arg", "output_type=pt")
    result = of_digits(digits, labels, tmp_path / "set", *more)
    assert result.exit_code == 0, result.output
    summary = " ".join(result.stdout.split())
    for said in ("layer transformer", "samples 12", "chunks 3", "size on disk", "hidden_states float32[8, 1, 8, 8]"):
        assert said in summary
    stored = hfquant.load_calibrate_set(tmp_path / "set")
    assert stored is not None
    assert len(stored) == 3 * 4
    assert stored.provenance["call"] == {
        "eta": 0.5,
        "guidance_scale": 2.0,
        "num_inference_steps": 6,
        "output_type": "pt",
    }
    assert stored.provenance["sampler"] == {"class": "UniformSampler", "seed": 0, "timesteps": 4}
    pipe = load(str(digits))
    hfquant.quantize(pipe.transformer, stored.get_dataloader(batch_size=2), "w8a8")
    assert quant_layers(pipe.transformer)


def test_the_same_set_as_from_the_library(digits, labels, tmp_path) -> None:
    arguments = ("--sampler", "normal", "--mean", 0.3, "--std", 0.2, "--timesteps", 3, "--seed", 7, "--samples", 8)
    layer = "transformer.transformer_blocks.1"
    result = of_digits(digits, labels, tmp_path / "set", *arguments, "--layer", layer, "--no-compress")
    assert result.exit_code == 0, result.output
    rows = {"dataset": str(labels), "column": "label", "samples": 8, "batch_size": 4, "seed": 7}
    sampler = NormalSampler(0.3, 3, std=0.2, seed=7)
    batches = hfquant.calibration.calibration_batches(rows)
    pipe = load(str(digits))
    hfquant.generate_calibrate_set(
        pipe, sampler, batches, layer, tmp_path / "ours", compress=False, num_inference_steps=6
    )
    assert contents(tmp_path / "set") == contents(tmp_path / "ours")


def test_a_language_model_records_its_tokens(llama, text, tmp_path) -> None:
    more = ("--samples", 6, "--seqlen", 8, "--batch-size", 2)
    result = calibrate(llama, "--source", text, "--out", tmp_path / "set", *more, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "the whole model" in result.stdout
    stored = hfquant.load_calibrate_set(tmp_path / "set")
    assert stored is not None
    assert [sample["input_ids"].shape for sample in stored] == [(2, 8)] * 3
    assert stored.provenance["sampler"]["class"] == "LanguageModelSampler"
    model = AutoModelForCausalLM.from_pretrained(llama)
    ids = stored[0]["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        after = hfquant.quantize(model, stored.get_dataloader(), "w8a8-smooth")(ids).logits
    assert len(quant_layers(model)) == 14
    assert 0 < (after - before).norm() < 0.1 * before.norm()

    of_layer = calibrate(llama, "--source", text, "--out", tmp_path / "mlp", *more, "--layer", "model.layers.1.mlp")
    assert of_layer.exit_code == 0, of_layer.output
    inputs = hfquant.load_calibrate_set(tmp_path / "mlp")
    assert inputs is not None
    assert inputs[0][0].shape == (2, 8, 32)


def test_several_columns_name_arguments(digits, labels, tmp_path) -> None:
    result = of_digits(digits, labels, tmp_path / "plain")
    assert result.exit_code == 0, result.output
    named = calibrate(
        *(digits, "--source", labels, "--out", tmp_path / "named", "--column", "class_labels=label"),
        *("--batch-size", 4, "--steps", 6),
    )
    assert named.exit_code == 0, named.output
    plain, by_name = (hfquant.load_calibrate_set(tmp_path / name) for name in ("plain", "named"))
    assert plain is not None
    assert by_name is not None
    assert torch.equal(plain[0]["hidden_states"], by_name[0]["hidden_states"])


def test_an_interrupted_set_is_continued(digits, labels, tmp_path, monkeypatch) -> None:
    def run(name: str) -> Result:
        return of_digits(digits, labels, tmp_path / name, "--chunk-size", 4, "--timesteps", 4)

    assert run("whole").exit_code == 0
    sample, calls = BaseSampler.sample, []

    def cut(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(BaseSampler, "sample", cut)
    assert run("cut").exit_code != 0
    assert hfquant.load_calibrate_set(tmp_path / "cut") is None
    held = storage.read_index(tmp_path / "cut")
    assert held is not None
    assert 0 < held.length < 12
    monkeypatch.setattr(BaseSampler, "sample", sample)
    again = run("cut")
    assert again.exit_code == 0, again.output
    assert f"has {held.length} samples: continuing from batch" in again.stderr
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert "complete with 12 samples: nothing to generate" in run("cut").stderr
    assert not logging.getLogger("hfquant").handlers


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "/no/such/model"}, "/no/such/model is not a folder"),
        ({"model": "{tmp}"}, "neither model_index.json nor config.json"),
        ({"model": "no/such"}, "no/such is neither a local folder nor in the cache, and offline mode is on"),
        ({"--source": "gone.json"}, "gone.json does not exist"),
        ({"--source": "{tmp}/odd.bin"}, "unknown kind of file"),
        ({"--column": "nope"}, r"has no column 'nope'; it has ['label']"),
        ({"--layer": "transformer.nope"}, "no layer 'transformer.nope'; did you mean"),
        ({"--samples": 0}, "calibration.samples"),
        ({"--chunk-size": 0}, "chunk_size must be a positive integer"),
        ({"--timesteps": 0}, "timesteps must be a positive integer"),
        ({"--dtype": "int8"}, "'int8' is not a floating-point dtype"),
        ({"--arg": "generator=1"}, "generator"),
        ({"--arg": "no_such=1"}, "unexpected keyword argument 'no_such'"),
        ({"--sampler": "language"}, "LanguageModelSampler runs a transformers model"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_1(change, said, digits, labels, tmp_path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"\0")
    arguments = {"model": digits, "--source": labels, "--out": tmp_path / "set", "--column": "label", "--steps": 2}
    arguments |= {key: str(value).replace("{tmp}", str(tmp_path)) for key, value in change.items()}
    model = arguments.pop("model")
    result = calibrate(model, *(item for pair in arguments.items() for item in pair))
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert said in line
    assert result.stderr.endswith(line + "\n")
    assert "Traceback" not in result.stderr


def test_a_missing_pipeline_class(digits, labels, tmp_path) -> None:
    index = json.loads((digits / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "OddPipeline"}))
    result = of_digits(tmp_path, labels, tmp_path / "set")
    assert result.exit_code == 1
    assert "is a OddPipeline, which diffusers" in result.stderr


def test_a_folder_of_other_files_is_left_alone(llama, text) -> None:
    before = contents(llama)
    result = calibrate(llama, "--source", text, "--out", llama)
    assert result.exit_code == 1
    assert "is not empty" in result.stderr
    assert len(lines(result.stderr)) == 1, "it says so before it loads the model"
    assert contents(llama) == before


def test_a_set_is_no_source(llama, text, tmp_path) -> None:
    assert calibrate(llama, "--source", text, "--out", tmp_path / "set", "--samples", 1, "--seqlen", 4).exit_code == 0
    result = calibrate(llama, "--source", tmp_path / "set", "--out", tmp_path / "again")
    assert result.exit_code == 1
    assert "--source: " in result.stderr
    assert "set is a calibration set, which `hfquant quantize` and `hfquant distill` read" in result.stderr
    assert len(lines(result.stderr)) == 1
    assert not (tmp_path / "again").exists()


def test_a_component_in_place_of_its_pipeline(tmp_path) -> None:
    sd3().save_pretrained(tmp_path / "pipe")
    alone = Path(shutil.copytree(tmp_path / "pipe" / "transformer", tmp_path / "alone"))
    for folder, said in (
        (tmp_path / "pipe" / "transformer", f"pass the folder of the pipeline, {tmp_path / 'pipe'}, and"),
        (alone, "pass the folder of the pipeline and"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{folder} is a SD3Transformer2DModel, one component")) as error:
            load(str(folder))
        assert said in str(error.value)
        assert f"--component {folder.name}" in str(error.value)
    (alone / "config.json").write_text("{")
    with pytest.raises((ValueError, OSError), match=r"config.json"):
        load(str(alone))


def test_another_set_is_not_overwritten(digits, labels, tmp_path) -> None:
    assert of_digits(digits, labels, tmp_path / "set").exit_code == 0
    before = contents(tmp_path / "set")
    for change, said in (("--seed", "holds another calibration set"), ("--samples", "was recorded from other data")):
        result = of_digits(digits, labels, tmp_path / "set", change, 1)
        assert result.exit_code == 1
        assert said in result.stderr
        assert contents(tmp_path / "set") == before


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_shows_the_traceback(how, digits, labels, tmp_path, monkeypatch) -> None:
    if how == "environment":
        monkeypatch.setenv("HFQUANT_DEBUG", "1")
    assert of_digits(digits, labels, tmp_path / "set").exit_code == 0
    more = ["--seed", 1, *(["--debug"] if how == "flag" else [])]
    assert isinstance(of_digits(digits, labels, tmp_path / "set", *more).exception, CalibSetError)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--sampler", "odd"], "'odd' is not one of"),
        (["--mean", 0.5], "the uniform sampler has no such option"),
        (["--arg", "eta"], "is not KEY=VALUE"),
        (["--column", "second"], "is not KEY=VALUE"),
        (["--no-such-option"], "No such option"),
        (["--device", "abacus"], "Invalid value for --device: 'abacus' cannot be used: "),
    ],
    ids=str,
)
def test_wrong_usage_is_exit_code_2(more, said, digits, labels, tmp_path) -> None:
    result = of_digits(digits, labels, tmp_path / "set", *more)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "set").exists()


def test_the_installed_command_helps_without_loading_torch() -> None:
    script = Path(sysconfig.get_path("scripts")) / "hfquant"
    found = subprocess.run([sys.executable, "-X", "importtime", script, "--help"], capture_output=True, text=True)
    assert found.returncode == 0
    assert "calibrate" in found.stdout
    assert "typer" in found.stderr
    assert not [line for line in found.stderr.splitlines() if line.rpartition("|")[2].strip() == "torch"]
    assert CliRunner().invoke(app, ["--version"]).stdout == f"{hfquant.__version__}\n"


def test_the_module_runs_as_a_program(llama, text, tmp_path) -> None:
    options = ["--source", str(text), "--out", str(tmp_path / "set"), "--samples", "2", "--seqlen", "4"]
    command = [sys.executable, "-m", "hfquant.cli", "calibrate", str(llama), *options]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "samples" in found.stdout
    assert len(hfquant.load_calibrate_set(tmp_path / "set")) == 2


def test_a_pipeline_and_a_model_make_their_own_data(digits, llama, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    result = calibrate(digits, "--source", "self", "--out", tmp_path / "runs", "--samples", 3, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert len(hfquant.load_calibrate_set(tmp_path / "runs")) == 6
    result = calibrate(llama, "--source", "self", "--out", tmp_path / "windows", "--samples", 2, "--seqlen", 9)
    assert result.exit_code == 0, result.output
    (sample,) = hfquant.load_calibrate_set(tmp_path / "windows")
    assert sample["input_ids"].shape == (2, 9)
    result = calibrate(digits, "--source", "self", "--out", tmp_path / "no", "--samples", 0)
    assert result.exit_code == 1
    assert "calibration.samples" in result.output
    result = calibrate(llama, "--source", "self", "--out", tmp_path / "no", "--column", "text")
    assert result.exit_code == 2
    assert "does not apply to --source self" in result.output


def test_a_file_that_cannot_be_read_is_not_called_missing(tmp_path, capsys) -> None:
    """safetensors calls every file missing that it fails to open."""
    file = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError) as found:
        safe_open(file, "pt")
    with pytest.raises(typer.Exit), command(debug=False):
        raise found.value
    assert capsys.readouterr().err == f"Error: No such file or directory: {file}\n"
    file.mkdir()  # instead of a file without permission: the tests may run as root, who may read any file
    with pytest.raises(typer.Exit), command(debug=False):
        raise found.value
    assert capsys.readouterr().err == f"Error: {file} cannot be read: Is a directory\n"


@pytest.mark.parametrize("architecture", ["OwnModel", "LlamaForCausalLM", None])
def test_the_class_that_comes_with_a_model(tmp_path, architecture) -> None:
    """If transformers has a class of that name as well, it is the one without permission, as in transformers."""
    own_model(make_llama(tmp_path))
    if architecture == "LlamaForCausalLM":
        with open(tmp_path / "own_model.py", "a", encoding="utf-8") as file:
            file.write("LlamaForCausalLM = OwnModel\n")
    auto_map = {"AutoModelForCausalLM": f"own_model.{architecture or 'OwnModel'}"}
    edit(tmp_path / "config.json", model_type="llama", architectures=architecture and [architecture], auto_map=auto_map)
    with remote_code(True):
        assert type(load(str(tmp_path))).__name__ == "OwnModel"
        assert type(skeleton(str(tmp_path)).models["model"]).__name__ == "OwnModel"
    for loaded in (load(str(tmp_path)), skeleton(str(tmp_path)).models["model"]):
        assert type(loaded) is LlamaForCausalLM
