"""The template: every part of it renders to Markdown that says what is known and nothing that is not."""

from __future__ import annotations

import importlib.metadata
import re

import pytest
from huggingface_hub import ModelCard

import hfquant
from hfquant.integrations.sharing.card import _count, _size, content_of
from hfquant.integrations.sharing.facts import of_models
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
    # Nothing was measured and no data was needed: no section about either.
    assert list(found) == ["", "How to load", "Quantization", "Left in full precision", "Versions"]
    assert found[""].startswith("# name\n\n[base/model](https://huggingface.co/base/model), a model of diffusers")
    code = re.findall(r"```python\n(.*?)```", found["How to load"], re.DOTALL)
    compile(code[0], "card", "exec")
    assert code[0].startswith("import hfquant")
    for package in ("hfquant", "torch", "diffusers"):
        assert importlib.metadata.version(package) in found["Versions"]


def test_every_table_is_one(content: str) -> None:
    """Each row has as many cells as the head of its table, and a blank line comes before."""
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
    assert [_size(n) for n in (999, 1_000, 2_500_000, 7_000_000_000)] == ["999 B", "1.0 kB", "2.5 MB", "7.0 GB"]
    assert [_count(n) for n in (999, 1_500, 2_500_000, 7_000_000_000)] == ["999", "1.5 k", "2.5 M", "7.0 B"]
