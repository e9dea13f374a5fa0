"""Plan how each layer of a model is quantized, before any data is seen: config, segments, dual scale.

The plan is sufficient to build every :class:`~hfquant.nn.linear.QuantLinear` empty, so a saved checkpoint's config.json
expands to it as well.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from hfquant.autoencoders import autoencoder_convs
from hfquant.calibration.batches import as_tensors, batched
from hfquant.config import QuantRules
from hfquant.console import counted
from hfquant.dataflow import LinearTrace, PatternError, obstacles_in_source, trace
from hfquant.enums import SegPattern
from hfquant.experts import ExpertsLayout, Unfused, check_one_config, first_alone, share_traces, unfused
from hfquant.folding import Fold, plan_folds
from hfquant.layer_config import OPTIONAL, LayerConfig
from hfquant.layer_plan import LayerPlan, can_be_dual, input_parts, layer_plan
from hfquant.mixed_precision import left_in_float, with_wider_inputs, with_wider_weights
from hfquant.nn.kinds import layers_in, refusal
from hfquant.nn.layer import QuantLayer
from hfquant.ties import configs_together, tied_groups

logger = logging.getLogger(__name__)

#: Reasons for linears that the user leaves in full precision.
EXCLUDED, SWITCHED_OFF = "in modules_to_not_convert", "enable=False"

_OUTPUT_PATTERNS = {SegPattern.LINEAR2CHUNK, SegPattern.LINEAR2SPLIT}
_INPUT_PATTERNS = {SegPattern.CONCAT2LINEAR, SegPattern.STACK2LINEAR, SegPattern.RESHAPE2LINEAR}


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model beyond its modules; a library's integration knows more than the core.

    Attributes:
        skipped: names of layers that stay in full precision unless requested -> the reason.
        tied: names of modules that get another module's weight once loaded -> that module.
        optional: names of layers -> the entry that a config's ``include`` needs for them to be quantized.
        prefix: a name without it means the same module (transformers' ``base_model_prefix``).
        example: returns inputs for pattern detection, or None if they are unknown.
        options: given the observed layers, returns keyword arguments to add to calibration samples that lack them.
        uncounted: names of modules that the share of quantized parameters excludes (output heads).
        experts: name of a module of fused experts -> its layout.
    """

    skipped: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    example: Callable[[], Any] = lambda: None
    options: Callable[[Iterable[nn.Module]], Mapping[str, Any]] = lambda layers: {}
    uncounted: Collection[str] = ()
    experts: Mapping[str, ExpertsLayout] = field(default_factory=dict)

    def aliases(self, name: str) -> tuple[str, ...]:
        """Return a module's name, followed by its name without the prefix, or with it if the name lacks it."""
        if not self.prefix:
            return (name,)
        start = self.prefix + "."
        return (name, name.removeprefix(start) if name.startswith(start) else start + name)


@dataclass(frozen=True)
class Plan:
    """The plan of a whole model.

    Attributes:
        layers: layer plans by name, in execution order.
        skipped: names of the layers left in full precision -> the reason.
        folds: folds of the folded layers, in execution order.
    """

    layers: dict[str, LayerPlan]
    skipped: dict[str, str]
    folds: tuple[Fold, ...] = ()

    @property
    def why_skipped(self) -> str:
        """Reasons why layers are skipped, with counts, in words."""
        counts = Counter(self.skipped.values())
        reasons = [f"{counted(number, 'layer')}: {why}" for why, number in counts.most_common()]
        return "; ".join(reasons) or "no layer of a supported kind"

    def fused(self, experts: Unfused, solved: Mapping[str, LayerPlan] | None = None) -> Plan:
        """Return the plan with one entry for all experts of a parameter, under the parameter's name.

        Args:
            experts: the unfused experts of the model.
            solved: final plans of such parameters; default: that of the first expert.
        """
        solved = solved or {}
        layers: dict[str, LayerPlan] = {}
        for name, layer in self.layers.items():
            parameter = experts.parameters.get(name, name)
            layers.setdefault(parameter, solved.get(parameter, layer))
        skipped = {experts.parameters.get(name, name): why for name, why in self.skipped.items()}
        return replace(self, layers=layers, skipped=skipped)

    def __str__(self) -> str:
        rows = [("layer", "in x out", "weight", "input", "opt", "segments in | out", "dual", "why")]
        for name, p in self.layers.items():
            rows.append(
                (
                    name,
                    f"{p.in_features} x {p.out_features}",
                    p.weight_in_words,
                    p.input_in_words,
                    p.method,
                    f"{_short(p.input_segments)} | {_short(p.output_segments)}",
                    "yes" if any(p.dual) else "",
                    "; ".join(p.evidence),
                )
            )
        rows += [(name, "", "", "", "", "", "", f"skipped: {why}") for name, why in self.skipped.items()]
        widths = [max(len(r[i]) for r in rows) for i in range(7)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, [*widths, 0], strict=True)).rstrip() for r in rows)


