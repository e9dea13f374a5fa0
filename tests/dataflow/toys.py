"""A toy model around two linears, and helpers shared by its tests."""

import torch
from torch import nn

from hfquant.dataflow.trace import trace

X = torch.zeros(2, 5, 8)


class Toy(nn.Module):
    """``a`` (8 -> 24) and ``b`` (24 -> 8) around a function of the module and the input."""

    def __init__(self, forward, a=24, b=24):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, a), nn.Linear(b, 8), nn.Linear(8, 24)
        self.norm, self.rms = nn.LayerNorm(b), nn.RMSNorm(b)
        self.table = nn.Parameter(torch.zeros(1, 3, 8))
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def of(forward, layer, x=X, **sizes):
    return trace(Toy(forward, **sizes), x)[layer]


def used(pieces):
    """Use every piece in an operation that is not a view."""
    return [p.cumsum(0) for p in pieces]


def two(x, n=12):
    """Return two tensors of untracked origin, 12 and 24 - 12 wide by default."""
    return x.repeat(1, 1, 2)[..., :n].cumsum(0), x.repeat(1, 1, 3)[..., : 24 - n].cumsum(0)
