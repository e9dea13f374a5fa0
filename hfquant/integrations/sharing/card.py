"""The card of an object: its facts rendered with one template and merged with an existing card."""

from __future__ import annotations

import importlib.metadata
from contextlib import suppress
from pathlib import Path
from typing import Any

from hfquant.console import size
from hfquant.integrations.config import FORMAT_VERSION
from hfquant.integrations.sharing.facts import Facts
from hfquant.integrations.sharing.merge import merged
from hfquant.integrations.sharing.origin import CARD_FILE, Origin

TEMPLATE = Path(__file__).with_name("card.md")
_PACKAGES = ("hfquant", "torch", "transformers", "diffusers", "safetensors")


def content_of(facts: Facts, noun: str, address: str, origin: Origin, existing: str | None) -> str:
    """Return the content of a card.

    Args:
        facts: facts about the object.
        noun: what to call the object.
        address: what it is loaded by: a hub id or a folder name.
        origin: what is known about the model it was made from.
        existing: the existing card; None if there is none.

    Raises:
        CardError: the metadata of the existing card cannot be read.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": size, "count": _count}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    body = template.render(
        facts=facts,
        noun=noun,
        address=address,
        base_model=origin.base_model,
        versions=_versions(),
        format_version=FORMAT_VERSION,
        **facts.values,
    )
    return merged(_metadata(facts, origin), body, facts.recipe, existing, CARD_FILE)


def _metadata(facts: Facts, origin: Origin) -> dict[str, Any]:
    base = {"base_model": origin.base_model, "base_model_relation": "quantized"} if origin.base_model else {}
    return {"library_name": facts.library_name, **base, **origin.metadata, "tags": facts.tags}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _count(count: int) -> str:
    """Return a number of parameters in human-readable form."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return str(count)
