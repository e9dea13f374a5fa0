"""The origin of a model, derived from folders and ids."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from hfquant.integrations.sharing.origin import Origin, file_of, hub_id, origin_of, places, source_of


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
    assert file_of("org/model", "README.md") is None
    Path("org/model/README.md").write_text("# A\n")
    assert file_of("org/model", "README.md") == Path("org/model/README.md")


def test_a_model_of_no_source_has_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("of something else")
    monkeypatch.chdir(tmp_path)
    assert file_of("", "README.md") is None
    assert list(places(SimpleNamespace(config={}))) == []


def test_sources_of_both_libraries() -> None:
    assert source_of(SimpleNamespace(name_or_path="a/b", config=object())) == "a/b"
    assert source_of(SimpleNamespace(config={"_name_or_path": "a/b"})) == "a/b"
    assert source_of(SimpleNamespace(config={})) == source_of(object()) == ""


@pytest.mark.parametrize("card", [b"---\ntags: [a\n---\n", b"\xff\xfe", b""])
def test_a_source_with_a_broken_card_is_done_without(card: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card)
    assert origin_of(SimpleNamespace(name_or_path=str(tmp_path)), None) == Origin()
    assert origin_of(SimpleNamespace(name_or_path=str(tmp_path)), "org/base") == Origin("org/base")
