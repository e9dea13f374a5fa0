"""The plan of one layer: what a checkpoint stores of it, its tensors, and its grid and input rules."""

import copy
import json
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from hfquant import ConfigError
from hfquant.algorithms import Identity, TensorSpec
from hfquant.algorithms.low_rank import LowRank
from hfquant.config import QuantRules
from hfquant.formats import FORMATS
from hfquant.layer_config import InputQuant, LayerConfig, WeightQuant
from hfquant.layer_plan import LayerPlan, input_parts, layer_plan
from hfquant.nn.linear import QuantLinear

A8 = {"opt": {"type": "default"}, "input_quant": {"type": "int8", "dynamic": True}, "weight_quant": {"axis": -1}}


# What a checkpoint stores of it.


def config_of(**fields) -> LayerConfig:
    return QuantRules({"default": {**A8, **fields}}).default


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"input_segments": (8, 24)},
        {"input_segments": (8, 24), "dual": (True, False)},
        {"output_segments": (1, 5)},
        {"config": config_of(weight_quant={"type": "int4", "group_size": 4}), "dual": (True,)},
        {"config": config_of(input_quant=None)},
    ],
)
def test_stored_differences_round_trip(made) -> None:
    linear, rule = nn.Linear(32, 6), config_of()
    plain = layer_plan("fc", linear, rule)
    dual = made.get("dual", (False,) * len(made.get("input_segments", (32,))))
    idle = set() if any(dual) else {"dual"}
    made = replace(plain, evidence=("why",), **{**made, "dual": dual})
    stored = json.loads(json.dumps(made.differences(rule)))
    assert layer_plan("fc", linear, rule, stored) == made
    # Nothing that follows from the rule is stored.
    changed = {f.name for f in fields(LayerPlan) if getattr(made, f.name) != getattr(plain, f.name)}
    assert set(stored) == changed - {"evidence", *idle}


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"rank": 4}, "stored plan.rank: unknown key; allowed are config, input_segments"),
        ({"ranks": [4]}, "stored plan.ranks: unknown key"),
        ({"input_segments": [8, 8]}, r"input_segments=\[8, 8\] do not sum to input_features=32"),
        ({"input_segments": [40, -8]}, "input_segments.1: .*greater than 0, got -8"),
        ({"input_segments": [32, 0]}, "input_segments.1: .*greater than 0, got 0"),
        ({"input_segments": [16.0, 16]}, "input_segments.0: .*valid integer, got 16.0"),
        ({"input_segments": [31, True]}, "input_segments.1: .*valid integer, got True"),
        ({"input_segments": ["32"]}, "input_segments.0: .*valid integer, got '32'"),
        ({"input_segments": [[32]]}, r"input_segments.0: .*valid integer, got \[32\]"),
        ({"input_segments": []}, r"input_segments: .*at least 1 item.*, got \[\]"),
        ({"input_segments": 32}, "input_segments: .*valid tuple, got 32"),
        ({"input_segments": None}, "input_segments: .*valid tuple, got None"),
        ({"input_segments": {"32": 32}}, "input_segments: .*valid tuple, got {'32': 32}"),
        ({"output_segments": [7]}, "output_segments=.* do not sum to output_features=6"),
        ({"dual": [True, True]}, "does not fit 1 input segments"),
        ({"dual": [1]}, "dual.0: .*valid boolean, got 1"),
        ({"dual": []}, r"dual: .*at least 1 item.*, got \[\]"),
        ({"dual": True}, "dual: .*valid tuple, got True"),
        ({"folded": 1}, "folded: .*valid boolean, got 1"),
        ({"tied": 3}, "tied: .*valid string, got 3"),
        ({"rounded": [True]}, "rounded.0: .*valid integer, got True"),
        ({"rounded": [-1]}, r"rounded=\[-1\] in the stored plan are not expert indices"),
        ({"dual": [True], "config": {"input_quant": None}}, "dual scale needs .* not None"),
        ({"dual": [True], "config": {"input_quant": {"type": "fp8e4m3", "dynamic": True}}}, "not fp8e4m3"),
        ({"dual": [True], "config": {"input_quant": {"type": "int16", "dynamic": True}}}, "not int16"),
        ({"config": {"enable": 3}}, "enable.*got 3"),
        ({"config": []}, r"config: .*valid dictionary, got \[\]"),
        ({"config": None}, "config: .*valid dictionary, got None"),
        ({"config": {"weight_quant": {"group_size": 0}}}, "group_size.*got 0"),
        ({"config": {"opt": {"type": "svd", "low_rank": 0}}}, "low_rank.*got 0"),
        ({"config": {"weight_quant": {"type": "int9"}}}, "unknown number format 'int9'"),
    ],
)
def test_malformed_stored_plans(stored, says) -> None:
    before = copy.deepcopy(stored)
    with pytest.raises(ConfigError, match=f"layer 'fc'.*{says}"):
        layer_plan("fc", nn.Linear(32, 6), config_of(), stored)
    assert stored == before


# Parts of the input.


