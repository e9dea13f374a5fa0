"""Solved layers against float64 formulas: smoothing, segments, search, low-rank branch, fallbacks."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hfquant.config import ConfigError, QuantRules
from hfquant.layer_plan import LayerPlan, layer_plan
from hfquant.nn.linear import QuantLinear
from hfquant.solver import Solution, solve
from hfquant.statistics import LayerStats

TOKEN = {"type": "int8", "axis": -1, "dynamic": True}
CHANNEL = {"type": "int8", "axis": -1}
SMOOTH = {"type": "smooth", "alpha": 0.4}
SEARCH = {"type": "smooth", "search_alpha_config": {"enable": True, "min": 0.1, "max": 0.9, "step": 0.2}}
SVD = {"type": "svd", "low_rank": 4, "alpha": 0.5}


def make_plan(rows: int, columns: int, stored: dict[str, Any] | None = None, **config: Any) -> LayerPlan:
    entry = {"opt": {"type": "default"}, "calib": {"type": "amax"}, **config}
    return layer_plan("layer", nn.Linear(columns, rows), QuantRules({"default": entry}).default, stored)


def inputs(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Return correlated rows with a few outlier channels, as in transformers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) / 4
    return x * torch.where(torch.rand(columns, generator=generator) > 0.85, 30.0, 1.0)


def stats_of(x: torch.Tensor) -> LayerStats:
    draw = torch.rand(len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return LayerStats.of(x, draw, {"hessian"})


def error(solution: Solution, weight: torch.Tensor, x: torch.Tensor) -> float:
    layer = QuantLinear.from_tensors(solution.plan, solution.tensors, None)
    exact = F.linear(x.double(), weight.double())
    return float((layer(x).double() - exact).norm() / exact.norm())


def test_smooth_is_the_formula_and_the_product_unchanged_in_high_precision() -> None:
    weight, x = torch.randn(12, 20), inputs(100, 20)
    plan = make_plan(12, 20, opt=SMOOTH, weight_quant={"type": "int16", "axis": -1}, input_quant=None)
    solution = solve("layer", weight, plan, stats_of(x))
    expected = x.abs().amax(0).double() ** 0.4 / weight.abs().amax(0).double() ** 0.6
    torch.testing.assert_close(solution.tensors["smooth"].double(), expected, rtol=1e-6, atol=0)
    assert error(solution, weight, x) < 1e-3
    assert solution.alphas == [[0.4]]


def test_smooth_by_root_mean_square_is_the_formula_in_each_output_segment() -> None:
    weight, x = torch.randn(12, 20), inputs(300, 20)  # more rows than the sample holds
    opt = {**SMOOTH, "magnitude": "rms"}
    plan = make_plan(12, 20, {"output_segments": [5, 7]}, opt=opt, weight_quant=CHANNEL, input_quant=None)
    found = solve("layer", weight, plan, stats_of(x)).tensors["smooth"].double()
    for smooth, rows in zip(found, weight.double().split([5, 7]), strict=True):
        expected = x.double().square().mean(0).sqrt() ** 0.4 / rows.square().mean(0).sqrt() ** 0.6
        torch.testing.assert_close(smooth, expected, rtol=1e-6, atol=0)


def test_output_segments_have_their_own_smoothing_and_static_scale() -> None:
    weight, x = torch.cat([torch.randn(5, 20), 40 * torch.rand(7, 20).pow(4)]), inputs(100, 20)
    plan = make_plan(12, 20, {"output_segments": [5, 7]}, opt=SMOOTH, weight_quant=CHANNEL)
    tensors = solve("layer", weight, plan, stats_of(x)).tensors
    assert tensors["smooth"].shape == (2, 20)
    for i, rows in enumerate((slice(0, 5), slice(5, 12))):
        part = make_plan(rows.stop - rows.start, 20, opt=SMOOTH, weight_quant=CHANNEL)
        alone = solve("part", weight[rows], part, stats_of(x)).tensors
        assert torch.equal(tensors["smooth"][i], alone["smooth"])
        assert torch.equal(tensors["weight"][rows], alone["weight"])
        assert torch.equal(tensors["input_scale"][i : i + 1], alone["input_scale"])


@given(cuts=st.lists(st.integers(1, 23), unique=True, max_size=4), static=st.booleans(), smooth=st.booleans())
def test_any_partition_of_the_input_is_the_sum_of_its_parts(cuts: list[int], static: bool, smooth: bool) -> None:
    edges = [0, *sorted(cuts), 24]
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    weight, x = torch.randn(6, 24, generator=torch.Generator().manual_seed(1)), inputs(50, 24)
    config = {"opt": SMOOTH if smooth else {"type": "default"}, "weight_quant": CHANNEL}
    config |= {} if static else {"input_quant": TOKEN}
    stored = {"input_segments": sizes} if len(sizes) > 1 else {}
    solution = solve("layer", weight, make_plan(6, 24, stored, **config), stats_of(x))
    whole = QuantLinear.from_tensors(solution.plan, solution.tensors, None)(x)
    parts = []
    for start, size in zip(edges, sizes, strict=False):
        columns = slice(start, start + size)
        alone = solve("part", weight[:, columns], make_plan(6, size, **config), stats_of(x[:, columns]))
        assert torch.equal(solution.tensors["weight"][:, columns], alone.tensors["weight"])
        parts.append(QuantLinear.from_tensors(alone.plan, alone.tensors, None)(x[:, columns]))
    torch.testing.assert_close(whole, torch.stack(parts).sum(0), rtol=1e-5, atol=1e-4)


@given(cut=st.integers(1, 11))
def test_rows_of_a_segment_share_its_scale_per_tensor(cut: int) -> None:
    weight, x = torch.randn(12, 8, generator=torch.Generator().manual_seed(2)), inputs(40, 8)
    weight[cut:] *= 50
    plan = make_plan(12, 8, {"output_segments": [cut, 12 - cut]}, weight_quant={"type": "int8"}, input_quant=None)
    tensors = solve("layer", weight, plan, None).tensors
    expected = [weight[:cut].abs().max() / 127] * cut + [weight[cut:].abs().max() / 127] * (12 - cut)
    assert tensors["weight_scale"].flatten().tolist() == torch.stack(expected).tolist()
    assert x.shape[1] == plan.in_features


@pytest.mark.parametrize("quant", [None, TOKEN, {"type": "int8"}, {"type": "int4", "axis": -1, "dynamic": True}])
@pytest.mark.parametrize("opt", [SEARCH, SEARCH | {"magnitude": "rms"}, SVD | SEARCH | {"type": "svd"}])
@pytest.mark.parametrize("segments", [[20], [7, 13]])
def test_search_equals_brute_force(quant: dict[str, Any] | None, opt: dict[str, Any], segments: list[int]) -> None:
    """Each segment gets the alpha whose layer, solved and run with it, has the least error in that segment.

    Static scales are judged on rows that they do not depend on: each half of the rows with the other half's ranges.
    The config's own alpha is on the grid, so no alpha that is worse on held-out rows is chosen.
    """
    weight, x = torch.randn(16, 20), inputs(120, 20)
    stored = {"input_segments": segments} if len(segments) > 1 else {}
    plain = {k: v for k, v in opt.items() if k != "search_alpha_config"}
    config = {"weight_quant": {"type": "int4", "axis": -1}, "input_quant": quant}
    stats = stats_of(x)
    found = solve("layer", weight, make_plan(16, 20, stored, opt=opt, **config), stats)
    draw = torch.rand(120, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) < 0.5
    halves = [(stats_of(x), x)]
    if quant == {"type": "int8"}:
        low, high = (torch.stack([part.amin(0), part.amax(0)]) for part in (x[draw], x[~draw]))
        halves = [
            (replace(stats, sums={**stats.sums, "low": r[:1], "high": r[1:]}), rows)
            for r, rows in ((low, x[~draw]), (high, x[draw]))
        ]
    grid = [0.1, 0.3, 0.5, 0.7, 0.9]
    losses = np.zeros((len(halves), len(grid), len(segments)))
    for (number, (half, rows)), (i, alpha) in itertools.product(enumerate(halves), enumerate(grid)):
        one = solve("layer", weight, make_plan(16, 20, stored, opt={**plain, "alpha": alpha}, **config), half)
        layer, start = QuantLinear.from_tensors(one.plan, one.tensors, None), 0
        for j, size in enumerate(segments):
            only = torch.zeros_like(rows)
            only[:, start : start + size] = rows[:, start : start + size]
            losses[number, i, j] = float((layer(only) - F.linear(only, weight)).double().square().sum())
            start += size
    assert found.alphas == [[grid[i] for i in losses.sum(0).argmin(0)]]


def test_low_rank_branch_is_optimal_and_as_cast() -> None:
    weight, x = torch.randn(16, 20), inputs(120, 20)
    config = {"opt": SVD, "weight_quant": {"type": "int16", "axis": -1}, "input_quant": None}
    tensors = solve("layer", weight, make_plan(16, 20, **config), stats_of(x), torch.bfloat16).tensors
    assert tensors["svd_up"].dtype == tensors["svd_down"].dtype == torch.bfloat16
    smooth = tensors["smooth"].double()
    scaled = weight.double() * smooth
    residual = scaled - tensors["svd_up"].double() @ (tensors["svd_down"].double() * smooth)
    # int16 codes represent the residual almost exactly, and it is computed from the factors as cast.
    codes = tensors["weight"].double() * tensors["weight_scale"].double()
    torch.testing.assert_close(codes, residual, rtol=0, atol=float(residual.abs().max()) / 30000)
    optimal = torch.linalg.svdvals(scaled)[4:].square().sum()
    assert optimal * 0.999 <= residual.square().sum() <= optimal * 1.01  # bf16 factors


COMPOSITIONS = list(
    itertools.product(
        [{"type": "default"}, SMOOTH, SEARCH, SVD],
        ["amax", "gptq"],
        ["int3", "int4", "int5", "int6", "int8", "int16", "fp8e4m3", "fp8e5m2", "fp16"],
        [None, TOKEN, {"type": "int8"}, {"type": "fp8e4m3"}],
    )
)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("opt", "calib", "weight_type", "quant"), COMPOSITIONS)
def test_every_composition_with_segments_and_dual(
    opt: dict[str, Any], calib: str, weight_type: str, quant: dict[str, Any] | None
) -> None:
    if weight_type == "fp16" and calib == "gptq":
        return  # the config refuses it: tests/test_config.py
    weight = torch.randn(12, 24)
    x = torch.cat([inputs(150, 8), F.silu(3 * inputs(150, 16, 1))], dim=1)
    weight_quant = {"type": weight_type} if weight_type == "fp16" else {"type": weight_type, "axis": -1}
    dual = quant is not None and quant["type"] == "int8"
    stored = {"input_segments": [8, 16], "output_segments": [7, 5], "dual": [False, dual]}
    plan = make_plan(12, 24, stored, opt=opt, calib={"type": calib}, weight_quant=weight_quant, input_quant=quant)
    solution = solve("layer", weight, plan, stats_of(x))
    found = error(solution, weight, x)
    limits = {"int3": 0.4, "int4": 0.2, "int5": 0.12, "int6": 0.06, "fp8e4m3": 0.05, "fp8e5m2": 0.08}
    assert found < limits.get(weight_type, 0.035)
    layer = QuantLinear.from_tensors(solution.plan, solution.tensors, None)
    fake = layer(x)
    layer.real_quant = True
    # Without an input format, kernels convert floats to 16-bit integers.
    close = 1e-4 if quant is None else 1e-5
    torch.testing.assert_close(layer(x), fake, rtol=1e-5, atol=close * float(fake.abs().max()))


@pytest.mark.parametrize("static", [True, False])
def test_the_data_decides_on_dual_scale(static: bool) -> None:
    weight = torch.randn(4, 20)
    x = torch.cat([inputs(200, 10), F.gelu(inputs(200, 10, 1))], dim=1)
    quant = {"type": "int8"} if static else TOKEN
    stored = {"input_segments": [10, 10], "dual": [True, True]}
    config = {"weight_quant": CHANNEL, "input_quant": quant, "calib": {"type": "gptq"}}
    solution = solve("layer", weight, make_plan(4, 20, stored, **config), stats_of(x))
    assert solution.plan.dual == (False, True)
    single = solve("layer", weight, make_plan(4, 20, {**stored, "dual": [False, False]}, **config), stats_of(x))
    assert error(solution, weight, x) < error(single, weight, x)
    if static:
        scale, negative = solution.tensors["input_scale"], solution.tensors["input_scale_neg"]
        assert scale[0] == negative[0]
        assert torch.log2(scale[1] / negative[1]) % 1 == 0


def test_gptq_beats_rounding_on_the_layer_output() -> None:
    weight, x = torch.randn(16, 32), inputs(400, 32)
    config = {"weight_quant": {"type": "int4", "group_size": 8}, "input_quant": None}
    nearest = solve("layer", weight, make_plan(16, 32, **config), stats_of(x))
    better = solve("layer", weight, make_plan(16, 32, calib={"type": "gptq"}, **config), stats_of(x))
    assert error(better, weight, x) < 0.8 * error(nearest, weight, x)


def test_gptq_own_group_size_is_used_by_every_stage() -> None:
    weight, x = torch.randn(16, 32), inputs(400, 32)
    config = {"weight_quant": {"type": "int4"}, "input_quant": TOKEN, "calib": {"type": "gptq", "group_size": 8}}
    solution = solve("layer", weight, make_plan(16, 32, opt=SEARCH, **config), stats_of(x))
    assert solution.tensors["weight_scale"].shape == (16, 4)


def test_without_data_the_stated_fallback() -> None:
    plan = make_plan(6, 16, opt=SVD, calib={"type": "gptq", "group_size": 8}, weight_quant={"type": "int4"})
    solution = solve("layer", torch.randn(6, 16), plan, None)
    config = solution.plan.config
    assert solution.fallback
    assert (config.opt.type, config.calib.type, config.group_size) == ("default", "amax", 8)
    assert config.input_quant is not None
    assert config.input_quant.dynamic
    assert config.input_quant.axis == -1
    assert set(solution.tensors) == {"weight", "weight_scale", "weight_scale_row"}


@pytest.mark.parametrize("opt", [{"type": "default"}, SEARCH, SEARCH | {"magnitude": "rms"}, SVD])
@pytest.mark.parametrize("calib", ["amax", "gptq"])
@pytest.mark.parametrize("case", ["zero weight", "constant input", "zero input", "one row", "few rows", "bf16"])
def test_degenerate_layers_stay_finite_and_right(opt: dict[str, Any], calib: str, case: str) -> None:
    weight, x = torch.randn(8, 16), inputs(100, 16)
    weight = torch.zeros_like(weight) if case == "zero weight" else weight
    weight = weight.bfloat16() if case == "bf16" else weight
    x = {
        "constant input": torch.full_like(x, 0.7),
        "zero input": torch.zeros_like(x),
        "one row": x[:1],
        "few rows": x[:5],
    }.get(case, x)
    plan = make_plan(8, 16, opt=opt, calib={"type": calib}, weight_quant={"type": "int8", "axis": -1})
    solution = solve("layer", weight, plan, stats_of(x))
    assert all(t.float().isfinite().all() for t in solution.tensors.values())
    layer = QuantLinear.from_tensors(solution.plan, solution.tensors, None)
    exact = F.linear(x, weight.float())
    assert (layer(x) - exact).norm() <= 0.03 * exact.norm() + 1e-6


def test_nan_weights_are_refused() -> None:
    weight = torch.randn(4, 4)
    weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match="layer 'layer': 1 of 16 weights are NaN or Inf"):
        solve("layer", weight, make_plan(4, 4, input_quant=None), None)


def test_statistics_are_not_changed_by_solving() -> None:
    weight, x = torch.randn(8, 16), inputs(100, 16)
    stats = stats_of(x)
    before = {**stats.sums, **vars(stats.sample)}
    copies = {k: v.clone() for k, v in before.items()}
    assert len(before) == 7
    solve("layer", weight, make_plan(8, 16, opt=SVD, calib={"type": "gptq"}), stats)
    assert all(torch.equal(before[k], v) for k, v in copies.items())
    assert stats.count == 100
    assert stats.divisor is None


@pytest.mark.parametrize("opt", [{"type": "default"}, SMOOTH, SEARCH, SVD])
@pytest.mark.parametrize("calib", ["amax", "gptq"])
@pytest.mark.parametrize("segments", [[40], [22, 18]])
def test_groups_may_end_short(opt: dict[str, Any], calib: str, segments: list[int]) -> None:
    """Each segment's last group holds the remaining columns, and the layer is no worse for it."""
    weight, x = torch.randn(12, 40), inputs(200, 40)
    stored = {"input_segments": segments} if len(segments) > 1 else {}
    config = {"opt": opt, "calib": {"type": calib}, "input_quant": None}
    plan = make_plan(12, 40, stored, **config, weight_quant={"type": "int4", "group_size": 16})
    assert plan.columns == ((16, 16, 8) if len(segments) == 1 else (16, 6, 16, 2))
    solution = solve("layer", weight, plan, stats_of(x))
    assert solution.tensors["weight_scale"].shape == (12, len(plan.columns))
    whole = solve(
        "layer", weight, make_plan(12, 40, stored, **config, weight_quant={"type": "int4", "axis": -1}), stats_of(x)
    )
    assert error(solution, weight, x) < error(whole, weight, x)
    layer = QuantLinear.from_tensors(solution.plan, solution.tensors, None)
    fake = layer(x)
    layer.real_quant = True
    # Kernels convert float inputs to 16-bit integers.
    torch.testing.assert_close(layer(x), fake, rtol=1e-5, atol=1e-4 * float(fake.abs().max()))


