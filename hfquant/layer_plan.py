"""The plan of one layer: enough to build its quantized module empty, or to restore it from a checkpoint's config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import nn

from hfquant.algorithms import TensorSpec, Transform
from hfquant.config import ConfigError, QuantRules
from hfquant.formats import GridRule, InputRule, split_columns
from hfquant.layer_config import LayerConfig
from hfquant.nn.kinds import kind_of, size_of
from hfquant.schema import Section, validated

#: Minimum width in columns of the parts that an input is split into: what one vector instruction multiplies.
NARROWEST = 64


class StoredPlan(Section):
    """The fields of a :class:`LayerPlan` that a checkpoint's config.json stores because the config's rule differs.

    A field that follows from the rule is empty here and absent from the file.
    """

    # strict=False admits JSON's lists; elements are checked strictly all the same.
    config: dict[str, Any] = Field({})
    input_segments: tuple[PositiveInt, ...] = Field((), strict=False, min_length=1)
    output_segments: tuple[PositiveInt, ...] = Field((), strict=False, min_length=1)
    dual: tuple[bool, ...] = Field((), strict=False, min_length=1)
    folded: bool = False
    rounded: tuple[int, ...] = Field((), strict=False)
    tied: str = ""


@dataclass(frozen=True)
class LayerPlan:
    """How one layer will be quantized.

    Attributes:
        config: the resolved config.
        in_features, out_features: size of its matrix.
        input_segments: sizes of column blocks that are quantized separately, summing to ``in_features``.
        output_segments: likewise for row blocks, summing to ``out_features``.
        dual: for each input segment, whether its activations get a second scale for the negative side.
        folded: whether the transform's divisor is folded into the preceding module (:mod:`hfquant.folding`).
        rank: number of dimensions of the float weight, and of the codes.
        tied: the layer whose codes and weight scales it shares; "" if it has its own.
        rounded: for a parameter that holds experts, the indices of those that calibration gave too few rows; they are
            rounded to nearest.
        evidence: reasons for these decisions, in words.
    """

    config: LayerConfig
    in_features: int
    out_features: int
    input_segments: tuple[int, ...]
    output_segments: tuple[int, ...]
    dual: tuple[bool, ...]
    folded: bool = False
    rank: int = 2
    tied: str = ""
    rounded: tuple[int, ...] = ()
    evidence: tuple[str, ...] = field(default=(), compare=False)

    @property
    def opt(self) -> Transform:
        """The config's transform, or what remains of it after folding."""
        return self.config.opt.folded() if self.folded else self.config.opt

    @cached_property
    def transform(self) -> Transform:
        """The transform, with its options limited to the layer's size."""
        return self.opt.fitted(self.in_features, self.row_groups)

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """Sizes of the column blocks with separate weight scales: groups, else input segments."""
        # Cached before the first forward: torch.compile cannot trace a section's missing field.
        return split_columns(self.input_segments, self.config.group_size)

    @property
    def row_groups(self) -> tuple[int, ...]:
        """Rows with the same quantized input: output segments if each is transformed separately, else all rows."""
        return self.output_segments if self.opt.per_output_segment else (self.out_features,)

    @property
    def input_rule(self) -> InputRule | None:
        """How the input is quantized; None if it is not."""
        quant = self.config.input_quant
        if quant is None:
            return None
        return InputRule(quant.format, quant.dynamic, quant.axis is not None, self.input_segments, self.dual)

    def grid_rule(self, rows: int) -> GridRule:
        """Return the rule for finding the grid of a row group of ``rows`` rows."""
        quant = self.config.weight_quant
        sharing: tuple[int, ...] | None = None
        if quant.axis is None and not self.config.group_size:
            sharing = self.output_segments if len(self.row_groups) == 1 else (rows,)
        return GridRule(quant.format, self.columns, sharing, quant.symmetric, quant.clip, self.two_level)

    @property
    def two_level(self) -> bool:
        """Whether weight scales are stored as one byte per group times one float32 per row."""
        return self.config.group_size is not None and self.config.weight_quant.scale == "two_level"

    @property
    def weight_in_words(self) -> str:
        """The weight's number format and group size, such as "int4 g64"."""
        group = self.config.group_size
        return self.config.weight_quant.type + (f" g{group}" if group else "")

    @property
    def input_in_words(self) -> str:
        """The input's number format, such as "int8 dynamic"; "-" if it is not quantized."""
        quant = self.config.input_quant
        return "-" if quant is None else quant.type + (" dynamic" if quant.dynamic else "")

    @property
    def method(self) -> str:
        """Transform and rounding method, such as "smooth/gptq"."""
        return f"{self.transform.type}/{self.config.calib.type}"

    @property
    def static_input(self) -> bool:
        """Whether activations have a static, calibrated scale."""
        return self.config.input_quant is not None and self.config.input_quant.static

    def tensors(self) -> dict[str, TensorSpec]:
        """Return shape and dtype of each of the layer's tensors in memory, by name, except the bias.

        ===================== ============================= ==========================================================
        weight                [out, packed width of in, 1s] the format's code dtype; as many 1s as a kernel has sides
        weight_scale          [out, groups]                 float32, or uint8 if two-level; if the format has a scale
        weight_scale_row      [out, 1]                      float32; if two-level
        weight_zero_point     [out, packed width of groups] the format's code dtype; if asymmetric
        input_scale           [row groups * input segments] float32; if the input is static
        input_scale_neg       the same                      float32; if the input is static and a segment is dual
        ===================== ============================= ==========================================================

        `groups` is the number of :attr:`columns`. The transform adds its own tensors, such as `smooth` or `svd_down`
        (see :meth:`hfquant.algorithms.Transform.tensors`).
        """
        weight, rows = self.config.weight_quant, self.out_features
        form = weight.format
        shape = (rows, form.packed_width(self.in_features), *(1,) * (self.rank - 2))
        spec = {"weight": TensorSpec(shape, form.code_dtype)}
        groups = len(self.columns)
        if form.has_scale:
            spec["weight_scale"] = TensorSpec((rows, groups), torch.uint8 if self.two_level else torch.float32)
        if self.two_level:
            spec["weight_scale_row"] = TensorSpec((rows, 1), torch.float32)
        if not weight.symmetric:
            spec["weight_zero_point"] = TensorSpec((rows, form.packed_width(groups)), form.code_dtype)
        if self.static_input:
            spec["input_scale"] = TensorSpec((len(self.row_groups) * len(self.input_segments),), torch.float32)
            if any(self.dual):
                spec["input_scale_neg"] = spec["input_scale"]
        return spec | self.transform.tensors(self.in_features, self.row_groups)

    def nbytes(self, float_size: int) -> int:
        """Return the bytes of the layer's tensors, except the bias.

        Args:
            float_size: bytes per float of the model's dtype.
        """
        specs = self.tensors().values()
        return sum(math.prod(s.shape) * (float_size if s.dtype is None else s.dtype.itemsize) for s in specs)

    def differences(self, rule: LayerConfig) -> dict[str, Any]:
        """Return what :func:`layer_plan` cannot derive from ``rule``, as JSON."""
        parts = input_parts((self.in_features,), self.config)
        # Not validated: a file has no empty lists.
        stored = StoredPlan.model_construct(
            config={} if self.config == rule else self.config.model_dump(mode="json"),
            input_segments=() if self.input_segments == parts else self.input_segments,
            output_segments=() if len(self.output_segments) == 1 else self.output_segments,
            dual=self.dual if any(self.dual) else (),
            folded=self.folded,
            rounded=self.rounded,
            tied=self.tied,
        )
        return stored.model_dump(mode="json", exclude_defaults=True)

    def without_data(self) -> LayerPlan:
        """Return the fallback plan of a layer that never ran in calibration.

        It keeps the part of the transform that needs no data, rounds weights to nearest, and quantizes activations with
        per-token dynamic scales.
        """
        config = self.config.plain().model_copy(update={"opt": self.config.opt.without_data()})
        return replace(self, config=config).by_token()

    def by_token(self) -> LayerPlan:
        """Return the plan with per-token dynamic input scales, if the input has scales."""
        quant = self.config.input_quant
        if quant is None or not quant.format.has_scale:
            return self
        dynamic = quant.model_copy(update={"dynamic": True, "axis": -1, "token_fallback": False})
        return replace(self, config=self.config.model_copy(update={"input_quant": dynamic}))

    def plain(self) -> LayerPlan:
        """Return the same formats with plain round-to-nearest: the baseline of the report."""
        return replace(self, config=self.config.plain(), dual=(False,) * len(self.dual))


