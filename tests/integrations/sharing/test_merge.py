"""Merging model cards: user-written text stays, generated text is updated."""

from __future__ import annotations

import pytest
import yaml

from hfquant.integrations.sharing.merge import CardError, Generated, merged, sections

BODY = "# Title\n\nHead.\n\n## One\n\nfirst\n\n## Two\n\n```python\n## no heading\n```\n"
METADATA = {"library_name": "transformers", "tags": ["hfquant", "4-bit"]}


def make(body: str = BODY, metadata: dict = METADATA, recipe: str = "a", existing: str | None = None) -> str:
    return merged(metadata, body, recipe, existing, "README.md")


def split(card: str) -> tuple[dict, list[tuple[str, str]], Generated]:
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), list(sections(body.partition("<!-- hfquant")[0])), Generated.of(card)


def test_sections_are_split_at_headings_outside_code() -> None:
    assert list(sections(BODY)) == [
        ("", "# Title\n\nHead."),
        ("One", "## One\n\nfirst"),
        ("Two", "## Two\n\n```python\n## no heading\n```"),
    ]
    assert list(sections("## A\r\n\r\ntext\r\n~~~\r\n```\r\n## in\r\n~~~\r\n## B")) == [
        ("A", "## A\n\ntext\n~~~\n```\n## in\n~~~"),
        ("B", "## B"),
    ]
    assert list(sections("\n\n")) == []


def test_a_new_card() -> None:
    metadata, texts, generated = split(make())
    assert metadata == METADATA
    assert texts == list(sections(BODY))
    assert generated.metadata == METADATA
    assert generated.sections.keys() == {"", "One", "Two"}
    assert make(existing=make()) == make()


def test_what_was_generated_is_renewed() -> None:
    body = BODY.replace("first", "second").replace("## Two", "## Three")
    metadata, texts, _ = split(make(body, {"library_name": "diffusers", "tags": ["hfquant", "8-bit"]}, "b", make()))
    assert metadata == {"library_name": "diffusers", "tags": ["hfquant", "8-bit"]}
    assert texts == list(sections(body))


def test_what_a_person_wrote_stays() -> None:
    """Text that was edited, inserted, appended or added after the comment stays, also with CRLF line endings."""
    theirs = make().replace("first", "mine").replace("## Two", "## Between\n\nnew\n\n## Two") + "\n## Last\n\nend\n"
    for existing in (theirs, theirs.replace("\n", "\r\n")):
        card = make(BODY.replace("first", "second").replace("Head.", "Neck."), recipe="b", existing=existing)
        assert [text for _, text in split(make(existing=card))[1]] == [
            "# Title\n\nHead.",
            "## One\n\nmine",
            "## Between\n\nnew",
            "## Two\n\n```python\n## no heading\n```",
            "## Last\n\nend",
        ]
        assert "# Title\n\nNeck." in card


def test_a_section_that_a_person_took_out_stays_out() -> None:
    existing = make().replace("## One\n\nfirst\n\n", "")
    assert [title for title, _ in split(make(existing=existing))[1]] == ["", "Two"]


def test_a_measurement_stays_while_the_recipe_is_the_same() -> None:
    without = BODY.replace("## One\n\nfirst\n\n", "")
    assert "first" in make(without, existing=make())
    assert "first" in make(without, existing=make(without, existing=make()))  # it is still generated text
    assert "first" not in make(without, recipe="b", existing=make(without, existing=make()))


def test_metadata_that_a_person_changed_stays() -> None:
    existing = make(metadata=METADATA | {"license": "mit", "base_model": "a/b"})
    existing = existing.replace("license: mit", "license: apache-2.0\nlanguage: en", 1).replace(
        "base_model: a/b\n", "", 1
    )
    existing = existing.replace("- 4-bit", "- mine", 1)
    new = {"library_name": "diffusers", "tags": ["hfquant", "4-bit", "w4a16"], "license": "mit", "base_model": "c/d"}
    metadata, _, generated = split(make(metadata=new, existing=existing))
    assert metadata == {
        "library_name": "diffusers",
        "tags": ["hfquant", "mine", "w4a16"],
        "license": "apache-2.0",
        "language": "en",
    }
    assert generated.metadata == new
    assert split(make(existing=make(metadata=METADATA | {"license": "mit"})))[0]["license"] == "mit"


def test_a_card_of_somebody_elses() -> None:
    existing = "---\nlicense: mit\ntags:\n- x\nmodel-index:\n- name: odd\n---\n# Theirs\n\n## One\n\ntheir one\n"
    metadata, texts, _ = split(make(existing=existing))
    assert metadata == {
        "license": "mit",
        "tags": ["x", "hfquant", "4-bit"],
        "model-index": [{"name": "odd"}],
        "library_name": "transformers",
    }
    assert [text for _, text in texts] == ["# Theirs", "## One\n\ntheir one", "## Two\n\n```python\n## no heading\n```"]
    assert "plain text" in make(existing="plain text, no metadata")


@pytest.mark.parametrize("stored", ["{", "[]", '{"recipe": "a", "other": 1}', '{"sections": 3}', '{"metadata": []}'])
def test_a_comment_that_makes_no_sense_is_none(stored: str) -> None:
    comment = f"<!-- hfquant generated {stored}; what has been changed since is kept -->"
    assert Generated.of(comment) == Generated()


def test_nothing_ends_the_comment_early() -> None:
    metadata = METADATA | {"base_model": "a --> b"}
    card = make(metadata=metadata)
    assert card.count("-->") == 2  # one in the metadata at the top, one that ends the comment
    assert Generated.of(card).metadata == metadata


@pytest.mark.parametrize("head", ["tags: [a", "- a\n- b", "a: b: c"])
def test_metadata_that_cannot_be_read(head: str) -> None:
    with pytest.raises(CardError, match=r"the metadata at the top of README.md cannot be read, fix it first"):
        make(existing=f"---\n{head}\n---\ntext")
