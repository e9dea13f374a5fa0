"""Effect of each choice on each layer: solve the layer, then compare it with the float layer on its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from hfquant.calibration.batches import CalibrationError
from hfquant.config import QuantRules
from hfquant.console import progress_bar
from hfquant.experts import Unfused
from hfquant.layer_plan import LayerPlan
from hfquant.memory import free_memory
from hfquant.nn.kinds import kind_of, matrix_of
from hfquant.nn.layer import QuantLayer
from hfquant.observe import observe
from hfquant.planner import ModelFacts, plan_apart
from hfquant.search.knapsack import Option
from hfquant.search.sensitivity import Sample, watch
from hfquant.solver import solve
from hfquant.statistics import LayerStats, stats_bytes, within_budget

#: Gradients are computed for one in this many samples, since a backward takes as long as two forwards.
_GRADIENTS = 3


@dataclass
class MeasuredChoices:
    """Measured choices by layer; a parameter that holds experts counts as one layer.

    Attributes:
        table: options of each layer.
        solved: name -> choice -> quantized layer; experts are listed individually.
        members: layer -> its names in ``solved``.
        plans: choice -> plans of all layers, including those that are not chosen for.
        gradients: whether harm is weighted by gradients.
        unreached: layers that no gradient reached, so that their harm is 0.
    """

    table: dict[str, list[Option]]
    solved: dict[str, dict[str, QuantLayer]]
    members: dict[str, list[str]]
    plans: dict[str, dict[str, LayerPlan]] = field(default_factory=dict)
    gradients: bool = True
    unreached: Sequence[str] = ()

    @property
    def weights(self) -> int:
        """Total number of weights in the layers."""
        plans = next(iter(self.plans.values()))
        return sum(plans[n].in_features * plans[n].out_features for names in self.members.values() for n in names)

    def modules(self, chosen: Mapping[str, str]) -> dict[str, QuantLayer]:
        """Return the quantized layers of a combination of choices, by name."""
        return {name: self.solved[name][choice] for unit, choice in chosen.items() for name in self.members[unit]}


def measure(
    model: nn.Module,
    rules: Mapping[str, QuantRules],
    data: Sequence[Any],
    facts: ModelFacts,
    experts: Unfused,
) -> MeasuredChoices:
    """Measure choices on a model with unfused experts.

    This takes one pass for statistics (more if memory is short), and one forward and backward over a third of the data
    for gradients. Layers that never ran or share codes with others keep the base's format and are not in the table.

    Raises:
        CalibrationError: no layer ran.
    """
    plans = {label: plan_apart(model, found, data[0], facts, experts).layers for label, found in rules.items()}
    first = next(iter(plans.values()))
    shared = {plan.tied for plan in first.values()}
    names = [name for name, plan in first.items() if not plan.tied and name not in shared]
    seen = watch(model, {name: model.get_submodule(name) for name in names}, data[::_GRADIENTS])
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(experts.parameters.get(name, name), []).append(name)
    members = {unit: found for unit, found in members.items() if any(name in seen for name in found)}
    if not members:
        raise CalibrationError("none of the layers that could be quantized ran during calibration")

    def size(name: str) -> int:
        return stats_bytes(first[name].in_features, _needs(name, plans))

    measured = [name for found in members.values() for name in found]
    solved: dict[str, dict[str, QuantLayer]] = {}
    with progress_bar(total=len(measured), desc="measuring choices") as progress:
        for group in within_budget(measured, size, free_memory(next(model.parameters()).device) // 4):
            for name, stats in _observed(model, group, plans, data, facts).items():
                solved[name] = {label: _solved(model, name, plans[label][name], stats) for label in plans}
                progress.update()
    table = {}
    for unit, found in members.items():
        table[unit] = [_option(model, label, found, plans[label], solved, seen) for label in plans]
    reached = {name for name, found in seen.items() if found.is_reached}
    unreached = [unit for unit, found in members.items() if reached.isdisjoint(found)]
    return MeasuredChoices(table, solved, members, plans, bool(reached), unreached)


def _needs(name: str, plans: Mapping[str, Mapping[str, LayerPlan]]) -> frozenset[str]:
    return frozenset().union(*(plan[name].config.needs for plan in plans.values()))


def _observed(
    model: nn.Module,
    names: Sequence[str],
    plans: Mapping[str, Mapping[str, LayerPlan]],
    data: Sequence[Any],
    facts: ModelFacts,
) -> dict[str, LayerStats | None]:
    layers = {name: model.get_submodule(name) for name in names}
    needs = {name: _needs(name, plans) for name in names}
    if not any(plan[name].config.needs_data for plan in plans.values() for name in names):
        return dict.fromkeys(names)
    found = observe(model, layers, data, needs, options=facts.options(layers.values()))
    return {name: found.get(name) for name in names}


@torch.no_grad()
def _solved(model: nn.Module, name: str, plan: LayerPlan, stats: LayerStats | None) -> QuantLayer:
    """Return a layer solved with one choice. Smoothing is skipped if inputs are float.

    In that case the search for its strength would take most of the time, and it affects all choices alike.
    """
    module: Any = model.get_submodule(name)
    plan = replace(plan, folded=False)  # the layer is solved alone: no module before it takes its divisor
    if plan.config.input_quant is None and stats is not None:  # without statistics, nothing is smoothed anyway
        unsmoothed = plan.config.model_copy(update={"opt": plan.config.opt.folded()})
        plan = replace(plan, config=unsmoothed)
    with align_module_device(module):
        solution = solve(name, matrix_of(module), plan, stats, module.weight.dtype)
        bias = module._parameters.get("bias")
        layer = kind_of(module).from_tensors(solution.plan, solution.tensors, bias, module)
    return layer.eval()


def _option(
    model: nn.Module,
    label: str,
    names: Sequence[str],
    plans: Mapping[str, LayerPlan],
    solved: Mapping[str, Mapping[str, QuantLayer]],
    seen: Mapping[str, Sample],
) -> Option:
    """Return the option that a choice gives for a layer, or for all experts of a parameter."""
    harm = relative = 0.0
    for name in names:
        if name in seen:
            one, own = seen[name].errors(model.get_submodule(name), solved[name][label])
            harm, relative = harm + one, relative + own / len(names)
    return Option(label, sum(stored_bytes(model, plans[name]) for name in names), harm, relative)


def stored_bytes(model: nn.Module, plan: LayerPlan) -> int:
    """Return the bytes of a layer's tensors, excluding the bias."""
    return plan.nbytes(next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4))
