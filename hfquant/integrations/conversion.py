"""Conversions that transformers applies to a checkpoint's tensors, for models whose layers hold codes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.integrations.checkpoint import experts_shape
from hfquant.integrations.compat import Transpose, WeightConverter
from hfquant.nn.experts import QuantExperts
from hfquant.nn.layer import QuantLayer


class _TransposeFloats(Transpose):
    """Transpose what a checkpoint stores transposed relative to the float model; the shapes of codes match neither."""

    def convert(self, *args: Any, model: nn.Module, **kwargs: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super().convert(*args, model=_FloatShapes(model), **kwargs)
        return found


class _FloatShapes:
    """Stand in for a model when a parameter's shape is read: for codes, return the float weight's shape."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def get_parameter(self, key: str) -> Tensor:
        name, _, tensor = key.rpartition(".")
        module = self.model.get_submodule(name)
        if isinstance(module, QuantExperts) and tensor in module.plans:
            return torch.empty(experts_shape(module, tensor), device="meta")
        if isinstance(module, QuantLayer) and tensor == "weight":
            return torch.empty(module.float_shape, device="meta")
        return self.model.get_parameter(key)


def transposing_floats(converter: WeightConverter) -> WeightConverter:
    """Return a converter whose shape-dependent transpositions use the shapes of the float model."""
    if not any(isinstance(op, Transpose) and op.check_dims for op in converter.operations):
        return converter
    changed = copy.copy(converter)
    changed.operations = [
        _TransposeFloats(op.dim0, op.dim1, check_dims=True) if isinstance(op, Transpose) and op.check_dims else op
        for op in converter.operations
    ]
    return changed
