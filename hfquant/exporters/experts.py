"""Mixtures of experts in checkpoints with one linear per expert, the form of most published ones.

transformers dequantizes these linears on load, before it fuses them into 3-D parameters, so they run in float. The way
it does this determines what can be exported (transformers 5.23): one scheme for all experts, with packed integers
without zero points, or with FP8.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from hfquant.exporters.requantize import plain, rounded_anew
from hfquant.layer_plan import LayerPlan
from hfquant.nn.experts import QuantExperts
from hfquant.nn.linear import QuantLinear

logger = logging.getLogger(__name__)


def as_read(plan: LayerPlan) -> LayerPlan:
    """Return a plan with the input quantization that other programs apply to the experts of a checkpoint.

    With packed integers, inputs are floats. FP8 experts have per-token scales, which transformers ignores.
    """
    if not plan.config.weight_quant.format.is_integer:
        return plan.by_token()
    config = plan.config.model_copy(update={"input_quant": None})
    return replace(plan, config=config, dual=(False,) * len(plan.dual))


def alike(plans: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """Return plain plans (see :func:`plain`) without zero points, whose group size divides the inputs of all."""
    common = math.gcd(*(plan.in_features for plan in plans.values()))
    found = {}
    for name, plan in plans.items():
        made = plain(plan, common)
        weight = made.config.weight_quant.model_copy(update={"symmetric": True})
        found[name] = replace(made, config=made.config.model_copy(update={"weight_quant": weight}))
    return found


def expert_layers(name: str, module: QuantExperts, projection: str, plan: LayerPlan) -> Iterator[QuantLinear]:
    """Yield each expert of a projection as a linear; log the cost if they are requantized.

    Args:
        name: name of the parameter, for messages.
        module: its weights must be in memory, not offloaded.
        projection: a quantized projection.
        plan: the plan of each expert: :func:`as_read` of its own, or a plain one.
    """
    own = as_read(module.plans[projection])
    errors: list[float] = []
    for i in range(module.expert_count):
        tensors = module.tensors_of(projection, i)
        layer = QuantLinear.from_tensors(own, {key: tensors[key] for key in own.tensors()}, None)
        if plan != own:
            layer, sqnr = rounded_anew(f"{name}.{i}", layer, plan)
            errors += [] if sqnr is None else [sqnr]
        yield layer
    if errors:
        least = min(errors)
        logger.warning(
            "experts %r: requantized for the export, SQNR at least %.1f dB against the previous weights", name, least
        )


def log_inputs(plans: Mapping[str, LayerPlan]) -> None:
    """Log once if experts with quantized inputs have float inputs in the export.

    Args:
        plans: plans of the quantized parameters of experts, by name.
    """
    quantized = [name for name, plan in plans.items() if plan.config.input_quant is not None]
    if quantized:
        logger.warning(
            "transformers runs the experts of this export (%r and %d more) on float inputs: it dequantizes them while "
            "it loads them",
            *(quantized[0], len(quantized) - 1),
        )