def layer_plan(name: str, module: nn.Module, config: LayerConfig, stored: Mapping[str, Any] | None = None) -> LayerPlan:
    """Return the plan of a float layer by its config's own rule, plus the differences that a checkpoint stored.

    Raises:
        ConfigError: ``stored`` does not fit the layer.
    """
    # Checks types; whether they fit the layer is checked below.
    found = validated(StoredPlan, dict(stored or {}), f"layer {name!r}: stored plan")
    if "config" in found.model_fields_set:
        try:
            config = QuantRules({"default": found.config}).default
        except ConfigError as error:
            raise ConfigError(f"layer {name!r}, stored plan: {error}") from None
    config, (in_features, out_features) = kind_of(module).fitted(config), size_of(module)
    inputs = found.input_segments or input_parts((in_features,), config)
    outputs = found.output_segments or (out_features,)
    dual = found.dual or (False,) * len(inputs)
    for what, sizes, total in (("input", inputs, in_features), ("output", outputs, out_features)):
        if sum(sizes) != total:
            raise ConfigError(f"layer {name!r}: {what}_segments={list(sizes)} do not sum to {what}_features={total}")
    if len(dual) != len(inputs):
        raise ConfigError(f"layer {name!r}: dual={list(dual)} does not fit {len(inputs)} input segments")
    if any(dual) and not can_be_dual(config):
        quant = config.input_quant
        raise ConfigError(
            f"layer {name!r}: dual scale needs an input_quant.type of at most 15 bits, not {quant and quant.type}"
        )
    if any(i < 0 for i in found.rounded):
        raise ConfigError(f"layer {name!r}: rounded={list(found.rounded)} in the stored plan are not expert indices")
    rank = module.get_parameter("weight").dim()
    tied, rounded = found.tied, found.rounded
    return LayerPlan(config, in_features, out_features, inputs, outputs, dual, found.folded, rank, tied, rounded)


def input_parts(segments: tuple[int, ...], config: LayerConfig) -> tuple[int, ...]:
    """Split a layer's input segments, given as column counts, into the parts set by ``config.input_quant.segments``.

    A part has its share of the columns, rounded up to a multiple of :data:`NARROWEST` and the group size; the last part
    of a segment may be narrower.
    """
    quant = config.input_quant
    if quant is None or quant.segments == 1:
        return segments
    unit = math.lcm(NARROWEST, config.group_size or 1)
    share = -(-sum(segments) // quant.segments)
    return split_columns(segments, -(-share // unit) * unit)


def can_be_dual(config: LayerConfig) -> bool:
    """Return whether activations of a layer can have a second scale for their negative side."""
    return config.input_quant is not None and config.input_quant.format.max_dual_exponent > 0
