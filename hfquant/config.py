"""What to quantize and how: the enums, the per-layer config and its validation.

A config is a plain JSON-able dict, ``{"default": {...}, "<glob>": {...}}``. :func:`parse` validates it once,
:meth:`QuantRules.resolve` gives the :class:`LayerConfig` of one module. The Hugging Face facing class that carries
such a dict through ``from_pretrained`` is :class:`hfquant.integrations.config.HfQuantConfig`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hfquant.presets import PRESETS


class _NamedEnum(str, Enum):
    """A string enum whose value is its name in lower case, accepted in any case."""

    @classmethod
    def _missing_(cls, value: object) -> Enum | None:
        return cls.__members__.get(value.upper()) if isinstance(value, str) else None

    def __str__(self) -> str:
        return str(self.value)


class DType(_NamedEnum):
    """Number formats for weights and activations. FP8 as in the OCP spec (E4M3 without infinities: "fn")."""

    INT4 = "int4"
    INT6 = "int6"
    INT8 = "int8"
    INT16 = "int16"
    FP8E4M3 = "fp8e4m3"
    FP8E5M2 = "fp8e5m2"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def bits(self) -> int:
        """Bits that one code takes on disk."""
        return {"int4": 4, "int6": 6, "int16": 16, "fp16": 16, "bf16": 16}.get(self.value, 8)

    @property
    def is_integer(self) -> bool:
        """INT4, INT6, INT8 or INT16."""
        return self.value.startswith("int")

    @property
    def is_scaled(self) -> bool:
        """Whether codes carry a scale: all but FP16 and BF16, which are plain casts."""
        return self not in (DType.FP16, DType.BF16)


class Optimum(_NamedEnum):
    """How a layer is transformed before it is quantized."""

    DEFAULT = "default"
    SMOOTH = "smooth"
    SVD = "svd"


class Calibrate(_NamedEnum):
    """How weight codes are chosen."""

    AMAX = "amax"
    GPTQ = "gptq"


class SegPattern(_NamedEnum):
    """Dataflow around a linear that :mod:`hfquant.dataflow.trace` looks for."""

    LINEAR2CHUNK = "linear2chunk"
    LINEAR2SPLIT = "linear2split"
    CONCAT2LINEAR = "concat2linear"
    STACK2LINEAR = "stack2linear"
    RESHAPE2LINEAR = "reshape2linear"
    ACTIVATION2LINEAR = "activation2linear"

    @classmethod
    def all(cls) -> list[SegPattern]:
        """Every pattern: segments and dual scale."""
        return list(cls)

    @classmethod
    def seg(cls) -> list[SegPattern]:
        """The patterns that split a layer into segments: all but ACTIVATION2LINEAR."""
        return [p for p in cls if p is not cls.ACTIVATION2LINEAR]


class ConfigError(ValueError):
    """A quantization config that cannot be used. The message names the key, the value and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    def _reject(self, names: Sequence[str], why: str) -> None:
        for name in names:
            if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} {why}")


def _int_or_none(value: Any) -> Any:
    """``Literal`` alone takes True and 1.0 for 1."""
    if type(value) not in (int, type(None)):
        raise ValueError(f"expected None, -1 or (weights) 1, got {value!r}")
    return value


def _is_patch(info: ValidationInfo) -> bool:
    """A glob's entry is a patch: its fields are checked alone, combinations once it is merged for a layer."""
    return bool(info.context and info.context.get("patch"))


class SearchAlpha(_Section):
    """Grid of smoothing strengths tried for each layer: ``min, min + step, ... max``."""

    enable: bool = False
    min: float = Field(0.0, ge=0.0, le=1.0)
    max: float = Field(1.0, ge=0.0, le=1.0)
    step: float = Field(0.1, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _ordered(self, info: ValidationInfo) -> SearchAlpha:
        if not _is_patch(info) and self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}")
        return self

    def grid(self) -> list[float]:
        """The alphas to try, in ascending order; ``max`` is included even where ``step`` does not hit it."""
        steps = int((self.max - self.min) / self.step + 1e-9)
        alphas = [round(self.min + i * self.step, 10) for i in range(steps + 1)]
        return alphas if alphas[-1] >= self.max - 1e-9 else [*alphas, self.max]


