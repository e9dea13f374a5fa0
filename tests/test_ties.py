"""Modules that share one weight, and which of them are quantized with one set of codes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hfquant
from hfquant.nn.modules import quant_layers
from hfquant.ties import tied_groups

INT8 = {"opt": {"type": "default"}, "weight_quant": {"type": "int8", "axis": -1}, "input_quant": None}
INCLUDED = {**INT8, "include": ["embeddings"]}


class Tied(nn.Module):
    """An embedding, a head that shares its weight, and a linear between."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(20, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 20)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


def test_groups() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcdef"})
    model["b"].weight = model["a"].weight
    model["d"].bias = model["c"].bias
    assert tied_groups(model, {}) == [["a", "b"]]
    # Before a library ties them, and when another module joins tied ones.
    assert tied_groups(model, {"e": "f", "a": "f"}) == [["f", "a", "b", "e"]]
    assert tied_groups(model.to("meta"), {"e": "f"}) == [["f", "e"]], "a move unties, as building there does"


@torch.no_grad()
def test_tied_layers_share_codes() -> None:
    model, ids = Tied(), torch.randint(0, 20, (2, 5))
    exact = model(ids)
    twin = copy.deepcopy(model)
    hfquant.quantize(model, None, {"default": {**INCLUDED, "input_quant": {"type": "int8", "dynamic": True}}})
    layers = quant_layers(model)
    assert list(layers) == ["embed", "body", "head"] or sorted(layers) == ["body", "embed", "head"]
    assert model.head.weight is model.embed.weight
    assert model.head.weight_scale is model.embed.weight_scale
    assert model.head.plan.tied == "embed"
    assert model.embed.plan.tied == model.body.plan.tied == ""
    assert model.head.plan.config.input_quant is not None, "its input is quantized all the same"
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in twin.parameters())
    assert (model(ids) - exact).norm() < 0.05 * exact.norm()
    again = copy.deepcopy(model)
    assert again.head.weight is again.embed.weight
    output = model(ids)
    hfquant.dequantize(model)
    assert model.head.weight is model.embed.weight
    assert type(model.embed) is nn.Embedding
    assert torch.equal(again(ids), output)


@torch.no_grad()
def test_parts_of_the_input_are_not_for_tied_layers() -> None:
    """The embedding has no input, so it cannot have the head's scales."""
    model, ids = Tied(256), torch.randint(0, 20, (2, 5))
    exact = model(ids)
    quant = {"type": "int8", "dynamic": True, "segments": 4}
    hfquant.quantize(model, None, {"default": {**INCLUDED, "input_quant": quant}})
    assert model.head.weight_scale is model.embed.weight_scale
    assert (len(model.body.plan.input_segments), len(model.head.plan.input_segments)) == (4, 1)
    assert (model(ids) - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("extra", [{"opt": {"type": "smooth"}}, {"calib": {"type": "gptq"}}, {"opt": {"type": "svd"}}])
@torch.no_grad()
def test_what_would_change_the_shared_weight_is_left_out(extra) -> None:
    """Also if other layers are smoothed, folded into norms, or rounded with respect to their inputs."""
    model, ids = Tied(), torch.randint(0, 20, (2, 5))
    exact = model(ids)
    config = {**INCLUDED, "input_quant": {"type": "int8"}, **extra}
    hfquant.quantize(model, [ids], {"default": config})
    assert model.head.weight is model.embed.weight
    assert model.head.plan.config.opt.type == "default"
    assert model.body.plan.config.opt.type == config["opt"]["type"]
    assert set(dict(model.head.named_buffers())) == {"weight_scale", "input_scale"}
    assert (model(ids) - exact).norm() < 0.05 * exact.norm()


def test_all_or_none() -> None:
    model = Tied()
    assert list(hfquant.plan(model, {"default": INT8}).layers) == ["body"]
    for left in ({"head": {"enable": False}}, {"embed": {"enable": False}}):
        found = hfquant.plan(model, {"default": INCLUDED, **left})
        assert list(found.layers) == ["body"]
        assert {"embed", "head"} == found.skipped.keys()
    # A layer that is enabled by its own name is quantized separately.
    found = hfquant.plan(model, {"default": INT8, "head": {"enable": True}})
    assert set(found.layers) == {"body", "head"}
    assert found.layers["head"].tied == ""
    # Linears tied to each other stay in float.
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    assert hfquant.plan(model, {"default": INCLUDED}).layers == {}


def test_the_owner_s_format_holds_for_all() -> None:
    found = hfquant.plan(Tied(), {"default": INCLUDED, "head": {"weight_quant": {"type": "int4", "group_size": 8}}})
    head, embed = found.layers["head"].config, found.layers["embed"].config
    assert head.weight_quant == embed.weight_quant
    assert embed.weight_quant.type == "int8"
