"""A small model with fused experts of odd sizes, and the same function written as loops over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hfquant import ptq
from hfquant.config import QuantRules
from hfquant.experts import ExpertsLayout, route_tokens
from hfquant.planner import ModelFacts
from hfquant.run import Settings

EXPERTS, WIDTH, INNER, CHOICES = 5, 12, 7, 2


class Fused(nn.Module):
    """Experts of odd sizes, with optional biases, and with parameters in either layout."""

    def __init__(self, transposed: bool = False, bias: bool = False) -> None:
        super().__init__()
        up, down = (EXPERTS, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER)
        swap = (lambda shape: (shape[0], shape[2], shape[1])) if transposed else (lambda shape: shape)
        self.gate_up_proj = nn.Parameter(torch.randn(swap(up)) / 3)
        self.down_proj = nn.Parameter(torch.randn(swap(down)) / 3)
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER))
            self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.act, self.note = nn.SiLU(), "kept"

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise AssertionError("the original does not run")


def gated(experts: Any, number: int, rows: Tensor) -> Tensor:
    gate, up = experts.project("gate_up_proj", number, rows).chunk(2, dim=-1)
    return experts.project("down_proj", number, experts.act(gate) * up)


def layout(transposed: bool = False, route: Callable[..., Tensor] = route_tokens) -> ExpertsLayout:
    return ExpertsLayout(("gate_up_proj", "down_proj"), route, gated, transposed)


class Model(nn.Module):
    """A model with experts behind a linear, and a router that never chooses the last expert."""

    def __init__(self, transposed: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.router = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.experts = Fused(transposed, bias)
        self.facts = ModelFacts(experts={"experts": layout(transposed)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        rows = x.reshape(-1, WIDTH)
        scores = (rows @ self.router.T).index_fill(1, torch.tensor([EXPERTS - 1]), -1e4)
        top = scores.softmax(-1).topk(CHOICES)
        return x + self.experts(rows, top.indices, top.values).view(x.shape)


def matrices(experts: nn.Module, transposed: bool) -> dict[str, Tensor]:
    """Return float64 weights [experts, out, in] and biases."""
    found = {}
    for name in ("gate_up_proj", "down_proj"):
        weight = experts.get_parameter(name).detach().double()
        found[name] = weight.transpose(1, 2) if transposed else weight
        bias = experts._parameters.get(f"{name}_bias")
        found[f"{name}_bias"] = torch.zeros(found[name].shape[:2]) if bias is None else bias.detach().double()
    return found


def one_expert(w: dict[str, Tensor], number: int, row: Tensor) -> Tensor:
    hidden = w["gate_up_proj"][number] @ row + w["gate_up_proj_bias"][number]
    gate, up = hidden[:INNER], hidden[INNER:]
    inner = gate / (1 + (-gate).exp()) * up
    return w["down_proj"][number] @ inner + w["down_proj_bias"][number]


def by_loops(w: dict[str, Tensor], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for choice in range(index.shape[1]):
            number = int(index[t, choice])
            if number < EXPERTS:
                out[t] += weights[t, choice] * one_expert(w, number, x[t])
    return out


def routing(tokens: int, last: int = EXPERTS) -> tuple[Tensor, Tensor]:
    index = torch.stack([torch.randperm(last)[:CHOICES] for _ in range(tokens)]) if tokens else torch.zeros(0, CHOICES)
    return index.long(), torch.rand(tokens, CHOICES)


CONFIGS: dict[str, dict[str, Any]] = {
    "weights": {"opt": {"type": "default"}, "weight_quant": {"type": "int8", "axis": -1}, "input_quant": None},
    "dynamic": {
        "opt": {"type": "default"},
        "weight_quant": {"type": "int8", "axis": -1},
        "input_quant": {"type": "int8", "axis": -1, "dynamic": True},
    },
    "static, smooth": {"opt": {"type": "smooth"}},
    "groups, zero points, gptq": {
        "opt": {"type": "smooth"},
        "calib": {"type": "gptq"},
        "weight_quant": {"type": "int4", "group_size": 5, "symmetric": False},
        "input_quant": None,
    },
    "low rank": {"opt": {"type": "svd", "low_rank": 2}, "weight_quant": {"type": "int4", "group_size": 6}},
    "fp8": {"opt": {"type": "default"}, "weight_quant": {"type": "fp8e4m3"}, "input_quant": {"type": "fp8e4m3"}},
}


def data() -> list[Tensor]:
    return [torch.randn(2, 40, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def quantized(model: Model, config: dict[str, Any], **settings: Any) -> ptq.Applied:
    """Quantize with the float model's routing, to compare the experts and not the choice of experts."""
    rules = QuantRules({"default": config, "first": {"enable": False}})
    return ptq.quantize(model, data(), rules, Settings(**settings), model.facts)
