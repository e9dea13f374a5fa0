"""The origin of a model, derived from folders and ids."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from hfquant.integrations.sharing.origin import Origin, file_of, origin_of, places, save_extra_files, source_of


def test_the_files_of_a_folder_named_like_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/model").mkdir(parents=True)
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


@pytest.mark.parametrize("model_type", ["qwen2_5_omni", "llama"])
def test_files_that_a_model_cannot_be_loaded_without_go_along(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "spk_dict.pt").write_bytes(b"voices")
    out = tmp_path / "out"
    out.mkdir()
    model = SimpleNamespace(name_or_path=str(tmp_path), config=SimpleNamespace(model_type=model_type))
    save_extra_files(model, out)
    assert [file.name for file in out.iterdir()] == (["spk_dict.pt"] if model_type == "qwen2_5_omni" else [])
    if model_type == "qwen2_5_omni":
        (out / "spk_dict.pt").write_bytes(b"other voices")
        save_extra_files(model, out)
        assert (out / "spk_dict.pt").read_bytes() == b"other voices"
