"""Merge a generated card with an existing one, keeping what a person wrote.

A card consists of sections (its head, then one per "## " heading) and metadata. A comment at its end holds a digest of
each section and the metadata, both as generated. Anything that is still as generated is replaced; anything that differs
or was never generated belongs to a person.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash
import yaml
from huggingface_hub import RepoCard

# "--" would end an HTML comment.
_COMMENT = re.compile(r"\n*<!-- hfquant generated (\{.*\}); what has been changed since is kept -->\n*")
_FENCE = re.compile(r"\s{0,3}(```|~~~)")


class CardError(ValueError):
    """A card whose metadata cannot be read. The message says where and why."""


@dataclass(frozen=True)
class Generated:
    """The generated content of a card.

    Attributes:
        recipe: digest of the quantization recipe of the model.
        metadata: the metadata as generated.
        sections: title -> digest of the text as generated.
    """

    recipe: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, content: str) -> Generated:
        """Return the content of a card's comment; an empty object if there is none or it cannot be read."""
        found = _COMMENT.search(content)
        try:
            stored = json.loads(found[1]) if found else {}
            generated = cls(**stored)
        except (ValueError, TypeError):
            return cls()
        fits = isinstance(generated.metadata, dict) and isinstance(generated.sections, dict)
        return generated if fits else cls()

    def comment(self) -> str:
        """Return the comment that stores this object."""
        stored = json.dumps({"recipe": self.recipe, "metadata": self.metadata, "sections": self.sections}, default=str)
        escaped = stored.replace("--", "\\u002d\\u002d")
        return f"<!-- hfquant generated {escaped}; what has been changed since is kept -->"


def merged(metadata: Mapping[str, Any], body: str, recipe: str, existing: str | None, where: str) -> str:
    """Return the content of a card: the generated one, plus what a person wrote in the existing one.

    Args:
        metadata: generated metadata, as JSON.
        body: generated Markdown.
        recipe: digest of the quantization recipe of the model. While it does not change, a section that was generated
            when more was known (a measurement of the quantization run) is kept.
        existing: content of the existing card; None if there is none.
        where: what to call that card in error messages.

    Raises:
        CardError: the metadata of the existing card is not a YAML dict.
    """
    new = dict(sections(body))
    generated = Generated(recipe, dict(metadata), {title: _digest(text) for title, text in new.items()})
    if existing is None:
        return _card(metadata, list(new.values()), generated)
    card = read_card(existing, where)
    before = Generated.of(existing)
    texts: list[str] = []
    shown: set[str] = set()
    for title, text in sections(_COMMENT.sub("\n", card.text)):
        shown.add(title)
        if _digest(text) != before.sections.get(title):
            texts.append(text)  # written by a person
        elif title in new:
            texts.append(new[title])
        elif before.recipe == recipe:
            texts.append(text)
            generated.sections[title] = before.sections[title]  # type: ignore[index]
    texts += [text for title, text in new.items() if title not in shown and title not in before.sections]
    return _card(_metadata(metadata, before.metadata, card.data.to_dict()), texts, generated)


def read_card(content: str, where: str) -> RepoCard:
    """Parse a card.

    Raises:
        CardError: its metadata is not a YAML dict.
    """
    try:
        # Metadata of results that the client does not understand is kept unchanged.
        return RepoCard(content, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise CardError(f"the metadata at the top of {where} cannot be read, fix it first: {error}") from error


def sections(body: str) -> Iterator[tuple[str, str]]:
    """Yield (title, text) of each non-empty section of Markdown; the title before the first heading is ""."""
    title, lines, fence = "", list[str](), ""
    for line in body.replace("\r\n", "\n").split("\n"):
        if mark := _FENCE.match(line):
            fence = mark[1] if not fence else "" if fence == mark[1] else fence
        if line.startswith("## ") and not fence:
            if any(lines):
                yield title, "\n".join(lines).strip("\n")
            title, lines = line[3:].strip(), []
        lines.append(line)
    if any(lines):
        yield title, "\n".join(lines).strip("\n")


def _digest(text: str) -> str:
    return xxhash.xxh3_64(text.encode()).hexdigest()


def _metadata(new: Mapping[str, Any], before: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """Merge three ways: update a key that is still as generated; keep one that a person changed or removed."""
    result = dict(there)
    for key, value in new.items():
        known, found = before.get(key), there.get(key)
        if isinstance(value, list) and isinstance(found, list):
            # Merge lists entry by entry.
            gone = [entry for entry in known or () if entry not in value]
            added = [entry for entry in value if entry not in (known or ()) and entry not in found]
            result[key] = [entry for entry in found if entry not in gone] + added
        elif found == known:  # both None: not present and never generated
            result[key] = value
    return result  # keep keys that are not generated now


def _card(metadata: Mapping[str, Any], texts: list[str], generated: Generated) -> str:
    head = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=float("inf"))
    body = "\n\n".join(texts)
    return f"---\n{head}---\n\n{body}\n\n{generated.comment()}\n"
