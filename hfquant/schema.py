"""The base class of config sections, a strict and frozen pydantic model, their validation and its error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo


class ConfigError(ValueError):
    """An invalid quantization config. The message names the key, the value and what is allowed."""


class Section(BaseModel):
    """Base class of config sections. It rejects unknown keys, lossy conversions, NaN and Inf."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


_Section = TypeVar("_Section", bound=Section)


def validated(kind: type[_Section], data: Mapping[str, Any], where: str, patch: bool = False) -> _Section:
    """Validate a section as written by the user.

    Args:
        kind: class of the section.
        data: its fields.
        where: name of the section in messages; keys are appended to it.
        patch: whether the fields are a glob's entry; see :func:`is_patch`.

    Raises:
        ConfigError: the section is invalid; the message has one line per problem, with the key, the value and what is
            allowed.
    """
    try:
        return kind.model_validate(data, context={"patch": patch})
    except ValidationError as error:
        raise ConfigError("\n".join(_explained(problem, where, kind) for problem in error.errors())) from None


def is_patch(info: ValidationInfo) -> bool:
    """Return whether a glob's entry is being validated: only single fields are checked until the entry is merged."""
    return bool(info.context and info.context.get("patch"))


def _explained(problem: Any, where: str, kind: type[Section]) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join([where, *path])
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key; allowed are {', '.join(_section_at(path[:-1], kind).model_fields)}"
        case "missing":
            return f"{key}: is missing"
        case "value_error" | "assertion_error":
            return f"{key}: {problem['ctx']['error']}"
        case _:
            return f"{key}: {problem['msg']}, got {problem['input']!r}"


def _section_at(path: Sequence[str], kind: type[Section]) -> type[Section]:
    """Return the class of the section at a path, which may lead through dicts of sections."""
    for name in path:
        if name in kind.model_fields:
            kind = next(_sections(kind.model_fields[name].annotation), kind)
    return kind


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """Yield the sections that a field's annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)
