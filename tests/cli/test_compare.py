"""`hfquant compare` on models and on pipelines."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from hfquant.calibration import BaseCalibSet
from hfquant.cli import app, options
from hfquant.demo.pipeline import DigitsPipeline
from tests.cli.conftest import lines


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_language_models(llama, text):
    result = compare(llama, llama, "--data", text, "--samples", 2, "--seqlen", 8)
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.output
    found = json.loads(compare(llama, llama, "--data", text, "--samples", 2, "--seqlen", 8, "--json").stdout)
    assert found["figures"]["top-1 agreement"]["value"] == 100


def test_the_text_that_every_python_has(llama):
    result = compare(llama, llama, "--samples", 1, "--seqlen", 8)
    assert result.exit_code == 0, result.output


def test_pipelines(digits, tmp_path):
    more = ("--arg", "class_labels=[1, 2]", "--arg", "num_inference_steps=2", "--images", tmp_path / "pairs")
    result = compare(digits, digits, *more)
    assert result.exit_code == 0, result.output
    assert "PSNR" in result.output
    assert "FID left out" in result.output
    assert len(list((tmp_path / "pairs").iterdir())) == 4


def test_as_many_images_as_asked_for(digits, tmp_path):
    more = ("--arg", "class_labels=[1]", "--arg", "num_inference_steps=2", "--images", tmp_path / "pairs")
    result = compare(digits, digits, "--samples", 3, *more)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "pairs").iterdir())) == 6


def test_images_are_read_from_files(tmp_path):
    Image.new("L", (4, 6), 7).save(tmp_path / "photo.png")
    found = options.call_arguments([f"image={tmp_path / 'photo.png'}", "steps=2", "prompt=photo.png", "mask_image=[1]"])
    picture = found.pop("image")
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (4, 6), (7, 7, 7))
    assert found == {"steps": 2, "prompt": "photo.png", "mask_image": [1]}
    (tmp_path / "text.png").write_text("a")
    for file in ("text.png", "none.png"):
        with pytest.raises(typer.BadParameter, match=f"image: cannot read .*{file}' as an image"):
            options.call_arguments([f"image={tmp_path / file}"])


def test_lists_of_images_are_read_from_files(tmp_path):
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, file in enumerate(files):
        Image.new("L", (2, 2), i).save(file)
    found = options.call_arguments([f"image={json.dumps(files)}", f"prompt={json.dumps(files)}"])
    assert [picture.getpixel((0, 0)) for picture in found["image"]] == [(0, 0, 0), (1, 1, 1)]
    assert found["prompt"] == files
    video = options.call_arguments([f"video={json.dumps(files)}"])["video"]
    assert [frame.getpixel((0, 0)) for frame in video] == [(0, 0, 0), (1, 1, 1)]
    nested = options.call_arguments([f"image={json.dumps([files, files[:1]])}"])["image"]
    assert [[picture.size for picture in pictures] for pictures in nested] == [[(2, 2)] * 2, [(2, 2)]]
    with pytest.raises(typer.BadParameter, match=r"image: cannot read '.*none.png' as an image$"):
        options.call_arguments([f"image={json.dumps([files[0], str(tmp_path / 'none.png')])}"])
    with pytest.raises(typer.BadParameter, match=r"as an image; a list of files is JSON, such as \["):
        options.call_arguments([f"image=[{', '.join(files)}]"])


def test_an_argument_that_a_pipeline_requires_is_named(digits, monkeypatch):
    def call(self: DigitsPipeline, image: Any, num_inference_steps: int = 2) -> None:
        raise AssertionError("it cannot run")

    monkeypatch.setattr(DigitsPipeline, "__call__", call)
    result = compare(digits, digits)
    assert result.exit_code == 1
    assert "DigitsPipeline requires image: pass --arg image=FILE on the command line" in result.stderr
    assert len(lines(result.stderr)) == 1


def test_bad_input_is_one_line(digits, llama, text, tmp_path):
    BaseCalibSet.from_samples([{"input_ids": torch.ones(1, 2, dtype=torch.long)}]).save(tmp_path / "set")
    for arguments, message in (
        ((llama, llama, "--data", tmp_path / "set"), "--data: "),
        ((digits, llama), "one is a pipeline, the other is not"),
        ((llama, tmp_path / "none"), "is not a folder"),
        ((digits, digits, "--data", text), "a pipeline runs on prompts and arguments of its call"),
        ((digits, digits, "--column", "prompt"), "a pipeline runs on prompts and arguments of its call"),
        ((llama, llama, "--prompt", "a"), "prompts and arguments of a call are for pipelines"),
        ((llama, llama, "--arg", "height=8"), "prompts and arguments of a call are for pipelines"),
        ((llama, llama, "--data", text, "--seqlen", 8, "--images", tmp_path / "x"), "only pipelines make images"),
    ):
        result = compare(*arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(lines(result.stderr)) == 1
