"""Generate the parts of the documentation that come from the code.

A page marks such a part with ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, where NAME is one of :data:`PARTS`.
``python -m docs.generate`` replaces what lies between; ``tests/test_docs.py`` fails if it is out of date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import EnumMeta
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer.main

from hfquant.algorithms import ROUNDINGS, TRANSFORMS
from hfquant.algorithms.smooth import SearchAlpha
from hfquant.cli import app
from hfquant.config import parse
from hfquant.enums import SegPattern
from hfquant.formats import FORMATS
from hfquant.layer_config import OPTIONAL, InputQuant, LayerConfig, WeightQuant
from hfquant.presets import PRESETS
from hfquant.schema import Section

DOCS = Path(__file__).parent


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table, with bars in cells escaped."""
    names = list(head)
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *lines))


#: Allowed values that are not in a field's JSON Schema, because they are the keys of a table.
_NAMES = {
    (InputQuant, "type"): list(FORMATS),
    (WeightQuant, "type"): list(FORMATS),
    (LayerConfig, "search_patterns"): [str(pattern) for pattern in SegPattern],
    (LayerConfig, "include"): list(OPTIONAL),
}
#: Fields that are sections themselves, with a link to the heading that describes each.
_SECTIONS = {
    "opt": "[`opt`](#opt)",
    "calib": "[`calib`](#calib)",
    "input_quant": "[`input_quant`](#input_quant), None",
    "weight_quant": "[`weight_quant`](#weight_quant)",
    "search_alpha_config": "[`search_alpha_config`](#search_alpha_config)",
}


def _type(schema: Mapping[str, Any]) -> str:
    """Return the name of the Python type described by a JSON Schema."""
    kinds = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    if "enum" in schema or "const" in schema:
        values = [value for value in schema.get("enum", [schema.get("const")]) if value is not None]
        return type(values[0]).__name__
    names = {"boolean": "bool", "integer": "int", "number": "float", "string": "str", "array": "list", "object": "dict"}
    return names.get(kinds[0].get("type", "object"), "dict")


def _allowed(kind: type[Section], name: str, schema: Mapping[str, Any]) -> str:
    """Return the values that a field accepts."""
    if name in _SECTIONS:
        return _SECTIONS[name]
    if known := _NAMES.get((kind, name)):
        return ", ".join(f"`{value}`" for value in known)
    (part, *_) = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    none = ", None" if any(part.get("type") == "null" for part in schema.get("anyOf", ())) else ""
    if values := part.get("enum", [part["const"]] if "const" in part else []):
        return ", ".join(f"`{value}`" if value is not None else "None" for value in values) + none
    if part.get("type") == "boolean":
        return "True, False"
    low = part.get("minimum", part.get("exclusiveMinimum"))
    above = "above " if "exclusiveMinimum" in part else "from " if "maximum" in part else "at least "
    high = f" to {part['maximum']:g}" if "maximum" in part else ""
    return f"{above}{low:g}{high}{none}"


def _default(value: Any) -> str:
    if isinstance(value, Section):
        type_of = getattr(value, "type", None)
        return "its defaults" if type_of is None else f'`{{"type": "{type_of}"}}`'
    if isinstance(value, tuple):
        return "all" if value else "none"
    return f"`{value}`"


def fields(kind: type[Section]) -> str:
    """Return a table of a section's fields."""
    schemas = kind.model_json_schema(mode="validation")["properties"]
    rows = []
    for name, info in kind.model_fields.items():
        meaning = info.description or ("Selects these options." if name == "type" else "")
        rows.append(
            (f"`{name}`", _type(schemas[name]), _default(info.default), _allowed(kind, name, schemas[name]), meaning)
        )
    return table(("field", "type", "default", "allowed", "meaning"), rows)


def _summary(kind: type[Any]) -> str:
    assert kind.__doc__ is not None
    return kind.__doc__.split("\n\n")[0].replace("``", "`")


def _choices(heading: str, kinds: Mapping[str, type[Section]], default: str) -> str:
    parts = []
    for name, kind in kinds.items():
        about = _summary(kind) + (" This is the default type." if name == default else "")
        parts.append(f'### `{heading}` of type "{name}"\n\n{about}\n\n{fields(kind)}')
    return "\n\n".join(parts)


def config_fields() -> str:
    """Return all sections of a config with their fields."""
    sections = [
        f"## A layer's fields\n\n{fields(LayerConfig)}",
        f"## `weight_quant`\n\n{fields(WeightQuant)}",
        f"## `input_quant`\n\n{fields(InputQuant)}",
        f"## `opt`\n\n{_choices('opt', TRANSFORMS, 'smooth')}",
        f"### `search_alpha_config`\n\n{_summary(SearchAlpha)}\n\n{fields(SearchAlpha)}",
        f"## `calib`\n\n{_choices('calib', ROUNDINGS, 'amax')}",
    ]
    return "\n\n".join(sections)


def presets() -> str:
    """Return the config that each preset stands for."""
    rows = []
    for name, config in PRESETS.items():
        needs = "yes" if parse(name).needs_data else "no"
        others = [f"`{json.dumps({key: entry})}`" for key, entry in config.items() if key != "default"]
        rows.append((f"`{name}`", needs, ", ".join([f"`{json.dumps(config['default'])}`", *others])))
    return table(("preset", "needs data", '"default" entry and any others'), rows)


def _commands(command: Any, path: tuple[str, ...] = ("hfquant",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from _commands(child, (*path, name))
        else:
            yield (*path, name), child


def _shown(param: Any, hint: Any) -> str:
    if param.param_type_name == "argument":
        return f"`{param.name.upper()}`"
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, EnumMeta)]
    choices = "/".join(choice.value for kind in kinds for choice in kind)
    value = "" if getattr(param, "is_flag", False) else f" {param.metavar or choices or param.name.upper()}"
    names = ", ".join(f"`{name}{value}`" for name in param.opts)
    return names + "".join(f", `{name}`" for name in param.secondary_opts)


def _default_of(param: Any) -> str:
    if param.required:
        return "required"
    value = param.default
    return (
        ""
        if value is None or value is False or value == () or callable(value)
        else f"`{getattr(value, 'value', value)}`"
    )


def commands() -> str:
    """Return the help of every command."""
    parts = []
    for path, command in _commands(typer.main.get_command(app)):
        about = re.sub(r"\s*\n\s*", " ", command.help.replace("\n\n", "\0").strip()).replace("\0", "\n\n")
        about = "\n\n".join(line.strip() for line in about.split("\n\n"))
        hints = get_type_hints(command.callback)
        rows = [
            (_shown(param, hints.get(param.name)), _default_of(param), getattr(param, "help", None) or "")
            for param in command.params
            if param.name != "help"
        ]
        listed = table(("argument or option", "default", "meaning"), rows) if rows else ""
        parts.append(f"## `{' '.join(path)}`\n\n{about}\n\n{listed}".rstrip())
    return "\n\n".join(parts)


#: Functions that generate each part, by its name.
PARTS = {"commands": commands, "config-fields": config_fields, "presets": presets}


def filled(page: str) -> str:
    """Return a page's text with its generated parts up to date."""

    def part(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{PARTS[match[2]]()}\n\n{match[3]}"

    return re.sub(r"(<!-- begin ([\w-]+) -->).*?(<!-- end \2 -->)", part, page, flags=re.DOTALL)


if __name__ == "__main__":
    for path in DOCS.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            path.write_text(new, encoding="utf-8")
