"""Sources that can be divided per channel while their readers multiply. Each one found is verified in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfquant.dataflow import trace

X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Gain(nn.Module):
    """An RMS norm written out as in models; ``shift`` adds a bias, ``plus`` is Gemma's 1 + weight."""

    def __init__(self, size: int = 8, shift: bool = False, plus: float = 0.0) -> None:
        super().__init__()
        self.weight, self.plus = nn.Parameter(torch.rand(size) + 0.5), plus
        self.bias = nn.Parameter(torch.randn(size)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32).to(dtype)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.plus:
            return (self.plus + self.weight.float()) * x
        y = self.weight * x.to(dtype)
        return y if self.bias is None else y + self.bias


class Toy(nn.Module):
    """Linears a, b (8 -> 8) and c (16 -> 8), a linear ab (8 -> 16) and norms around a function of the module."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.run = forward
        self.a, self.b, self.c, self.ab = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 8), nn.Linear(8, 16)
        self.d, self.free = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.ln, self.rms, self.gain = nn.LayerNorm(8), nn.RMSNorm(8), Gain()
        self.shifted, self.gemma, self.bare = (
            Gain(shift=True),
            Gain(plus=1.0),
            nn.LayerNorm(8, elementwise_affine=False),
        )
        self.kept: Any = None
        generator = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def heads(x: Tensor, count: int = 2) -> Tensor:
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def attention(m: Any, x: Tensor) -> Tensor:
    return m.b(merged(F.scaled_dot_product_attention(heads(m.free(x)), heads(m.d(x)), heads(m.a(x)))))


def shared_heads(m: Any, x: Tensor) -> Tensor:
    """The values of two heads serve four query heads, as in grouped-query attention."""
    q, v = heads(m.ab(x), 4), heads(m.a(x))
    v = v[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape)
    return m.c(merged(torch.matmul(torch.softmax(q @ q.transpose(2, 3), -1), v)))


def keep(m: Any, x: Tensor) -> Tensor:
    m.kept = m.ln(x)
    return m.a(m.kept)


FOUND: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, str]]] = {
    "layer norm": (lambda m, x: m.a(m.ln(x)), {"a": "ln"}),
    "nn.RMSNorm": (lambda m, x: m.a(m.rms(x)), {"a": "rms"}),
    "RMS norm spelled out": (lambda m, x: m.a(m.gain(x)), {"a": "gain"}),
    "with a bias": (lambda m, x: m.a(m.shifted(x)), {"a": "shifted"}),
    "two readers": (lambda m, x: (lambda y: m.a(y) * torch.tanh(m.b(y)))(m.ln(x)), {"a": "ln", "b": "ln"}),
    "a reader called twice": (lambda m, x: (lambda y: m.a(y) + m.a(y[:, :1]))(m.ln(x)), {"a": "ln"}),
    "a norm called twice": (lambda m, x: m.a(m.ln(x)) + m.b(m.ln(x.tanh())), {"a": "ln", "b": "ln"}),
    "linear and ReLU": (lambda m, x: m.b(F.relu(m.a(x))), {"b": "a"}),
    "linear without bias": (lambda m, x: m.b(m.d(x)), {"b": "d"}),
    "leaky ReLU": (lambda m, x: m.b(F.leaky_relu(m.a(x), 0.1)), {"b": "a"}),
    "gated": (lambda m, x: m.b(F.silu(m.free(x)) * m.a(x)), {"b": "a"}),
    "gated from the other side": (lambda m, x: m.b(m.a(x) * F.silu(m.free(x))), {"b": "a"}),
    "two ReLUs gate each other": (lambda m, x: m.b(F.relu(m.free(x)) * F.relu(m.a(x))), {"b": "a"}),
    "divided by a gate": (lambda m, x: m.b(m.a(x) / (1 + F.silu(m.free(x)).abs())), {"b": "a"}),
    "times a number": (lambda m, x: m.b(0.5 * m.a(x) / 3), {"b": "a"}),
    "one scale a token": (lambda m, x: m.b(m.a(x) * x.mean(-1, keepdim=True)), {"b": "a"}),
    "one half of a fused linear": (
        lambda m, x: (lambda g, u: m.b(F.silu(g) * u))(*m.ab(x).chunk(2, -1)),
        {"b": "ab"},
    ),
    "views": (lambda m, x: m.a(m.ln(x).flatten(0, 1)[3:].view(-1, 1, 8).transpose(0, 1).contiguous()), {"a": "ln"}),
    "casts and dropout": (lambda m, x: m.a(F.dropout(m.ln(x), training=False).clone().to(x.dtype)), {"a": "ln"}),
    "shape and dtype are looked at": (lambda m, x: (lambda y: m.a(y) * len(y) + y.size(0))(m.ln(x)), {"a": "ln"}),
    "channels in another order": (lambda m, x: m.b(m.a(x).flip(-1)), {}),
    "attention": (attention, {"b": "a"}),
    "grouped attention": (shared_heads, {"c": "a"}),
    "a chain": (lambda m, x: m.d(F.relu(m.b(F.relu(m.a(m.ln(x)))))), {"a": "ln", "b": "a", "d": "b"}),
}
LOST: dict[str, Callable[[Any, Tensor], Any]] = {
    "one plus the weight": lambda m, x: m.a(m.gemma(x)),
    "no gain": lambda m, x: m.a(m.bare(x)),
    "a modulated norm": lambda m, x: m.a(m.bare(x) * (1 + x.mean(1, keepdim=True)) + 1),
    "a residual beside it": lambda m, x: (lambda y: m.a(y) + y)(m.ln(x)),
    "it is returned": lambda m, x: (lambda y: (m.a(y), {"norm": y}))(m.ln(x)),
    "it is kept": keep,
    "GELU": lambda m, x: m.b(F.gelu(m.a(x))),
    "ReLU6": lambda m, x: m.b(F.relu6(m.a(x))),
    "a sum": lambda m, x: m.b(m.a(x) + x),
    "a number is added": lambda m, x: m.b(m.a(x) + 1),
    "a square": lambda m, x: m.b(m.a(x) ** 2),
    "times itself": lambda m, x: (lambda y: m.b(y * y))(m.a(x)),
    "times a view of itself": lambda m, x: (lambda y: m.b(y * y.flatten(0, 1).view_as(y)))(m.a(x)),
    "times a function of itself": lambda m, x: (lambda y: m.b(y * torch.sigmoid(y)))(m.a(x)),
    "the divisor": lambda m, x: m.b(1 / m.a(x)),
    "written to in place": lambda m, x: m.b(m.a(x).add_(1)),
    "ReLU in place": lambda m, x: m.b(F.relu(m.a(x), inplace=True)),
    "assigned to": lambda m, x: (lambda y: (y.__setitem__((..., 0), 1.0), m.b(y))[1])(m.a(x)),
    "assigned into another": lambda m, x: (lambda z: (z.__setitem__(slice(0, 2), m.a(x)), m.b(z))[1])(x.clone()),
    "another function sees it": lambda m, x: (lambda y: m.a(y) * y.amax())(m.ln(x)),
    "its numbers are read": lambda m, x: (lambda y: m.a(y) * y.sum().item())(m.ln(x)),
    "the gain is used elsewhere": lambda m, x: m.a(m.ln(x)) + m.ln.weight,
    "the weight is used elsewhere": lambda m, x: m.b(m.a(x)) + m.a.weight.sum(),
    "a reader's weight is used elsewhere": lambda m, x: m.b(m.a(x)) + m.b.weight.sum(),
    "a reader that reads something else too": lambda m, x: m.a(m.ln(x)) + m.a(x),
    "readers of different channels": lambda m, x: (lambda y: m.b(y[..., :8]) + m.d(y[..., 8:]))(m.ab(x)),
    "mixed along the channels": lambda m, x: m.b(m.a(x) @ torch.eye(8, dtype=x.dtype)),
    "normalized again": lambda m, x: m.b(F.layer_norm(m.a(x), (8,))),
    "joined": lambda m, x: m.c(torch.cat([m.a(x), x], -1)),
    "a function of the weight alone": lambda m, x: F.linear(m.ln(x), m.a.weight * 2),
    "to whole numbers": lambda m, x: m.b(m.a(x).to(torch.int32).to(x.dtype)),
    "scores of attention": lambda m, x: merged(F.scaled_dot_product_attention(*[heads(m.a(x))] * 3)),
}


def found(model: nn.Module) -> dict[str, Any]:
    return {name: t.source for name, t in trace(model, X).items() if t.source is not None}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", FOUND)
def test_a_source_takes_what_its_readers_give(case: str) -> None:
    forward, expected = FOUND[case]
    model = Toy(forward).double()
    sources = found(model)
    assert {name: source.module for name, source in sources.items()} == expected
    scaled, generator = copy.deepcopy(model), torch.Generator().manual_seed(2)
    factors = {}
    for source in dict.fromkeys(sources.values()):
        module = scaled.get_submodule(source.module)
        size = len(module.get_parameter(source.parameters[0]))
        used = torch.zeros(size, dtype=torch.bool)
        used[list(source.channels or range(size))] = True
        # Channels that no reader sees must stay unchanged, since they may be used anywhere.
        factor = torch.where(used, torch.exp(torch.randn(size, generator=generator)), torch.ones(size)).double()
        factors[source] = factor
        for name in source.parameters:
            param = module.get_parameter(name)
            param.data = param.data / factor.view(-1, *(1 for _ in param.shape[1:]))
    for name, source in sources.items():
        factor = factors[source]
        scaled.get_submodule(name).weight.data *= factor[list(source.channels)] if source.channels else factor
    with torch.no_grad():
        before, after = model(X), scaled(X)
    assert (after - before).abs().max() <= 1e-12 * before.abs().max()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", LOST)
def test_what_cannot_be_divided_is_left(case: str) -> None:
    assert found(Toy(LOST[case]).double()) == {}


def test_all_parameters_of_a_source_are_named() -> None:
    assert found(Toy(lambda m, x: m.a(m.shifted(x))))["a"].parameters == ("weight", "bias")
    assert found(Toy(lambda m, x: m.b(m.d(x))))["b"].parameters == ("weight",)
    assert found(Toy(FOUND["one half of a fused linear"][0]))["b"].channels == tuple(range(8, 16))
    assert found(Toy(shared_heads))["c"].channels == (0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7)


def test_tied_and_foreign_linears_are_left() -> None:
    tied = Toy(lambda m, x: m.b(m.a(x)))
    tied.free.weight = tied.b.weight
    assert found(tied) == {}

    class Other(nn.Linear):
        pass

    foreign = Toy(lambda m, x: m.b(m.a(m.ln(x))))
    foreign.a = Other(8, 8)
    assert found(foreign) == {}


def test_a_shared_norm_serves_wherever_it_is() -> None:
    model = Toy(lambda m, x: m.a(m.ln(x)) + m.b(m.rms(x)))
    model.rms = model.ln
    assert {name: source.module for name, source in found(model).items()} == {"a": "ln", "b": "ln"}
