"""What each linear of a model will become, decided before any data is seen: config, segments, dual scale.

The plan is all that is needed to build every :class:`~hfquant.nn.linear.QuantLinear` empty, so it is also what a saved
checkpoint's config.json is expanded to.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from hfquant import formats
from hfquant.config import ConfigError, LayerConfig, Optimum, QuantRules, SegPattern
from hfquant.dataflow.trace import LinearTrace, PatternError, trace
from hfquant.formats.packing import packed_width
from hfquant.integrations.examples import example_inputs

logger = logging.getLogger(__name__)

_OUTPUT_PATTERNS = {SegPattern.LINEAR2CHUNK, SegPattern.LINEAR2SPLIT}
_INPUT_PATTERNS = {SegPattern.CONCAT2LINEAR, SegPattern.STACK2LINEAR, SegPattern.RESHAPE2LINEAR}


@dataclass(frozen=True)
class LayerPlan:
    """One linear's future.

    Attributes:
        config: the resolved config.
        in_features, out_features: of the linear.
        input_segments: column sizes that are quantized apart, summing to ``in_features``.
        output_segments: row sizes likewise, summing to ``out_features``.
        dual: for each input segment, whether its activations get a second scale for the negative side.
        evidence: why, for people.
    """

    config: LayerConfig
    in_features: int
    out_features: int
    input_segments: tuple[int, ...]
    output_segments: tuple[int, ...]
    dual: tuple[bool, ...]
    evidence: tuple[str, ...] = field(default=(), compare=False)

    @property
    def columns(self) -> tuple[int, ...]:
        """Sizes of the column blocks that have a weight scale of their own: groups, else input segments."""
        group = self.config.group_size
        return (group,) * (self.in_features // group) if group else self.input_segments

    @property
    def row_groups(self) -> tuple[int, ...]:
        """Rows that see the same quantized input: output segments where each is smoothed apart, else all rows."""
        return self.output_segments if self.config.opt.type is not Optimum.DEFAULT else (self.out_features,)

    @property
    def rank(self) -> int:
        """Rank of the low-rank branch (of each row group); 0 without one."""
        return self.config.opt.low_rank if self.config.opt.type is Optimum.SVD else 0

    @property
    def static_input(self) -> bool:
        """Whether activations have a calibrated scale."""
        quant = self.config.input_quant
        return quant is not None and quant.type.is_scaled and not quant.dynamic

    def tensors(self, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of each tensor of the layer in memory, bias excepted; ``dtype`` is the model's."""
        weight, rows, groups = self.config.weight_quant, self.out_features, len(self.row_groups)
        bits = weight.type.bits
        width = packed_width(self.in_features, bits) if bits < 8 else self.in_features
        spec: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((rows, width), formats.code_dtype(weight.type))
        }
        if weight.type.is_scaled:
            spec["weight_scale"] = ((rows, len(self.columns)), torch.float32)
        if not weight.symmetric:
            spec["weight_zero_point"] = ((rows, len(self.columns)), formats.code_dtype(weight.type))
        if self.static_input:
            spec["input_scale"] = ((groups * len(self.input_segments),), torch.float32)
            if any(self.dual):
                spec["input_scale_neg"] = spec["input_scale"]
        if self.config.opt.type is not Optimum.DEFAULT:
            spec["smooth"] = ((self.in_features,) if groups == 1 else (groups, self.in_features), torch.float32)
        if self.rank:
            spec["svd_down"] = ((groups * self.rank, self.in_features), dtype)
            spec["svd_up"] = ((rows, self.rank), dtype)
        return spec

    def differences(self, rule: LayerConfig) -> dict[str, Any]:
        """What :func:`layer_plan` cannot derive from ``rule``, as JSON."""
        found: dict[str, Any] = {}
        if self.config != rule:
            found["config"] = self.config.model_dump(mode="json")
        if len(self.input_segments) > 1:
            found["input_segments"] = list(self.input_segments)
        if len(self.output_segments) > 1:
            found["output_segments"] = list(self.output_segments)
        if any(self.dual):
            found["dual"] = list(self.dual)
        return found


def layer_plan(name: str, linear: nn.Linear, config: LayerConfig, stored: Mapping[str, Any] | None = None) -> LayerPlan:
    """The plan of one linear by its config's own rule, or with the differences a checkpoint stored.

    Raises:
        ConfigError: the config cannot work for this layer (group_size, low_rank), or ``stored`` does not fit it.
    """
    stored = dict(stored or {})
    if "config" in stored:
        try:
            config = QuantRules({"default": stored.pop("config")}).default
        except ConfigError as error:
            raise ConfigError(f"layer {name!r}, stored plan: {error}") from None
    if odd := {k: v for k, v in stored.items() if not isinstance(v, (list, tuple))}:
        raise ConfigError(f"layer {name!r}: expected lists in the stored plan, got {odd}")
    inputs = tuple(stored.pop("input_segments", (linear.in_features,)))
    outputs = tuple(stored.pop("output_segments", (linear.out_features,)))
    dual = tuple(stored.pop("dual", (False,) * len(inputs)))
    if stored:
        raise ConfigError(f"layer {name!r}: unknown keys {sorted(stored)} in the stored plan")
    for what, sizes, total in (("input", inputs, linear.in_features), ("output", outputs, linear.out_features)):
        if not all(type(s) is int and s > 0 for s in sizes) or sum(sizes) != total:
            raise ConfigError(f"layer {name!r}: {what}_segments={list(sizes)} do not sum to {what}_features={total}")
    if len(dual) != len(inputs) or not all(type(d) is bool for d in dual):
        raise ConfigError(f"layer {name!r}: dual={list(dual)} does not fit {len(inputs)} input segments")
    result = LayerPlan(config, linear.in_features, linear.out_features, inputs, outputs, dual)
    _check_sizes(name, result)
    return result


