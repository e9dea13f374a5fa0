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
        raise ConfigError(explained(error, kind, where)) from None


def is_patch(info: ValidationInfo) -> bool:
    """Return whether a glob's entry is being validated: only single fields are checked until the entry is merged."""
    return bool(info.context and info.context.get("patch"))


def explained(error: ValidationError, kind: type[BaseModel], where: str = "", also: Sequence[str] = ()) -> str:
    """Return one line per problem, with the key, the value and what is allowed; unknown keys first.

    Args:
        error: what pydantic found.
        kind: the validated class.
        where: its name; keys are appended to it.
        also: keys that the caller takes besides the fields.
    """
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    return "\n".join(_explained(problem, kind, where, also) for problem in problems)


def _explained(problem: Any, kind: type[BaseModel], where: str, also: Sequence[str]) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join([where, *path] if where else path)
    match problem["type"]:
        case "extra_forbidden":
            allowed = [*_model_at(path[:-1], kind).model_fields, *also]
            return f"{key}: unknown key; allowed are {', '.join(allowed)}"
        case "missing":
            return f"{key}: is missing"
        case "value_error" | "assertion_error":
            return f"{key}: {problem['ctx']['error']}"
        case _:
            return f"{key}: {problem['msg']}, got {problem['input']!r}"


def _model_at(path: Sequence[str], kind: type[BaseModel]) -> type[BaseModel]:
    """Return the class of the model at a path, which may lead through dicts of models."""
    for name in path:
        if name in kind.model_fields:
            kind = next(_models(kind.model_fields[name].annotation), kind)
    return kind


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that a field's annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
