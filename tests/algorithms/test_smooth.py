"""Smoothing against float64 formulas: the vector, the grid of strengths, and the effect on a layer."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hfquant
from hfquant.algorithms import Identity, Problem, Smooth
from hfquant.algorithms.smooth import SearchAlpha, segment_ranges, smoothing_vector
from hfquant.formats import FORMATS, GridRule, InputRule
from hfquant.statistics import LayerStats


@given(alpha=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_smoothing_vector_is_the_formula(alpha: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.lognormal(sigma=4, size=(2, 33)).astype(np.float32)
    expected = x.astype(np.float64) ** alpha / w.astype(np.float64) ** (1 - alpha)
    found = smoothing_vector(torch.from_numpy(x), torch.from_numpy(w), alpha)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=3e-7)


def test_smoothing_leaves_dead_channels_alone_and_stays_finite() -> None:
    x = torch.tensor([0.0, 0.5, 0.0, 1e30, 1e-38])
    w = torch.tensor([0.5, 0.0, 0.0, 1e-30, 1e30])
    found = smoothing_vector(x, w, 0.5)
    assert found[:3].tolist() == [1.0, 1.0, 1.0]
    assert found.isfinite().all()
    assert (found > 0).all()
    assert torch.equal(smoothing_vector(torch.zeros(2), torch.ones(2), 0.5), torch.ones(2))


def test_dead_channels_set_no_scale() -> None:
    """Neither an input whose weights are 0 nor weights whose input is 0 are larger than all others once divided."""
    x = torch.tensor([0.0, 3.0, 1e30, 1e-38])
    w = torch.tensor([2.0, 0.0, 1e-30, 1e30])
    found = smoothing_vector(x, w, 0.5)
    assert found[:2].tolist() == [0.5, 3.0]
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(128, 64)
    net[0].weight.data.normal_(0, 0.02)
    config = {"opt": {"type": "smooth"}, "input_quant": {"type": "int8", "axis": -1, "dynamic": True}}

    def error() -> float:
        right = net(data)
        quantized = hfquant.quantize(copy.deepcopy(net), [data], {"default": config})
        return float((quantized(data) - right).norm() / right.norm())

    before = error()
    net[0].weight.data[:, ::8] = 0
    assert error() < 1.2 * before


def stats_of(x: torch.Tensor) -> LayerStats:
    return LayerStats.of(x, torch.rand(len(x)).double())


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({}, [i / 10 for i in range(11)]),
        ({"min": 0.1, "max": 0.9, "step": 0.2}, [0.1, 0.3, 0.5, 0.7, 0.9]),
        ({"min": 0.3, "max": 0.3}, [0.3]),
        ({"step": 0.3}, [0.0, 0.3, 0.6, 0.9, 1.0]),  # the last step is shorter
        ({"min": 0.2, "max": 0.7, "step": 1.0}, [0.2, 0.7]),
    ],
)
def test_the_grid_has_both_ends(search, expected) -> None:
    assert SearchAlpha(**search).grid() == pytest.approx(expected)


def test_no_more_than_a_thousand_alphas() -> None:
    assert len(SearchAlpha(step=0.002).grid()) == 501
    with pytest.raises(ValueError, match=r"step=1e-07 makes 1e\+07 alphas, at most 1000 are tried"):
        SearchAlpha(step=1e-7)
    with pytest.raises(ValueError, match=r"min=0.8 is above max=0.2"):
        SearchAlpha(min=0.8, max=0.2)


@pytest.mark.parametrize("magnitude", ["amax", "rms"])
def test_magnitudes(magnitude) -> None:
    x, weight = torch.randn(100, 7) * 3, torch.randn(5, 7)
    found = Smooth(magnitude=magnitude).magnitudes(weight, stats_of(x))
    for values, of in zip(found, (x.double(), weight.double()), strict=True):
        exact = of.abs().amax(0) if magnitude == "amax" else of.square().mean(0).sqrt()
        torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("magnitude", ["amax", "rms"])
def test_columns_of_several_layers_count_by_their_geometric_mean(magnitude) -> None:
    opt, x = Smooth(magnitude=magnitude, fold=True), torch.randn(100, 7) * 3
    weights = [torch.randn(5, 7), 10 * torch.randn(2, 7), torch.randn(9, 7)]
    weights[1][:, 3] = 0
    problem = Problem("a", GridRule(FORMATS["int8"], (7,)), None, (7,), stats_of(x), torch.float32, (5, 2, 9))
    found = opt.common_divisor(torch.cat(weights), problem)
    own = [torch.stack(opt.magnitudes(w, stats_of(x))).double() for w in weights]
    inputs = own[0][0]
    exact = inputs.sqrt() / (own[0][1] * own[1][1] * own[2][1]) ** (1 / 6)
    exact[3] = 0  # a layer has no weights there
    exact[3] = max(1.0, inputs[3] / (inputs / exact)[exact > 0].max())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_nothing_is_left_of_what_is_folded() -> None:
    assert Smooth(fold=True).folds()
    assert not Smooth().folds()
    assert type(Smooth(fold=True).folded()) is Identity


def test_input_and_weight_change_and_the_product_does_not() -> None:
    x, weight, transform = torch.randn(64, 20), torch.randn(12, 20), Smooth()
    vectors = [torch.rand(20) + 0.5, torch.rand(20) + 0.5]
    tensors = {"smooth": transform.joined("smooth", vectors)}
    assert tensors["smooth"].shape == transform.tensors(20, (5, 7))["smooth"].shape == (2, 20)
    for i, rows in enumerate((slice(0, 5), slice(5, 12))):
        product = (x / transform.divisor(tensors, i)) @ (weight[rows] * vectors[i]).T
        torch.testing.assert_close(product, x @ weight[rows].T, rtol=1e-4, atol=1e-4)
    smoothed = torch.cat([weight[:5] * vectors[0], weight[5:] * vectors[1]])
    torch.testing.assert_close(transform.restored(smoothed, tensors, (5, 7)), weight, rtol=1e-6, atol=1e-6)
    assert torch.equal(transform.divisor({"smooth": vectors[0]}, 0), vectors[0])
    assert transform.branch(tensors, 0, slice(0, 5)) is None


@pytest.mark.parametrize("segments", [(20,), (13, 7), (8, 8, 4)])
def test_ranges_of_segments(segments) -> None:
    x = torch.randn(50, 20)
    low, high = segment_ranges(stats_of(x), segments)
    parts = x.split(list(segments), 1)
    assert low.tolist() == [p.min().item() for p in parts]
    assert high.tolist() == [p.max().item() for p in parts]


def test_the_config_s_own_alpha_is_tried_too() -> None:
    """Here it is far better than any alpha on the grid, which does not contain it."""
    x, weight = torch.randn(300, 20) * torch.logspace(-1, 1, 20), torch.randn(8, 20)
    opt = Smooth(alpha=0.5, search_alpha_config=SearchAlpha(enable=True, min=0.99, max=1.0, step=0.01))
    problem = Problem("layer", GridRule(FORMATS["int4"], (20,)), None, (20,), stats_of(x), torch.float32)
    own, *others = opt.losses(weight, problem, [0.5, 0.99, 1.0])[:, 0]
    assert 2 * own < min(others)
    assert opt.solve(weight, problem).alphas == (0.5,)


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_no_smoothing_is_tried_too(spread: float) -> None:
    """With equal channels and only twelve rows a vector would fit noise; with one large channel it pays off."""
    rows = torch.randn(12, 64)
    rows[:, 3] *= spread
    weight, opt = torch.randn(32, 64), Smooth(search_alpha_config=SearchAlpha(enable=True, min=0.4, step=0.2))
    rule = InputRule(FORMATS["int8"], False, False, (64,), (False,))
    problem = Problem("layer", GridRule(FORMATS["int8"], (64,)), rule, (64,), stats_of(rows), torch.float32)
    found = opt.solve(weight, problem)
    grid = [None, 0.4, 0.6, 0.8, 1.0, 0.5]
    assert found.alphas == (grid[opt.losses(weight, problem, grid)[:, 0].argmin()],)
    assert (found.alphas == (None,)) == (spread == 1)
    assert torch.equal(found.tensors["smooth"], torch.ones(64)) == (spread == 1)

    def error(divisor: torch.Tensor) -> float:
        """Return the float64 error on new rows, with scales taken from the largest values seen."""
        new = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))
        new[:, 3] *= spread
        step = (rows / divisor).abs().max().double() / 127
        quantized = (new.double() / divisor / step).round().clamp(-127, 127) * step
        scaled = weight.double() * divisor
        grain = scaled.abs().amax(1, keepdim=True) / 127
        return float((quantized @ ((scaled / grain).round() * grain).T - new.double() @ weight.double().T).norm())

    magnitudes = opt.magnitudes(weight, problem.stats)
    others = [error(smoothing_vector(*magnitudes, alpha)) for alpha in grid[1:]]
    assert (error(torch.ones(64)) < min(others)) == (spread == 1)
