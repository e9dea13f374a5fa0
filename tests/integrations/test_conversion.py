"""Conversions of a checkpoint's tensors for models whose layers hold codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import hfquant
from hfquant.integrations.compat import Transpose, WeightConverter
from hfquant.integrations.conversion import transposing_floats
from tests.integrations import small_models


def converted(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    converter = transposing_floats(WeightConverter("x", "x", operations=[Transpose(0, 1, check_dims=True)]))
    arguments = {"source_patterns": ["x"], "target_patterns": ["x"], "full_layer_name": f"{name}.weight"}
    return converter.operations[0].convert({"x": weight}, model=model, **arguments)["x"]


def test_what_is_stored_transposed_is_recognized_by_the_shape_of_the_float_weight():
    """INT4 codes have half the columns."""
    model, name = small_models.llama(), "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach().clone()
    assert weight.shape[0] != weight.shape[1]
    for _ in range(2):
        assert torch.equal(converted(model, name, weight), weight)
        assert torch.equal(converted(model, name, weight.T.contiguous()), weight)
        model = hfquant.quantize(small_models.llama(), None, "w4a16")
    assert model.get_submodule(name).weight.shape != weight.shape


def test_other_conversions_are_left_alone():
    converter = WeightConverter("x", "x", operations=[Transpose(0, 1)])
    assert transposing_floats(converter) is converter
