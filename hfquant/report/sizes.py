"""Size of a model before quantization and, by its plan, after."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hfquant.integrations.experts import holds_experts
from hfquant.integrations.facts import facts_of
from hfquant.nn.modules import quantized_share
from hfquant.planner import Plan


@dataclass(frozen=True)
class PlannedSize:
    """Size of a model.

    Attributes:
        before: bytes of its parameters in full precision.
        after: bytes after quantization.
        share: quantized fraction of the parameters in matrices, excluding embeddings and output head.
    """

    before: int
    after: int
    share: float


def planned_size(model: nn.Module, plan: Plan, width: int) -> PlannedSize:
    """Return the size of a model before and after quantization; it may be on the meta device.

    Args:
        model: model in full precision.
        plan: its plan.
        width: bytes per float of the model's dtype.
    """
    before = width * sum(tensor.numel() for tensor in {id(p): p for p in model.parameters()}.values())
    counts = {name: matrices(model, name) for name, layer in plan.layers.items() if not layer.tied}
    layers = {name: plan.layers[name] for name in counts}
    sizes = {name: counts[name] * layer.in_features * layer.out_features for name, layer in layers.items()}
    stored = sum(counts[name] * layer.nbytes(width) for name, layer in layers.items())
    share, _ = quantized_share(model, sizes, facts_of(model).uncounted)
    return PlannedSize(before, before - width * sum(sizes.values()) + stored, share)


def matrices(model: nn.Module, name: str) -> int:
    """Return how many matrices an entry of a plan covers: one per expert of a parameter, or one for a layer."""
    return len(model.get_parameter(name)) if holds_experts(model, name) else 1
