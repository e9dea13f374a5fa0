"""The guard's remedies for a layer that fails its check: safer formats to try, and the likely cause in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.layer_config import WeightQuant
from hfquant.layer_plan import LayerPlan
from hfquant.nn.layer import QuantLayer
from hfquant.solver import solve


def _token_scales(plan: LayerPlan) -> LayerPlan | None:
    """Return the plan with per-token input scales, otherwise unchanged; None if the scales are not static."""
    return plan.by_token() if plan.static_input else None


def _eight_bits(plan: LayerPlan) -> LayerPlan | None:
    """Return the plan with at least 8 bits, rounded to nearest, without calibration; None if nothing changes."""
    config = plan.plain().by_token().config
    weight, quant = config.weight_quant, config.input_quant
    update: dict[str, Any] = {}
    if weight.format.bits < 8:
        update["weight_quant"] = WeightQuant(type="int8", axis=-1, group_size=weight.group_size)
    if quant is not None and quant.format.bits < 8:
        update["input_quant"] = quant.model_copy(update={"type": "int8"})
    changed = replace(plan, config=config.model_copy(update=update), dual=(False,) * len(plan.dual))
    return changed if changed != plan else None


def _float_inputs(plan: LayerPlan) -> LayerPlan | None:
    """Return that 8-bit plan with float inputs; None if inputs are float already."""
    safe = _eight_bits(plan) or plan
    if safe.config.input_quant is None:
        return None
    return replace(safe, config=safe.config.model_copy(update={"input_quant": None}))


#: Remedies for a layer that fails the check, in order; if none brings it within bounds, it stays in full precision.
LADDER: dict[str, Callable[[LayerPlan], LayerPlan | None]] = {
    "per-token input scales": _token_scales,
    "8 bits, round-to-nearest": _eight_bits,
    "8-bit weights, float inputs": _float_inputs,
}


def lowered(
    name: str, layer: QuantLayer, remedy: str, weight: Tensor, bias: Tensor | None, original: nn.Module
) -> QuantLayer | None:
    """Return a layer moved to a rung of the ladder; None if that changes nothing.

    Args:
        name: layer name for messages.
        layer: the layer as solved.
        remedy: a key of :data:`LADDER`.
        weight, bias: weight and bias of the float layer, [out, in] and [out].
        original: the float module.
    """
    plan = LADDER[remedy](layer.plan)
    if plan is None:
        return None
    # If the weight side is unchanged, keep its solution: the statistics behind it are gone.
    if (plan.config.weight_quant, plan.opt) == (layer.plan.config.weight_quant, layer.plan.opt):
        tensors = {key: tensor for key, tensor in layer.solved_tensors().items() if key in plan.tensors()}
    else:
        tensors = solve(name, weight, plan, None, original.get_parameter("weight").dtype).tensors
    parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return type(layer).from_tensors(plan, tensors, parameter, original)


#: Thresholds to report a cause: an outlier over the median, and an input over its static scale's range.
_OUTLIER, _SATURATED = 100.0, 1.5


def likely_cause(layer: QuantLayer, weight: Tensor, x: Tensor) -> str:
    """Describe what is unusual about a layer that failed the check, for input rows [rows, in] or indices [rows]."""
    causes = []
    if x.is_floating_point():
        if not x.isfinite().all():
            return "NaN or Inf in the input"
        if (beyond := _saturation(layer, x)) > _SATURATED:
            causes.append(f"static scale saturates: inputs reach {beyond:.3g}x its range")
        channel, times = _outlier(x.float())
        if times > _OUTLIER:
            causes.append(f"outlier channel {channel} in the input, {times:.3g}x the median")
    channel, times = _outlier(weight.float())
    if times > _OUTLIER:
        causes.append(f"outlier channel {channel} in the weights, {times:.3g}x the median")
    if dead := _dead_groups(layer, weight):
        causes.append(f"dead groups: {dead} groups of weights rounded to zero")
    return "; ".join(causes) or "formats are too coarse for this layer"


def _saturation(layer: QuantLayer, x: Tensor) -> float:
    """Return the largest input relative to the range of the layer's static scale; 0 without one."""
    if not layer.plan.static_input:
        return 0.0
    stored = dict(layer.named_buffers())
    limits = stored["input_scale"].view(len(layer.plan.row_groups), -1) * layer.plan.input_rule.format.qmax  # type: ignore[union-attr]
    beyond = 0.0
    for group, limit in enumerate(limits):
        divisor = layer.plan.transform.divisor(stored, group)
        seen = x.float() if divisor is None else x.float() / divisor
        parts = seen.abs().split(list(layer.plan.input_segments), dim=1)
        beyond = max([beyond, *(float(part.max() / most) for part, most in zip(parts, limit, strict=True))])
    return beyond


def _outlier(values: Tensor) -> tuple[int, float]:
    """Return the channel of [rows, channels] with the largest magnitude, and its ratio to the median channel."""
    amax = values.abs().amax(0)
    channel = int(amax.argmax())
    return channel, float(amax[channel] / amax.median().clamp(min=torch.finfo(torch.float32).tiny))


def _dead_groups(layer: QuantLayer, weight: Tensor) -> int:
    """Return how many weight groups are all zero although their float weights are not."""
    columns = list(layer.plan.columns)
    blocks = zip(layer.dequantize().split(columns, 1), weight.split(columns, 1), strict=True)
    return sum(int(((q == 0).all(1) & (w != 0).any(1)).sum()) for q, w in blocks)
