"""How large a model is, and will be, by its plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from hfquant.integrations.experts import holds_experts
from hfquant.integrations.facts import facts_of
from hfquant.layer_plan import LayerPlan
from hfquant.nn.modules import quantized_share
from hfquant.planner import Plan


@dataclass(frozen=True)
class PlannedSize:
    """Size of a model.

    Attributes:
        before: bytes of its parameters and buffers in full precision.
        after: bytes once it is quantized.
        share: of the parameters in matrices, embeddings and output head aside, that are quantized.
    """

    before: int
    after: int
    share: float


def planned_size(model: nn.Module, plan: Plan, width: int) -> PlannedSize:
    """Return the size of a model before and after; it may be on the meta device.

    Args:
        model: in full precision.
        plan: for it.
        width: bytes of a float of the model's dtype.
    """
    before = width * sum(tensor.numel() for tensor in {id(p): p for p in model.parameters()}.values())
    counts = {name: matrices(model, name) for name, layer in plan.layers.items() if not layer.tied}
    layers = {name: plan.layers[name] for name in counts}
    sizes = {name: counts[name] * layer.in_features * layer.out_features for name, layer in layers.items()}
    stored = sum(counts[name] * layer_bytes(layer, width) for name, layer in layers.items())
    share, _ = quantized_share(model, sizes, facts_of(model).uncounted)
    return PlannedSize(before, before - width * sum(sizes.values()) + stored, share)


def matrices(model: nn.Module, name: str) -> int:
    """Return how many matrices an entry of a plan stands for: the experts of a parameter, or the one of a layer."""
    return len(model.get_parameter(name)) if holds_experts(model, name) else 1


def layer_bytes(layer: LayerPlan, width: int) -> int:
    """Return the bytes of a layer's tensors but the bias.

    Args:
        layer: its plan.
        width: bytes of a float of the model's dtype.
    """
    return sum(
        math.prod(spec.shape) * (width if spec.dtype is None else spec.dtype.itemsize)
        for spec in layer.tensors().values()
    )
