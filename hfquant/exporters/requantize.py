"""Round layers anew on a plain grid: what is left of a layer in a format that cannot express it."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from torch import nn

from hfquant.layer_plan import LayerPlan
from hfquant.nn.layer import QuantLayer
from hfquant.nn.linear import QuantLinear
from hfquant.solver import solve

logger = logging.getLogger(__name__)

#: Groups narrower than this would cost more than they gain.
_NARROWEST = 16


def no_linear(layer: QuantLayer) -> str | None:
    """Return what a layer is that no other format has codes for; None for a linear."""
    return None if type(layer) is QuantLinear else f"it is no linear but a {layer._get_name()}"


def plain(plan: LayerPlan) -> LayerPlan:
    """Return the plan with the same bits and nothing else: one segment, no transform, equal groups, dynamic scales."""
    plan = replace(
        plan.without_data(),
        input_segments=(plan.in_features,),
        output_segments=(plan.out_features,),
        dual=(False,),
        folded=False,
    )
    weight, inputs = plan.config.weight_quant, plan.config.input_quant
    group = weight.group_size and _equal_groups(plan.in_features, weight.group_size)
    changes = {"group_size": group, "axis": weight.axis if group or not weight.group_size else -1}
    weight = weight.model_copy(update=changes)
    inputs = inputs and inputs.model_copy(update={"segments": 1})
    return replace(plan, config=plan.config.model_copy(update={"weight_quant": weight, "input_quant": inputs}))


def _equal_groups(columns: int, group: int) -> int | None:
    """Return the largest size of at most ``group`` that divides ``columns``; None for one group a row."""
    size = max(d for d in range(1, min(group, columns) + 1) if columns % d == 0)
    return size if size >= _NARROWEST else None


def requantized(name: str, layer: QuantLinear, plan: LayerPlan) -> QuantLinear:
    """Return a layer with the effective weight of ``layer`` by ``plan``; log what that costs.

    Codes stay where only the inputs are quantized otherwise; else the weight is rounded to nearest.

    Args:
        name: for the log.
        layer: stays as it is.
        plan: needs no data (see :func:`plain`).
    """
    bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
    old = layer.plan
    if old.columns == plan.columns and not old.transform.tensors(old.in_features, old.row_groups):
        logger.warning("layer %r: in the export its inputs have one scale a token, computed at run time", name)
        return QuantLinear.from_tensors(plan, {key: getattr(layer, key) for key in plan.tensors()}, bias)
    weight = layer.effective_weight()
    new = QuantLinear.from_tensors(plan, solve(name, weight, plan, None).tensors, bias)
    error = (new.dequantize() - weight).square().sum().item()
    sqnr = 10 * math.log10(weight.square().sum().item() / error) if error else math.inf
    logger.warning("layer %r: rounded anew for the export, %.1f dB to the weight that it had", name, sqnr)
    return new