class OptConfig(_Section):
    """Transformation before quantization: SmoothQuant (arXiv 2211.10438) or SVDQuant (arXiv 2411.05007).

    ``magnitude`` is what smoothing balances between a channel of the inputs and its column of the weights: the largest
    values, which set the scale of quantized activations, or the root mean squares, for weights alone.
    """

    type: Optimum = Optimum.SMOOTH
    alpha: float = Field(0.5, ge=0.0, le=1.0)
    magnitude: Literal["amax", "rms"] = "amax"
    low_rank: int = Field(32, ge=1)
    search_alpha_config: SearchAlpha = SearchAlpha()

    @model_validator(mode="after")
    def _fields_fit_type(self, info: ValidationInfo) -> OptConfig:
        if not _is_patch(info):
            if self.type is Optimum.DEFAULT:
                self._reject(["alpha", "magnitude", "low_rank", "search_alpha_config"], 'needs type "smooth" or "svd"')
            elif self.type is Optimum.SMOOTH:
                self._reject(["low_rank"], 'needs type "svd"')
        return self


class CalibConfig(_Section):
    """How codes are chosen: round to nearest on the amax grid, or GPTQ (arXiv 2210.17323)."""

    type: Calibrate = Calibrate.AMAX
    block_size: int = Field(128, ge=1)
    damp: float = Field(0.01, gt=0.0, le=1.0)
    act_order: bool = False
    group_size: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _fields_fit_type(self, info: ValidationInfo) -> CalibConfig:
        if not _is_patch(info) and self.type is Calibrate.AMAX:
            self._reject(["block_size", "damp", "act_order", "group_size"], 'needs type "gptq"')
        return self


class InputQuant(_Section):
    """Activations. ``axis``: None = one scale a tensor (a segment), -1 = one scale a token (dynamic only)."""

    type: DType = DType.INT8
    axis: Annotated[Literal[None, -1], BeforeValidator(_int_or_none)] = None
    dynamic: bool = False

    @model_validator(mode="after")
    def _static_per_token(self, info: ValidationInfo) -> InputQuant:
        if not _is_patch(info) and self.type.is_scaled and self.axis == -1 and not self.dynamic:
            raise ValueError("axis=-1 (one scale a token) needs dynamic=True: a static scale cannot know the tokens")
        return self


class WeightQuant(_Section):
    """Weights. ``axis``: None = one scale a tensor, 1 or -1 = one an output channel; ``group_size`` overrides it."""

    type: DType = DType.INT8
    axis: Annotated[Literal[None, 1, -1], BeforeValidator(_int_or_none)] = None
    group_size: int | None = Field(None, ge=1)
    symmetric: bool = True
    clip: Literal["amax", "mse"] = "amax"

    @model_validator(mode="after")
    def _fields_fit_type(self, info: ValidationInfo) -> WeightQuant:
        if not _is_patch(info):
            if not self.type.is_integer:
                self._reject(["symmetric"], f"needs an integer type, not {self.type}")
            if not self.type.is_scaled:
                self._reject(["axis", "group_size", "clip"], f"has no meaning for {self.type}, which has no scale")
        return self


