"""The search for the least squared error, against every scale and zero point that can be stored, in float64."""

from itertools import accumulate, pairwise, product

import numpy as np
import pytest
import torch

from hfquant.formats import FORMATS, Grid, GridRule, clipping
from tests import oracle

INT4 = FORMATS["int4"]
COLUMNS = {"equal": (32, 32, 32), "short": (32, 32, 8), "one": (40,)}


def losses(w: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> np.ndarray:
    """Return each block's weighted squared error, [out, G] float64."""
    error = (grid.dequantize(grid.quantize(w)).double() - w.double()) ** 2 * w.double().abs().sqrt()
    if importance is not None:
        error = error * importance.double()
    return torch.stack([part.sum(-1) for part in error.split(list(grid.columns), -1)], -1).numpy()


def best_of_all(w: np.ndarray, scales: np.ndarray, symmetric: bool, bits: int, importance: np.ndarray) -> float:
    """Return a block's [size] least weighted squared error over scales and all zero points, by brute force."""
    half = 2 ** (bits - 1)
    bounds = [(1 - half, half - 1)] if symmetric else [(-half - z, half - 1 - z) for z in range(-half, half)]
    weights = np.sqrt(np.abs(w)) * importance
    return min(
        float((weights * (np.clip(np.rint(w / s), low, high) * s - w) ** 2).sum())
        for s, (low, high) in product(scales, bounds)
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("two_level", [True, False])
def test_nearly_the_best_of_all_scales_and_zero_points(two_level, columns, symmetric, weighted) -> None:
    sizes = COLUMNS[columns]
    # Heavy tails and a nonzero mean, so that both clipping and zero points pay off.
    w = torch.randn(16, sum(sizes)) + 0.2 * torch.randn(16, 1)
    w *= 1 + 2 * (torch.rand(w.shape) < 0.03)
    importance = torch.randn(sum(sizes)).mul(1.5).exp() if weighted else None
    rule = GridRule(INT4, sizes, None, symmetric, "mse", two_level)
    grid = rule.fit(w, importance)
    found = losses(w, grid, importance)
    best = np.empty_like(found)
    for g, (start, end) in enumerate(pairwise(accumulate(sizes, initial=0))):
        for r, block in enumerate(w[:, start:end].double().numpy()):
            if two_level:
                scales = np.array([oracle.group_scale(code) for code in range(256)]) * grid.scale_row[r].item()
            else:
                scales = np.abs(block).max() / 7 * np.linspace(0.3, 1.1, 100)
            # A scale below a third of the full range would clip everything but the middle.
            scales = scales[(scales > np.ptp(block) / 15 * 0.33) & (scales < np.abs(block).max() / 4)]
            weights = np.ones(end - start) if importance is None else importance[start:end].double().numpy()
            best[r, g] = best_of_all(block, scales, symmetric, 4, weights)
    # Weights of low importance mislead the search by a few percent more.
    assert found.sum() <= (1.12 if weighted else 1.05) * best.sum()
    assert np.median(found / best) <= 1.03


@pytest.mark.parametrize("rows", [None, (6,), (1, 2, 3)])
@pytest.mark.parametrize(("form", "symmetric"), [("int4", True), ("int4", False), ("int8", False), ("fp8e4m3", True)])
def test_never_above_the_grid_that_reaches_all(form, symmetric, rows) -> None:
    """Rows that share a scale are judged by their total error, and share the result."""
    w = torch.randn(6, 72) * torch.logspace(-2, 2, 6)[:, None] + 0.1
    w[2, 3], w[4] = 1e3, 0.0
    importance = torch.rand(72) ** 4 * 100
    sums = torch.zeros(len(rows or w), 6, dtype=torch.float64)
    for i, count in enumerate(rows or (1,) * 6):
        sums[i, sum((rows or (1,) * 6)[:i]) :][:count] = 1
    widest, grid = (GridRule(FORMATS[form], (32, 32, 8), rows, symmetric, clip) for clip in ("amax", "mse"))
    ours, theirs = (sums.numpy() @ losses(w, g.fit(w, importance), importance) for g in (grid, widest))
    assert (ours <= theirs * (1 + 1e-5) + 1e-12).all()
    found = grid.fit(w, importance)
    for shared in (found.scale, found.zero_point):
        for part in () if shared is None else shared.split(list(rows or (1,) * 6)):
            assert (part == part[:1]).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_a_group_has_the_grid_that_it_would_have_alone(weighted, monkeypatch) -> None:
    """Also for the short last group; solving rows in chunks only saves memory and changes nothing."""
    w = torch.randn(200, 144)
    importance = torch.rand(144) if weighted else None
    rule = GridRule(INT4, (64, 64, 16), None, False, "mse")
    whole = rule.fit(w, importance)
    for g, columns in enumerate((slice(0, 64), slice(64, 128), slice(128, 144))):
        part = None if importance is None else importance[columns]
        alone = GridRule(INT4, (columns.stop - columns.start,), None, False, "mse").fit(w[:, columns], part)
        assert torch.equal(whole.scale[:, g], alone.scale[:, 0])
        assert torch.equal(whole.zero_point[:, g], alone.zero_point[:, 0])
    monkeypatch.setattr(clipping, "CHUNK", 1)
    in_blocks = rule.fit(w, importance)
    assert torch.equal(in_blocks.scale, whole.scale)
    assert torch.equal(in_blocks.zero_point, whole.zero_point)


def test_it_pays_at_four_bits() -> None:
    w = torch.randn(64, 64)
    widest, found = (GridRule(INT4, (64,), None, False, clip, two_level=True).fit(w) for clip in ("amax", "mse"))
    squared = [(grid.round(w) - w).square().sum() for grid in (widest, found)]
    assert squared[1] < 0.95 * squared[0]


def test_a_column_that_matters_is_not_clipped() -> None:
    w = torch.randn(1, 64)
    importance = torch.zeros(64)
    importance[w[0].abs().argmax()] = 1.0
    grid = GridRule(INT4, (64,), None, False, "mse").fit(w, importance)
    assert (grid.round(w) - w).abs()[0, importance > 0].item() < 0.02 * w.abs().max()


def test_rounding_up_does_not_leave_float32() -> None:
    w = torch.tensor([[3.4e38, 1e38, -3.3e38, 2.9e38]])
    for symmetric, two_level in product((True, False), (True, False)):
        grid = GridRule(INT4, (4,), None, symmetric, "mse", two_level).fit(w)
        assert grid.round(w).isfinite().all()


def test_roots_are_those_of_any_cpu() -> None:
    """The last bit of `torch.sqrt` depends on the CPU, and so would a search whose losses tie on that bit."""
    values = np.concatenate([[0.0], np.random.default_rng(0).exponential(size=100_003)]).astype(np.float32)
    with np.errstate(divide="ignore"):
        expected = np.float32(1) / (np.float32(1) / np.sqrt(values))
    assert np.array_equal(clipping._root(torch.from_numpy(values.copy())).numpy(), expected)
