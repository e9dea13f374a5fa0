"""What the guard needs from each kind of layer: its float output, and input rows that produce output rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import hfquant
from hfquant.nn.checked import Checked
from hfquant.nn.experts import QuantExperts
from hfquant.nn.kinds import kind_of
from hfquant.nn.layer import QuantLayer
from hfquant.nn.linear import QuantLinear
from tests.nn.fused_experts import CONFIGS, EXPERTS, INNER, WIDTH, Model, matrices, quantized, routing

WEIGHTS = {"opt": {"type": "default"}, "input_quant": None, "weight_quant": {"type": "int8", "axis": -1}}
TOKEN = {**WEIGHTS, "input_quant": {"type": "int8", "axis": -1, "dynamic": True}}
INCLUDE = {"include": ["embeddings", "edge_convs", "autoencoder_convs"]}


class CausalConv(WanCausalConv3d):
    """A subclass that pads with earlier frames."""

    def __init__(self) -> None:
        super().__init__(6, 5, 3, padding=1)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(2, 7, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), lambda: torch.randn(2, 7, 6)),
    "1d": (lambda: nn.Conv1d(6, 5, 4, 3, 2, padding_mode="replicate"), lambda: torch.randn(2, 6, 11)),
    "2d": (lambda: nn.Conv2d(6, 5, 3, padding=1), lambda: torch.randn(2, 6, 7, 5)),
    "1x1": (lambda: nn.Conv2d(6, 5, 1, bias=False), lambda: torch.randn(2, 6, 7, 5)),
    "strided, no batch": (
        lambda: nn.Conv2d(6, 5, (3, 2), (1, 2), (2, 1), (2, 1), padding_mode="reflect"),
        lambda: torch.randn(6, 9, 7),
    ),
    "same": (lambda: nn.Conv2d(6, 5, 4, padding="same"), lambda: torch.randn(1, 6, 5, 5)),
    "3d": (lambda: nn.Conv3d(6, 5, 2, 2), lambda: torch.randn(2, 6, 4, 6, 5)),
    "causal": (CausalConv, lambda: torch.randn(1, 6, 3, 5, 4)),
    "embedding": (lambda: nn.Embedding(9, 5), lambda: torch.randint(9, (2, 7))),
    "scaled embedding": (lambda: Gemma3TextScaledWordEmbedding(9, 5, 0, 3.0), lambda: torch.randint(9, (2, 7))),
}


def heard(layer: QuantLayer | QuantExperts, *args: Any) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]]]:
    """Return the output of a layer and what a listener received."""
    told: list[tuple[str, Tensor, Tensor]] = []
    handle = layer.listen(lambda part, x, y: told.append((part, x, y)))
    y = layer(*args)
    handle.remove()
    layer(*args)
    return y, told


@pytest.mark.parametrize("config", [WEIGHTS, TOKEN], ids=["weight-only", "w8a8"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_rows_of_the_input_give_rows_of_the_output(name: str, config: dict[str, Any]) -> None:
    make, inputs = LAYERS[name]
    original, x = make(), inputs()
    model = nn.Sequential(copy.deepcopy(original))
    hfquant.quantize(model, None, {"default": config | INCLUDE, "0": {"enable": True}})
    layer = model[0]
    assert isinstance(layer, QuantLayer)
    assert layer.parts() == {"": layer}
    y, told = heard(layer, x)
    assert len(told) == 1, "the handle was removed"
    part, seen, output = told[0]
    assert part == ""
    assert torch.equal(output, y)
    kind = kind_of(original)
    right = layer.float_output(seen, kind.matrix(original.weight.double()), getattr(original, "bias", None))
    assert right.dtype == torch.float32
    torch.testing.assert_close(right, original(x), rtol=1e-5, atol=1e-5)
    rows = layer.output_rows(y)
    assert rows.shape == (y.numel() // 5, 5)
    index = torch.tensor([0, len(rows) // 2, len(rows) - 1])
    torch.testing.assert_close(layer.multiply(layer.input_rows(seen, index)), rows[index], rtol=1e-5, atol=1e-5)
    assert len(layer.input_rows(seen, index[:0])) == 0


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_what_a_listener_returns_goes_on(name: str) -> None:
    make, inputs = LAYERS[name]
    model, x = nn.Sequential(make()), inputs()
    hfquant.quantize(model, None, {"default": WEIGHTS | INCLUDE, "0": {"enable": True}})
    before = model(x)
    handle = model[0].listen(lambda part, x, y: torch.full_like(y, 7))
    assert (model(x) == 7).all()
    handle.remove()
    assert torch.equal(model(x), before)


def test_another_part_takes_a_layers_place() -> None:
    original, other = nn.Linear(3, 2), nn.Linear(3, 2)
    layer = Checked()
    assert layer.with_parts({"": None}, original) is original
    assert layer.with_parts({"": other}, original) is other  # type: ignore[dict-item]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_experts_tell_of_each_ones_own_rows(transposed: bool, bias: bool) -> None:
    model = Model(transposed, bias)
    exact = matrices(model.experts, transposed)
    quantized(model, CONFIGS["static, smooth"])
    experts, x = model.experts, torch.randn(31, WIDTH)
    index, weights = routing(31, EXPERTS - 1)
    assert isinstance(experts, QuantExperts)
    parts = experts.parts()
    assert [*parts] == [f"{p}.{i}" for p in ("gate_up_proj", "down_proj") for i in range(EXPERTS)]
    y, told = heard(experts, x, index, weights)
    assert len(told) == 2 * (EXPERTS - 1), "the last expert is never chosen"
    for part, rows, output in told:
        projection, number = part.split(".")
        assert len(rows) == (index == int(number)).sum()
        layer = parts[part]
        assert torch.equal(layer.multiply(rows), output)
        weight, b = exact[projection][int(number)], exact[f"{projection}_bias"][int(number)]
        right = F.linear(rows.double(), weight, b.double())
        torch.testing.assert_close(layer.float_output(rows, weight, b).double(), right, rtol=1e-5, atol=1e-5)
    assert torch.equal(experts(x, index, weights), y)
    handle = experts.listen(lambda part, rows, y: torch.zeros_like(y) if part.startswith("down_proj") else None)
    assert (experts(x, index, weights) == 0).all()
    handle.remove()


@torch.no_grad()
def test_other_experts_take_the_place_of_a_projections() -> None:
    """Every expert of the projection changes, other projections stay; all in float restores the float module."""
    model = Model(transposed=True, bias=True)
    original = model.experts
    quantized(model, CONFIGS["groups, zero points, gptq"])
    experts = model.experts
    eight = copy.deepcopy(model)
    eight.experts = original
    quantized(eight, CONFIGS["weights"])
    parts = {name: part for name, part in eight.experts.parts().items() if name.startswith("down_proj")}
    mixed = experts.with_parts(parts, original)
    assert isinstance(mixed, QuantExperts)
    assert mixed.plans["down_proj"].config.weight_quant.type == "int8"
    assert torch.equal(mixed.down_proj, eight.experts.down_proj)
    assert mixed.plans["gate_up_proj"] == experts.plans["gate_up_proj"]
    assert all(torch.equal(t, mixed.state_dict()[n]) for n, t in experts.state_dict().items() if "gate_up" in n)
    half = experts.with_parts(dict.fromkeys(parts), original)
    assert isinstance(half, QuantExperts)
    assert [*half.plans] == ["gate_up_proj"]
    assert torch.equal(half.down_proj, original.down_proj)
    for new in (mixed, half):
        x, (index, weights) = torch.randn(9, WIDTH), routing(9)
        assert new(x, index, weights).isfinite().all()
    assert experts.with_parts(dict.fromkeys(experts.parts()), original) is original
    assert isinstance(parts["down_proj.0"], QuantLinear)
    assert parts["down_proj.0"].in_features == INNER
