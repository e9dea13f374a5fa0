"""Smoothing vector and low-rank branch against float64 formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.algorithms.smooth import smoothing_vector
from hfquant.algorithms.svd import _randomized, low_rank


@given(alpha=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_smoothing_vector_is_the_formula(alpha: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.lognormal(sigma=4, size=(2, 33)).astype(np.float32)
    expected = x.astype(np.float64) ** alpha / w.astype(np.float64) ** (1 - alpha)
    found = smoothing_vector(torch.from_numpy(x), torch.from_numpy(w), alpha)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=3e-7)


def test_smoothing_leaves_dead_channels_alone_and_stays_finite() -> None:
    x = torch.tensor([0.0, 3.0, 0.0, 1e30, 1e-38])
    w = torch.tensor([2.0, 0.0, 0.0, 1e-30, 1e30])
    found = smoothing_vector(x, w, 0.5)
    assert found[:3].tolist() == [1.0, 1.0, 1.0]
    assert found.isfinite().all()
    assert (found > 0).all()


def decaying(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    u, _ = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=torch.float64))
    return (u * torch.arange(1, size + 1).double().pow(-0.7)) @ v.T


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (7, 5), (300, 500), (500, 300)])
@pytest.mark.parametrize("rank", [1, 4])
def test_low_rank_is_optimal(shape: tuple[int, int], rank: int) -> None:
    """Eckart-Young: the residual is what the dropped singular values leave."""
    weight = decaying(*shape)
    up, down = low_rank(weight, rank)
    assert up.shape == (shape[0], rank)
    assert down.shape == (rank, shape[1])
    best = torch.linalg.svdvals(weight)[rank:].square().sum()
    residual = (weight - up.double() @ down.double()).square().sum()
    # 0.1 % of the captured energy is the bound promised for the randomized branch.
    captured = torch.linalg.svdvals(weight)[:rank].square().sum()
    assert best - 1e-9 <= residual <= best + 1e-3 * captured


def test_randomized_svd_is_used_only_once_converged() -> None:
    assert _randomized(decaying(300, 500).float(), 8, 24) is not None
    flat = torch.randn(300, 500, generator=torch.Generator().manual_seed(0))
    up, down = low_rank(flat, 8)
    best = torch.linalg.svdvals(flat.double())[8:].square().sum()
    captured = torch.linalg.svdvals(flat.double())[:8].square().sum()
    assert (flat.double() - up.double() @ down.double()).square().sum() <= best + 1e-3 * captured


def test_low_rank_of_nothing_is_nothing() -> None:
    up, down = low_rank(torch.zeros(12, 9), 3)
    assert (up @ down == 0).all()
    assert up.isfinite().all()
    assert down.isfinite().all()
