"""The low-rank branch against float64: optimal, clipped to the layer's size, and stored as in a checkpoint."""

import pytest
import torch
import torch.nn.functional as F

from hfquant.algorithms import Problem, TensorSpec
from hfquant.algorithms.low_rank import LowRank, _block_krylov, low_rank
from hfquant.formats import FORMATS, GridRule
from hfquant.statistics import LayerStats


def decaying(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    u, _ = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=torch.float64))
    return (u * torch.arange(1, size + 1).double().pow(-0.7)) @ v.T


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (7, 5), (300, 500), (500, 300)])
@pytest.mark.parametrize("rank", [1, 4])
def test_low_rank_is_optimal(shape: tuple[int, int], rank: int) -> None:
    """Eckart-Young: the residual equals the energy of the dropped singular values."""
    weight = decaying(*shape)
    up, down = low_rank(weight, rank)
    assert up.shape == (shape[0], rank)
    assert down.shape == (rank, shape[1])
    best = torch.linalg.svdvals(weight)[rank:].square().sum()
    residual = (weight - up.double() @ down.double()).square().sum()
    # The randomized branch promises a residual within 0.1 % of the captured energy.
    captured = torch.linalg.svdvals(weight)[:rank].square().sum()
    assert best - 1e-9 <= residual <= best + 1e-3 * captured


def test_the_branch_is_left_of_what_is_folded() -> None:
    """If smoothing is folded, only the branch remains: it factors the original weight, and nothing is divided."""
    weight = decaying(12, 9).float()
    branch = LowRank(low_rank=3, fold=True).folded()
    assert branch.tensors(9, (12,)) == {"svd_down": TensorSpec((3, 9), None), "svd_up": TensorSpec((12, 3), None)}
    assert not branch.needs_data
    problem = Problem("a", GridRule(FORMATS["int8"], (9,)), None, (9,), None, torch.float64)
    made = branch.solve(weight, problem)
    assert made.tensors.keys() == {"svd_down", "svd_up"}
    assert made.divisor is None
    assert branch.divisor(made.tensors, 0) is None
    product = made.tensors["svd_up"].double() @ made.tensors["svd_down"].double()
    torch.testing.assert_close(made.weight.double(), weight.double() - product, rtol=0, atol=1e-6)
    torch.testing.assert_close(branch.restored(made.weight.clone(), made.tensors, (12,)), weight, rtol=0, atol=1e-6)


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def left_over(weight: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]) -> float:
    up, down = factors
    return float((weight.double() - up.double() @ down.double()).square().sum())


OUTLIERS = torch.ones(500).index_fill(0, torch.tensor([7, 300]), 1e3)
KRYLOV = {
    "decaying": (decaying(300, 500).float(), 8),
    "tall": (decaying(500, 300).float(), 20),
    "flat": (normal(300, 500), 8),  # converges the slowest
    "outlier columns": (normal(300, 500) * OUTLIERS, 16),
    "rank 3": (normal(300, 3) @ normal(3, 500), 8),
    "nothing": (torch.zeros(300, 500), 8),
}


@pytest.mark.parametrize("case", KRYLOV)
def test_krylov_basis_loses_little_of_what_can_be_captured(case: str) -> None:
    """The residual stays close to the optimum too, even if that is tiny beside a few large columns."""
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


# Used as a transform.


def problem(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> Problem:
    stats = LayerStats.of(x, torch.rand(len(x)).double())
    return Problem("layer", GridRule(FORMATS["int4"], (x.shape[1],)), None, (x.shape[1],), stats, dtype)


@pytest.mark.parametrize(
    ("rank", "in_features", "rows", "expected"),
    [(32, 8, (2,), 2), (32, 20, (64,), 20), (32, 64, (40, 3, 21), 3), (3, 64, (40, 3), 3), (2, 64, (40, 3), 2)],
)
def test_the_rank_is_cut_to_the_smallest_side(rank, in_features, rows, expected) -> None:
    transform = LowRank(low_rank=rank, alpha=0.3)
    fitted = transform.fitted(in_features, rows)
    assert fitted.low_rank == expected
    assert (fitted is transform) == (rank == expected)
    assert (transform.low_rank, fitted.alpha) == (rank, 0.3)
    assert fitted.describe() == f"rank={expected}"
    spec = fitted.tensors(in_features, rows)
    assert spec["svd_down"] == TensorSpec((len(rows) * expected, in_features), None)
    assert spec["svd_up"] == TensorSpec((sum(rows), expected), None)
    assert spec["smooth"].shape == ((in_features,) if len(rows) == 1 else (len(rows), in_features))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (300, 500), (500, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_contiguous_and_of_the_model_s_dtype(shape, dtype) -> None:
    """With strides unlike a checkpoint's, products would round differently before saving and after loading."""
    weight, x = torch.randn(*shape), torch.randn(64, shape[1])
    solved = LowRank(low_rank=4).solve(weight, problem(x, dtype))
    assert solved.tensors.keys() == {"smooth", "svd_down", "svd_up"}
    for name in ("svd_down", "svd_up"):
        assert solved.tensors[name].is_contiguous()
        assert solved.tensors[name].dtype == dtype


def test_nothing_is_lost_between_branch_and_residual() -> None:
    weight, x = torch.randn(12, 20), torch.randn(64, 20) * torch.logspace(-1, 1, 20)
    transform = LowRank(low_rank=4)
    solved = transform.solve(weight, problem(x))
    product = F.linear(x / transform.divisor(solved.tensors, 0), solved.weight)
    down, up = transform.branch(solved.tensors, 0, slice(0, 12))
    output = x @ down.T @ up.T
    torch.testing.assert_close(product + output, x @ weight.T, rtol=1e-4, atol=1e-4)
    parts = [transform.added(x, solved.tensors, c) for c in (slice(0, 7), slice(7, 20))]
    torch.testing.assert_close(parts[0] + parts[1], output, rtol=1e-4, atol=1e-4)
    restored = transform.restored(solved.weight.clone(), solved.tensors, (12,))
    torch.testing.assert_close(restored, weight, rtol=1e-5, atol=1e-5)


def test_groups_of_rows_have_branches_of_their_own() -> None:
    x, rows = torch.randn(64, 20), (5, 7)
    weight, transform = torch.randn(12, 20), LowRank(low_rank=3)
    parts = [transform.solve(w, problem(x)) for w in weight.split(list(rows))]
    tensors = {name: transform.joined(name, [p.tensors[name] for p in parts]) for name in parts[0].tensors}
    assert {n: (tuple(t.shape)) for n, t in tensors.items()} == {
        n: spec.shape for n, spec in transform.tensors(20, rows).items()
    }
    residual = torch.cat([p.weight for p in parts])
    products = [F.linear(x / transform.divisor(tensors, i), w) for i, w in enumerate(residual.split(list(rows)))]
    factors = [transform.branch(tensors, i, r) for i, r in enumerate((slice(0, 5), slice(5, 12)))]
    found = torch.cat(products, 1) + torch.cat([x @ down.T @ up.T for down, up in factors], 1)
    torch.testing.assert_close(found, x @ weight.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(transform.restored(residual.clone(), tensors, rows), weight, rtol=1e-5, atol=1e-5)