def warn_if_empty(model: nn.Module, plan: Plan) -> None:
    """Log one line if there is nothing to quantize."""
    if not plan.layers:
        logger.warning(
            "%s has nothing to quantize (%s): it stays in full precision", type(model).__name__, plan.why_skipped
        )


def _short(sizes: tuple[int, ...]) -> str:
    if len(sizes) == 1:
        return "1"
    return f"{len(sizes)} x {sizes[0]}" if len(set(sizes)) == 1 else "+".join(map(str, sizes))


def matches(names: Iterable[str], keys: Collection[str]) -> bool:
    """Return whether any name equals one of ``keys``, contains it as a path component, or matches it as a glob."""
    return any(f".{key}." in f".{name}." or fnmatchcase(name, key) for name in names for key in keys)


def plan_layers(
    model: nn.Module,
    rules: QuantRules,
    example: Any = None,
    facts: ModelFacts | None = None,
) -> Plan:
    """Plan how each layer of ``model`` will be quantized, and each parameter that holds experts.

    Needs no weights: the model may be on the meta device.

    Args:
        model: any module; :mod:`hfquant.nn.kinds` defines which layers can be quantized.
        rules: the validated config.
        example: model inputs for pattern detection: a tensor, positional arguments, or a dict of keyword arguments;
            None uses those of ``facts``.
        facts: what a library knows about the model.

    Raises:
        ConfigError: the config is invalid, or does not fit a layer.
    """
    facts = facts or ModelFacts()
    with unfused(model, facts.experts) as experts:
        return plan_apart(model, rules, example, facts, experts).fused(experts)


def plan_apart(
    model: nn.Module,
    rules: QuantRules,
    example: Any,
    facts: ModelFacts,
    experts: Unfused,
) -> Plan:
    """Do what :func:`plan_layers` does, for a model with unfused experts: each is a separate linear."""
    chosen, skipped, ties = _choose(model, rules, facts, experts)
    with first_alone(experts):
        traces = _traces(model, chosen, example, facts)
    share_traces(traces, experts)
    obstacles = {n: t.obstacle for n, t in traces.items() if t.obstacle}
    if not traces.keys() >= chosen.keys():  # for layers that no forward was traced through, inspect the source code
        obstacles = {n: why for n, why in obstacles_in_source(model).items() if n not in traces} | obstacles
    for name in [n for n in chosen if n in obstacles]:
        skipped[name] = obstacles[name]
        del chosen[name]
    order = sorted(chosen, key=lambda n: traces[n].order if n in traces else len(traces))
    free = {n: chosen[n] for n in order if n not in {*ties, *ties.values()} and not _asked(rules, facts.aliases(n))}
    left = left_in_float(free, {n: model.get_parameter(f"{n}.weight").numel() for n in order})
    order = [n for n in order if n not in left]
    chosen, skipped = {n: chosen[n] for n in order}, skipped | left
    folds = plan_folds(model, chosen, traces)
    folded = {name: fold.source.module for fold in folds for name in fold.readers}
    layers = {n: _with_trace(n, model.get_submodule(n), chosen[n], traces.get(n), folded.get(n)) for n in order}
    layers = {n: replace(p, tied=ties[n]) if ties.get(n) in layers else p for n, p in layers.items()}
    alone = {n: p for n, p in layers.items() if n not in experts.parameters}
    layers |= with_wider_inputs(alone, {n: found.rows for n, found in traces.items()})
    layers |= with_wider_weights({n: layers[n] for n in alone})
    _log_cuts(type(model).__name__, layers)
    return Plan(layers, skipped, tuple(folds))