@pytest.mark.parametrize(
    ("segments", "parts", "group", "expected"),
    [
        ((512,), 1, None, (512,)),
        ((512,), 4, None, (128,) * 4),
        ((512,), 8, None, (64,) * 8),
        ((512,), 100, None, (64,) * 8),
        ((576,), 4, None, (192,) * 3),
        ((63,), 4, None, (63,)),
        ((65,), 2, None, (64, 1)),
        ((640,), 4, None, (192, 192, 192, 64)),
        ((640,), 4, 48, (192, 192, 192, 64)),
        ((640,), 4, 160, (320, 320)),
        ((640,), 4, 32, (192, 192, 192, 64)),
        ((100, 412), 4, None, (100, 128, 128, 128, 28)),
    ],
)
def test_parts_of_an_input(segments, parts, group, expected) -> None:
    weight = {"axis": -1} if group is None else {"type": "int4", "group_size": group}
    config = config_of(input_quant={**A8["input_quant"], "segments": parts}, weight_quant=weight)
    assert input_parts(segments, config) == expected
    assert input_parts(segments, config_of(input_quant=None)) == segments
    if len(segments) == 1:
        plan = layer_plan("fc", nn.Linear(segments[0], 4), config)
        assert plan.input_segments == expected
        assert plan.differences(config) == {}, "it is what the rule gives"
        whole = replace(plan, input_segments=segments, dual=(False,))
        assert layer_plan("fc", nn.Linear(segments[0], 4), config, whole.differences(config)) == whole


def test_a_window_s_positions_are_no_parts() -> None:
    config = config_of(input_quant={**A8["input_quant"], "segments": 4})
    assert layer_plan("conv", nn.Conv2d(128, 8, 3), config).input_segments == (1152,)


# Tensors.


@pytest.mark.parametrize("dtype", FORMATS)
def test_tensors_of_a_plan(dtype) -> None:
    config = LayerConfig(
        weight_quant=WeightQuant(type=dtype), input_quant=InputQuant(type="int8"), opt=LowRank(low_rank=3)
    )
    form = FORMATS[dtype]
    spec = LayerPlan(config, 13, 10, (6, 7), (4, 6), (True, False)).tensors()
    codes = torch.int16 if form.bits == 16 else torch.int8
    assert all(isinstance(s, TensorSpec) for s in spec.values())
    assert spec["weight"] == ((10, -(-13 * form.bits // 8) if form.bits < 8 else 13), codes)
    assert spec.get("weight_scale") == (((10, 2), torch.float32) if form.has_scale else None)
    assert spec["input_scale"] == spec["input_scale_neg"] == ((4,), torch.float32)
    assert spec["smooth"] == ((2, 13), torch.float32)
    # Their dtype is the model's.
    assert spec["svd_down"] == ((6, 13), None)
    assert spec["svd_up"] == ((10, 3), None)
    config = LayerConfig(weight_quant=WeightQuant(type=dtype), input_quant=None, opt=Identity())
    plain = LayerPlan(config, 13, 10, (13,), (10,), (False,))
    assert set(plain.tensors()) == {"weight"} | ({"weight_scale"} if form.has_scale else set())


def test_zero_points_and_groups() -> None:
    config = LayerConfig(weight_quant=WeightQuant(type="int4", group_size=4, symmetric=False), input_quant=None)
    for columns, groups in ((12, 3), (10, 3), (9, 3), (13, 4)):
        spec = LayerPlan(config, columns, 5, (columns,), (5,), (False,)).tensors()
        assert spec["weight"] == ((5, -(-columns // 2)), torch.int8)
        assert spec["weight_scale"] == ((5, groups), torch.uint8)
        assert spec["weight_scale_row"] == ((5, 1), torch.float32)
        assert spec["weight_zero_point"] == ((5, 2), torch.int8)
        exact = WeightQuant(type="int4", group_size=4, scale="float32")
        config_exact = LayerConfig(weight_quant=exact, input_quant=None)
        spec_exact = LayerPlan(config_exact, columns, 5, (columns,), (5,), (False,)).tensors()
        assert spec_exact["weight_scale"] == ((5, groups), torch.float32)
        assert not {"weight_scale_row", "weight_zero_point"} & spec_exact.keys()
        assert spec["smooth"] == ((columns,), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_layer(dtype) -> None:
    config = LayerConfig(weight_quant=WeightQuant(type="int4", group_size=4), opt=LowRank(low_rank=3))
    plan = LayerPlan(config, 13, 10, (13,), (10,), (False,))
    layer = QuantLinear(plan, bias=False, device="meta", dtype=dtype)
    assert plan.nbytes(dtype.itemsize) == sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()])


def test_rules_say_what_the_plan_decided() -> None:
    """The rules for grids and inputs reflect rows that share a scale, segments, dual scale and groups."""
    config = config_of(weight_quant={"type": "int4", "axis": None}, input_quant={"type": "int8"})
    found = replace(layer_plan("fc", nn.Linear(32, 6), config), input_segments=(8, 24), output_segments=(2, 4))
    assert (found.grid_rule(6).rows, found.grid_rule(6).columns) == ((2, 4), (8, 24))
    smooth = replace(found, config=config_of(**{**found.config.model_dump(), "opt": {"type": "smooth"}}))
    assert smooth.row_groups == (2, 4)
    assert smooth.grid_rule(4).rows == (4,)
    rule = replace(found, dual=(True, False)).input_rule
    assert (rule.static, rule.per_token, rule.segments, rule.dual) == (True, False, (8, 24), (True, False))
    grouped = config_of(weight_quant={"type": "int4", "group_size": 16, "clip": "mse", "symmetric": False})
    rule = replace(found, config=grouped).grid_rule(6)
    assert (rule.format, rule.columns, rule.rows) == (FORMATS["int4"], (8, 16, 8), None)
    assert (rule.symmetric, rule.clip, rule.two_level) == (False, "mse", True)
    assert not found.grid_rule(6).two_level
    assert replace(found, config=config_of(input_quant=None)).input_rule is None
