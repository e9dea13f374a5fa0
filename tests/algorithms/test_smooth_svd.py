"""Smoothing vector and low-rank branch against float64 formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.algorithms.smooth import smoothing_vector
from hfquant.algorithms.svd import _block_krylov, low_rank


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


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def left_over(weight: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]) -> float:
    up, down = factors
    return float((weight.double() - up.double() @ down.double()).square().sum())


OUTLIERS = torch.ones(500).index_fill(0, torch.tensor([7, 300]), 1e3)
KRYLOV = {
    "decaying": (decaying(300, 500).float(), 8),
    "tall": (decaying(500, 300).float(), 20),
    "flat": (normal(300, 500), 8),  # the slowest to converge
    "outlier columns": (normal(300, 500) * OUTLIERS, 16),
    "rank 3": (normal(300, 3) @ normal(3, 500), 8),
    "nothing": (torch.zeros(300, 500), 8),
}


@pytest.mark.parametrize("case", KRYLOV)
def test_krylov_basis_loses_little_of_what_can_be_captured(case: str) -> None:
    """Nor does it leave much more than has to be left, be that little beside a few columns."""
    weight, rank = KRYLOV[case]
    factors = _block_krylov(weight, rank, 16)
    assert factors is not None
    squares = torch.linalg.svdvals(weight.double()).square()
    captured, best, found = float(squares[:rank].sum()), float(squares[rank:].sum()), left_over(weight, factors)
    assert found <= best + 1e-3 * min(captured, best) + 1e-6 * captured
    assert sum(f.isfinite().all() for f in factors) == 2


def test_exact_where_the_krylov_basis_grows_too_large() -> None:
    weight = normal(300, 500)
    assert _block_krylov(weight, 64, 64) is None
    best = float(torch.linalg.svdvals(weight.double())[64:].square().sum())
    assert left_over(weight, low_rank(weight, 64)) <= best * (1 + 1e-6)


def test_low_rank_of_nothing_is_nothing() -> None:
    up, down = low_rank(torch.zeros(12, 9), 3)
    assert (up @ down == 0).all()
    assert up.isfinite().all()
    assert down.isfinite().all()
