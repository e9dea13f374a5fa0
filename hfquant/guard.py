"""The guard: after quantizing with data, run the model once on held-out rows and compare each layer with its float one.

A layer is off if its output has NaN or Inf where the float layer's output has none, or if its error
(:mod:`hfquant.layer_errors`) is

- more than half of the output, and
- more than :data:`TIMES` times the nominal error of its number formats (that on normally distributed values), and
- more than :data:`TIMES` times the median error of its peers, the other layers with the same formats.

A layer that is off moves down :data:`~hfquant.remedies.LADDER` until it is within bounds on the same rows. Experts that
share a parameter share a format: if one of them is off, all of them move down as far as it needs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from hfquant.calibration.batches import CalibrationData, samples
from hfquant.calibration.self_made import SelfMade
from hfquant.calibration.streams import Batches
from hfquant.distributed import Processes
from hfquant.folding import Folding
from hfquant.formats.nominal_error import nominal_error
from hfquant.layer_config import InputQuant, LayerConfig, WeightQuant
from hfquant.layer_errors import LEAST, Observed, part_name, relative_error, row_errors, watch
from hfquant.layer_plan import LayerPlan
from hfquant.nn.base import QuantModule
from hfquant.nn.float_modules import hollow
from hfquant.nn.kinds import kind_of, matrix_of
from hfquant.nn.layer import QuantLayer
from hfquant.planner import Plan
from hfquant.remedies import LADDER, likely_cause, lowered
from hfquant.report.layers import LayerReport, QuantReport

logger = logging.getLogger(__name__)

#: Factor over both its nominal error and its peers' median beyond which a layer's error is off.
TIMES = 4.0
#: The last remedy, after the whole ladder.
FLOAT = "left in full precision"


@dataclass(frozen=True)
class Mended:
    """Outcome for a layer that was off, or that shares a parameter with one.

    Attributes:
        error: error before the remedy.
        cause: likely cause, in words; empty if the layer itself was sound.
        remedy: the rung of the ladder, in words.
        remaining: error on the same rows with the remedy.
        what: description of the replacement, as modules print themselves.
        plan: plan of the replacement; None if the layer stays in full precision.
        tensors: tensors of the replacement.
    """

    error: float
    cause: str
    remedy: str
    remaining: float
    what: str
    plan: LayerPlan | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        error = "NaN or Inf" if self.error == torch.inf else f"error {self.error:.2g}"
        return f"{error} ({self.cause}): {self.remedy}, error {self.remaining:.2g}"


@dataclass(frozen=True)
class Comparison:
    """A quantized model, and the float modules to compare it with.

    Attributes:
        model: the quantized model.
        modules: its quantized modules, by name.
        originals: their float modules, and a float linear for each expert.
        stacks: name of an expert's layer -> name of the parameter that it is a slice of.
        folding: divisors that were folded into preceding modules.
    """

    model: nn.Module
    modules: Mapping[str, QuantModule]
    originals: Mapping[str, nn.Module]
    stacks: Mapping[str, str] = field(default_factory=dict)
    folding: Folding = field(default_factory=Folding)

    @cached_property
    def layers(self) -> dict[str, QuantLayer]:
        """The single-matrix layers, by name: a module of experts has one per expert."""
        return {
            part_name(n, part): layer for n, module in self.modules.items() for part, layer in module.parts().items()
        }

    def exact(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return a layer's float matrix [out, in] and bias, with folded divisors, to match the quantized model."""
        original = self.originals[name]
        # Offloaded weights are fetched temporarily.
        with align_module_device(original):
            bias = original._parameters.get("bias")
            return self.folding.weight(name, matrix_of(original)), self.folding.bias(name, bias)

    def in_float(self, name: str) -> nn.Module:
        """Return a float module whose weights include the divisors folded around it."""
        original = self.originals[name]
        if name not in self.folding.inputs and name not in self.folding.outputs:
            return original
        kind = kind_of(original)
        shape, dtype = original.get_parameter("weight").shape, original.get_parameter("weight").dtype
        weight, bias = self.exact(name)
        new = hollow(original)
        new.weight = nn.Parameter(kind.float_weight(weight, shape).to(dtype).contiguous(), requires_grad=False)
        new.bias = bias  # type: ignore[assignment]
        return new

    def lowered(self, name: str, remedy: str) -> QuantLayer | None:
        """Return a layer moved to a rung of the ladder; None if that changes nothing."""
        with torch.no_grad(), align_module_device(self.layers[name]):
            return lowered(name, self.layers[name], remedy, *self.exact(name), self.originals[name])

    def placed(self, name: str, found: Mended) -> QuantLayer | None:
        """Return the replacement of a mended layer; None if that is the float module."""
        if found.plan is None:
            return None
        layer = self.layers[name]
        tensors = {key: tensor.to(layer.weight.device) for key, tensor in found.tensors.items()}
        return type(layer).from_tensors(found.plan, tensors, layer.bias, self.originals[name])


