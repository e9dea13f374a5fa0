"""A generated card brought together with one that is there already: what a person wrote stays.

A card is a list of sections (its head, then one for each "## " heading) and its metadata. A comment at its end keeps
the digest of each section and the metadata as they were generated. What still is as it was generated is replaced; what
differs, and what was never generated, is a person's.
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

# "--" would end a comment.
_COMMENT = re.compile(r"\n*<!-- hfquant generated (\{.*\}); what has been changed since is kept -->\n*")
_FENCE = re.compile(r"\s{0,3}(```|~~~)")


class CardError(ValueError):
    """A card whose metadata cannot be read. The message says where and why."""


@dataclass(frozen=True)
class Generated:
    """What of a card was generated.

    Attributes:
        recipe: digest of what the model was quantized by.
        metadata: as generated.
        sections: title -> digest of the text as generated.
    """

    recipe: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, content: str) -> Generated:
        """Return what a card's comment says; nothing where there is none, or none that can be read."""
        found = _COMMENT.search(content)
        try:
            stored = json.loads(found[1]) if found else {}
            generated = cls(**stored)
        except (ValueError, TypeError):
            return cls()
        fits = isinstance(generated.metadata, dict) and isinstance(generated.sections, dict)
        return generated if fits else cls()

    def comment(self) -> str:
        """Return the comment that keeps it."""
        stored = json.dumps({"recipe": self.recipe, "metadata": self.metadata, "sections": self.sections}, default=str)
        escaped = stored.replace("--", "\\u002d\\u002d")
        return f"<!-- hfquant generated {escaped}; what has been changed since is kept -->"


def merged(metadata: Mapping[str, Any], body: str, recipe: str, existing: str | None, where: str) -> str:
    """Return the content of a card: the generated one, with what a person wrote in the one that is there.

    Args:
        metadata: generated, as JSON.
        body: generated Markdown.
        recipe: digest of what the model was quantized by. While it is the same, a section that was generated when more
            was known (a measurement of the run that quantized) stays.
        existing: content of the card that is there; None without one.
        where: what an error calls that card.

    Raises:
        CardError: its metadata is not a dict in YAML.
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
            texts.append(text)  # a person's
        elif title in new:
            texts.append(new[title])
        elif before.recipe == recipe:
            texts.append(text)
            generated.sections[title] = before.sections[title]  # type: ignore[index]
    texts += [text for title, text in new.items() if title not in shown and title not in before.sections]
    return _card(_metadata(metadata, before.metadata, card.data.to_dict()), texts, generated)


def read_card(content: str, where: str) -> RepoCard:
    """Return a card.

    Raises:
        CardError: its metadata is not a dict in YAML.
    """
    try:
        # Metadata of results that the client cannot make sense of is kept as it is.
        return RepoCard(content, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise CardError(f"the metadata at the top of {where} cannot be read, mend it first: {error}") from error


def sections(body: str) -> Iterator[tuple[str, str]]:
    """Yield the (title, text) of each section of Markdown that has any; that before the first heading is called ""."""
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
    """Three ways: a key that is as it was generated is renewed, one that a person changed or took out stays so."""
    result = dict(there)
    for key, value in new.items():
        known, found = before.get(key), there.get(key)
        if isinstance(value, list) and isinstance(found, list):
            # Of a list, each entry.
            gone = [entry for entry in known or () if entry not in value]
            added = [entry for entry in value if entry not in (known or ()) and entry not in found]
            result[key] = [entry for entry in found if entry not in gone] + added
        elif found == known:  # both None: not there, and never generated
            result[key] = value
    return result  # what is not known now stays


def _card(metadata: Mapping[str, Any], texts: list[str], generated: Generated) -> str:
    head = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=float("inf"))
    body = "\n\n".join(texts)
    return f"---\n{head}---\n\n{body}\n\n{generated.comment()}\n"
