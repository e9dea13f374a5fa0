"""What to quantize and how: the per-layer config and its validation.

A config is a plain JSON-able dict, ``{"default": {...}, "<glob>": {...}}``. :func:`parse` validates it once,
:meth:`QuantRules.resolve` returns the :class:`LayerConfig` of one module. The class that carries such a dict through
Hugging Face's ``from_pretrained`` is :class:`hfquant.integrations.config.HfQuantConfig`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field

from hfquant.algorithms import ROUNDINGS, TRANSFORMS
from hfquant.enums import SegPattern
from hfquant.layer_config import InputQuant, LayerConfig, Quant, WeightQuant
from hfquant.presets import PRESETS, SUCCEEDED
from hfquant.schema import ConfigError, Section, validated


class SearchRule(Section):
    """Choose each layer's config with :mod:`hfquant.search`, on the calibration data, when a model is quantized.

    ``budget``: stored bits per weight (at most 32), a number of bytes, or a preset whose size is the budget.
    ``choices``: formats, presets or config fields, as for :func:`hfquant.search_bits`.
    """

    budget: float | str
    choices: tuple[str | dict[str, Any], ...] = Field(("int3", "int4", "int5", "int6", "int8"), strict=False)


#: Sections whose class depends on ``type``, each with its default type.
_TABLES: dict[str, tuple[Mapping[str, type[Section]], str]] = {
    "opt": (TRANSFORMS, "smooth"),
    "calib": (ROUNDINGS, "amax"),
}
_QUANTS: dict[str, type[Quant]] = {"input_quant": InputQuant, "weight_quant": WeightQuant}

#: The reference implementation's spellings.
_KEYS = {"blocksize": "block_size", "percdamp": "damp", "groupsize": "group_size", "actorder": "act_order"}
_NAMES = {
    "fpe4m3": "fp8e4m3",
    "fpe5m2": "fp8e5m2",
    **{p.value.replace("2", "_to_"): p.value for p in SegPattern},
}


class QuantRules:
    """A validated config: the default and the overrides, in the order listed.

    An entry overrides only the fields it names; a sub-dict that names another ``type`` replaces the whole sub-dict. If
    several globs match a module, they are applied in the order listed, so the last one wins. "search" is not a glob but
    a :class:`SearchRule`.

    Args:
        config: the entries; None for the reference implementation's defaults.
        excluded: names, path components or globs of layers to leave alone, in addition to the default ones.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, excluded: Iterable[str] = ()) -> None:
        raw = _plain({} if config is None else config, "config")
        if not isinstance(raw, dict):
            raise TypeError(f"a quantization config is a dict, got {type(config).__name__}")
        if "default" not in raw and (fields := [key for key in raw if key in LayerConfig.model_fields]):
            raise ConfigError(
                f"config: {fields[0]!r} is a field, not the name of a layer; wrap the fields: "
                '{"default": {...}, "<glob>": {...}}'
            )
        self.excluded = list(excluded)
        #: The entries as given, in JSON types, with enum members replaced by their values.
        self.raw: dict[str, dict[str, Any]] = {}
        #: How to search for each layer's config; None if the entries define it.
        self.search: SearchRule | None = None
        for key, entry in raw.items():
            where = f"config[{key!r}]"
            if not isinstance(entry, dict):
                raise ConfigError(f"{where}: expected a dict of fields, got {entry!r}")
            checked: Section
            if key == "search":
                checked = self.search = validated(SearchRule, entry, where)
            else:
                checked = _validate(entry, where, patch=key != "default")
            self.raw[key] = checked.model_dump(mode="json", exclude_unset=True)
        self.patterns = [k for k in self.raw if k not in ("default", "search")]
        self._resolved: dict[tuple[str, ...], LayerConfig] = {}
        self.default = self.resolve()

    def matching(self, *names: str) -> tuple[str, ...]:
        """Return the globs that match any of a module's names, in the order listed (``fnmatchcase``)."""
        return tuple(p for p in self.patterns if any(fnmatchcase(n, p) for n in names))

    def resolve(self, *names: str) -> LayerConfig:
        """Return the config of the module ``names[0]`` (the other names are its aliases).

        Raises:
            ConfigError: the merged entries are an invalid combination; the message names the layer.
        """
        return self._merged(self.matching(*names), names[0] if names else None)

    @property
    def needs_data(self) -> bool:
        """Whether any layer could need calibration data: by the default, or by a glob and those that cover it."""
        if self.search is not None or self.default.needs_data:
            return True
        # Only globs that would need data if they were enabled are worth the search for what else applies there.
        needing = (p for p in self.patterns if _enabled(_merge(self.raw.get("default", {}), self.raw[p])).needs_data)
        return any(self._needs_data(glob) for glob in needing)

    def _needs_data(self, glob: str) -> bool:
        """Return whether layers that a glob matches could need data, by what covers it and what may enable them."""
        covers = {p for p in self.patterns if p == glob or fnmatchcase(glob, p)}
        enabling = {p for p in self.patterns if self.raw[p].get("enable") is True and _may_meet(p, glob)} - covers
        if self._merged(tuple(p for p in self.patterns if p in covers)).needs_data:
            return True
        for also in enabling:
            with suppress(ConfigError):  # the two may never meet
                if self._merged(tuple(p for p in self.patterns if p in covers or p == also)).needs_data:
                    return True
        return False

    def _merged(self, globs: tuple[str, ...], layer: str | None = None) -> LayerConfig:
        if globs not in self._resolved:
            merged = self.raw.get("default", {})
            for glob in globs:
                merged = _merge(merged, self.raw[glob])
            where = " + ".join(f"config[{k!r}]" for k in ("default", *globs))
            self._resolved[globs] = _validate(merged, where + (f" for layer {layer!r}" if layer and globs else ""))
        return self._resolved[globs]


