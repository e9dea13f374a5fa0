"""Rotated layers against float64, alone and in models that are saved, compiled and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hfquant
from hfquant import PRESETS
from hfquant.algorithms import TRANSFORMS, Problem
from hfquant.algorithms.hadamard import SmoothHadamard
from hfquant.config import ConfigError, parse
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import quant_modules
from hfquant.solver import requantize, solve
from hfquant.statistics import LayerStats
from tests.formats.test_rotation import by_hand
from tests.integrations.small_models import inputs_of, llama
from tests.test_solver import error, inputs, make_plan, stats_of

TOKEN = {"type": "int8", "axis": -1, "dynamic": True}
FOUR = {"type": "int4", "axis": -1, "dynamic": True}
HADAMARD = {"type": "hadamard", "block_size": 8}
SMOOTH = {"type": "smooth_hadamard", "alpha": 0.4, "block_size": 8}
ROTATIONS = [HADAMARD, SMOOTH]


def test_statistics_of_rotated_rows_are_those_of_the_rows_rotated() -> None:
    x, divisor = inputs(300, 20), torch.rand(20) + 0.5
    matrix = by_hand(20, 8)
    seen = stats_of(x).divided(divisor).rotated(8)
    rows = (x.double() / divisor.double()).numpy() @ matrix
    np.testing.assert_allclose(seen.hessian.numpy(), rows.T @ rows / 300, rtol=1e-4, atol=1e-4 * (rows**2).mean())
    np.testing.assert_allclose(seen.mean_square.numpy(), (rows**2).mean(0), rtol=1e-4)
    few = LayerStats.of(x[:150], torch.rand(150).double()).divided(divisor).rotated(8)
    np.testing.assert_allclose(few.mean_square.numpy(), (rows[:150] ** 2).mean(0), rtol=1e-4)  # all are sampled
    sampled = (stats_of(x).rows.double() / divisor.double()).numpy() @ matrix
    np.testing.assert_allclose(seen.rows.numpy(), sampled, atol=1e-4)
    assert torch.equal(seen.row_weights, stats_of(x).row_weights)
    np.testing.assert_allclose(seen.amax.numpy(), np.abs(sampled).max(0), rtol=1e-5)


@pytest.mark.parametrize("opt", ROTATIONS, ids=lambda opt: opt["type"])
@pytest.mark.parametrize("columns", [20, 7, 1])
@pytest.mark.parametrize("stored", [{}, {"output_segments": [5, 7]}], ids=["whole", "segments"])
def test_the_product_is_unchanged_in_high_precision(opt: dict[str, Any], columns: int, stored: dict[str, Any]) -> None:
    weight, x = torch.randn(12, columns), inputs(100, columns)
    plan = make_plan(12, columns, stored, opt=opt, weight_quant={"type": "int16", "axis": -1}, input_quant=None)
    solution = solve("layer", weight, plan, stats_of(x))
    assert error(solution, weight, x) < 1e-3
    layer = QuantLinear.from_tensors(solution.plan, solution.tensors, None)
    torch.testing.assert_close(layer.effective_weight(), weight, rtol=1e-3, atol=1e-3)
    again = requantize("layer", weight, solution.plan, solution.tensors)
    assert (again["weight"].int() - solution.tensors["weight"].int()).abs().max() <= 1  # stochastic rounding


def test_codes_are_of_the_smoothed_rotated_weight() -> None:
    weight, x = torch.randn(12, 20), inputs(100, 20)
    plan = make_plan(12, 20, opt=SMOOTH, weight_quant={"type": "int8", "axis": -1}, input_quant=TOKEN)
    solution = solve("layer", weight, plan, stats_of(x))
    smooth = x.abs().amax(0).double() ** 0.4 / weight.abs().amax(0).double() ** 0.6
    torch.testing.assert_close(solution.tensors["smooth"].double(), smooth, rtol=1e-6, atol=0)
    exact = (weight.double() * smooth).numpy() @ by_hand(20, 8)
    found = solution.tensors["weight"].double() * solution.tensors["weight_scale"].double()
    step = np.abs(exact).max(1, keepdims=True) / 127
    assert (np.abs(found.numpy() - exact) <= 0.5001 * step).all()


@pytest.mark.parametrize("opt", ROTATIONS, ids=lambda opt: opt["type"])
def test_outliers_are_spread_where_inputs_have_four_bits(opt: dict[str, Any]) -> None:
    """One channel is twenty times as large as the others; rotation more than halves the error of per-token scales."""
    weight, x = torch.randn(32, 64), torch.randn(400, 64)
    x[:, 5] *= 20
    config: dict[str, Any] = {"weight_quant": {"type": "int8", "axis": -1}, "input_quant": FOUR}
    plain = solve("layer", weight, make_plan(32, 64, **config), stats_of(x))
    turned = solve("layer", weight, make_plan(32, 64, opt={**opt, "block_size": 64}, **config), stats_of(x))
    assert error(turned, weight, x) < 0.6 * error(plain, weight, x)


def test_alpha_is_searched_on_what_is_rotated() -> None:
    """Blocks of 8 straddle the boundary at 10, so both segments share one alpha, that of the layer's least error."""
    weight, x = torch.randn(16, 24), inputs(150, 24)  # the sample holds all rows
    grid = [0.1, 0.3, 0.5, 0.7, 0.9]
    config: dict[str, Any] = {"weight_quant": {"type": "int4", "axis": -1}, "input_quant": FOUR}
    stored = {"input_segments": [10, 14]}
    squares = []
    for alpha in grid:
        fixed = make_plan(16, 24, stored, opt={**SMOOTH, "alpha": alpha}, **config)
        relative = error(solve("layer", weight, fixed, stats_of(x)), weight, x)
        squares.append(relative**2 * float((x.double() @ weight.double().T).square().sum()))
    plan = make_plan(16, 24, stored, opt=SMOOTH, **config)
    problem = Problem("layer", plan.grid_rule(16), plan.input_rule, (10, 14), stats_of(x), torch.float32)
    losses = SmoothHadamard(alpha=0.4, block_size=8).losses(weight, problem, grid)
    assert losses.shape == (5, 2)
    for found in losses.T.tolist():
        assert found == pytest.approx(squares, rel=1e-3)
    search = {**SMOOTH, "alpha": 0.5, "search_alpha_config": {"enable": True, "min": 0.1, "max": 0.9, "step": 0.2}}
    (alphas,) = solve("layer", weight, make_plan(16, 24, stored, opt=search, **config), stats_of(x)).alphas
    assert alphas == [grid[min(range(5), key=squares.__getitem__)]] * 2


