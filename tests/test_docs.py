"""README and docs: their code runs, their generated parts are up to date, their links resolve.

The blocks of a page run from top to bottom, in one namespace and one folder. The folder has models, prompts and texts
under the names that the pages use; the models are tiny, random and of real classes.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import datasets
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

import hfquant
from hfquant.cli import app
from hfquant.kernels.table import KERNELS
from tests.cli.conftest import make_llama
from tests.integrations.test_pipelines import sd3

ROOT = Path(__file__).parents[1]
generate, hooks = (SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / name))) for name in ("generate.py", "hooks.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Number of blocks per page that cannot run in a test; a comment before each says why: ``<!-- not run: reason -->``.
NOT_RUN = {"README.md": 1, "calibration.md": 1, "sharing.md": 1}
#: Pages that take more than a few seconds.
SLOW = {"pipelines.md", "calibration.md", "choosing-bits.md", "distillation.md"}
#: Shell commands that set up a machine; tests run on one that is set up.
SET_UP = ("pip", "make", "git", "python")
MODELS = ("path/to/llm", "HuggingFaceTB/SmolLM2-135M-Instruct")
PIPELINES = ("path/to/pipeline", "stabilityai/stable-diffusion-3.5-medium")


class Block(NamedTuple):
    """A fenced block of code."""

    line: int
    language: str
    text: str
    not_run: str | None


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    fence = r"(?:^<!-- not run: (?P<why>[^>]+) -->\n+)?^(?P<mark>```+)(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=mark)$"
    for found in re.finditer(fence, text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, found.start("mark")) + 1
        yield Block(line, found["language"].strip(), found["text"], found["why"])


def commands(text: str) -> list[list[str]]:
    """Return the words of each command in a shell block."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders named like the models in the pages."""
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        make_llama(folder / name, 128)
    for name in PIPELINES:
        sd3().save_pretrained(folder / name)
    return folder


@pytest.fixture
def desk(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a reader works in."""
    for name in (*MODELS, *PIPELINES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(models / name)
    text = [" ".join("abcdefgh"[(i * j) % 8] for j in range(40)) for i in range(600)]
    (tmp_path / "wiki.txt").write_text("\n\n".join(text))
    datasets.Dataset.from_dict({"text": text}).to_parquet(tmp_path / "wiki.parquet")
    prompts = ["a b c", "d e f", "g h a", "b d f"]
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": prompt} for prompt in prompts]))
    datasets.Dataset.from_dict({"prompt": prompts}).to_parquet(tmp_path / "prompts.parquet")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _marked(page: Path) -> Any:
    return pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW else [])


@pytest.mark.parametrize("page", [_marked(p) for p in PAGES if any(b.language != "yaml" for b in blocks(p))])
def test_the_code_of_a_page_runs(page: Path, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.not_run:
            continue
        if block.language == "python":
            code = "\n" * block.line + block.text
            capsys.readouterr()
            exec(compile(code, str(page), "exec"), namespace)  # noqa: S102 (this project's own pages)
            if re.search(r"^except .*:$", block.text, re.MULTILINE):
                assert capsys.readouterr().out, f"{page.name}:{block.line}: the error that it shows is not raised"
        elif block.language == "bash":
            for program, *arguments in commands(block.text):
                if program in SET_UP:
                    continue
                assert program == "hfquant", f"{page.name}:{block.line}: a test cannot run {program!r}"
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, f"{page.name}:{block.line}: {arguments}\n{result.output}"


def test_an_error_that_a_page_shows_must_be_raised(tmp_path: Path, desk: Path, capsys: Any) -> None:
    page = tmp_path / "page.md"
    block = "```python\ntry:\n    int('{}')\nexcept ValueError as error:\n    print(error)\n```\n"
    page.write_text(block.format("a"))
    test_the_code_of_a_page_runs(page, desk, capsys)
    page.write_text(block.format("1"))
    with pytest.raises(AssertionError, match=r"page.md:1: the error that it shows is not raised"):
        test_the_code_of_a_page_runs(page, desk, capsys)


def test_every_block_is_run_or_says_why_not() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("python", "bash", "yaml", "json", "text"), f"{page.name}:{block.line}"
    counted = {page.name: sum(block.not_run is not None for block in blocks(page)) for page in PAGES}
    assert {name: count for name, count in counted.items() if count} == NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert generate.filled(text) == text, "run: make docs"


def test_a_part_is_made_anew() -> None:
    page = "before\n<!-- begin presets -->\nstale\n<!-- end presets -->\nafter\n"
    made = generate.filled(page)
    assert made.startswith("before\n<!-- begin presets -->\n\n| preset |")
    assert made.endswith("|\n\n<!-- end presets -->\nafter\n")
    assert "stale" not in made


def test_blocks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n```python\nx = 1\n```\n\n<!-- not run: no such machine -->\n```bash\nhfquant a \\\n  b # c\n```\n"
    )
    python, bash = blocks(page)
    assert python == (3, "python", "x = 1\n", None)
    assert (bash.line, bash.language, bash.not_run) == (8, "bash", "no such machine")
    assert commands(bash.text) == [["hfquant", "a", "b"]]


def test_links_out_of_docs_lead_to_the_repository() -> None:
    config = {"repo_url": "https://host/repo"}
    rewritten = hooks.on_page_markdown("[a](../README.md#limits) [b](config.md)", config)
    assert rewritten == "[a](https://host/repo/blob/main/README.md#limits) [b](config.md)"
    with pytest.raises(FileNotFoundError, match=r"nothing\.md"):
        hooks.on_page_markdown("[a](../nothing.md)", config)


def test_roles_in_docstrings_are_shown_as_code() -> None:
    html = "<p>see :func:<code>~hfquant.quantize</code>, <code>x</code></p>"
    assert hooks.on_page_content(html) == "<p>see <code>quantize</code>, <code>x</code></p>"


def test_generated_parts_are_all_used() -> None:
    begun = re.findall(r"<!-- begin ([\w-]+) -->", "".join(page.read_text(encoding="utf-8") for page in PAGES))
    assert sorted(begun) == sorted(generate.PARTS)


def test_every_field_of_a_config_has_a_meaning() -> None:
    rows = [line for line in generate.config_fields().splitlines() if line.startswith("| `")]
    assert rows
    assert not [row for row in rows if not row.rsplit(" | ", 1)[1].strip(" |")]


def _anchors(page: Path) -> set[str]:
    """Return the anchors that links to a page may use, as GitHub and mkdocs derive them from headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in _anchors(there), f"{page.name} links to {target}"


def test_the_api_page_has_every_public_name() -> None:
    listed = re.findall(r"^::: hfquant\.(\w+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(hfquant.__all__)


def test_the_kernels_page_has_every_kernel() -> None:
    rows = re.findall(r"^\| `([\w-]+)`", (ROOT / "docs/kernels.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(KERNELS)


def test_how_it_works_names_files_that_exist() -> None:
    named = re.findall(r"`([\w/]+(?:\.py|/))`", (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8"))
    assert named
    assert not [name for name in named if not (ROOT / "hfquant" / name).exists()]


def test_measured_rows_of_readme_are_rows_of_the_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text[text.index("## Measured") : text.index("## Limits")]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows
    page = (ROOT / "docs/measured.md").read_text(encoding="utf-8").splitlines()
    assert not [row for row in rows if row not in page]


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(
        r"^ +- (?:Home: )?([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(page.name for page in PAGES[1:])