def _check_sizes(name: str, layer: LayerPlan) -> None:
    group, limit = layer.config.group_size, min(layer.in_features, *layer.row_groups)
    if group and any(size % group for size in layer.input_segments):
        section = "weight_quant" if layer.config.weight_quant.group_size else "calib"
        raise ConfigError(
            f"layer {name!r}: {section}.group_size={group} does not divide in_features={layer.in_features}"
            + (f" (segments {list(layer.input_segments)})" if len(layer.input_segments) > 1 else "")
            + f'; choose a divisor, or override this layer: {{"{name}": {{"{section}": {{"group_size": ...}}}}}}'
        )
    if layer.rank > limit:
        raise ConfigError(f"layer {name!r}: opt.low_rank={layer.rank} is over the layer's size, at most {limit}")
    if any(layer.dual) and not _can_be_dual(layer.config):
        quant = layer.config.input_quant
        raise ConfigError(
            f"layer {name!r}: dual scale needs an input_quant.type of int4, int6 or int8, not {quant and quant.type}"
        )


def _can_be_dual(config: LayerConfig) -> bool:
    """Both sides' codes are one 16-bit integer, so 16-bit codes leave no room for a second scale."""
    return config.input_quant is not None and config.input_quant.type.is_integer and config.input_quant.type.bits < 16


@dataclass(frozen=True)
class Plan:
    """The plan of a whole model: ``layers`` in order of execution, and why each other linear is ``skipped``."""

    layers: dict[str, LayerPlan]
    skipped: dict[str, str]

    def __str__(self) -> str:
        rows = [("layer", "in x out", "weight", "input", "opt", "segments in | out", "dual", "why")]
        for name, p in self.layers.items():
            w, i = p.config.weight_quant, p.config.input_quant
            grouped = f" g{p.config.group_size}" if p.config.group_size else ""
            rows.append(
                (
                    name,
                    f"{p.in_features} x {p.out_features}",
                    f"{w.type}{grouped}",
                    "-" if i is None else f"{i.type}{' dynamic' if i.dynamic else ''}",
                    f"{p.config.opt.type}/{p.config.calib.type}",
                    f"{_short(p.input_segments)} | {_short(p.output_segments)}",
                    "yes" if any(p.dual) else "",
                    "; ".join(p.evidence),
                )
            )
        rows += [(name, "", "", "", "", "", "", f"skipped: {why}") for name, why in self.skipped.items()]
        widths = [max(len(r[i]) for r in rows) for i in range(7)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, [*widths, 0], strict=True)).rstrip() for r in rows)


def _short(sizes: tuple[int, ...]) -> str:
    if len(sizes) == 1:
        return "1"
    return f"{len(sizes)} x {sizes[0]}" if len(set(sizes)) == 1 else "+".join(map(str, sizes))


