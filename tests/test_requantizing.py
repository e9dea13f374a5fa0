"""Requantizing a solved layer for another weight: on its own grid where the change is small, refitted elsewhere."""

from typing import Any

import numpy as np
import pytest
import torch

from hfquant.layer_config import InputQuant
from hfquant.nn.linear import QuantLinear
from hfquant.solver import requantize, solve
from tests.nn.linear_cases import IN, OUT, cases, layer_of, rank, weight_by_hand
from tests.test_solver import inputs, make_plan, stats_of


@pytest.mark.parametrize("dtype", ["int2", "int3", "int4", "int5", "int6", "int8", "fp8e4m3", "bf16"])
def test_requantizing_keeps_the_transform_and_rounds_quite_another_weight_to_nearest(dtype: str) -> None:
    for name, case in cases(dtype).items():
        plan = case.plan(InputQuant())
        _, tensors = layer_of(plan, bias=False)
        before = {key: tensor.clone() for key, tensor in tensors.items()}
        weight = torch.randn(OUT, IN)
        given = weight.clone()
        made = requantize("layer", weight, plan, tensors)
        assert torch.equal(weight, given)
        assert made.keys() == tensors.keys()
        for key in made.keys() - {"weight", "weight_scale", "weight_scale_row", "weight_zero_point"}:
            assert torch.equal(made[key], before[key]), (name, key)
        assert all(torch.equal(tensors[key], before[key]) for key in tensors)
        # What is rounded, in float64: (W - up down) s.
        target, start = weight.double().numpy(), 0
        for i, rows in enumerate(plan.row_groups):
            block = slice(start, start + rows)
            if rank(plan):
                down = tensors["svd_down"].double().numpy().reshape(-1, rank(plan), IN)[i]
                target[block] -= tensors["svd_up"].double().numpy()[block] @ down
            if "smooth" in tensors:
                target[block] *= tensors["smooth"].double().numpy().reshape(-1, IN)[i]
            start += rows
        found = weight_by_hand(plan, made)
        form = plan.config.weight_quant.format
        if form.is_integer:
            one = {**made, "weight": torch.ones_like(made["weight"])}
            one.pop("weight_zero_point", None)
            step = weight_by_hand(plan, one)
            # Two-level scales are rounded by up to 1/64, and values beyond the last code are clipped.
            steps = 0.5001 + (2**form.bits / 64 if plan.two_level else 0)
            assert (np.abs(found - target) <= step * steps + 1e-6).all(), name
        else:
            assert (np.abs(found - target) <= np.abs(target) * 2.0**-4 + np.abs(target).max() * 1e-3).all(), name
        QuantLinear.from_tensors(plan, made, None)


RECIPES = {
    "int4 groups": {"type": "int4", "group_size": 32, "symmetric": False, "clip": "mse"},
    "int8 channels": {"type": "int8", "axis": -1},
    "int8 tensor": {"type": "int8", "axis": None},
    "fp8 channels": {"type": "fp8e4m3", "axis": -1},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_requantizing_what_the_codes_stand_for_gives_them_back(recipe: str) -> None:
    plan, x = (
        make_plan(48, 200, opt={"type": "smooth"}, weight_quant=RECIPES[recipe], input_quant=None),
        inputs(300, 200),
    )
    tensors = solve("layer", torch.randn(48, 200), plan, stats_of(x)).tensors
    made = requantize("layer", QuantLinear.from_tensors(plan, tensors, None).effective_weight(), plan, tensors)
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[key], tensors[key]) for key in tensors)


def spacing_by_hand(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return the spacing of a format's values around ``values``, in units of the scale."""
    if dtype.startswith("int"):
        return np.ones_like(values)
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(values), 2.0**-6))) - 3)


@pytest.mark.parametrize("share", [0.02, 0.2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_requantizing_keeps_a_change_of_less_than_a_step_on_average(recipe: str, share: float) -> None:
    """Round-to-nearest would lose the change, and on another grid all codes would move."""
    plan = make_plan(96, 400, weight_quant=RECIPES[recipe], input_quant=None)
    tensors = solve("layer", torch.randn(96, 400), plan, None).tensors
    before = weight_by_hand(plan, tensors)
    one = {**tensors, "weight": torch.ones_like(tensors["weight"])} | {
        key: torch.zeros_like(tensors[key]) for key in tensors if key == "weight_zero_point"
    }
    form = plan.config.weight_quant.format
    scale = weight_by_hand(plan, one) / (1 if form.is_integer else 2.0**-9)  # the smallest subnormal has bit pattern 1
    step = scale * spacing_by_hand(before / scale, form.name)
    # Away from the extreme codes, beyond which nothing can be rounded.
    change = share * step * np.where(before > 0, -1, 1)
    made = requantize("layer", torch.from_numpy(before + change).float(), plan, tensors)
    assert all(torch.equal(made[key], tensors[key]) for key in tensors.keys() - {"weight"})
    found = weight_by_hand(plan, made) - before
    assert (np.abs(found) <= step * 1.001).all()
    kept = (found * change).sum() / (change**2).sum()
    # Each value moves by one step with probability ``share``, else not at all.
    deviation = (share * (1 - share)) ** 0.5 * np.linalg.norm(step * change) / (change**2).sum()
    assert abs(kept - 1) < 4 * deviation + 5e-4 / share
    again = requantize("layer", torch.from_numpy(before + change).float(), plan, tensors)
    assert torch.equal(again["weight"], made["weight"])


def test_requantizing_refits_the_rows_that_change_by_more() -> None:
    for quant, rows in ((RECIPES["int4 groups"], [3]), (RECIPES["int8 tensor"], range(12))):
        plan = make_plan(12, 64, weight_quant=quant, input_quant=None)
        tensors = solve("layer", torch.randn(12, 64), plan, None).tensors
        weight = torch.from_numpy(weight_by_hand(plan, tensors)).float()
        weight[3] *= 3
        made = requantize("layer", weight, plan, tensors)
        moved = (made["weight_scale"] != tensors["weight_scale"]).any(1)
        if "weight_scale_row" in made:
            moved |= (made["weight_scale_row"] != tensors["weight_scale_row"]).any(1)
        assert moved.nonzero().flatten().tolist() == list(rows)
        fitted = plan.grid_rule(12).fit(weight)
        assert torch.equal(made["weight"][3], fitted.quantize(weight)[3])


@pytest.mark.parametrize("quant", [RECIPES["int4 groups"], RECIPES["int8 channels"]])
def test_requantizing_gives_zeros_a_grid_once_they_are_none(quant: dict[str, Any]) -> None:
    """Zeros have a scale of 1, relative to which any realistic change is small."""
    plan = make_plan(12, 64, weight_quant=quant, input_quant=None)
    weight = torch.randn(12, 64)
    weight[3] = weight[5, :32] = 0
    tensors = solve("layer", weight, plan, None).tensors
    weight += 0.01 * torch.randn(12, 64)
    made = requantize("layer", weight, plan, tensors)
    off = np.linalg.norm(weight_by_hand(plan, made) - weight.double().numpy(), axis=1)
    assert (off < 0.15 * weight.norm(dim=1).numpy()).all()


def test_requantizing_nan_names_the_layer() -> None:
    plan = make_plan(12, 20, weight_quant={"type": "int8", "axis": -1}, input_quant=None)
    tensors = solve("layer", torch.randn(12, 20), plan, None).tensors
    weight = torch.randn(12, 20)
    weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'block\.linear': 20 of 240 weights are NaN or Inf"):
        requantize("block.linear", weight, plan, tensors)
