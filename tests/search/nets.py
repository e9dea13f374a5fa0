"""Shared by the tests of the search: a net of two layers of different influence, its inputs, a plain config."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BASE = {
    "default": {
        "opt": {"type": "default"},
        "calib": {"type": "amax"},
        "input_quant": None,
        "weight_quant": {"type": "int4", "group_size": 32, "symmetric": False, "clip": "mse"},
    }
}


class Net(nn.Module):
    """Two layers with very different influence on the output."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.loud(x) + 0.01 * self.quiet(x)


def inputs(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 64, generator=generator) for _ in range(count)]
