"""Shared by the tests of the Triton kernels: the device, and a layer's product computed by one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hfquant import QuantLinear
from hfquant.algorithms import block_slices
from hfquant.layer_config import InputQuant

#: A real device if there is one, else Triton's interpreter (tests/conftest.py) on the CPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Numbers of tokens that no tile divides: a single one, less than a tile, several tiles.
TOKENS = (1, 7, 33)
INPUTS = {
    "token": InputQuant(type="int8", axis=-1, dynamic=True),
    "tensor": InputQuant(type="int8", dynamic=True),
    "static": InputQuant(type="int8"),
    "int6": InputQuant(type="int6", axis=-1, dynamic=True),
    "int4": InputQuant(type="int4"),
}


def run_layer(run: Callable[..., Tensor], layer: QuantLinear, x: Tensor) -> Tensor:
    """Return the layer's output [tokens, out] for ``x`` [tokens, in], computed by a kernel's ``run``."""
    layer, x = layer.to(DEVICE), x.to(DEVICE)
    parts = [
        run(x, layer.operands(i, rows), layer.product) for i, rows in enumerate(block_slices(layer.plan.row_groups))
    ]
    return torch.cat(parts, -1).cpu()