class _Choice(NamedTuple):
    """Which layers are quantized.

    Attributes:
        configs: configs of the layers to quantize.
        skipped: names of the other layers -> why they stay in full precision.
        ties: names of layers that share another layer's codes -> that layer.
    """

    configs: dict[str, LayerConfig]
    skipped: dict[str, str]
    ties: dict[str, str]


def _choose(model: nn.Module, rules: QuantRules, facts: ModelFacts, experts: Unfused) -> _Choice:
    """Decide which layers are quantized; warn about names in the config that match none."""
    kinds, groups = layers_in(model), tied_groups(model, facts.tied)
    tied = {name: next(n for n in reversed(group) if n != name) for group in groups for name in group}
    needed, fused = _needed_entries(model, kinds, facts), experts.parameters
    # All names by which the config may address a module, starting with its own.
    names = {n: facts.aliases(n) + (facts.aliases(fused[n]) if n in fused else ()) for n, _ in model.named_modules()}
    refused = {name: why for name, module in model.named_modules() if (why := refusal(module))}
    layers = [name for name in names if name in kinds or name in refused]
    open_to: dict[str, LayerConfig] = {}
    chosen = _Choice({}, dict(experts.skipped), {})
    for name in layers:
        config, asked = _config_of(names[name], rules, name in fused), _asked(rules, names[name])
        known = facts.skipped.get(name) or facts.skipped.get(fused.get(name, ""), "")
        why = refused.get(name) or _why_float(names[name], config, asked, rules.excluded, known, needed[name])
        if not why:
            open_to[name] = kinds[name].fitted(config)
            if name in tied and not asked:
                why = f"its weight is tied to {tied[name]}"
        if why:
            chosen.skipped[name] = why
        else:
            chosen.configs[name] = config
    for group in groups:
        together = configs_together(group, open_to, kinds)
        chosen.configs.update(together)
        chosen.ties.update({name: group[0] for name in group[1:] if name in together})
        for name in together:
            chosen.skipped.pop(name, None)
    _warn_if_unmatched(type(model).__name__, rules, names, layers)
    check_one_config(chosen.configs, experts)
    return chosen


def _config_of(names: tuple[str, ...], rules: QuantRules, is_expert: bool) -> LayerConfig:
    config = rules.resolve(*names)
    if not is_expert or config.input_quant is None:
        return config
    # All experts of a parameter have one config, so none may switch to per-token scales on its own.
    static = config.input_quant.model_copy(update={"token_fallback": False})
    return config.model_copy(update={"input_quant": static})


def _needed_entries(model: nn.Module, kinds: Mapping[str, type[QuantLayer]], facts: ModelFacts) -> dict[str, list[str]]:
    """Return the entries of ``include`` that each layer needs to be quantized, unless it is explicitly enabled."""
    needed = {n: [facts.optional.get(n, ""), kind.optional(model.get_submodule(n))] for n, kind in kinds.items()}
    for name in autoencoder_convs(model, kinds):
        needed[name].append("autoencoder_convs")
    return {name: [entry for entry in entries if entry] for name, entries in needed.items()}


def _why_float(
    names: tuple[str, ...],
    config: LayerConfig,
    asked: bool,
    excluded: Collection[str],
    known: str,
    needed: list[str],
) -> str:
    """Return why a layer of a supported kind stays in full precision, ties aside; "" if it does not.

    What the library says (``known``) and missing ``needed`` entries do not count if the user ``asked`` for the layer.
    """
    if not names[0]:
        return "it is the whole model, so no parent can hold its replacement; wrap it in nn.Sequential"
    if matches(names, excluded):
        return EXCLUDED
    if not config.enable:
        return SWITCHED_OFF
    if asked:
        return ""
    return known or next((OPTIONAL[entry] for entry in needed if entry not in config.include), "")


def _warn_if_unmatched(
    who: str,
    rules: QuantRules,
    names: Mapping[str, tuple[str, ...]],
    layers: Iterable[str],
) -> None:
    """Log one line per glob of the config that matches none of ``layers``, and per name that matches no module."""
    matched = {glob for layer in layers for glob in rules.matching(*names[layer])}
    for glob in rules.patterns:
        if glob not in matched:
            logger.warning("%s: config[%r] matches no layer (those of a block are %r)", who, glob, f"{glob}.*")
    for key in dict.fromkeys(rules.excluded):
        if not any(matches(module, [key]) for module in names.values()):
            logger.warning("%s: modules_to_not_convert: %r matches no module", who, key)


