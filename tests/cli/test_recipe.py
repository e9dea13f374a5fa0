"""`hfquant recipe`, and behavior that all commands share."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner, Result

from hfquant import recipes
from hfquant.cli import app
from tests.cli.conftest import make_llama
from tests.integrations.own_models import own_model
from tests.recipes.test_segquant import EXPERIMENTS
from tests.recipes.tiny import PUBLISHED


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["recipe", *map(str, arguments)])


def test_list_show_and_schema():
    listed = json.loads(run("list", "--json").stdout)
    assert list(listed) == recipes.names()
    assert "flux1-w4a8" in run("list").output
    assert yaml.safe_load(run("show", "flux1-w4a8").stdout)["loads"] == "FluxPipeline"
    assert json.loads(run("schema").stdout)["title"] == "Recipe"


def test_check():
    assert "valid recipe" in run("check", "vit-w8a8").output
    result = run("check", "vit-w8a8", PUBLISHED / "vit-base-patch16-224")
    assert result.exit_code == 0, result.output
    assert "quantized" in result.output
    result = run("check", "vit-w8a8", PUBLISHED / "bert-base-uncased")
    assert result.exit_code == 1
    assert "a recipe for a ViTForImageClassification" in result.stderr


class TestImport:
    @pytest.fixture
    def file(self, tmp_path):
        (tmp_path / "sdxl").mkdir()
        path = tmp_path / "sdxl" / "w4a8.yaml"
        path.write_text(yaml.safe_dump(EXPERIMENTS))
        return path

    def test_all_experiments(self, file, tmp_path):
        result = run("import", file, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == [f"sdxl-{name}.yaml" for name in sorted(EXPERIMENTS)]
        assert all(recipes.load(path).loads == "StableDiffusionXLPipeline" for path in (tmp_path / "out").iterdir())
        assert "not carried over" in result.stderr

    def test_one_for_another_model(self, file, tmp_path):
        result = run("import", file, "--out", tmp_path / "out", "--experiment", "smooth", "--model", "flux")
        assert result.exit_code == 0, result.output
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["flux-smooth.yaml"]

    def test_bad_input(self, file, tmp_path):
        other = tmp_path / "w4a8.yaml"
        other.write_text(file.read_text())
        for arguments, message in (
            ((file, "--experiment", "x"), "has no experiment 'x'; it has low-rank"),
            ((file, "--model", "wan"), "unknown model 'wan'"),
            ((other,), "say what it is for with --model"),
            ((tmp_path / "none.yaml",), "none.yaml"),
        ):
            result = run("import", *arguments, "--out", tmp_path / "out")
            assert result.exit_code == 1
            assert message in result.stderr
            assert not (tmp_path / "out").exists()

    def test_nothing_is_overwritten(self, file, tmp_path):
        assert run("import", file, "--out", tmp_path / "out").exit_code == 0
        result = run("import", file, "--out", tmp_path / "out")
        assert result.exit_code == 1
        assert "exists" in result.stderr


def test_help_needs_no_torch():
    code = "import sys; from hfquant.cli import app; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    for command in (
        "quantize",
        "plan",
        "calibrate",
        "inspect",
        "compare",
        "report",
        "export",
        "kernels",
        "demo",
        "recipe",
    ):
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0
        assert "Usage" in result.output


@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "{}", "--out", "{}/q"),
        ("plan", "{}"),
        ("calibrate", "{}", "--source", "self", "--out", "{}/set"),
        ("distill", "{}", "{}", "--out", "{}/q"),
        ("inspect", "{}"),
        ("compare", "{}", "{}"),
        ("report", "{}", "--out", "{}/report.html"),
        ("export", "{}", "--out", "{}/q"),
        ("recipe", "check", "vit-w8a8", "{}"),
    ],
    ids=lambda command: command[0],
)
def test_a_model_s_own_code_runs_only_if_it_is_allowed(command, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asks whether to run the code"))
    folder = own_model(make_llama(tmp_path))
    (folder / "own_config.py").write_text("raise NotImplementedError('it runs')")
    arguments = [part.format(folder) for part in command]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert f"Error: {folder} has code of its own" in result.stderr
    assert result.stderr.count("\n") == 1
    result = CliRunner().invoke(app, [*arguments, "--trust-remote-code"])
    assert repr(result.exception) == "NotImplementedError('it runs')"


def test_the_demo_says_what_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert 'pip install "hfquant[demo]"' in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_demo_gets_its_folder(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr("hfquant.demo.__main__.main", called.append)
    assert CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")]).exit_code == 0
    assert called == [["--out", str(tmp_path / "out")]]