@dataclass(frozen=True)
class Mends:
    """Changes that the guard makes to a model.

    Attributes:
        layers: mended layers by name; each expert has its own.
        modules: replacements of the modules that these layers are or belong to, by name.
        stacks: name of an expert's layer -> name of the parameter that it is a slice of.
    """

    layers: dict[str, Mended] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    stacks: Mapping[str, str] = field(default_factory=dict)

    def outcome(self, plan: Plan, reports: Sequence[LayerReport]) -> tuple[Plan, QuantReport]:
        """Return the solved plan and the report, both updated with these changes."""
        plans, skipped = dict(plan.layers), dict(plan.skipped)
        for name, found in self.layers.items():
            owner = self.stacks.get(name, name)
            if found.plan is not None:
                plans[owner] = found.plan
            elif found.cause:
                plans.pop(owner, None)
                skipped.setdefault(owner, f"guard: {'' if owner == name else f'{name} '}{found}")
        return replace(plan, layers=plans, skipped=skipped), QuantReport([self._told(r) for r in reports], skipped)

    def _told(self, report: LayerReport) -> LayerReport:
        """Return a layer's report with the guard's finding and remedy."""
        found = self.layers.get(report.name)
        if found is None:
            return report
        return replace(report, what=found.what, guard=str(found) if found.cause else "")


def samples_to_check(loader: Any, data: CalibrationData | None, held_out: Any) -> list[Any]:
    """Return samples to check a quantized model on.

    Args:
        loader: the calibration data as given.
        data: the same data, opened.
        held_out: batches kept out of calibration; if there are none, the first sample of ``data`` is used.
    """
    if held_out is None and isinstance(loader, (SelfMade, Batches)):
        held_out = loader.held_out or None
    if held_out is not None:
        return [sample for batch in CalibrationData(held_out) for sample in samples(batch)]
    return [] if data is None else samples(data.first)[:1]


def mend(compared: Comparison, checks: Sequence[Any], options: Mapping[str, Any], group: Processes) -> Mends:
    """Return the replacements of layers that are off, the same in all processes, and log each.

    Args:
        compared: the model; not changed.
        checks: samples of the model's input; empty if this process has none.
        options: keyword arguments to add to samples that lack them.
        group: the processes that share the work; the first with samples checks for all.
    """
    checker = [*group.gather(bool(checks)), True].index(True)
    found: dict[str, Mended] = {}
    with group.together():
        if group.rank == checker:
            found = guard(compared, checks, options)
    everyones = group.exchange({name: (replace(m, tensors={}), m.tensors) for name, m in found.items()})
    mended = {name: replace(m, tensors=tensors) for name, (m, tensors) in everyones.items()}
    for name, m in mended.items():
        if m.cause and group.main:
            beside = f" (and with it all of {compared.stacks[name]})" if name in compared.stacks else ""
            logger.warning("layer %r failed the check after quantization: %s%s", name, m, beside)
    modules = {}
    for name, module in compared.modules.items():
        names = {part: part_name(name, part) for part in module.parts()}
        parts = {part: compared.placed(n, mended[n]) for part, n in names.items() if n in mended}
        if parts:
            modules[name] = module.with_parts(parts, compared.in_float(name))
    return Mends(mended, modules, compared.stacks)


