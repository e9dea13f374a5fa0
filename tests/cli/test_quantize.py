"""`hfquant quantize` on real folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import hfquant
from hfquant.calibration import LanguageModelSampler
from hfquant.cli import app
from hfquant.cli.output import staged
from hfquant.demo.pipeline import DigitsPipeline
from hfquant.integrations.data import transformers_batches
from hfquant.nn.modules import quant_layers
from tests.cli.conftest import lines, make_llama
from tests.integrations.own_models import own_model, own_pipeline, own_tokenizer


def quantize(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def test_a_model_without_data(llama, tmp_path):
    result = quantize(llama, "--preset", "w4a16", "--out", tmp_path / "q")
    assert result.exit_code == 0, result.output
    assert "bits per weight" in result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert len(quant_layers(model)) == 14
    assert (tmp_path / "q" / "tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


def test_a_model_with_data_and_layers_left_out(llama, text, tmp_path):
    more = ("--samples", 4, "--seqlen", 8, "--skip", "model.layers.0.*", "--json")
    result = quantize(llama, "--preset", "w4a16-gptq", "--calibration", text, "--out", tmp_path / "q", *more)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout[result.stdout.index("{") :])
    assert summary["layers"] == 7
    assert summary["bytes"] < summary["bytes in full precision"]
    layers = json.loads((tmp_path / "q" / "quant_report.json").read_text())["layers"]
    assert all(layer["error"] is not None for layer in layers)


def test_bits_are_chosen_under_a_budget(llama, text, tmp_path):
    more = ("--samples", 4, "--seqlen", 8, "--bits", 8.5, "--json")
    result = quantize(llama, "--preset", "w4a16", "--calibration", text, "--out", tmp_path / "q", *more)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout[result.stdout.index("{") :])
    assert summary["bits per weight"]["model"] <= 8.5
    layers = quant_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "q")).values()
    assert len({layer.plan.config.weight_quant.type for layer in layers}) > 1


def test_a_pipeline(digits, labels, tmp_path):
    more = ("--column", "label", "--samples", 4, "--arg", "num_inference_steps=3")
    result = quantize(digits, "--preset", "w8a8", "--calibration", labels, "--out", tmp_path / "q", *more)
    assert result.exit_code == 0, result.output
    pipe = DigitsPipeline.from_pretrained(tmp_path / "q")
    assert len(quant_layers(pipe.transformer)) == 19
    assert pipe([1], num_inference_steps=2, output_type="np").images.shape[0] == 1


def test_a_pipeline_makes_its_own_data_in_the_calls_asked_for(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    result = quantize(digits, "--preset", "w8a8", "--arg", "num_inference_steps=3", "--out", tmp_path / "q")
    assert result.exit_code == 0, result.output
    assert "8 runs of 3 steps" in result.stderr
    pipe = DigitsPipeline.from_pretrained(tmp_path / "q")
    assert all(layer.plan.static_input for layer in quant_layers(pipe.transformer).values())


def test_a_recorded_set(digits, llama, text, labels, tmp_path):
    spec, path = {"dataset": str(text), "samples": 4, "seqlen": 8}, tmp_path / "set"
    model = AutoModelForCausalLM.from_pretrained(llama)
    hfquant.generate_calibrate_set(model, LanguageModelSampler(), transformers_batches(model, spec), "", path)
    result = quantize(llama, "--preset", "w8a8", "--calibration", path, "--out", tmp_path / "q")
    assert result.exit_code == 0, result.output
    found = quant_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "q"))
    expected = quant_layers(hfquant.quantize(model, spec, "w8a8"))
    assert all(torch.equal(layer.input_scale, found[name].input_scale) for name, layer in expected.items())
    result = quantize(llama, "--preset", "w8a8", "--calibration", path, "--samples", 1, "--out", tmp_path / "first")
    assert result.exit_code == 0, result.output
    found = quant_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "first"))
    model = AutoModelForCausalLM.from_pretrained(llama)
    first = [hfquant.load_calibrate_set(path)[0]]
    alone = quant_layers(hfquant.quantize(model, first, "w8a8"))
    assert all(torch.equal(layer.input_scale, found[name].input_scale) for name, layer in alone.items())
    assert not all(torch.equal(layer.input_scale, found[name].input_scale) for name, layer in expected.items())
    result = quantize(digits, "--preset", "w8a8", "--calibration", path, "--out", tmp_path / "pipe")
    assert result.exit_code == 1
    assert "is a calibration set" in result.stderr
    assert len(lines(result.stderr)) == 1


def test_a_recipe_with_an_affiner(digits, labels, tmp_path):
    recipe = tmp_path / "digits.yaml"
    recipe.write_text(
        f"""
