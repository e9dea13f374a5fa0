"""GPTQ against a direct, unblocked textbook implementation in float64, and properties that hold for any input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfquant.algorithms.gptq import Gptq, _inverse_cholesky
from hfquant.formats import FORMATS, Grid, GridRule
from hfquant.statistics import LayerStats


def problem(rows: int, columns: int, samples: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mixing
    x *= torch.logspace(-1, 1, columns, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, (x.T @ x / samples).float()


def textbook(w: np.ndarray, h: np.ndarray, scale: np.ndarray, limit: int, damp: float, order: np.ndarray) -> np.ndarray:
    """Return float64 codes by Algorithm 1 of arXiv 2210.17323, with one column per block, on a fixed grid."""
    h = h[np.ix_(order, order)] + damp * np.mean(np.diag(h)) * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    # numpy gives the lower factor L of H^-1 = L L^T; the algorithm needs H^-1 = U^T U, so U = L^T.
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(h), rtol=1e-6, atol=1e-9 * np.abs(h).max())
    w, scale = w[:, order].copy(), scale[:, order]
    codes = np.zeros_like(w)
    for j in range(w.shape[1]):
        codes[:, j] = np.clip(np.round(w[:, j] / scale[:, j]), -limit, limit)
        error = (w[:, j] - codes[:, j] * scale[:, j]) / upper[j, j]
        w[:, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
    back = np.empty_like(codes)
    back[:, order] = codes
    return back


def row_loss(w: torch.Tensor, w_hat: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    error = (w - w_hat).double()
    return ((error @ h.double()) * error).sum(-1)


def gptq(weight: torch.Tensor, h: torch.Tensor, rule: GridRule, **options: object) -> tuple[torch.Tensor, Grid]:
    return Gptq(**options).swept(weight, h, rule, "layer")


@pytest.mark.parametrize("panel", [1, 7, 39, 40, 256])
def test_the_factor_in_panels_of_any_width(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfquant.algorithms.gptq._PANEL", panel)
    _, h = problem(1, 40, 400)
    h[3] = h[:, 3] = 0  # an input that is always zero
    found = _inverse_cholesky(h, 0.01, act_order=False)
    assert found is not None
    damped = h.double().numpy() + 0.01 * h.diagonal().double().mean().item() * np.eye(40)
    damped[3, 3] = 1
    expected = np.linalg.cholesky(np.linalg.inv(damped)).T
    np.testing.assert_allclose(found[0], expected, rtol=2e-7, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_matches_the_textbook(act_order: bool, block_size: int) -> None:
    weight, h = problem(24, 40, 400)
    options = {"block_size": block_size, "act_order": act_order}
    codes, grid = gptq(weight, h, GridRule(FORMATS["int4"], (40,)), **options)
    assert grid.zero_point is None
    order = np.argsort(-h.diagonal().numpy(), kind="stable") if act_order else np.arange(40)
    scale = grid.scale.double().expand(-1, 40).numpy()
    expected = textbook(weight.double().numpy(), h.double().numpy(), scale, 7, Gptq(**options).damp, order)
    kept_nearest = (codes == grid.quantize(weight)).all(1)
    assert not kept_nearest.all()
    loss = row_loss(weight, codes.double() * grid.scale, h)[~kept_nearest]
    target = row_loss(weight, torch.from_numpy(expected) * grid.scale, h)[~kept_nearest]
    torch.testing.assert_close(loss, target, rtol=1e-6, atol=0)
    assert np.array_equal(codes[~kept_nearest].numpy(), expected[~kept_nearest.numpy()].astype(np.int8))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
def test_matches_the_textbook_with_a_short_last_group(act_order: bool, block_size: int) -> None:
    """Compared on the resulting grid: in natural order, a group's scale is fitted when the sweep reaches the group."""
    weight, h = problem(24, 40, 400)
    columns = (16, 16, 8)
    codes, grid = gptq(weight, h, GridRule(FORMATS["int4"], columns), block_size=block_size, act_order=act_order)
    assert grid.columns == columns
    assert grid.scale.shape == (24, 3)
    order = np.argsort(-h.diagonal().numpy(), kind="stable") if act_order else np.arange(40)
    scale = grid.scale.double().repeat_interleave(torch.tensor(columns), 1).numpy()
    expected = textbook(weight.double().numpy(), h.double().numpy(), scale, 7, 0.01, order)
    kept_nearest = (codes == GridRule(FORMATS["int4"], columns).fit(weight).quantize(weight)).all(1)
    assert kept_nearest.sum() <= 12
    assert np.array_equal(codes[~kept_nearest].numpy(), expected[~kept_nearest.numpy()].astype(np.int8))


