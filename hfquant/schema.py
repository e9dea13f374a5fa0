"""What every section of a config is: a strict, frozen pydantic model. The error for configs that cannot be used."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationInfo


class ConfigError(ValueError):
    """A quantization config that cannot be used. The message names the key, the value and what is allowed."""


class Section(BaseModel):
    """Base class of config sections: unknown keys, lossy conversions, NaN and Inf are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def is_patch(info: ValidationInfo) -> bool:
    """Return whether a glob's entry is validated: its fields are checked alone, combinations once it is merged."""
    return bool(info.context and info.context.get("patch"))
