"""Casts of quantized modules: which tensors change their dtype, and what that says of the module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfquant.nn.casts import cast_by, keeping_dtypes

DTYPES = [torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_named_tensors_are_moved_but_not_cast(dtype: torch.dtype) -> None:
    module = nn.Linear(2, 3)
    module.register_buffer("scale", torch.ones(3))
    cast = keeping_dtypes(module, lambda tensor: tensor.to("meta", dtype), {"scale", "bias"})
    found = {name: cast(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "weight": dtype,
        "bias": torch.float32,
        "scale": torch.float32,
    }
    assert all(tensor.is_meta for tensor in found.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_that_a_function_gives(dtype: torch.dtype) -> None:
    for like in (None, torch.ones(2), torch.ones(2, device="meta")):
        assert cast_by(lambda tensor: tensor.to(dtype), torch.float32, like) == dtype
        assert cast_by(lambda tensor: tensor, dtype, like) == dtype
    assert cast_by(lambda tensor: tensor.to(tensor.device), dtype, torch.ones(1)) == dtype
