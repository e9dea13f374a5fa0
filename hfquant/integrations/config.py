"""HfQuantConfig: a quantization config for transformers and diffusers, in memory and in config.json."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Any

from hfquant import config as rules
from hfquant.calibration.self_made import SelfSpec
from hfquant.config import ConfigError, QuantRules

if TYPE_CHECKING:
    _BASES: Any = object
else:
    # transformers, where installed, only registers subclasses of its mixin. diffusers does not require its own, and
    # importing it takes seconds that users of transformers alone should not spend.
    _BASES = ()
    with suppress(ImportError):
        from transformers.utils.quantization_config import QuantizationConfigMixin

        _BASES += (QuantizationConfigMixin,)

METHOD = "hfquant"
#: Version of the checkpoint format; raised when readers of this version could not read what a later one writes.
FORMAT_VERSION = 2


class QuantMethod(str, Enum):
    """diffusers reads ``quant_method.value``, transformers uses the string."""

    HFQUANT = METHOD


class HfQuantConfig(*_BASES):  # type: ignore[misc]
    """Config for ``from_pretrained(quantization_config=...)`` of any transformers or diffusers model.

    Args:
        config: a dict (docs/config.md), the name of a preset (:data:`hfquant.PRESETS`), or None for
            "w8a8-dynamic".
        calibration: data for configs that need it (static activations, SMOOTH, SVD, GPTQ): a list of strings, a
            ``DataLoader`` or any re-iterable of model inputs. Never stored, and released after use. With "self", or a
            dict ``{"source": "self", "seed": 0, "samples": 16, "seqlen": 512}``, the model generates its own data, as
            it does if no data is given; this form is stored.
        modules_to_not_convert: names (whole, a path component, or globs) to leave alone, in addition to the defaults
            (output heads, tied weights, the model's ``_keep_in_fp32_modules``).
        per_layer_mode: solve layer by layer, so that each sees the quantized layers before it.
        guard: after quantizing with data, check each layer and move any with a large error to a safer format
            (:mod:`hfquant.guard`).

    Raises:
        ConfigError: unknown key, wrong value, or invalid combination.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | str | None = None,
        calibration: Any = None,
        modules_to_not_convert: Sequence[str] | None = None,
        per_layer_mode: bool = False,
        guard: bool = True,
    ) -> None:
        for key, value in (("per_layer_mode", per_layer_mode), ("guard", guard)):
            if not isinstance(value, bool):
                raise ConfigError(f"{key}: expected True or False, got {value!r}")
        self.quant_method = QuantMethod.HFQUANT
        self.rules = rules.parse("w8a8-dynamic" if config is None else config)
        if modules_to_not_convert is not None:
            self.modules_to_not_convert = modules_to_not_convert
        SelfSpec.of(calibration)  # validates it
        self.calibration = calibration
        self.per_layer_mode, self.guard = per_layer_mode, guard
        #: What the plan decided for each layer beyond the rules; only set in a model's own copy.
        self.layers: dict[str, dict[str, Any]] = {}
        #: Exact names of the linears that stay in full precision, and why; only set in a model's own copy.
        self.skipped: dict[str, str] = {}
        #: Description of the calibration data, as JSON; only set in a model's own copy, and empty if the config needs
        #: none.
        self.provenance: dict[str, Any] = {}

    @classmethod
    def of(cls, config: Any) -> HfQuantConfig:
        """Return ``config`` itself, or one made from a dict, a preset's name, or None (the reference's defaults)."""
        if isinstance(config, cls):
            return config
        if config is None or isinstance(config, (str, Mapping)):
            return cls({} if config is None else config)
        raise TypeError(
            f"config: expected a dict, a preset's name, an HfQuantConfig or None, got {type(config).__name__}"
        )

    @property
    def modules_to_not_convert(self) -> list[str] | None:
        """Names (whole, a path component, or globs) to leave alone; None without any.

        Raises:
            ConfigError: set to something else.
        """
        return self.rules.excluded or None

    @modules_to_not_convert.setter
    def modules_to_not_convert(self, names: Sequence[str] | None) -> None:
        names = [] if names is None else names
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"modules_to_not_convert: expected a list of names, got {names!r}")
        self.rules = QuantRules(self.rules.raw, names)  # a shallow copy of this config may share the former rules

    @property
    def needs_data(self) -> bool:
        """Whether any entry of the config needs calibration data."""
        return self.rules.needs_data

    def for_model(
        self, layers: Mapping[str, dict[str, Any]], skipped: Mapping[str, str], made: SelfSpec | None = None
    ) -> HfQuantConfig:
        """Return a model's own copy: with its plan and its skipped linears, and without the data.

        Args:
            layers: what the plan decided for each layer.
            skipped: the linears that stay in full precision, and why.
            made: the data that the model generated itself, if any.
        """
        own = copy.deepcopy(self)
        own.calibration = None if made is None else made.to_dict()
        own.layers, own.skipped = dict(layers), dict(sorted(skipped.items()))
        return own

    def to_dict(self) -> dict[str, Any]:
        """Return the form stored in config.json: enough to build every module without data, without user objects."""
        made = SelfSpec.of(self.calibration)
        return {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "config": copy.deepcopy(self.rules.raw),
            **({} if made is None else {"calibration": made.to_dict()}),
            "modules_to_not_convert": self.modules_to_not_convert,
            "per_layer_mode": self.per_layer_mode,
            **({} if self.guard else {"guard": False}),
            "layers": copy.deepcopy(self.layers),
            "skipped": dict(self.skipped),
            **({"provenance": copy.deepcopy(self.provenance)} if self.provenance else {}),
        }

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> HfQuantConfig | tuple[HfQuantConfig, dict[str, Any]]:
        """Return the inverse of :meth:`to_dict`; ``calibration`` may be passed in addition to the stored keys.

        Raises:
            ConfigError: unknown keys, or a format version this hfquant cannot read.
        """
        values = {**config_dict, **{k: v for k, v in kwargs.items() if k in _ARGUMENTS}}
        unused = {k: v for k, v in kwargs.items() if k not in _ARGUMENTS}
        method, version = values.pop("quant_method", METHOD), values.pop("format_version", FORMAT_VERSION)
        if getattr(method, "value", method) != METHOD:
            raise ConfigError(f"quant_method: expected {METHOD!r}, got {method!r}")
        if type(version) is not int or version != FORMAT_VERSION:
            newer = type(version) is int and version > FORMAT_VERSION
            raise ConfigError(
                f"format_version: this hfquant reads version {FORMAT_VERSION}, the checkpoint has {version!r}; "
                + ("upgrade hfquant to load it" if newer else "quantize the model again")
            )
        if "format_version" in config_dict and "config" not in values:
            raise ConfigError("the stored quantization_config lacks its key 'config'")
        layers, skipped = values.pop("layers", {}), values.pop("skipped", {})
        provenance = values.pop("provenance", {})
        if unknown := set(values) - set(_ARGUMENTS):
            allowed = ", ".join((*_ARGUMENTS, "layers", "skipped", "provenance"))
            raise ConfigError(f"unknown keys {sorted(unknown)}; allowed are {allowed}")
        if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
            raise ConfigError("layers: expected a dict of dicts, one per layer")
        if not isinstance(skipped, dict) or not all(isinstance(v, str) for v in skipped.values()):
            raise ConfigError("skipped: expected a dict of reasons, one per linear")
        if not isinstance(provenance, dict):
            raise ConfigError("provenance: expected a dict")
        config = cls(**values)
        config.layers, config.skipped = copy.deepcopy(layers), dict(skipped)
        config.provenance = copy.deepcopy(provenance)
        return (config, unused) if return_unused_kwargs else config

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same as :meth:`to_dict`, since no defaults are worth omitting."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the stored form as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __deepcopy__(self, memo: dict[int, Any]) -> HfQuantConfig:
        # transformers deep-copies configs; the data may be large, or impossible to copy.
        new = copy.copy(self)
        memo[id(self)] = new
        new.rules = QuantRules(self.rules.raw, self.rules.excluded)
        new.layers, new.skipped = copy.deepcopy(self.layers), dict(self.skipped)
        new.provenance = copy.deepcopy(self.provenance)
        return new

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        # For dict(config). The libraries' own version would copy every attribute, including the data.
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HfQuantConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


_ARGUMENTS = ("config", "calibration", "modules_to_not_convert", "per_layer_mode", "guard")