def guard(compared: Comparison, batches: Iterable[Any], options: Mapping[str, Any] | None = None) -> dict[str, Mended]:
    """Find the layers that are off, and a remedy for each.

    Args:
        compared: the model; not changed.
        batches: samples of the model's input, kept out of calibration if possible.
        options: keyword arguments to add to samples that lack them.

    Returns:
        Outcomes by layer name, including sound layers that share a parameter with one that is off.
    """
    layers = compared.layers
    seen = watch(compared.model, compared.modules, compared.exact, batches, options)
    off = far_off({name: s.error for name, s in seen.items()}, {n: layer.plan for n, layer in layers.items()})
    together: dict[str, list[str]] = {}
    for name in off:
        together.setdefault(compared.stacks.get(name, name), []).append(name)
    mended: dict[str, Mended] = {}
    for owner, names in together.items():
        remedy, errors = _remedy(compared, {name: seen[name] for name in names})
        for name in layers:
            if compared.stacks.get(name, name) != owner:
                continue
            layer = None if remedy == FLOAT else compared.lowered(name, remedy)
            cause = ""
            if name in errors:
                with align_module_device(layers[name]):
                    cause = likely_cause(layers[name], compared.exact(name)[0], seen[name].rows)
            error = seen[name].error if name in seen else 0.0
            after = (FLOAT,) if layer is None else (layer.extra_repr(), layer.plan, layer.solved_tensors())
            mended[name] = Mended(error, cause, remedy, errors.get(name, 0.0), *after)
    return mended


def _remedy(compared: Comparison, seen: Mapping[str, Observed]) -> tuple[str, dict[str, float]]:
    """Return the first remedy that brings all of these layers within bounds, and each one's error with it."""
    for remedy in LADDER:
        errors: dict[str, float] = {}
        for name, was in seen.items():
            layer = compared.lowered(name, remedy)
            if layer is None:
                break
            output = layer.multiply(was.rows).float()
            errors[name] = relative_error(output, was.right, row_errors(output, was.right))
            if errors[name] > bound(layer.plan, 0.0):
                break
        else:
            return remedy, errors
    return FLOAT, dict.fromkeys(seen, 0.0)


# ----------------------------------------------------------------------------------------------------------- the rule


def far_off(errors: Mapping[str, float], plans: Mapping[str, LayerPlan]) -> list[str]:
    """Return the layers that are off, by the rule above. An error above 1 always is: zeros would be better."""
    peers = _peers(errors, plans)
    limits = {name: max(LEAST, bound(plans[name], peers[name])) for name in errors}
    return [name for name, error in errors.items() if error > min(limits[name], 1.0)]


def bound(plan: LayerPlan, peers: float) -> float:
    """Return the largest acceptable error, given a layer's formats and the median error of its peers."""
    return TIMES * max(nominal_error_of(plan.config), peers)


def _peers(errors: Mapping[str, float], plans: Mapping[str, LayerPlan]) -> dict[str, float]:
    """Return for each layer the median error of the others with its formats; 0 if there are none."""
    alike: dict[Any, list[str]] = {}
    for name in sorted(errors, key=lambda name: errors[name]):
        alike.setdefault(_formats(plans[name].config), []).append(name)
    return {
        name: _median_without(i, [errors[n] for n in names]) for names in alike.values() for i, name in enumerate(names)
    }


def _formats(config: LayerConfig) -> tuple[WeightQuant, InputQuant | None]:
    return config.weight_quant, config.input_quant


def _median_without(index: int, ascending: Sequence[float]) -> float:
    """Return the median of sorted values without the one at ``index``; 0 if none are left."""
    count = len(ascending) - 1
    if not count:
        return 0.0
    low, high = ((i + 1 if i >= index else i) for i in ((count - 1) // 2, count // 2))
    return (ascending[low] + ascending[high]) / 2


def nominal_error_of(config: LayerConfig) -> float:
    """Return the relative error of a product of normally distributed factors quantized in a config's formats."""
    formats = [config.weight_quant.format] + ([] if config.input_quant is None else [config.input_quant.format])
    return sum(nominal_error(form) ** 2 for form in formats) ** 0.5
