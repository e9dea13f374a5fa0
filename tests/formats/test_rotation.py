"""The rotation against signs computed from parity, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hfquant.formats.rotation import hadamard, rotated


def by_hand(columns: int, size: int) -> np.ndarray:
    """Return the full rotation [columns, columns] in float64: the sign is the parity of the bits both indices share."""
    whole, start = np.zeros((columns, columns)), 0
    while start < columns:
        while size > columns - start:
            size //= 2
        index = np.arange(size)
        parity = np.vectorize(lambda i, j: bin(i & j).count("1") % 2)(index[:, None], index)
        whole[start : start + size, start : start + size] = (1 - 2.0 * parity) / np.sqrt(size)
        start += size
    return whole


@given(columns=st.integers(1, 90), log=st.integers(1, 6), rows=st.integers(0, 3))
def test_rotation_is_orthogonal_block_by_block(columns: int, log: int, rows: int) -> None:
    matrix = by_hand(columns, 2**log)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(columns), atol=1e-12)
    x = torch.randn(rows, 2, columns, generator=torch.Generator().manual_seed(columns))
    found = rotated(x, 2**log)
    assert found.shape == x.shape
    np.testing.assert_allclose(found.numpy(), x.double().numpy() @ matrix, atol=1e-5)
    torch.testing.assert_close(rotated(found, 2**log), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_matrix_is_right_in_each_dtype_whatever_came_before(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        rotated(torch.randn(2, 32, dtype=dtype), 32)
    x = torch.eye(32, dtype=dtype, requires_grad=True)
    found = rotated(x, 32)
    assert found.dtype == dtype
    found.sum().backward()  # needs the matrix for the backward
    torch.testing.assert_close(found.detach(), hadamard(32).to(dtype))


def test_fake_tensors_leave_nothing_behind() -> None:
    with FakeTensorMode():
        assert rotated(torch.empty(3, 16), 16).shape == (3, 16)
    assert type(rotated(torch.randn(3, 16), 16)) is Tensor
