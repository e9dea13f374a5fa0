"""Requantize layers on a plain grid, for formats that cannot express them."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import nn

from hfquant.algorithms import Identity
from hfquant.layer_plan import LayerPlan
from hfquant.nn.layer import QuantLayer
from hfquant.nn.linear import QuantLinear
from hfquant.outputs import decibels
from hfquant.solver import solve

logger = logging.getLogger(__name__)

#: Groups narrower than this would cost more than they gain.
_NARROWEST = 16


def no_linear(layer: QuantLayer) -> str | None:
    """Return the kind of a layer that other formats have no codes for; None for a linear."""
    return None if type(layer) is QuantLinear else f"it is not a linear but a {layer._get_name()}"


def plain(plan: LayerPlan, divided: int | None = None) -> LayerPlan:
    """Return a plan with the same bit widths and nothing else: one segment, no transform, equal groups, dynamic scales.

    Args:
        plan: plan of a layer.
        divided: number of columns that the group size must divide; None: the layer's inputs.
    """
    plan = replace(
        plan.plain().by_token(),
        input_segments=(plan.in_features,),
        output_segments=(plan.out_features,),
        dual=(False,),
        folded=False,
    )
    weight, inputs = plan.config.weight_quant, plan.config.input_quant
    group = weight.group_size and _equal_groups(divided or plan.in_features, weight.group_size)
    changes = {"group_size": group, "axis": weight.axis if group or not weight.group_size else -1}
    weight = weight.model_copy(update=changes)
    inputs = inputs and inputs.model_copy(update={"segments": 1})
    return replace(plan, config=plan.config.model_copy(update={"weight_quant": weight, "input_quant": inputs}))


def _equal_groups(columns: int, group: int) -> int | None:
    """Return the largest size of at most ``group`` that divides ``columns``; None for one group per row."""
    size = max(d for d in range(1, min(group, columns) + 1) if columns % d == 0)
    return size if size >= _NARROWEST else None


def requantized(name: str, layer: QuantLinear, plan: LayerPlan) -> QuantLinear:
    """Return a layer as requantized by :func:`rounded_anew`, and log the loss."""
    new, sqnr = rounded_anew(name, layer, plan)
    if sqnr is None:
        logger.warning("layer %r: its inputs use dynamic per-token scales in the export", name)
    else:
        logger.warning("layer %r: requantized for the export, SQNR %.1f dB against the previous weight", name, sqnr)
    return new


def rounded_anew(name: str, layer: QuantLinear, plan: LayerPlan) -> tuple[QuantLinear, float | None]:
    """Return a layer with the effective weight of ``layer`` under ``plan``, and its SQNR in dB.

    If only the input quantization changes, the codes are kept and the SQNR is None; otherwise, the weight is rounded to
    nearest.

    Args:
        name: layer name, for messages.
        layer: the layer; it is not modified.
        plan: a plan that needs no data (see :func:`plain`).
    """
    bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
    old = layer.plan
    same_grid = old.columns == plan.columns and old.config.weight_quant.symmetric == plan.config.weight_quant.symmetric
    if same_grid and isinstance(old.transform, Identity):
        return QuantLinear.from_tensors(plan, {key: getattr(layer, key) for key in plan.tensors()}, bias), None
    weight = layer.effective_weight()
    new = QuantLinear.from_tensors(plan, solve(name, weight, plan, None).tensors, bias)
    signal, noise = (x.square().sum() for x in (weight, new.dequantize() - weight))
    return new, decibels(signal, noise).item()
