"""From a linear's weight, its plan and its statistics to the tensors of a QuantLinear."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hfquant.activations import static_scales
from hfquant.algorithms import rounding
from hfquant.config import CalibConfig, Calibrate, OptConfig, Optimum
from hfquant.observers import CalibrationError, LayerStats
from hfquant.planner import LayerPlan


def solve(name: str, weight: Tensor, plan: LayerPlan, stats: LayerStats | None) -> tuple[LayerPlan, dict[str, Tensor]]:
    """Quantize one layer.

    Args:
        name: for error messages.
        weight: [out, in], any float dtype.
        plan: what the layer is to become.
        stats: of its inputs; None where the config needs no data or the layer never ran.

    Returns:
        the plan as it ended up (the data has the last word on dual scale), and the tensors by name, codes unpacked.

    Raises:
        ValueError: the weight has NaN or Inf.
        NotImplementedError: an algorithm that is not built yet.
    """
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise ValueError(f"layer {name!r}: {bad} of {weight.numel()} weights are NaN or Inf")
    config = plan.config
    if config.opt.type is not Optimum.DEFAULT:
        raise NotImplementedError(f"layer {name!r}: opt.type {config.opt.type.value!r} is not built yet")
    if config.calib.type is not Calibrate.AMAX:
        raise NotImplementedError(f"layer {name!r}: calib.type {config.calib.type.value!r} is not built yet")
    if config.needs_data and stats is None:
        plan = without_data(plan)
        config = plan.config
    tensors: dict[str, Tensor] = {}
    quant = config.weight_quant
    rows = plan.output_segments if quant.axis is None and not config.group_size else None
    scale, zero_point = rounding.weight_grid(weight, quant, plan.columns, rows)
    tensors["weight"] = rounding.round_to_nearest(weight, scale, zero_point, quant.type, plan.columns)
    if scale is not None:
        tensors["weight_scale"] = scale.contiguous()
    if zero_point is not None:
        tensors["weight_zero_point"] = zero_point.contiguous()
    if plan.static_input:
        if stats is None:
            raise CalibrationError(f"layer {name!r}: a static input scale needs calibration data")
        plan, scales = static_input(plan, stats)
        tensors.update(scales)
    return plan, tensors


def static_input(plan: LayerPlan, stats: LayerStats) -> tuple[LayerPlan, dict[str, Tensor]]:
    """Scales of the activations, a segment each, from the range seen; dual scale is kept where it helps (e >= 1)."""
    assert plan.config.input_quant is not None
    low = torch.stack([part.min() for part in stats.low.split(list(plan.input_segments))])
    high = torch.stack([part.max() for part in stats.high.split(list(plan.input_segments))])
    scale, negative = static_scales(low, high, plan.config.input_quant.type, plan.dual)
    plan = replace(plan, dual=tuple((scale != negative).tolist()))
    return plan, {"input_scale": scale} | ({"input_scale_neg": negative} if any(plan.dual) else {})


def without_data(plan: LayerPlan) -> LayerPlan:
    """The stated fallback for a layer that calibration never ran.

    No smoothing, no low-rank branch, weights rounded to nearest, activations scaled by the token at run time.
    """
    quant = plan.config.input_quant
    if quant is not None and quant.type.is_scaled:
        quant = quant.model_copy(update={"dynamic": True, "axis": -1})
    update = {
        "opt": OptConfig(type=Optimum.DEFAULT),
        "calib": CalibConfig(),
        "input_quant": quant,
        "weight_quant": plan.config.weight_quant.model_copy(update={"group_size": plan.config.group_size}),
    }
    return replace(plan, config=plan.config.model_copy(update=update))