def _asked(rules: QuantRules, names: Iterable[str]) -> bool:
    """Return whether a config entry other than the default explicitly enables this layer."""
    return any(rules.raw[glob].get("enable") is True for glob in rules.matching(*names))


def _log_cuts(who: str, layers: Mapping[str, LayerPlan]) -> None:
    """Log one line per case in which a config's sizes do not fit layers and were reduced."""
    short = [n for n, p in layers.items() if p.config.group_size and len(set(p.columns)) > 1]
    small = [n for n, p in layers.items() if p.transform != p.opt]
    for names, what in ((short, "the last group of a segment is shorter"), (small, "opt is reduced to the layer size")):
        if names:
            logger.info("%s: in %s %s (first: %r)", who, counted(len(names), "layer"), what, names[0])


def _traces(
    model: nn.Module, chosen: Mapping[str, LayerConfig], example: Any, facts: ModelFacts
) -> dict[str, LinearTrace]:
    patterns = {p for layer in chosen.values() for p in layer.search_patterns}
    if not chosen:
        return {}
    # While transformers builds a model, its default device is meta, on which example inputs would lose their values.
    with torch.device("cpu"):
        example = facts.example() if example is None else example
        if example is None:
            if any(layer.seglinear and layer.search_patterns for layer in chosen.values()):
                logger.info("%s: no example inputs, so layers are quantized without segments", type(model).__name__)
            return {}
        try:
            codes = {name: layer.weight_quant.format.code_dtype for name, layer in chosen.items()}
            example = as_tensors(batched(model, example), list(signature(model.forward).parameters))
            return trace(model, example, patterns=patterns, codes=codes)
        except PatternError as error:
            logger.warning(
                "%s: pattern detection failed (%s); continuing without segments", type(model).__name__, error
            )
            return {}


def _with_trace(
    name: str, module: nn.Module, config: LayerConfig, found: LinearTrace | None, source: str | None
) -> LayerPlan:
    base = replace(layer_plan(name, module, config), folded=source is not None)
    config = base.config
    if found is None:
        return base
    quant, weight, grouped = config.input_quant, config.weight_quant, config.group_size is not None
    wanted = set(config.search_patterns) & set(found.patterns)
    inputs, outputs, evidence = base.input_segments, base.output_segments, found.evidence
    if source is not None:
        evidence = (*evidence, f"divisor folded into {source}")
    if config.seglinear:
        # Segments are used only if they change a scale.
        apart = (quant is not None and quant.format.has_scale) or (weight.format.has_scale and not grouped)
        # A segment narrower than a group would only add scales.
        wide = min(found.input_segments) >= (config.group_size or 1)
        if apart and wide and wanted & _INPUT_PATTERNS:
            inputs = input_parts(found.input_segments, config)
        apart = weight.format.has_scale and weight.axis is None and not grouped
        apart = apart or base.opt.per_output_segment
        split = replace(base, output_segments=found.output_segments)
        if apart and wanted & _OUTPUT_PATTERNS and split.transform == base.transform:
            outputs = found.output_segments
    dual = (False,) * len(inputs)
    if SegPattern.ACTIVATION2LINEAR in wanted and quant is not None:
        if config.opt.rotation:
            # Rotated values are sums of both signs: no side is small, and 16-bit codes would take twice the time.
            evidence = (*evidence, "no dual scale: the input is rotated")
        elif can_be_dual(config):
            active = tuple(a is not None for a in found.activations)
            before, after = list(accumulate(found.input_segments)), list(accumulate(inputs))
            # A part has the activation of the segment that it was split from.
            cut = set(before) <= set(after)
            dual = tuple(active[bisect_left(before, end)] if cut else all(active) for end in after)
        elif quant.format.has_scale:
            evidence = (*evidence, f"no dual scale: {quant.format.no_dual_scale}")
    return replace(base, input_segments=inputs, output_segments=outputs, dual=dual, evidence=evidence)
