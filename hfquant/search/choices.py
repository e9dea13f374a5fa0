"""Choices for a layer: formats, presets or config fields, each expressed as the rules for a whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfquant.config import ConfigError, QuantRules, parse
from hfquant.formats import FORMATS
from hfquant.layer_config import LayerConfig, WeightQuant
from hfquant.presets import PRESETS

#: Name of a number format or preset, fields of ``weight_quant``, or fields of a layer's config.
Choice = str | Mapping[str, Any]

#: Fields that decide which layers are quantized. A choice does not.
_WHICH = ("enable", "include", "float_share")


def rules_of(choices: Sequence[Choice], base: QuantRules) -> dict[str, QuantRules]:
    """Return the config for each choice applied to the whole model, by a human-readable label.

    Globs of ``base`` still apply, after the choice. A preset replaces the base's default entry as a whole, without its
    own globs; any other choice overrides fields of that entry.

    Raises:
        ConfigError: fewer than two choices, unknown names or fields, or a choice that does not fit the base.
    """
    if isinstance(choices, str) or len(choices) < 2:
        raise ConfigError(f"choices: expected at least two, got {choices!r}")
    found: dict[str, QuantRules] = {}
    entries = {key: entry for key, entry in base.raw.items() if key != "search"}
    for i, choice in enumerate(choices):
        try:
            rules = QuantRules({**entries, "default": _default(choice, base.raw.get("default", {}))}, base.excluded)
        except ConfigError as error:
            raise ConfigError(f"choices[{i}]: {error}") from None
        if any(rules.raw == other.raw for other in found.values()):
            raise ConfigError(f"choices[{i}]: {choice!r} is a duplicate")
        label = choice if isinstance(choice, str) else described(rules.default)
        found[label if label not in found else f"{label} ({i})"] = rules
    return found


def described(config: LayerConfig) -> str:
    """Return a short label that distinguishes choices: "int4 g32"."""
    return config.weight_quant.type + (f" g{config.group_size}" if config.group_size else "")


def _default(choice: Choice, base: Mapping[str, Any]) -> dict[str, Any]:
    fields = {key: value for key, value in _fields(choice, base).items() if key not in _WHICH}
    return fields | {key: base[key] for key in _WHICH if key in base}


def _fields(choice: Choice, base: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(choice, str):
        if choice in PRESETS:
            return dict(parse(choice).raw["default"])
        if choice not in FORMATS:
            known = f"formats {', '.join(FORMATS)} and presets {', '.join(PRESETS)}"
            raise ConfigError(f"unknown number format {choice!r}; available: {known}")
        choice = {"type": choice}
    if not isinstance(choice, Mapping):
        raise ConfigError(f"expected the name of a format or a preset, or a dict of fields, got {choice!r}")
    fields = {"weight_quant": choice} if set(choice) <= set(WeightQuant.model_fields) else dict(choice)
    weight = {**base.get("weight_quant", {}), **fields.get("weight_quant", {})}
    if weight.get("type", "int8") in FORMATS and not FORMATS[weight.get("type", "int8")].is_integer:
        weight = {key: value for key, value in weight.items() if key not in ("symmetric", "clip")}
    return {**base, **fields, "weight_quant": weight}
