"""`hfquant inspect`, `hfquant report` and `hfquant export` on a quantized folder."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner, Result

from hfquant.cli import app
from tests.cli.conftest import lines


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def quantized(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect") / "q"
    assert run("quantize", llama, "--preset", "w4a16", "--out", folder).exit_code == 0
    return folder


def test_every_layer_is_listed(quantized):
    result = run("inspect", quantized)
    assert result.exit_code == 0, result.output
    assert result.output.count("int4 g32") == 14
    assert "lm_head in full precision: " in result.output
    assert "model.layers.1.self_attn.q_proj  " in result.output, "nothing is cut off outside a terminal"
    assert "int4 g32" not in run("inspect", quantized, "--summary").output


def test_as_json(quantized):
    found = json.loads(run("inspect", quantized, "--json").stdout)["model"]
    assert len(found["layers"]) == 14
    assert found["bytes"] < found["bytes_in_full_precision"]
    assert found["class"] == "LlamaForCausalLM"


def test_report_is_a_page(quantized, llama, text, tmp_path):
    result = run("report", quantized, "-o", tmp_path / "page" / "r.html")
    assert result.exit_code == 0, result.output
    assert "<table" in (tmp_path / "page" / "r.html").read_text()
    more = ("--reference", llama, "--data", text, "--samples", 2, "--seqlen", 8)
    result = run("report", quantized, "-o", tmp_path / "r.html", *more)
    assert result.exit_code == 0, result.output
    assert "KL divergence" in (tmp_path / "r.html").read_text()


def test_a_page_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    result = run("report", tmp_path / "none", "-o", tmp_path / "folder")
    assert result.exit_code == 1
    assert lines(result.stderr) == [f"Error: --out: {tmp_path / 'folder'} is a folder; pass the name of a file"]
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert "is not a folder" in run("report", tmp_path / "none", "-o", page).stderr
    assert page.read_text() == "mine"


def test_export(llama, tmp_path):
    assert run("quantize", llama, "--preset", "w8a16", "--out", tmp_path / "q").exit_code == 0
    result = run("export", tmp_path / "q", "--out", tmp_path / "exported")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (tmp_path / "exported" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    for arguments, message in (
        (("--format", "gguf"), "unknown export format 'gguf'"),
        (("--format", "nunchaku-lite"), "nunchaku-lite"),
    ):
        result = run("export", tmp_path / "q", "--out", tmp_path / "other", *arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(lines(result.stderr)) == 1
        assert not (tmp_path / "other").exists()
    assert "is not empty" in run("export", tmp_path / "q", "--out", tmp_path / "exported").stderr


@pytest.mark.parametrize("command", ["inspect", "report"])
def test_bad_folders_are_one_line(command, llama, tmp_path):
    for folder, message in ((tmp_path / "none", "is not a folder"), (llama, "nothing in it was quantized")):
        result = run(command, folder)
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(lines(result.stderr)) == 1
