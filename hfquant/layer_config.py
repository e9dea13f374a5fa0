"""The config of one layer: its sections, their defaults and the combinations that are valid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, ValidationInfo, model_validator

from hfquant.algorithms import Identity, Nearest, Rounding, Smooth, Transform
from hfquant.enums import SegPattern
from hfquant.formats import NumberFormat, number_format
from hfquant.schema import Section, is_patch


def _int_or_none(value: Any) -> Any:
    """Refuse True and 1.0, which ``Literal`` alone accepts as 1."""
    if type(value) not in (int, type(None)):
        raise ValueError(f"expected None, -1 or (weights) 1, got {value!r}")
    return value


def _known_format(name: str) -> str:
    number_format(name)
    return name


def _patterns(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected a list of patterns, got {value!r}")
    if unknown := [v for v in value if not isinstance(v, str) or v not in SegPattern._value2member_map_]:
        raise ValueError(f"unknown pattern {unknown[0]!r}; available: {', '.join(SegPattern)}")
    return tuple(SegPattern(v) for v in dict.fromkeys(value))


_FormatName = Annotated[str, AfterValidator(_known_format)]


class Quant(Section):
    """The fields that activations and weights share."""

    type: _FormatName = Field("int8", description="Number format.")

    @property
    def format(self) -> NumberFormat:
        """The number format."""
        return number_format(self.type)


class InputQuant(Quant):
    """How activations are quantized."""

    axis: Annotated[Literal[None, -1], BeforeValidator(_int_or_none)] = Field(
        None,
        description="None: one scale per tensor, or per segment. -1: one scale per token; needs `dynamic`.",
    )
    dynamic: bool = Field(
        False,
        description="True: scales are computed from the input at run time. False: they are calibrated beforehand.",
    )
    segments: int = Field(
        1,
        ge=1,
        description="Number of parts of about equal size that the input channels are cut into, each with its own "
        "scales, so that an outlier only affects its own part. No part is narrower than 64 channels; inputs of "
        "convolutions are not cut.",
    )
    int8_share: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share of the model's multiplications that may have INT8 inputs if the type has fewer bits: the "
        "smallest layers, up to this share. These take almost no time, and some matter most: a denoiser's last "
        "projection and its modulation by the timestep.",
    )
    token_fallback: bool = Field(
        False,
        description="Switch a layer to dynamic per-token scales if no calibrated scale fits its inputs: if the error "
        "of its output, on rows not used to compute the scale, is more than twice the format's nominal error.",
    )

    @model_validator(mode="after")
    def _static_per_token(self, info: ValidationInfo) -> InputQuant:
        if not is_patch(info) and self.format.has_scale and self.axis == -1 and not self.dynamic:
            raise ValueError("axis=-1 (one scale per token) needs dynamic=True: a static scale cannot know the tokens")
        if not is_patch(info) and self.token_fallback and not self.static:
            raise ValueError("token_fallback is for calibrated scales: set dynamic=False and a type that has a scale")
        if not is_patch(info) and self.segments > 1 and not self.format.has_scale:
            raise ValueError(f"segments={self.segments} has no meaning for {self.type}, which has no scale")
        return self

    @property
    def static(self) -> bool:
        """Whether the scale is calibrated."""
        return self.format.has_scale and not self.dynamic


class WeightQuant(Quant):
    """How weights are quantized."""

    axis: Annotated[Literal[None, 1, -1], BeforeValidator(_int_or_none)] = Field(
        None, description="None: one scale per tensor. 1 or -1: one scale per output channel."
    )
    group_size: int | None = Field(
        None,
        ge=1,
        description="Number of input channels that share a scale within each output channel; overrides `axis`. Groups "
        "never straddle segments; if the size does not divide a segment, the segment's last group is shorter.",
    )
    symmetric: bool = Field(True, description="False: groups also have zero points; integer formats only.")
    int8_share: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share of the model's weights that may be INT8 if the type has fewer bits: the smallest layers "
        "outside the repeated blocks, up to this share. One of them is a denoiser's last projection, whose rounding "
        "error stays in the image.",
    )
    clip: Literal["amax", "mse"] = Field(
        "amax",
        description="How the range is chosen. amax: up to the largest weight. mse: clipped to minimize the squared "
        "error, weighted by the inputs' second moments if they are known.",
    )
    scale: Literal["two_level", "float32"] = Field(
        "two_level",
        description="How group scales are stored. two_level: one byte per group times one float32 per row. float32: "
        "one float32 per group.",
    )

    @model_validator(mode="after")
    def _fields_fit_type(self, info: ValidationInfo) -> WeightQuant:
        if not is_patch(info):
            if not self.format.is_integer:
                self._reject(["symmetric"], f"needs an integer type, not {self.type}")
            if not self.format.has_scale:
                self._reject(["axis", "group_size", "clip"], f"has no meaning for {self.type}, which has no scale")
        return self

    def _reject(self, names: Sequence[str], why: str) -> None:
        for name in names:
            if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} {why}")


#: Layers that stay in full precision unless ``include`` names them or they have their own config entry
#: (``{"<glob>": {"enable": True}}``), each with a description.
OPTIONAL = {
    "autoencoder_convs": "a convolution of an autoencoder",
    "edge_convs": "a convolution that reads or writes few channels, at an end of the model",
    "embeddings": "an embedding",
    "output_heads": "the model's output head",
}


def _optional(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected a list of names, got {value!r}")
    if unknown := [v for v in value if not isinstance(v, str) or v not in OPTIONAL]:
        raise ValueError(f"unknown name {unknown[0]!r}; available: {', '.join(OPTIONAL)}")
    return tuple(dict.fromkeys(value))


class LayerConfig(Section):
    """Everything that is decided for one layer before any data is seen. Defaults are the reference implementation's."""

    enable: bool = Field(True, description="Quantize the layer.")
    float_share: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share of the model's weights that may stay in full precision: the smallest layers outside the "
        "repeated blocks, up to this share. One of them is a denoiser's last projection, whose rounding causes most of "
        "the error at 8 bits.",
    )
    seglinear: bool = Field(True, description="Give each segment of the input and output its own scales.")
    search_patterns: Annotated[tuple[SegPattern, ...], BeforeValidator(_patterns)] = Field(
        tuple(SegPattern.all()), description="Dataflow patterns from which segments and dual scales are derived."
    )
    real_quant: bool = Field(
        False,
        description="True: multiply codes in low-bit kernels. False: fake quantization, with floats rounded to the "
        "values of the codes.",
    )
    opt: SerializeAsAny[Transform] = Field(
        Smooth(), description="Transform of weight and input before rounding; see the options of each `type`."
    )
    calib: SerializeAsAny[Rounding] = Field(
        Nearest(), description="How the transformed weight is rounded; see the options of each `type`."
    )
    input_quant: InputQuant | None = Field(
        InputQuant(), description="How activations are quantized; None leaves them in floating point."
    )
    weight_quant: WeightQuant = Field(WeightQuant(), description="How weights are quantized.")
    include: Annotated[tuple[str, ...], BeforeValidator(_optional)] = Field(
        (), description="Kinds of layers to quantize that otherwise stay in floating point."
    )

    @model_validator(mode="after")
    def _combinations(self, info: ValidationInfo) -> LayerConfig:
        if is_patch(info):
            return self
        if self.calib.needs_scale and not self.weight_quant.format.has_scale:
            raise ValueError(
                f'calib.type "{self.calib.type}" needs a weight_quant.type with a scale, not {self.weight_quant.type}'
            )
        if self.opt.rotation and self.input_quant is not None and self.input_quant.static:
            raise ValueError(
                f'opt.type "{self.opt.type}" mixes input channels, and scales are calibrated from the ranges of single '
                "channels: set dynamic=True in input_quant"
            )
        group, own = self.weight_quant.group_size, getattr(self.calib, "group_size", None)
        if group and own and own != group:
            raise ValueError(f"calib.group_size={own} contradicts weight_quant.group_size={group}")
        return self

    @property
    def group_size(self) -> int | None:
        """Number of input channels that share a weight scale: ``weight_quant.group_size``, or the rounding's own."""
        return self.weight_quant.group_size or getattr(self.calib, "group_size", None)

    @property
    def needs_data(self) -> bool:
        """Whether a static activation scale, the transform or the rounding needs calibration data."""
        static = self.input_quant is not None and self.input_quant.static
        return self.enable and (static or self.opt.needs_data or self.calib.needs_data)

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics that the transform and the rounding need."""
        return self.opt.needs | self.calib.needs

    def plain(self) -> LayerConfig:
        """Return the config with the same formats, no transform and round-to-nearest."""
        weight = self.weight_quant.model_copy(update={"group_size": self.group_size})
        inputs = self.input_quant and self.input_quant.model_copy(update={"token_fallback": False})
        update = {"opt": Identity(), "calib": Nearest(), "weight_quant": weight, "input_quant": inputs}
        return self.model_copy(update=update)