def test_a_rank_above_the_layer_s_size_is_cut() -> None:
    weight, x = torch.randn(2, 20), inputs(100, 20)
    opt = {"type": "svd", "low_rank": 32}
    solution = solve("layer", weight, make_plan(2, 20, opt=opt, weight_quant=CHANNEL), stats_of(x))
    assert solution.tensors["svd_up"].shape == (2, 2)
    assert error(solution, weight, x) < 1e-5  # a branch of full rank leaves no residual


def with_massive_rows(rows: int, columns: int, share: float = 1 / 64, size: float = 300.0) -> torch.Tensor:
    """Return Gaussian rows, a few of them huge in one channel, like the first token in many language models."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    x[:: round(1 / share), columns // 2] *= size
    return x


FALLBACK = {"type": "int8", "token_fallback": True}


@pytest.mark.parametrize("opt", [{"type": "default"}, SMOOTH])
def test_a_layer_that_no_static_scale_serves_is_scaled_by_the_token(opt: dict[str, Any]) -> None:
    weight, x = torch.randn(12, 32), with_massive_rows(2048, 32)
    plan = make_plan(12, 32, opt=opt, weight_quant=CHANNEL, input_quant=FALLBACK)
    solution = solve("layer", weight, plan, stats_of(x))
    by_hand = solve("layer", weight, make_plan(12, 32, opt=opt, weight_quant=CHANNEL, input_quant=TOKEN), stats_of(x))
    assert not solution.plan.static_input
    assert solution.tensors.keys() == by_hand.tensors.keys()
    assert all(torch.equal(value, by_hand.tensors[name]) for name, value in solution.tensors.items())
    kept = solve(
        "layer", weight, make_plan(12, 32, opt=opt, weight_quant=CHANNEL, input_quant={"type": "int8"}), stats_of(x)
    )
    usual = x[1:64]
    assert error(solution, weight, usual) < 0.5 * error(kept, weight, usual)


def test_a_layer_that_a_static_scale_serves_keeps_it() -> None:
    weight, x = torch.randn(12, 32), torch.randn(2048, 32)
    plan = make_plan(12, 32, weight_quant=CHANNEL, input_quant=FALLBACK)
    solution = solve("layer", weight, plan, stats_of(x))
    assert solution.plan == plan
    assert "input_scale" in solution.tensors


@pytest.mark.parametrize(("largest", "static"), [(1.5, True), (3.0, False)])
def test_a_static_scale_may_err_twice_as_much_as_its_format_promises(largest: float, static: bool) -> None:
    """The promise assumes values within 3.5 standard deviations; rounding errors grow with the largest value."""
    weight, x = torch.randn(12, 32), torch.randn(2048, 32).clamp(-3.5, 3.5)
    x[::64, 16] = largest * 3.5
    plan = make_plan(12, 32, weight_quant=CHANNEL, input_quant=FALLBACK)
    assert solve("layer", weight, plan, stats_of(x)).plan.static_input == static


def test_few_rows_say_nothing_of_a_scale() -> None:
    weight, x = torch.randn(12, 32), with_massive_rows(100, 32, share=1 / 20)
    plan = make_plan(12, 32, weight_quant=CHANNEL, input_quant=FALLBACK)
    assert solve("layer", weight, plan, stats_of(x)).plan == plan
    assert not solve("layer", weight, plan, stats_of(with_massive_rows(200, 32, share=1 / 20))).plan.static_input


def test_one_output_segment_that_needs_token_scales_moves_all() -> None:
    """The segments have separate smoothing, but the layer's input has a single config."""
    weight, x = torch.randn(12, 32), with_massive_rows(2048, 32)
    weight[:6, 16] = 0  # these rows do not read the huge channel
    plan = make_plan(12, 32, {"output_segments": [6, 6]}, opt=SMOOTH, weight_quant=CHANNEL, input_quant=FALLBACK)
    assert not solve("layer", weight, plan, stats_of(x)).plan.static_input


@pytest.mark.parametrize("other", [{"dynamic": True}, {"type": "fp16"}])
def test_only_calibrated_scales_have_a_fallback(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="token_fallback is for calibrated scales"):
        make_plan(4, 4, weight_quant=CHANNEL, input_quant={**FALLBACK, **other})
