"""Fold smoothing divisors into the preceding module, so that nothing has to be divided at run time.

``Y = (X / s)(W s)^T``: if X is the output of a norm or of a linear, and only linears read it
(:mod:`hfquant.dataflow.scaling`), the norm's gain and bias, or the linear's rows and bias, are divided by s once. All
readers of one X share one s.

The model's float function does not change, so ``dequantize`` keeps the divided parameters: its linears hold ``W s``. A
norm's divided gain is rounded to its dtype, and W is multiplied by the factor that the gain was effectively divided by.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfquant.algorithms import Problem
from hfquant.dataflow import LinearTrace, Source
from hfquant.layer_config import LayerConfig
from hfquant.offload import forget_hook
from hfquant.statistics import LayerStats, stats_bytes, within_budget

if TYPE_CHECKING:  # the planner imports this module
    from hfquant.planner import Plan

#: Collects statistics of some layers' inputs, given by layer name the ones needed beyond those always collected.
Observe = Callable[[Mapping[str, Collection[str]]], Mapping[str, LayerStats]]


@dataclass(frozen=True)
class Fold:
    """A divisor to fold into the parameters of ``source``, for the input of ``readers``, all layers that read it."""

    source: Source
    readers: tuple[str, ...]


def plan_folds(model: nn.Module, chosen: Mapping[str, LayerConfig], traces: Mapping[str, LinearTrace]) -> list[Fold]:
    """Return the divisors that can be folded: all readers of the source must be quantized, and in the same way.

    Args:
        model: any model; it may be on the meta device.
        chosen: the configs of the linears to quantize.
        traces: traces of the model's linears.
    """
    readers: dict[Source, list[str]] = {}
    for name, found in traces.items():
        if found.source is not None:
            readers.setdefault(found.source, []).append(name)
    folds = []
    for source, names in readers.items():
        config, inputs = chosen.get(names[0]), traces[names[0]].input_segments
        alike = all(chosen.get(n) == config and traces[n].input_segments == inputs for n in names)
        if config is not None and config.opt.folds() and alike and _can_give(model, source, chosen):
            folds.append(Fold(source, tuple(names)))
    return folds


def _can_give(model: nn.Module, source: Source, chosen: Collection[str]) -> bool:
    """Return whether dividing a source loses no precision: a half-precision matrix would be rounded once more."""
    params = [model.get_submodule(source.module).get_parameter(name) for name in source.parameters]
    wide = all(p.dim() == 1 or p.dtype in (torch.float32, torch.float64) for p in params)
    return source.module in chosen or wide


@dataclass(frozen=True)
class Folding:
    """Divisors with their sources. The model is unchanged until the modules of :meth:`sources` are swapped in.

    Attributes:
        inputs: linear -> divisor already applied to its input, [in] float64.
        outputs: module -> divisor of its output channels, [out] float64.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """Return a linear's weight [out, in] with its divisors folded in, in at least float32."""
        columns, rows = self.inputs.get(name), self.outputs.get(name)
        if columns is None and rows is None:
            return weight
        wide = weight if weight.dtype == torch.float64 else weight.float()
        if columns is not None:
            wide = wide * columns.to(wide)
        return wide if rows is None else wide / rows.to(wide)[:, None]

    def bias(self, name: str, bias: nn.Parameter | None) -> nn.Parameter | None:
        """Return a linear's bias [out] with its divisor folded in."""
        rows = self.outputs.get(name)
        return bias if bias is None or rows is None else nn.Parameter(_divided(bias, rows), requires_grad=False)

    def stats(self, name: str, stats: LayerStats | None) -> LayerStats | None:
        """Return the statistics of a linear's divided input, from those of the original input."""
        columns = self.inputs.get(name)
        return stats if stats is None or columns is None else stats.divided(columns.float())

    def unfolded(self, name: str, layer: nn.Module) -> list[RemovableHandle]:
        """Let a folded linear run between modules that are not folded yet, until the handles are removed."""
        handles = []
        if (columns := self.inputs.get(name)) is not None:

            def divide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                x = args[0] if args else kwargs["input"]
                return (_rounded_once(x, columns, torch.div),), {}

            handles.append(layer.register_forward_pre_hook(divide, with_kwargs=True))
        if (rows := self.outputs.get(name)) is not None:
            handles.append(layer.register_forward_hook(lambda m, args, out: _rounded_once(out, rows, torch.mul)))
        return handles

    def sources(self, model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
        """Return a divided copy of each source that is not itself quantized, by name."""
        return {
            source.module: _divided_copy(
                model.get_submodule(source.module), source.parameters, self.outputs[source.module]
            )
            for source in (fold.source for fold in plan.folds)
            if source.module in self.outputs and source.module not in plan.layers
        }


def find_folding(model: nn.Module, plan: Plan, observe: Observe, budget: int) -> Folding:
    """Compute the divisors of ``plan.folds`` from data; a fold whose readers never ran is left out.

    Args:
        model: float model; not changed.
        plan: its plan.
        observe: runs the model over the calibration data, given layer names and the statistics that each needs.
        budget: bytes of statistics to hold at once; if they need more, several passes are made.
    """

    def size(fold: Fold) -> int:
        layer = plan.layers[fold.readers[0]]
        return stats_bytes(layer.in_features, layer.config.opt.needs)

    folding = Folding()
    # In reverse execution order, so that a linear that is both a source and a reader has its rows divided before its
    # columns are considered.
    for folds in within_budget(reversed(plan.folds), size, budget):
        stats = observe({name: plan.layers[name].config.opt.needs for fold in folds for name in fold.readers})
        for fold in folds:
            divisor = _common_divisor(model, plan, fold, stats, folding)
            if divisor is not None:
                _place(model, plan, fold, divisor, folding)
    return folding


def _common_divisor(
    model: nn.Module, plan: Plan, fold: Fold, stats: Mapping[str, LayerStats], folding: Folding
) -> Tensor | None:
    """Return the divisor [in] float64 shared by all readers of a source; None without data."""
    seen = {id(stats[name]): stats[name] for name in fold.readers if name in stats}
    if not seen:
        return None
    first, *others = seen.values()
    for other in others:
        first = first.merge(other)
    weights, rows = [], []
    for name in fold.readers:
        linear = model.get_submodule(name)
        with align_module_device(linear):
            weights.append(folding.weight(name, linear.get_parameter("weight").detach()).float())
        rows.append(plan.layers[name].grid_rule(plan.layers[name].out_features).rows)
    layer, weight = plan.layers[fold.readers[0]], torch.cat(weights)
    rule = layer.grid_rule(layer.out_features)
    rule = replace(rule, rows=None if rule.rows is None else tuple(size for sizes in rows for size in sizes or ()))
    dtype = model.get_submodule(fold.readers[0]).get_parameter("weight").dtype
    seen_by_all, sizes = first.to(weight.device), tuple(len(w) for w in weights)
    problem = Problem(fold.readers[0], rule, layer.input_rule, layer.input_segments, seen_by_all, dtype, sizes)
    return layer.config.opt.common_divisor(weight, problem).double()


def _place(model: nn.Module, plan: Plan, fold: Fold, divisor: Tensor, folding: Folding) -> None:
    """Add a divisor [in] of a source's readers to ``folding``, adjusted to what the source can actually represent."""
    source = fold.source
    module = model.get_submodule(source.module)
    with align_module_device(module):
        gain = module.get_parameter(source.parameters[0]).detach()
        index = torch.tensor(source.channels or range(len(gain)), device=divisor.device)
        # A channel that feeds several inputs (a value head shared by several heads) gets their geometric mean.
        logs = divisor.new_zeros(len(gain)).index_add_(0, index, divisor.log())
        outputs = (logs / torch.bincount(index, minlength=len(gain)).clamp(min=1)).exp()
        if source.module not in plan.layers and gain.dim() == 1:
            outputs = _effective(gain.to(outputs.device), outputs)
    folding.outputs[source.module] = outputs
    folding.inputs.update(dict.fromkeys(fold.readers, outputs[index]))


def _effective(gain: Tensor, divisor: Tensor) -> Tensor:
    """Return the effective divisor of a gain [channels] after rounding to its dtype; 1 if that loses the channel."""
    quotient = _divided(gain, divisor).double()
    exact = gain.double() / quotient
    usable = quotient.isfinite() & exact.isfinite() & (exact > 0)
    return torch.where(gain == 0, divisor, torch.where(usable, exact, torch.ones_like(exact)))


def _rounded_once(x: Tensor, factors: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply a function to ``x`` and factors in at least float32, and return the result in the dtype of ``x``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return function(x.to(wide), factors.to(x.device, wide)).to(x.dtype)


def _divided(param: Tensor, divisor: Tensor) -> Tensor:
    """Return ``param`` divided along its first dimension, in its own dtype."""
    wide = param.detach().double()
    return (wide / divisor.to(wide).view(-1, *(1 for _ in param.shape[1:]))).to(param.dtype)


def _divided_copy(module: nn.Module, names: Collection[str], divisor: Tensor) -> nn.Module:
    """Return a copy of a childless module with the parameters ``names`` divided; the others are shared."""
    new = copy.copy(module)
    for key, value in vars(module).items():
        if isinstance(value, dict):
            vars(new)[key] = copy.copy(value)
    forget_hook(new)
    with align_module_device(module):
        for key, param in module.named_parameters(recurse=False):
            value = _divided(param, divisor) if key in names else param.detach()
            new._parameters[key] = nn.Parameter(value, requires_grad=param.requires_grad)
    return new