def aliases(name: str, model: nn.Module) -> tuple[str, ...]:
    """A module's name, then its name with or without the model's ``base_model_prefix``."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix:
        return (name,)
    return (name, name.removeprefix(prefix + ".") if name.startswith(prefix + ".") else f"{prefix}.{name}")


def matches(names: Iterable[str], keys: Collection[str]) -> bool:
    """Whether any name is, lies below, or has as a path component one of ``keys`` (or matches it as a glob)."""
    return any(f".{key}." in f".{name}." or fnmatchcase(name, key) for name in names for key in keys)


def default_skips(model: nn.Module) -> dict[str, str]:
    """Module names that stay in full precision unless asked for, and why: heads, tied weights, fp32 modules."""
    skips: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    fp32 = (getattr(model, f"_keep_in_fp32_modules{strict}", None) for strict in ("", "_strict"))
    keep = [key for keys in fp32 for key in keys or ()]
    for name, module in model.named_modules():
        for param in module._parameters.values():
            if param is not None:
                owners.setdefault(id(param), []).append(name)
        if type(module) is nn.Linear and matches([name, f"{name}.weight"], keep):
            skips[name] = "in the model's _keep_in_fp32_modules"
    for names in owners.values():
        for name, other in itertools.permutations(dict.fromkeys(names), 2):
            skips[name] = f"its weight is tied to {other}"
    for key, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        skips.update({k.removesuffix(".weight"): f"its weight is tied ({key} = {other})" for k in (key, other)})
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    if head is not None:
        skips.update((n, "the model's output head") for n, m in model.named_modules() if m is head)
    return skips


def plan(model: nn.Module, config: Any = None, example: Any = None) -> Plan:
    """Decide what every linear of ``model`` will become. Needs no weights: the model may be on the meta device.

    Args:
        model: any module; only modules whose type is exactly ``nn.Linear`` are quantized.
        config: a dict, the name of a preset, an :class:`~hfquant.HfQuantConfig`, or None (the reference's defaults).
        example: model inputs for pattern detection: a tensor, positional arguments, or a dict of keyword arguments;
            None derives them from the model's own config where that is possible.

    Raises:
        ConfigError: the config is invalid, or does not fit a layer.
    """
    from hfquant.integrations.config import HfQuantConfig

    config = HfQuantConfig.of(config)
    return plan_layers(model, config.rules, config.modules_to_not_convert or (), example)


def plan_layers(model: nn.Module, rules: QuantRules, not_convert: Collection[str], example: Any = None) -> Plan:
    """:func:`plan` on validated rules; ``not_convert`` adds to the model's default skips."""
    skips = default_skips(model)
    chosen: dict[str, LayerConfig] = {}
    skipped: dict[str, str] = {}
    idle = dict.fromkeys(rules.patterns)
    for name, linear in model.named_modules():
        if type(linear) is not nn.Linear:
            continue
        names = aliases(name, model)
        globs = rules.matching(*names)
        for glob in globs:
            idle.pop(glob, None)
        asked = any(rules.raw[glob].get("enable") is True for glob in globs)
        layer = rules.resolve(*names)
        if not name:
            skipped[name] = "it is the whole model, so nothing can hold its replacement; wrap it in nn.Sequential"
        elif matches(names, not_convert):
            skipped[name] = "in modules_to_not_convert"
        elif not layer.enable:
            skipped[name] = "enable=False"
        elif name in skips and not asked:
            skipped[name] = skips[name]
        else:
            chosen[name] = layer
    for glob in idle:
        logger.warning(
            "%s: config[%r] matches no linear (those of a block are %r)", type(model).__name__, glob, f"{glob}.*"
        )
    traces = _traces(model, chosen, example)
    for name in [n for n in chosen if n in traces and traces[n].functional]:
        skipped[name] = "its weight is read outside its own forward"
        del chosen[name]
    order = sorted(chosen, key=lambda n: traces[n].order if n in traces else len(traces))
    layers = {n: _with_trace(n, model.get_submodule(n), chosen[n], traces.get(n)) for n in order}
    return Plan(layers, skipped)


def _traces(model: nn.Module, chosen: Mapping[str, LayerConfig], example: Any) -> dict[str, LinearTrace]:
    patterns = {p for layer in chosen.values() for p in layer.search_patterns}
    if not chosen:
        return {}
    # While transformers builds a model its default device is meta, where example inputs would lose their values.
    with torch.device("cpu"):
        example = example_inputs(model) if example is None else example
        if example is None:
            if any(layer.seglinear and layer.search_patterns for layer in chosen.values()):
                logger.info("%s: no example inputs, so layers are quantized without segments", type(model).__name__)
            return {}
        try:
            return trace(model, example, patterns=patterns)
        except PatternError as error:
            logger.warning("%s: pattern detection failed (%s); going on without segments", type(model).__name__, error)
            return {}


def _with_trace(name: str, linear: nn.Module, config: LayerConfig, found: LinearTrace | None) -> LayerPlan:
    assert isinstance(linear, nn.Linear)
    base = layer_plan(name, linear, config)
    if found is None:
        return base
    quant, weight, group = config.input_quant, config.weight_quant, config.group_size
    wanted = set(config.search_patterns) & set(found.patterns)
    inputs, outputs = base.input_segments, base.output_segments
    if config.seglinear:
        # Segments are taken where they change a scale; no scale straddles a segment, so a group must divide each.
        apart = (quant is not None and quant.type.is_scaled) or (weight.type.is_scaled and not group)
        if apart and wanted & _INPUT_PATTERNS and all(size % (group or 1) == 0 for size in found.input_segments):
            inputs = found.input_segments
        apart = weight.type.is_scaled and weight.axis is None and not group
        apart = apart or config.opt.type is not Optimum.DEFAULT
        if apart and wanted & _OUTPUT_PATTERNS and min(found.output_segments) >= base.rank:
            outputs = found.output_segments
    dual = (False,) * len(inputs)
    if SegPattern.ACTIVATION2LINEAR in wanted and _can_be_dual(config):
        active = tuple(a is not None for a in found.activations)
        dual = active if len(inputs) == len(active) else (all(active),) * len(inputs)
    return replace(base, input_segments=inputs, output_segments=outputs, dual=dual, evidence=found.evidence)