title: digits
models: [digits]
loads: DigitsPipeline
components:
  transformer: {{config: w4a16, skip: {{proj_out_2: the way out}}}}
calibration:
  data: {{dataset: {labels}, column: label, samples: 4}}
  call: {{num_inference_steps: 3}}
affiner: {{stepper: {{sample_size: 4}}, solver: {{blocksize: null}}}}
"""
    )
    result = quantize(digits, "--recipe", recipe, "--out", tmp_path / "q")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "q" / "affiner" / "affiner.safetensors").is_file()
    tensors = load_file(tmp_path / "q" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert tensors["proj_out_2.weight"].dtype == torch.float32


def test_a_config_from_a_file(llama, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"default": {"input_quant": None}}), encoding="utf-8-sig")
    result = quantize(
        llama, "--config", tmp_path / "config.json", "--out", tmp_path / "q", "--skip", "model.layers.1.*"
    )
    assert result.exit_code == 0, result.output
    (tmp_path / "config.json").write_text('"w4a16"')
    result = CliRunner().invoke(app, ["plan", str(llama), "--config", str(tmp_path / "config.json")])
    assert result.exit_code == 0, result.output
    assert "14 x int4" in result.output


def test_a_failed_push_says_where_the_result_is(llama, tmp_path, monkeypatch):
    def refused(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no route")

    monkeypatch.setattr("hfquant.integrations.sharing.push_to_hub", refused)
    result = quantize(llama, "--preset", "w4a16", "--out", tmp_path / "q", "--push", "me/llm", "--private")
    assert result.exit_code == 1
    said = f"--push: no route. The result is saved in {tmp_path / 'q'}: to push it later, load it from there"
    assert f"{said} and call hfquant.push_to_hub(model, 'me/llm', private=True)" in lines(result.stderr)[-1]
    assert len(quant_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "q"))) == 14


def test_the_card_names_the_folder(llama, tmp_path):
    result = quantize(llama, "--preset", "w4a16", "--out", tmp_path / "q")
    assert result.exit_code == 0, result.output
    assert '.from_pretrained("q")' in (tmp_path / "q" / "README.md").read_text()


@pytest.mark.parametrize("name", ["folder", "link", ".", "link to nowhere"])
def test_an_empty_folder_is_filled(name, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "link to nowhere").symlink_to(tmp_path / "new")
    monkeypatch.chdir(folder if name == "." else tmp_path)
    before = folder.stat()
    with staged(Path(name)) as place:
        assert place.name == ("new" if name == "link to nowhere" else "folder")
        (place / "part").mkdir()
        (place / "part" / "file").write_text("content")
    assert (Path(name) / "part" / "file").read_text() == "content"
    assert (folder.stat().st_ino, folder.stat().st_mode) == (before.st_ino, before.st_mode)
    assert {path.name for path in tmp_path.iterdir()} <= {"folder", "link", "link to nowhere", "new"}


def test_a_model_with_code_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asks whether to run the code"))
    source = own_model(make_llama(tmp_path / "llama"))
    result = quantize(source, "--preset", "w4a16", "--out", tmp_path / "q")
    assert result.exit_code == 1
    assert f"Error: {source} has code of its own" in result.stderr
    assert "--trust-remote-code" in result.stderr
    assert len(lines(result.stderr)) == 1
    result = quantize(source, "--preset", "w4a16", "--trust-remote-code", "--out", tmp_path / "q")
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert len(quant_layers(model)) == 14
    card = (tmp_path / "q" / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("q", trust_remote_code=True)' in card
    # A copy of its code is in the folder.
    shutil.rmtree(source)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "q", trust_remote_code=True).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


def test_a_tokenizer_with_code_of_its_own(tmp_path, text):
    source = own_tokenizer(make_llama(tmp_path / "llama"))
    data = ("--preset", "w8a8", "--calibration", text, "--samples", 2, "--seqlen", 8)
    result = quantize(source, *data, "--out", tmp_path / "q")
    assert result.exit_code == 1
    assert "text needs a tokenizer" in result.stderr
    result = quantize(source, *data, "--trust-remote-code", "--out", tmp_path / "q")
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "q", trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizer"


def test_a_pipeline_with_code_of_its_own(tmp_path):
    (tmp_path / "pipe").mkdir()
    source = own_pipeline(tmp_path / "pipe")
    result = quantize(source, "--out", tmp_path / "q")
    assert result.exit_code == 1
    assert "--trust-remote-code" in result.stderr
    assert len(lines(result.stderr)) == 1
    result = quantize(source, "--trust-remote-code", "--out", tmp_path / "q")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "q" / "own_pipeline.py").is_file()
    assert (tmp_path / "q" / "transformer" / "own_denoiser.py").is_file()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "q", trust_remote_code=True)
    assert type(pipe).__name__ == "OwnPipeline"
    assert len(quant_layers(pipe.transformer)) == 2
    assert torch.isfinite(pipe()).all()


class TestBadInput:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", "config.json is not valid JSON: Expecting property name"),
            (b"\xff\xfe{}", "config.json is not valid JSON: 'utf-8' codec can't decode"),
            (b"[1]", 'config.json must hold a JSON object, such as {"default": ...}, or a preset\'s name in quotes, '),
        ],
    )
    def test_a_config_file(self, llama, content, message, tmp_path):
        (tmp_path / "config.json").write_bytes(content)
        result = quantize(llama, "--config", tmp_path / "config.json", "--out", tmp_path / "q")
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(lines(result.stderr)) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--private",), "for --private: is for the repository of --push, which is missing"),
            (("--arg", "height=8"), "for --arg: is for pipelines, and this is a LlamaForCausalLM"),
            (("--device", "abacus"), "for --device: 'abacus' cannot be used: "),
        ],
    )
    def test_options_that_do_not_apply(self, llama, arguments, message, tmp_path):
        result = quantize(llama, "--out", tmp_path / "q", *arguments)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.stderr.replace("│", " ").split())
        assert list(tmp_path.iterdir()) == []

    def test_a_device_that_this_machine_lacks(self, llama, tmp_path, monkeypatch):
        def refused(*args: object, **kwargs: object) -> None:
            raise AssertionError("Torch not compiled with CUDA enabled")  # as torch says it

        monkeypatch.setattr(torch, "empty", refused)
        out = ("--out", str(tmp_path / "q"))
        for words in (
            ("quantize", "m", *out), ("calibrate", "m", "--source", "t", *out), ("compare", "m", "m"),
            ("distill", "m", "m", *out), ("report", "m"), ("kernels",),
        ):  # fmt: skip
            result = CliRunner().invoke(app, [*words, "--device", "cuda"])
            assert result.exit_code == 2, words
            said = " ".join(result.stderr.replace("│", " ").split())
            assert "for --device: 'cuda' cannot be used: Torch not compiled with CUDA enabled" in said

    def test_settings_that_a_recorded_set_cannot_have(self, llama, text, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(llama)
        batches = transformers_batches(model, {"dataset": str(text), "samples": 4, "seqlen": 8})
        hfquant.generate_calibrate_set(model, LanguageModelSampler(), batches, "", tmp_path / "set")
        for option, value in (("seqlen", 4), ("column", "text"), ("name", "a"), ("split", "train"), ("seed", 1)):
            arguments = ("--calibration", tmp_path / "set", f"--{option}", value)
            result = quantize(llama, "--preset", "w8a8", *arguments, "--out", tmp_path / "q")
            assert result.exit_code == 1
            assert f"set is a calibration set, ready to use, so '{option}' cannot apply to it" in result.stderr
            assert len(lines(result.stderr)) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--preset", "w4a17"), "unknown preset 'w4a17' (did you mean"),
            (("--recipe", "flux1-w4"), "unknown recipe 'flux1-w4'; did you mean"),
            (("--recipe", "flux1-w4a8"), "a recipe for a FluxPipeline, and this is a LlamaForCausalLM"),
            (("--recipe", "x", "--preset", "w4a16"), "exclude each other"),
            (("--config", "none.json"), "none.json"),
            (("--skip", "model.layer.*"), "'model.layer.*' matches no module of LlamaForCausalLM"),
            (("--component", "unet"), 'its only component is "model"'),
            (("--preset", "w8a8", "--calibration", "none.parquet"), "none.parquet"),
            (("--dtype", "int8"), "not a floating-point dtype"),
        ],
    )
    def test_each_is_one_line_and_nothing_is_written(self, llama, arguments, message, tmp_path):
        result = quantize(llama, "--out", tmp_path / "q", *arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(lines(result.stderr)) == 1
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("option", ["--column", "--name", "--split", "--samples", "--seqlen", "--seed"])
    def test_how_to_read_data_that_is_not_given(self, llama, option, tmp_path):
        result = quantize(llama, "--preset", "w8a8", option, "4", "--out", tmp_path / "q")
        assert result.exit_code == 2
        said = " ".join(result.stderr.replace("│", " ").split())
        assert f"Invalid value for {option}: says how to read --calibration, which is missing" in said
        assert not (tmp_path / "q").exists()

    def test_no_such_model(self, tmp_path):
        for name in (tmp_path / "none", "nobody/nothing"):
            result = quantize(name, "--out", tmp_path / "q")
            assert result.exit_code == 1
            assert len(lines(result.stderr)) == 1

    def test_a_folder_that_is_not_empty(self, llama, tmp_path):
        (tmp_path / "q").mkdir()
        (tmp_path / "q" / "mine").write_text("kept")
        result = quantize(llama, "--out", tmp_path / "q")
        assert result.exit_code == 1
        assert "is not empty" in result.stderr
        assert (tmp_path / "q" / "mine").read_text() == "kept"
        assert f"{tmp_path / 'q' / 'mine'} is a file" in quantize(llama, "--out", tmp_path / "q" / "mine").stderr

    def test_a_broken_safetensors_file(self, llama, tmp_path):
        copy = Path(shutil.copytree(llama, tmp_path / "copy"))
        (copy / "model.safetensors").write_bytes(b"\xff" * 64)
        result = quantize(copy, "--preset", "w4a16", "--out", tmp_path / "q")
        assert result.exit_code == 1
        assert "model.safetensors" in result.stderr
        assert len(lines(result.stderr)) == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]

    def test_not_a_model_folder(self, tmp_path):
        (tmp_path / "notes").mkdir()
        result = quantize(tmp_path / "notes", "--out", tmp_path / "q")
        assert result.exit_code == 1
        assert "neither model_index.json nor config.json" in result.stderr
        assert len(lines(result.stderr)) == 1

    def test_no_permission_to_write(self, tmp_path, monkeypatch):
        """Simulated in the system call, because tests may run as root, who may write anywhere."""
        opened = os.open

        def refused(path: str, *args: object, **kwargs: object) -> int:
            if tmp_path in (Path(path), *Path(path).parents):
                raise PermissionError(13, "Permission denied", path)
            return opened(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", refused)
        result = quantize("no/model", "--out", tmp_path / "closed" / "q")
        assert result.exit_code == 1
        assert lines(result.stderr) == [f"Error: --out: nothing can be written in {tmp_path}: Permission denied"]
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "command",
        [
            ("quantize", "no/model", "--out"),
            ("calibrate", "no/model", "--source", "self", "--out"),
            ("distill", "no/model", "no/teacher", "--out"),
            ("export", "no/model", "--out"),
            ("report", "no-folder", "--out"),
            ("compare", "no/model", "no/model", "--images"),
            ("demo", "--out"),
        ],
        ids=lambda command: command[0],
    )
    def test_a_place_that_cannot_be_written_is_named_before_anything_is_read(self, command, tmp_path):
        (tmp_path / "file").write_text("mine")
        result = CliRunner().invoke(app, [*command, str(tmp_path / "file" / "new" / "q")])
        assert result.exit_code == 1
        said = f"Error: {command[-1]}: nothing can be written in {tmp_path / 'file'}: Not a directory"
        assert lines(result.stderr) == [said]
        assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]

    def test_a_link_to_nowhere_in_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "file" / "q")
        result = quantize("no/model", "--out", tmp_path / "link")
        assert result.exit_code == 1
        assert f"nothing can be written in {tmp_path / 'file'}" in result.stderr

    def test_debug_shows_the_trace(self, tmp_path):
        result = quantize(tmp_path / "none", "--out", tmp_path / "q", "--debug")
        assert isinstance(result.exception, OSError)

    def test_a_full_disk_leaves_nothing_half_written(self, llama, tmp_path, monkeypatch):
        def full(loaded, folder: Path, affiner=None):
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("hfquant.recipes.run.save", full)
        result = quantize(llama, "--out", tmp_path / "q")
        assert result.exit_code == 1
        assert "No space left on device" in result.stderr
        assert not (tmp_path / "q").exists()
        assert not list(tmp_path.glob(".q.partial"))


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path, llama, text):
    command = [sys.executable, "-m", "hfquant.cli", "quantize", str(llama), "--preset", "w4a16-gptq", "--out"]
    command += [str(tmp_path / "q"), "--calibration", str(text), "--samples", "512", "--seqlen", "64"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    solved = tmp_path / ".q.resume"
    deadline = time.monotonic() + 120
    while not (solved.is_dir() and any(solved.rglob("*.safetensors"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    if run.returncode == 0:
        pytest.fail("it was finished before it could be interrupted")
    assert run.returncode == 130
    assert "Run the same command again to resume" in said
    assert not (tmp_path / "q").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "q" / "config.json").is_file()
    assert not solved.exists()
