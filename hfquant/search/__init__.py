"""Automatic bit allocation: one choice per layer under a budget, based on measured effects.

Measure (:mod:`.measure`): each layer is solved with each choice, and the error on its inputs is weighted by the
gradients of the model's output there (:mod:`.sensitivity`). Choose (:mod:`.knapsack`): minimize harm within the budget.
Judge and repair (:mod:`.repair`): compare the model's own output on held-out rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.calibration.batches import CalibrationData, samples
from hfquant.config import ConfigError, QuantRules, parse
from hfquant.experts import Unfused, unfused
from hfquant.layer_plan import LayerPlan
from hfquant.planner import ModelFacts, plan_apart
from hfquant.presets import PRESETS
from hfquant.search.choices import Choice, rules_of
from hfquant.search.data import apart
from hfquant.search.knapsack import Option, cheapest, relaxed
from hfquant.search.measure import MeasuredChoices, measure, stored_bytes
from hfquant.search.repair import TRIES, Judge, repaired

__all__ = ["BitSearch", "Choice", "choose", "search"]

logger = logging.getLogger(__name__)

#: Divergence up to which outputs count as equal; float32 leaves a KL divergence of equal ones below it.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class BitSearch:
    """A choice for each layer.

    Attributes:
        config: config dict, with an entry for each layer that differs from the default.
        chosen: label of each layer's choice.
        bits: stored bits per weight, scales included.
        bytes: total size of the layers.
        error: estimated harm to the output.
        bound: lower bound on the harm of any choice within the budget.
        judged: divergence of the output on held-out rows, for the result and for the choices that it was compared with.
    """

    config: dict[str, dict[str, Any]]
    chosen: dict[str, str]
    bits: float
    bytes: int
    error: float
    bound: float
    judged: dict[str, float]


def search(
    model: nn.Module,
    data: Any,
    budget: float | str,
    choices: Sequence[Choice] = ("int4", "int6", "int8"),
    base: QuantRules | str | Mapping[str, Any] = "w4a16-gptq",
    facts: ModelFacts | None = None,
) -> BitSearch:
    """Choose a format for each layer, leaving the model unchanged.

    Args:
        model: in full precision.
        data: calibration batches; every fourth sample is held out to judge the result.
        budget: up to 32, stored bits per weight, scales included; above, bytes of all layers that are chosen for. Or
            the name of a preset, to use as many bytes as it does.
        choices: choices for each layer.
        base: config for everything that a choice does not set.
        facts: what the model's library knows about the model.

    Raises:
        ConfigError: unknown choices, or choices that do not fit the base.
        ValueError: the budget is below the size of the smallest choices.
        CalibrationError: there is only a single sample that is not a batch, or no layer ran.
    """
    base = base if isinstance(base, QuantRules) else parse(dict(base) if isinstance(base, Mapping) else base)
    if isinstance(budget, str) and budget not in PRESETS:
        raise ConfigError(f"budget: expected bits, bytes or the name of a preset, got {budget!r}")
    rules, facts = rules_of(choices, base), facts or ModelFacts()
    seen, held = apart([sample for batch in CalibrationData(data) for sample in samples(batch)])
    with unfused(model, facts.experts) as experts:

        def planned(found: QuantRules) -> dict[str, LayerPlan]:
            return plan_apart(model, found, seen[0], facts, experts).layers

        measured = measure(model, rules, seen, facts, experts)
        if isinstance(budget, str):
            plans = planned(parse(budget, base.excluded))
            names = [name for found in measured.members.values() for name in found if name in plans]
            limit = sum(stored_bytes(model, plans[name]) for name in names)
        else:
            limit = limit_of(measured, budget)
        chosen, judged = choose(measured, Judge.of(model, held), limit)
        config = _config(rules, measured, chosen, planned(base), experts)
    return _result(measured, chosen, config, limit, judged)


def limit_of(measured: MeasuredChoices, budget: float) -> int:
    """Return a budget in bytes; numbers up to 32 are bits per weight."""
    return math.floor(budget * measured.weights / 8) if budget <= 32 else math.floor(budget)


def choose(
    measured: MeasuredChoices, judge: Judge, limit: int, tries: int = TRIES
) -> tuple[dict[str, str], dict[str, float]]:
    """Return a choice for each layer within ``limit`` bytes, and the held-out divergences of the candidates, by label.

    Raises:
        ValueError: the smallest choices exceed the limit.
    """
    table = measured.table
    kept: dict[tuple[str, ...], Tensor] = {}

    def judged(chosen: Mapping[str, str]) -> Tensor:
        key = tuple(chosen[name] for name in table)
        if key not in kept:
            kept[key] = judge.divergence(measured.modules(chosen))
        return kept[key]

    why = "no layer has a gradient" if not measured.gradients else _cut_off(measured, judge)
    if why:
        logger.info("%s: estimating harm by forward differences", why)
        table = _by_differences(measured, judge)
    weightings: dict[str, Callable[[str, Option], float]] = {
        "output": lambda _, option: option.harm,
        "both": lambda _, option: math.sqrt(option.harm * option.relative),
    }
    starts = {how: cheapest(table, limit, weigh) for how, weigh in weightings.items()}
    found = {how: judged(chosen).mean().item() for how, chosen in starts.items()}
    best = min(found, key=lambda how: found[how])
    chosen, divergences = repaired(table, limit, weightings[best], judged, tries)
    found["repaired"] = divergences.mean().item()
    # A single choice for all layers is preferred if it does better.
    labels = [option.name for option in next(iter(table.values()))]
    sizes = {label: sum(o.bytes for options in table.values() for o in options if o.name == label) for label in labels}
    fitting = [label for label in labels if sizes[label] <= limit]
    if fitting:
        label = max(fitting, key=lambda label: sizes[label])
        uniform = dict.fromkeys(table, label)
        found[f"all {label}"] = judged(uniform).mean().item()
        if found[f"all {label}"] < found["repaired"]:
            chosen = uniform
    return chosen, found


def _cut_off(measured: MeasuredChoices, judge: Judge) -> str:
    """Return a message if layers that no gradient reached affect the output all the same, else "".

    A model may run a part without gradients, or pass on a copy that is detached from it.
    """
    smallest = {u: min(measured.table[u], key=lambda option: option.bytes).name for u in measured.unreached}
    if not smallest or _one(judge).divergence(measured.modules(smallest)).max().item() <= _ROUNDING:
        return ""
    named = ", ".join(list(smallest)[:3]) + (" ..." if len(smallest) > 3 else "")
    return f"no gradient reaches {named}, but the output depends on it"


def _one(judge: Judge) -> Judge:
    return replace(judge, data=judge.data[:1], expected=judge.expected[:1])


def _by_differences(measured: MeasuredChoices, judge: Judge) -> dict[str, list[Option]]:
    """Return the table with harm estimated by forward differences.

    A layer's smallest choice is measured by the divergence of the output with only that layer replaced; its other
    choices follow in proportion to the layer's own error.
    """
    one, table = _one(judge), {}
    for unit, options in measured.table.items():
        smallest = min(options, key=lambda option: option.bytes)
        moved = one.divergence(measured.modules({unit: smallest.name})).mean().item()
        scale = moved / max(smallest.relative, torch.finfo(torch.float32).tiny)
        table[unit] = [Option(o.name, o.bytes, scale * o.relative, o.relative) for o in options]
    return table


def _config(
    rules: Mapping[str, QuantRules],
    measured: MeasuredChoices,
    chosen: Mapping[str, str],
    planned: Mapping[str, LayerPlan],
    experts: Unfused,
) -> dict[str, dict[str, Any]]:
    """Return the config of a choice: the most common one as default, and whole sections for layers that differ.

    Layers that were not chosen for keep their ``planned`` config from the base.
    """
    labels = list(chosen.values())
    default = max(dict.fromkeys(labels), key=labels.count)
    config = dict(rules[default].raw)
    for name, plan in planned.items():
        unit = experts.parameters.get(name, name)
        wanted = (measured.plans[chosen[unit]][name] if unit in chosen else plan).config.model_dump(mode="json")
        given = measured.plans[default][name].config.model_dump(mode="json")
        differing = {key for key, value in wanted.items() if value != given[key]}
        if differing:
            # The last match wins, so the entry moves to the end; the fields that it had get the values in force.
            entry = config.pop(unit, {})
            config[unit] = {**entry, **{key: wanted[key] for key in wanted if key in differing or key in entry}}
    return config


def _result(
    measured: MeasuredChoices,
    chosen: dict[str, str],
    config: dict[str, dict[str, Any]],
    limit: int,
    judged: dict[str, float],
) -> BitSearch:
    picked = [next(o for o in measured.table[name] if o.name == label) for name, label in chosen.items()]
    labels, size = list(chosen.values()), sum(option.bytes for option in picked)
    found = BitSearch(
        config,
        chosen,
        8 * size / measured.weights,
        size,
        sum(option.harm for option in picked),
        relaxed(measured.table, limit),
        judged,
    )
    logger.info(
        "bits: %s; %.2f bits per weight, estimated harm %.3g, at least %.3g within the budget; on held-out rows %s",
        ", ".join(f"{labels.count(label)} x {label}" for label in dict.fromkeys(sorted(labels))),
        found.bits,
        found.error,
        found.bound,
        ", ".join(f"{value:.4g} ({how})" for how, value in judged.items()),
    )
    return found