def _may_meet(one: str, other: str) -> bool:
    """Return whether some name may match two globs; true whenever both have wildcards."""
    wild = [bool(set("*?[") & set(glob)) for glob in (one, other)]
    return all(wild) or fnmatchcase(one, other) or fnmatchcase(other, one)


def _enabled(entry: Mapping[str, Any]) -> LayerConfig:
    return _validate({**entry, "enable": True}, "config", patch=True)


#: Maximum nesting depth of a config; guards against a dict that contains itself.
_DEPTH = 8


def _plain(value: Any, where: str, key: str = "", depth: int = 0) -> Any:
    """Convert to JSON types: enums to strings, tuples to lists, the reference's spellings to ours."""
    if depth > _DEPTH:
        raise ConfigError(f"{where[:80]}: nested more than {_DEPTH} levels deep")
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, Section):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        if odd := [k for k in value if not isinstance(k, str)]:
            raise ConfigError(f"{where}: key {odd[0]!r} is not a string")
        return {_KEYS.get(k, str(k)): _plain(v, f"{where}[{k!r}]", k, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]", key, depth + 1) for i, v in enumerate(value)]
    if isinstance(value, str) and key in ("type", "search_patterns"):
        return _NAMES.get(value.lower(), value.lower())
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"{where}: {value!r} of type {type(value).__name__} cannot be stored in JSON")


def _merge(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in patch.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not _other_type(key, old, value):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _other_type(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether ``new`` names a type different from that of ``old``, which may rely on the field's default."""
    default = _TABLES[key][1] if key in _TABLES else "int8"
    return "type" in new and new["type"] != old.get("type", default)


def _validate(entry: Mapping[str, Any], where: str, patch: bool = False) -> LayerConfig:
    fields: dict[str, Any] = dict(entry)
    errors = []
    for key, value in entry.items():
        try:
            if isinstance(value, dict) and key in _TABLES:
                fields[key] = _typed_section(key, value, f"{where}.{key}", patch)
            elif isinstance(value, dict) and key in _QUANTS:
                fields[key] = validated(_QUANTS[key], value, f"{where}.{key}", patch)
        except ConfigError as error:
            errors.append(str(error))
            del fields[key]
    try:
        config = validated(LayerConfig, fields, where, patch)
    except ConfigError as error:
        errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))
    return config


def _typed_section(key: str, entry: Mapping[str, Any], where: str, patch: bool) -> Section:
    """Validate a section by the class of its ``type``; a patch without a type by the first class with its keys."""
    table, default = _TABLES[key]
    name = entry.get("type", default)
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"{where}.type: expected one of {', '.join(table)}, got {name!r}")
    if patch and "type" not in entry:
        name = next((n for n, kind in table.items() if entry.keys() <= kind.model_fields.keys()), name)
    fields = dict(entry)
    for field in entry.keys() - table[name].model_fields.keys():
        others = [n for n, kind in table.items() if field in kind.model_fields]
        if not others:
            allowed = dict.fromkeys(f for kind in table.values() for f in kind.model_fields)
            raise ConfigError(f"{where}.{field}: unknown key; allowed are {', '.join(allowed)}")
        other = validated(table[others[0]], {field: entry[field]}, where, patch=True)
        if getattr(other, field) != table[others[0]].model_fields[field].default:
            needed = " or ".join(f'"{n}"' for n in others)
            raise ConfigError(f"{where}: {field}={entry[field]!r} needs type {needed}")
        del fields[field]
    return validated(table[name], fields, where, patch)


def parse(config: str | Mapping[str, Any] | None, excluded: Iterable[str] = ()) -> QuantRules:
    """Validate a config dict, the name of a preset, or None (the reference's defaults: W8A8, SMOOTH, static).

    ``excluded`` is that of :class:`QuantRules`.

    Raises:
        ConfigError: unknown preset, key or value, or an invalid combination.
        TypeError: ``config`` is none of these.
    """
    if isinstance(config, str):
        if config in SUCCEEDED:
            raise ConfigError(f"preset {config!r} was removed; use {SUCCEEDED[config]!r}")
        if config not in PRESETS:
            near = difflib.get_close_matches(config.lower(), PRESETS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"unknown preset {config!r}{hint}; available: {', '.join(PRESETS)}")
        config = PRESETS[config]
    return QuantRules(config, excluded)
