"""Hub ids, and names of models that say nothing about the disk they lie on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hfquant.hub_ids import hub_id, shared_name


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/model", "org/model"),
        ("gpt2", "gpt2"),
        ("/root/.cache/hub/models--org--a-model/snapshots/0a1b/transformer", "org/a-model"),
        ("/root/.cache/hub/models--gpt2/snapshots/0a1b", "gpt2"),
        ("/somewhere/else", None),
        ("./here", None),
        ("a/b/c", None),
        ("https://user:secret@host/a", None),
        ("", None),
    ],
)
def test_ids(source: str, expected: str | None) -> None:
    assert hub_id(source) == expected


def test_a_folder_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/model").mkdir(parents=True)
    assert hub_id("org/model") is None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/model", "org/model"),
        ("/root/.cache/hub/models--org--a-model/snapshots/0a1b/transformer", "org/a-model"),
        ("/home/me/secret/llm", "llm"),
        ("/home/me/secret/llm/", "llm"),
        ("../secret/llm", "llm"),
        ("a/b/c", "c"),
        ("", ""),
    ],
)
def test_a_name_to_share_has_no_folders(source: str, expected: str) -> None:
    assert shared_name(source) == expected
    assert shared_name(expected) == expected


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shared_name(os.curdir) == tmp_path.name