@pytest.mark.parametrize("opt", ROTATIONS, ids=lambda opt: opt["type"])
def test_what_cannot_be_is_refused(opt: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f'opt.type "{opt["type"]}" mixes input channels.*set dynamic=True'):
        parse({"default": {"opt": opt, "input_quant": {"type": "int8"}}})
    for size, message in ((12, "expected a power of two, got 12"), (1, "greater than or equal to 2")):
        with pytest.raises(ConfigError, match=f"opt.block_size: .*{message}"):
            parse({"default": {"opt": {**opt, "block_size": size}, "input_quant": TOKEN}})


def test_folding_leaves_the_rotation() -> None:
    left = TRANSFORMS["smooth_hadamard"](block_size=16, fold=True).folded()
    assert (type(left), left.block_size) == (TRANSFORMS["hadamard"], 16)
    assert left.tensors(20, (12,)) == {}


RECIPES: dict[str, dict[str, Any]] = {
    "data-free": {**PRESETS["w4a4-dynamic"]["default"], "opt": HADAMARD},
    "calibrated": {**PRESETS["w4a4-gptq"]["default"], "opt": {**PRESETS["w4a4-gptq"]["default"]["opt"], **SMOOTH}},
    "folded": {**PRESETS["w4a4-gptq"]["default"], "opt": {**SMOOTH, "fold": True}},
}


@torch.no_grad()
@pytest.mark.parametrize("name", RECIPES)
def test_a_language_model_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, config = llama(), {"default": RECIPES[name]}
    batch = inputs_of(model)
    exact = model(**batch).logits
    hfquant.quantize(model, [batch], config)
    output = model(**batch).logits
    assert 0 < (output - exact).norm() < 0.6 * exact.norm()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, output)
    hfquant.set_real_quant(loaded, False)
    torch.testing.assert_close(loaded(**batch).logits, output, rtol=1e-4, atol=1e-4)
    hfquant.dequantize(loaded)
    assert not quant_modules(loaded)
    assert (loaded(**batch).logits - exact).norm() < 0.6 * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(96, 32), torch.randn(7, 96)
    exact = layer(x)
    model = hfquant.quantize(nn.Sequential(layer).to(dtype), [x.to(dtype)], {"default": RECIPES["calibrated"]})
    found = model(x.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - exact).norm() < 0.3 * exact.norm()


@torch.no_grad()
def test_convolutions_are_smoothed_and_not_rotated() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 8, 1)).eval()
    x = torch.randn(2, 8, 6, 6)
    exact = model(x)
    config = {"default": {**RECIPES["calibrated"], "include": ["edge_convs"]}}
    hfquant.quantize(model, [x], config)
    layers = quant_modules(model)
    assert [layer.plan.transform.type for layer in layers.values()] == ["smooth"] * 2
    chosen = parse(config).default.opt
    for layer in layers.values():
        fields = layer.plan.transform.model_dump()
        assert fields == {k: v for k, v in chosen.model_dump().items() if k in fields} | {"type": "smooth"}
    assert (model(x) - exact).norm() < 0.3 * exact.norm()


def test_one_graph_and_a_gradient_through_the_rotation() -> None:
    layer = nn.Linear(40, 16)
    weight = layer.weight.detach().clone()
    model = hfquant.quantize(nn.Sequential(layer), None, {"default": {**RECIPES["data-free"], "opt": HADAMARD}})
    x = torch.randn(5, 40, requires_grad=True)
    y = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), y)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    expected = direction @ weight
    assert x.grad is not None
    assert nn.functional.cosine_similarity(x.grad.flatten(), expected.flatten(), 0) > 0.98
    exported = torch.export.export(model, (x.detach(),))
    torch.testing.assert_close(exported.module()(x.detach()), y.detach())
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("name", ["data-free", "calibrated"])
def test_exports_refuse_it(name: str, tmp_path: Path) -> None:
    model = llama()
    hfquant.quantize(model, [inputs_of(model)], {"default": RECIPES[name]})
    with pytest.raises(ValueError, match=r"transformed at run time \((hadamard|smooth)\)"):
        hfquant.export(model, tmp_path, "compressed-tensors")


def test_a_layer_without_statistics_is_rotated_where_that_needs_none() -> None:
    assert LayerStats.empty(4).rotation == 0
    plan = make_plan(12, 20, opt=HADAMARD, weight_quant={"type": "int8", "axis": -1}, input_quant=TOKEN)
    weight, x = torch.randn(12, 20), inputs(50, 20)
    solution = solve("layer", weight, plan, None)
    assert not solution.fallback
    assert solution.plan.transform.describe() == "hadamard=8"
    assert error(solution, weight, x) < 0.02