class LayerConfig(_Section):
    """Everything decided for one linear before its data is seen. Defaults are the reference's."""

    enable: bool = True
    seglinear: bool = True
    search_patterns: tuple[SegPattern, ...] = tuple(SegPattern.all())
    real_quant: bool = False
    opt: OptConfig = OptConfig()
    calib: CalibConfig = CalibConfig()
    input_quant: InputQuant | None = InputQuant()
    weight_quant: WeightQuant = WeightQuant()

    @field_validator("search_patterns")
    @classmethod
    def _unique(cls, value: tuple[SegPattern, ...]) -> tuple[SegPattern, ...]:
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _combinations(self, info: ValidationInfo) -> LayerConfig:
        if _is_patch(info):
            return self
        weight = self.weight_quant
        if self.calib.type is Calibrate.GPTQ:
            if not weight.type.is_scaled:
                raise ValueError(f'calib.type "gptq" needs an integer or FP8 weight_quant.type, not {weight.type}')
            if self.calib.group_size and weight.group_size and self.calib.group_size != weight.group_size:
                raise ValueError(
                    f"calib.group_size={self.calib.group_size} contradicts weight_quant.group_size={weight.group_size}"
                )
        return self

    @property
    def group_size(self) -> int | None:
        """Input channels that share a weight scale: ``weight_quant.group_size``, or GPTQ's own."""
        return self.weight_quant.group_size or self.calib.group_size

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is needed: static activations, smoothing, a low-rank branch, GPTQ."""
        static = self.input_quant is not None and self.input_quant.type.is_scaled and not self.input_quant.dynamic
        return self.enable and (static or self.opt.type is not Optimum.DEFAULT or self.calib.type is not Calibrate.AMAX)


_SECTIONS: dict[str, type[_Section]] = {
    "opt": OptConfig,
    "search_alpha_config": SearchAlpha,
    "calib": CalibConfig,
    "input_quant": InputQuant,
    "weight_quant": WeightQuant,
}


class QuantRules:
    """A validated config: the default and the overrides, in the order they were listed.

    An entry overrides only the fields it names; a sub-dict that names another ``type`` replaces the whole sub-dict.
    Where several globs match a module they are applied in the order listed, so the last one wins.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        raw = _plain({} if config is None else config, "config")
        if not isinstance(raw, dict):
            raise TypeError(f"a quantization config is a dict, got {type(config).__name__}")
        #: The entries as given, in JSON's own types and with enum members spelt as their values.
        self.raw: dict[str, dict[str, Any]] = {}
        for key, entry in raw.items():
            if not isinstance(entry, dict):
                raise ConfigError(f"config[{key!r}]: expected a dict of fields, got {entry!r}")
            checked = _validate(entry, f"config[{key!r}]", patch=key != "default")
            self.raw[key] = checked.model_dump(mode="json", exclude_unset=True)
        self.patterns = [k for k in self.raw if k != "default"]
        self._resolved: dict[tuple[str, ...], LayerConfig] = {}
        self.default = self.resolve()

    def matching(self, *names: str) -> tuple[str, ...]:
        """The globs that match any of a module's names, in the order listed (``fnmatchcase``)."""
        return tuple(p for p in self.patterns if any(fnmatchcase(n, p) for n in names))

    def resolve(self, *names: str) -> LayerConfig:
        """The config of the module called ``names[0]`` (the others are aliases, e.g. without the base-model prefix).

        Raises:
            ConfigError: the merged entries are an impossible combination; the message names the layer.
        """
        return self._merged(self.matching(*names), names[0] if names else None)

    @property
    def needs_data(self) -> bool:
        """Whether any layer could need calibration data: by the default, or by a glob and those that cover it."""
        covers = [tuple(p for p in self.patterns if p == glob or fnmatchcase(glob, p)) for glob in self.patterns]
        return any(self._merged(globs).needs_data for globs in [(), *covers])

    def _merged(self, globs: tuple[str, ...], layer: str | None = None) -> LayerConfig:
        if globs not in self._resolved:
            merged = self.raw.get("default", {})
            for glob in globs:
                merged = _merge(merged, self.raw[glob])
            where = " + ".join(f"config[{k!r}]" for k in ("default", *globs))
            self._resolved[globs] = _validate(merged, where + (f" for layer {layer!r}" if layer and globs else ""))
        return self._resolved[globs]


def _plain(value: Any, where: str) -> Any:
    """Enums to their strings, tuples to lists, mappings to dicts: what JSON can carry."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        if odd := [k for k in value if not isinstance(k, str)]:
            raise ConfigError(f"{where}: key {odd[0]!r} is not a string")
        return {str(k): _plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
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
    """Whether ``new`` names another type than ``old`` has (``old`` may leave it to the field's default)."""
    return "type" in new and new["type"] != old.get("type", _SECTIONS[key].model_fields["type"].default)


def _validate(entry: Mapping[str, Any], where: str, patch: bool = False) -> LayerConfig:
    try:
        # Strict, but by JSON's rules: enums come as strings, tuples as lists.
        return LayerConfig.model_validate_json(json.dumps(entry), context={"patch": patch})
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, where) for e in error.errors())) from None


def _explain(error: Any, where: str) -> str:
    """One pydantic error as one line that names the key, the value and what is allowed."""
    path = [str(p) for p in error["loc"]]
    key = ".".join([where, *path])
    if error["type"] == "extra_forbidden":
        section = _SECTIONS[path[-2]] if len(path) > 1 else LayerConfig
        return f"{key}: unknown key; allowed are {', '.join(section.model_fields)}"
    if error["type"] in ("value_error", "assertion_error"):
        return f"{key}: {error['ctx']['error']}"
    return f"{key}: {error['msg']}, got {error['input']!r}"


def parse(config: str | Mapping[str, Any] | None) -> QuantRules:
    """Validate a config dict, the name of a preset, or None (the reference's defaults: W8A8, SMOOTH, static).

    Raises:
        ConfigError: unknown preset, key or value, or an impossible combination.
        TypeError: ``config`` is neither.
    """
    if isinstance(config, str):
        if config not in PRESETS:
            raise ConfigError(f"unknown preset {config!r}; there are {', '.join(PRESETS)}")
        return QuantRules(PRESETS[config])
    return QuantRules(config)
