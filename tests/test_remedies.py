"""The ladder of safer formats, and the names of causes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hfquant
from hfquant.layer_plan import LayerPlan, layer_plan
from hfquant.nn.linear import QuantLinear
from hfquant.remedies import LADDER, likely_cause
from tests.schemes import SVDQUANT

ROWS = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


def plan(preset: str) -> LayerPlan:
    return layer_plan("x", nn.Linear(64, 16), hfquant.HfQuantConfig(preset).rules.default)


def rungs(start: LayerPlan) -> dict[str, str]:
    found = {name: lower(start) for name, lower in LADDER.items()}

    def said(p: LayerPlan) -> str:
        w, i = p.config.weight_quant, p.config.input_quant
        inputs = "float" if i is None else f"{i.type} {'token' if i.dynamic else 'static'}"
        return f"{p.config.opt.type}/{p.config.calib.type} {w.type} g{p.config.group_size} {inputs}"

    return {name: said(p) for name, p in found.items() if p is not None}


TOKEN, EIGHT, FLOAT_INPUTS = LADDER


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        (
            "w8a8",
            {
                TOKEN: "smooth/amax int8 gNone int8 token",
                EIGHT: "default/amax int8 gNone int8 token",
                FLOAT_INPUTS: "default/amax int8 gNone float",
            },
        ),
        (
            "w4a8-gptq",
            {EIGHT: "default/amax int8 g32 int8 token", FLOAT_INPUTS: "default/amax int8 g32 float"},
        ),
        ("w4a16-gptq", {EIGHT: "default/amax int8 g32 float"}),
        (SVDQUANT, {EIGHT: "default/amax int8 g64 int8 token", FLOAT_INPUTS: "default/amax int8 g64 float"}),
        (
            "fp8",
            {
                TOKEN: "default/amax fp8e4m3 gNone fp8e4m3 token",
                EIGHT: "default/amax fp8e4m3 gNone fp8e4m3 token",
                FLOAT_INPUTS: "default/amax fp8e4m3 gNone float",
            },
        ),
        ("w8a16", {}),
    ],
)
def test_each_rung_is_safer(preset, expected):
    assert rungs(plan(preset)) == expected


def layer(linear: nn.Linear, config, rows=ROWS) -> QuantLinear:
    net = nn.Sequential(copy.deepcopy(linear))
    hfquant.quantize(net, [rows], hfquant.HfQuantConfig(config, guard=False))
    return net[0]


def test_causes():
    linear = nn.Linear(64, 16, bias=False)
    static = layer(linear, "w8a8")
    assert likely_cause(static, linear.weight, ROWS) == "formats are too coarse for this layer"
    assert likely_cause(static, linear.weight, 30 * ROWS).startswith("static scale saturates: inputs reach 30")
    rows = ROWS.clone()
    rows[:, 9] *= 1e4
    cause = likely_cause(static, linear.weight, rows)
    assert "static scale saturates" in cause
    assert "outlier channel 9 in the input" in cause
    with torch.no_grad():
        linear.weight[:, 3] *= 1e5
    four = layer(linear, {"default": {"opt": {"type": "default"}, "weight_quant": {"type": "int4", "group_size": 64}}})
    cause = likely_cause(four, linear.weight, ROWS)
    assert "outlier channel 3 in the weights" in cause
    four.weight.data.zero_()
    assert "dead groups: 16 groups of weights rounded to zero" in likely_cause(four, linear.weight, ROWS)
