"""GPTQ against a direct, unblocked textbook implementation in float64, and what must hold for any input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfquant.algorithms.gptq import gptq
from hfquant.algorithms.rounding import dequantize_weight, round_to_nearest, weight_grid
from hfquant.config import CalibConfig, Calibrate, DType, WeightQuant


def problem(rows: int, columns: int, samples: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mixing
    x *= torch.logspace(-1, 1, columns, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, (x.T @ x / samples).float()


def textbook(w: np.ndarray, h: np.ndarray, scale: np.ndarray, limit: int, damp: float, order: np.ndarray) -> np.ndarray:
    """Algorithm 1 of arXiv 2210.17323 with one column a block, on a fixed grid: codes in float64."""
    h = h[np.ix_(order, order)] + damp * np.mean(np.diag(h)) * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    # numpy gives the lower factor of H^-1 = L L^T; what is wanted is H^-1 = U^T U with U = L^T.
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


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_matches_the_textbook(act_order: bool, block_size: int) -> None:
    weight, h = problem(24, 40, 400)
    quant = WeightQuant(type=DType.INT4, axis=-1)
    calib = CalibConfig(type=Calibrate.GPTQ, block_size=block_size, act_order=act_order)
    codes, scale, zero = gptq(weight, h, quant, calib, (40,))
    assert zero is None
    order = np.argsort(-h.diagonal().numpy(), kind="stable") if act_order else np.arange(40)
    grid = scale.double().expand(-1, 40).numpy()
    expected = textbook(weight.double().numpy(), h.double().numpy(), grid, 7, calib.damp, order)
    kept_nearest = (codes == round_to_nearest(weight, scale, None, quant.type, (40,))).all(1)
    assert not kept_nearest.all()
    loss = row_loss(weight, codes.double() * scale, h)[~kept_nearest]
    target = row_loss(weight, torch.from_numpy(expected) * scale, h)[~kept_nearest]
    torch.testing.assert_close(loss, target, rtol=1e-6, atol=0)
    assert np.array_equal(codes[~kept_nearest].numpy(), expected[~kept_nearest.numpy()].astype(np.int8))


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    samples=st.sampled_from([1, 5, 64, 300]),
    dtype=st.sampled_from([DType.INT4, DType.INT6, DType.INT8, DType.FP8E4M3, DType.FP8E5M2]),
    group=st.sampled_from([None, 8, 16]),
    act_order=st.booleans(),
    symmetric=st.booleans(),
    clip=st.sampled_from(["amax", "mse"]),
)
def test_never_worse_than_rounding(
    seed: int, samples: int, dtype: DType, group: int | None, act_order: bool, symmetric: bool, clip: str
) -> None:
    """Rank-deficient Hessians included: one sample, fewer rows than columns."""
    weight, h = problem(10, 48, samples, seed)
    quant = WeightQuant(type=dtype, axis=-1, group_size=group, symmetric=symmetric or not dtype.is_integer, clip=clip)
    columns = (group,) * (48 // group) if group else (48,)
    codes, scale, zero = gptq(
        weight, h, quant, CalibConfig(type=Calibrate.GPTQ, block_size=12, act_order=act_order), columns
    )
    grid, zeros = weight_grid(weight, quant, columns, None, h.diagonal())
    nearest = round_to_nearest(weight, grid, zeros, dtype, columns)
    loss = row_loss(weight, dequantize_weight(codes, scale, zero, dtype, columns), h)
    base = row_loss(weight, dequantize_weight(nearest, grid, zeros, dtype, columns), h)
    assert (loss <= base * (1 + 1e-4) + 1e-12).all()


def test_helps_a_lot_on_correlated_inputs() -> None:
    weight, h = problem(32, 64, 1000)
    quant = WeightQuant(type=DType.INT4, group_size=16)
    columns = (16,) * 4
    # The problem's last columns weigh most, so only act_order leaves columns to make up for them.
    codes, scale, zero = gptq(weight, h, quant, CalibConfig(type=Calibrate.GPTQ, act_order=True), columns)
    grid, _ = weight_grid(weight, quant, columns)
    nearest = round_to_nearest(weight, grid, None, quant.type, columns)
    nearest = dequantize_weight(nearest, grid, None, quant.type, columns)
    after = row_loss(weight, dequantize_weight(codes, scale, zero, quant.type, columns), h).sum()
    assert after < 0.6 * row_loss(weight, nearest, h).sum()


def test_dead_columns_round_to_nearest_and_get_no_error() -> None:
    weight, h = problem(6, 20, 200)
    h[3], h[:, 3] = 0, 0
    quant = WeightQuant(type=DType.INT8, axis=-1)
    codes, scale, _ = gptq(weight, h, quant, CalibConfig(type=Calibrate.GPTQ), (20,))
    assert torch.equal(codes[:, 3], round_to_nearest(weight, scale, None, quant.type, (20,))[:, 3])


def test_no_input_at_all_is_rounding() -> None:
    weight, _ = problem(6, 20, 10)
    quant = WeightQuant(type=DType.INT4, axis=-1)
    codes, scale, _ = gptq(weight, torch.zeros(20, 20), quant, CalibConfig(type=Calibrate.GPTQ), (20,))
    assert torch.equal(codes, round_to_nearest(weight, scale, None, quant.type, (20,)))


def test_hopeless_hessian_falls_back_loudly(caplog: pytest.LogCaptureFixture) -> None:
    weight, h = problem(6, 20, 200)
    indefinite = -100 * h + 101 * h.diagonal().mean() * torch.eye(20)
    quant = WeightQuant(type=DType.INT4, axis=-1)
    codes, scale, _ = gptq(weight, indefinite, quant, CalibConfig(type=Calibrate.GPTQ), (20,), name="blocks.1.down")
    assert torch.equal(codes, round_to_nearest(weight, scale, None, quant.type, (20,)))
    assert "layer 'blocks.1.down': its Hessian cannot be factorized" in caplog.text


def test_all_zero_weight() -> None:
    _, h = problem(6, 20, 200)
    quant = WeightQuant(type=DType.INT4, group_size=10, symmetric=False, clip="mse")
    codes, scale, zero = gptq(torch.zeros(6, 20), h, quant, CalibConfig(type=Calibrate.GPTQ), (10, 10))
    assert (dequantize_weight(codes, scale, zero, quant.type, (10, 10)) == 0).all()


def test_rows_that_share_a_scale_keep_sharing_it() -> None:
    weight, h = problem(8, 20, 200)
    _, scale, _ = gptq(weight, h, WeightQuant(type=DType.INT4), CalibConfig(type=Calibrate.GPTQ), (12, 8), rows=(5, 3))
    assert (scale[:5] == scale[0]).all()
    assert (scale[5:] == scale[5]).all()