@pytest.mark.parametrize("columns", [(16, 16, 8), (40,), (3, 20, 17)])
@pytest.mark.parametrize("two_level", [False, True])
def test_blocks_change_nothing(columns: tuple[int, ...], two_level: bool) -> None:
    """A group's scale takes all earlier errors into account, including those of a block that is not finished."""
    weight, h = problem(24, 40, 400)
    rule = GridRule(FORMATS["int4"], columns, two_level=two_level)
    codes, grid = gptq(weight, h, rule, block_size=1)
    for block_size in (7, 16, 24, 128):
        other_codes, other = gptq(weight, h, rule, block_size=block_size)
        torch.testing.assert_close(other.scale, grid.scale, rtol=1e-4, atol=0)
        assert torch.equal(other_codes, codes)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    samples=st.sampled_from([1, 5, 64, 300]),
    form=st.sampled_from(["int2", "int3", "int4", "int5", "int6", "int8", "fp8e4m3", "fp8e5m2"]),
    columns=st.sampled_from([(48,), (8,) * 6, (16,) * 3, (20, 20, 8)]),
    act_order=st.booleans(),
    symmetric=st.booleans(),
    clip=st.sampled_from(["amax", "mse"]),
)
def test_never_worse_than_rounding(
    seed: int, samples: int, form: str, columns: tuple[int, ...], act_order: bool, symmetric: bool, clip: str
) -> None:
    """Also with rank-deficient Hessians: a single sample, or fewer rows than columns."""
    weight, h = problem(10, 48, samples, seed)
    rule = GridRule(FORMATS[form], columns, None, symmetric or not FORMATS[form].is_integer, clip)
    codes, grid = gptq(weight, h, rule, block_size=12, act_order=act_order)
    nearest = rule.fit(weight, h.diagonal())
    loss = row_loss(weight, grid.dequantize(codes), h)
    base = row_loss(weight, nearest.dequantize(nearest.quantize(weight)), h)
    assert (loss <= base * (1 + 1e-4) + 1e-12).all()


def test_helps_a_lot_on_correlated_inputs() -> None:
    weight, h = problem(32, 64, 1000)
    rule = GridRule(FORMATS["int4"], (16,) * 4)
    # The last columns carry the most weight, so only act_order leaves columns that can compensate for them.
    codes, grid = gptq(weight, h, rule, act_order=True)
    nearest = rule.fit(weight)
    after = row_loss(weight, grid.dequantize(codes), h).sum()
    assert after < 0.6 * row_loss(weight, nearest.dequantize(nearest.quantize(weight)), h).sum()


def test_dead_columns_round_to_nearest_and_get_no_error() -> None:
    weight, h = problem(6, 20, 200)
    h[3], h[:, 3] = 0, 0
    codes, grid = gptq(weight, h, GridRule(FORMATS["int8"], (20,)))
    assert torch.equal(codes[:, 3], grid.quantize(weight)[:, 3])


def test_no_input_at_all_is_rounding() -> None:
    weight, _ = problem(6, 20, 10)
    codes, grid = gptq(weight, torch.zeros(20, 20), GridRule(FORMATS["int4"], (20,)))
    assert torch.equal(codes, grid.quantize(weight))


def test_hopeless_hessian_falls_back_loudly(caplog: pytest.LogCaptureFixture) -> None:
    weight, h = problem(6, 20, 200)
    indefinite = -100 * h + 101 * h.diagonal().mean() * torch.eye(20)
    codes, grid = Gptq().swept(weight, indefinite, GridRule(FORMATS["int4"], (20,)), "blocks.1.down")
    assert torch.equal(codes, grid.quantize(weight))
    assert "layer 'blocks.1.down': its Hessian cannot be factorized" in caplog.text


def test_all_zero_weight() -> None:
    _, h = problem(6, 20, 200)
    rule = GridRule(FORMATS["int4"], (10, 10), symmetric=False, clip="mse")
    codes, grid = gptq(torch.zeros(6, 20), h, rule)
    assert (grid.dequantize(codes) == 0).all()


def test_rows_that_share_a_scale_keep_sharing_it() -> None:
    weight, h = problem(8, 20, 200)
    _, grid = gptq(weight, h, GridRule(FORMATS["int4"], (12, 8), rows=(5, 3)))
    assert (grid.scale[:5] == grid.scale[0]).all()
    assert (grid.scale[5:] == grid.scale[5]).all()


def test_solves_for_the_hessian_of_what_the_layer_sees() -> None:
    weight, _ = problem(6, 20, 10)
    x, divisor = torch.randn(200, 20) @ torch.randn(20, 20), torch.rand(20) + 0.5
    rule, weight_seen = GridRule(FORMATS["int4"], (20,)), weight * divisor
    stats = LayerStats.of(x, torch.rand(200).double(), Gptq.needs).divided(divisor)
    codes, grid = Gptq().solve(weight_seen, rule, stats, "layer")
    seen = (x / divisor).double()
    by_hand, same = gptq(weight_seen, (seen.T @ seen / 200).float(), rule)
    assert torch.equal(codes, by_hand)
    assert torch.equal(grid.scale, same.scale)


def test_cost_grows_with_the_inverse() -> None:
    assert Gptq().cost(200, 10) > 7 * Gptq().cost(100, 10) > 0
