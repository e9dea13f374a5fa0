"""The closed-form solutions against numpy's least squares on raw samples, and their invariants."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfquant.affiner import BlockwiseAffiner
from hfquant.affiner.config import parse
from hfquant.affiner.maps import PTQD, TAC, MeanShift
from hfquant.affiner.solvers import (
    EPS,
    BlockLayout,
    expand,
    held_out_strength,
    limit,
    moments,
    objective,
    solve_blocks,
    solve_interpolated,
)


def predictions(seed=0, batch=5, channels=2, height=5, width=7, noise=0.3):
    draw = torch.Generator().manual_seed(seed)
    real = torch.randn(batch, channels, height, width, generator=draw, dtype=torch.float64)
    gain = 1 + 0.2 * torch.randn(1, channels, height, width, generator=draw, dtype=torch.float64)
    quant = gain * real + 0.1 + noise * torch.randn(real.shape, generator=draw, dtype=torch.float64)
    return real, quant


def blocks_of(height, width, size):
    for top in range(0, height, size):
        for left in range(0, width, size):
            yield (top // size, left // size), (slice(top, top + size), slice(left, left + size))


def ridge_lstsq(q, r, a, lambda1, lambda2):
    """Return min over K, b of a |K q + b - r|^2 + lambda1 (K - 1)^2 + lambda2 b^2, by least squares on raw samples."""
    rows = np.sqrt(a) * np.stack([q, np.ones_like(q)], 1)
    rows = np.concatenate([rows, np.diag(np.sqrt([lambda1, lambda2]))])
    right = np.concatenate([np.sqrt(a) * r, [np.sqrt(lambda1), 0.0]])
    return np.linalg.lstsq(rows, right, rcond=None)[0]


@pytest.mark.parametrize(("size", "alpha", "lambda1", "lambda2"), [(2, 0.5, 0.1, 0.03), (3, 1.0, 0, 0), (4, 0.0, 2, 5)])
def test_blocks_equal_least_squares(size, alpha, lambda1, lambda2):
    real, quant = predictions()
    batches = [moments(real[i : i + 2], quant[i : i + 2], size) for i in range(0, 5, 2)]
    scale, shift = solve_blocks(batches[0] + batches[1] + batches[2], alpha, lambda1, lambda2)
    assert scale.shape == (2, -(-5 // size), -(-7 // size))
    for channel in range(2):
        for (i, j), (rows, columns) in blocks_of(5, 7, size):
            q, r = (x[:, channel, rows, columns].numpy().ravel() for x in (quant, real))
            a = alpha / len(q) + (1 - alpha) / ((r**2).sum() + EPS)
            expected = ridge_lstsq(q, r, a, lambda1, lambda2)
            np.testing.assert_allclose([scale[channel, i, j], shift[channel, i, j]], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [2, 3])
def test_interpolated_equals_least_squares(size):
    real, quant = predictions()
    grid = BlockLayout(5, 7, size)
    alpha, lambda1, lambda2 = 0.4, 0.1, 0.02
    scale, shift = solve_interpolated(moments(real, quant, 1), grid, alpha, lambda1, lambda2)
    nodes = grid.shape[0] * grid.shape[1]
    basis = expand(torch.eye(nodes, dtype=torch.float64).view(nodes, *grid.shape), grid, True).flatten(1).T.numpy()
    for channel in range(2):
        a = np.zeros((5, 7))
        for _, (rows, columns) in blocks_of(5, 7, size):
            r = real[:, channel, rows, columns].numpy()
            a[rows, columns] = alpha / r.size + (1 - alpha) / ((r**2).sum() + EPS)
        root = np.sqrt(np.tile(a.ravel(), 5))[:, None]
        q, r = quant[:, channel].numpy().reshape(-1, 1), real[:, channel].numpy().reshape(-1)
        wide = np.tile(basis, (5, 1))
        ridge = np.diag(np.sqrt([lambda1] * nodes + [lambda2] * nodes))
        system = np.concatenate([root * np.concatenate([q * wide, wide], 1), ridge])
        right = np.concatenate([root[:, 0] * r, [np.sqrt(lambda1)] * nodes, [0.0] * nodes])
        expected = np.linalg.lstsq(system, right, rcond=None)[0]
        found = torch.cat([scale[channel].flatten(), shift[channel].flatten()]).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_interpolation_is_linear_between_centres():
    grid = BlockLayout(1, 10, 4)  # centres at 1.5, 5.5 and (a block of two) 8.5
    row = expand(torch.tensor([[[0.0, 4.0, 1.0]]], dtype=torch.float64), grid, True)[0, 0]
    expected = [0, 0, 0.5, 1.5, 2.5, 3.5, 3.5, 2.5, 1.5, 1]
    torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("interpolate", [False, True])
def test_planted_map_is_recovered(interpolate):
    real, _ = predictions(batch=6)
    grid = BlockLayout(5, 7, 3)
    draw = torch.Generator().manual_seed(1)
    scale = 1 + 0.3 * torch.randn(2, *grid.shape, generator=draw, dtype=torch.float64)
    shift = torch.randn(2, *grid.shape, generator=draw, dtype=torch.float64)
    quant = (real - expand(shift, grid, interpolate)) / expand(scale, grid, interpolate)
    if interpolate:
        found = solve_interpolated(moments(real, quant, 1), grid, 0.5, 0.0, 0.0)
    else:
        found = solve_blocks(moments(real, quant, 3), 0.5, 0.0, 0.0)
    torch.testing.assert_close(found[0], scale, rtol=0, atol=1e-9)
    torch.testing.assert_close(found[1], shift, rtol=0, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_equal_predictions_give_the_identity(ridge):
    real, _ = predictions()
    for scale, shift in (
        solve_blocks(moments(real, real, 2), 0.5, ridge, ridge),
        solve_interpolated(moments(real, real, 1), BlockLayout(5, 7, 2), 0.5, ridge, ridge),
        TAC(parse({})).fit(moments(real, real, None)),
        MeanShift(parse({})).fit(moments(real, real, None)),
    ):
        assert torch.equal(scale, torch.ones_like(scale))
        assert torch.equal(shift, torch.zeros_like(shift))
    scale, shift = PTQD(parse({})).fit(moments(real, real, None))
    torch.testing.assert_close(scale, torch.ones_like(scale), rtol=0, atol=1e-12)
    torch.testing.assert_close(shift, torch.zeros_like(shift), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 8),
    alpha=st.floats(0, 1),
    lambda1=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
    lambda2=st.sampled_from([0.0, 1e-3, 1.0]),
    percentile=st.floats(0, 100),
    greater=st.booleans(),
    factor=st.floats(0, 1),
    constant=st.booleans(),
)
def test_objective_never_rises(seed, size, alpha, lambda1, lambda2, percentile, greater, factor, constant):
    real, quant = predictions(seed, batch=2, noise=1.0)
    if constant:
        quant[:, 0] = 0.25
    sums = moments(real, quant, size)
    grid = BlockLayout(5, 7, size)
    scale, shift = solve_blocks(sums, alpha, lambda1, lambda2)
    start = objective(sums, torch.ones_like(scale), torch.zeros_like(shift), alpha, lambda1, lambda2)
    solved = objective(sums, scale, shift, alpha, lambda1, lambda2)
    limited = objective(sums, *limit(scale, shift, percentile, greater, factor), alpha, lambda1, lambda2)
    assert solved <= limited * (1 + 1e-9) + 1e-12
    assert limited <= start * (1 + 1e-9) + 1e-12
    pixels = moments(real, quant, 1)
    scale, shift = solve_interpolated(pixels, grid, alpha, lambda1, lambda2)
    start = objective(pixels, torch.ones_like(scale), torch.zeros_like(shift), alpha, lambda1, lambda2, grid)
    assert objective(pixels, scale, shift, alpha, lambda1, lambda2, grid) <= start * (1 + 1e-9) + 1e-12


def test_constant_predictions_without_ridge_keep_the_scale():
    real = torch.full((3, 1, 2, 2), 0.7, dtype=torch.float64)
    for quant in (torch.full_like(real, 0.2), torch.zeros_like(real)):
        scale, shift = solve_blocks(moments(real, quant, 2), 0.5, 0.0, 0.0)
        assert scale.item() == 1
        assert shift.item() == pytest.approx(0.7 - quant[0, 0, 0, 0].item(), abs=1e-12)


def test_limited_nodes_never_do_worse_than_no_correction():
    """Nodes share pixels, so limiting some of them may do worse; the timestep is then left uncorrected."""
    terms, grid, gone = (0.5, 0.0, 0.0), BlockLayout(5, 7, 2), 0
    solver = {"blocksize": 2, "lambda1": 0.0, "lambda2": 0.0, "percentile": 50.0, "scale": 0.0}
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        real = torch.randn(2, 1, 5, 7, generator=draw, dtype=torch.float64)
        gain = 1 + torch.randn(1, 1, 5, 7, generator=draw, dtype=torch.float64)
        quant = gain * real + 0.1 * torch.randn(real.shape, generator=draw, dtype=torch.float64)
        affiner = BlockwiseAffiner({"solver": {**solver, "sample_mode": "interpolate"}})
        affiner.observe(1.0, real, quant)
        affiner.solve(1.0)
        sums, (scale, shift) = moments(real, quant, 1), (x.double() for x in affiner.prediction.table[1.0])
        start = objective(sums, torch.ones_like(scale), torch.zeros_like(shift), *terms, grid)
        assert objective(sums, scale, shift, *terms, grid) <= start * (1 + 1e-6)
        gone += bool((scale == 1).all())
    assert 0 < gone < 20


def test_limiting_spares_the_blocks_on_the_other_side():
    scale = torch.tensor([[[1.1, 0.5, 1.2, 1.9]]], dtype=torch.float64)
    shift = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)
    limited, moved = limit(scale, shift, 50.0, True, 0.5)
    assert limited.flatten().tolist() == pytest.approx([1.1, 0.75, 1.2, 1.45])
    assert moved.flatten().tolist() == pytest.approx([1.0, 1.0, 3.0, 2.0])
    limited, moved = limit(scale, shift, 50.0, False, 0.0)
    assert limited.flatten().tolist() == pytest.approx([1.0, 0.5, 1.0, 1.9])
    assert moved.flatten().tolist() == pytest.approx([0.0, 2.0, 0.0, 4.0])


def test_a_correction_that_does_harm_elsewhere_is_dropped():
    """The maps double the error on the fold that they were not fitted on."""
    draw = torch.Generator().manual_seed(0)
    real = torch.randn(4, 2, 3, 3, generator=draw, dtype=torch.float64)
    folds, maps = [], []
    for i in range(4):
        noise = torch.randn(2, 3, 3, generator=draw, dtype=torch.float64)
        folds.append(moments(real[i : i + 1], (real[i] + noise)[None], 1))
        maps.append((torch.ones(2, 3, 3, dtype=torch.float64), noise))  # doubles the error
    assert held_out_strength(folds, maps) == 0.0


@pytest.mark.parametrize(("size", "expected"), [(0.5, 1.0), (1.0, 1.0), (1.6, 1.0), (4.0, 0.5), (-1.0, 0.0)])
def test_the_strength_is_the_most_that_does_no_harm(size, expected):
    """The quantized model is off by 1 everywhere, and the map subtracts `size`."""
    draw = torch.Generator().manual_seed(0)
    real = torch.randn(8, 1, 2, 2, generator=draw, dtype=torch.float64)
    folds = [moments(real[i::2], real[i::2] + 1, None) for i in range(2)]
    maps = [(torch.ones(1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1), -size, dtype=torch.float64))] * 2
    assert held_out_strength(folds, maps) == pytest.approx(expected)
