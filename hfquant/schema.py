"""The base class of config sections, a strict and frozen pydantic model, and the error for invalid configs."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationInfo


class ConfigError(ValueError):
    """An invalid quantization config. The message names the key, the value and what is allowed."""


class Section(BaseModel):
    """Base class of config sections. It rejects unknown keys, lossy conversions, NaN and Inf."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def is_patch(info: ValidationInfo) -> bool:
    """Return whether a glob's entry is being validated: only single fields are checked until the entry is merged."""
    return bool(info.context and info.context.get("patch"))
