"""The expected error of a format, against integrals over a normal distribution."""

import math

import numpy as np
import pytest

from hfquant.formats import FORMATS
from hfquant.formats.nominal_error import nominal_error


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_integers(bits: int) -> None:
    """Round the quantiles of the normal distribution in float64; the largest one lies at the end of the grid."""
    from statistics import NormalDist

    bell = np.array([NormalDist().inv_cdf(i / 4098) for i in range(1, 4098)])
    scale = bell.max() / (2 ** (bits - 1) - 1)
    expected = np.linalg.norm(np.rint(bell / scale) * scale - bell) / np.linalg.norm(bell)
    assert nominal_error(FORMATS[f"int{bits}"]) == pytest.approx(expected, rel=1e-3)


def test_eight_bits_are_a_uniform_error_of_a_step() -> None:
    assert nominal_error(FORMATS["int8"]) == pytest.approx(3.49 / 127 / math.sqrt(12), rel=0.05)


@pytest.mark.parametrize(("name", "mantissa"), [("fp8e4m3", 3), ("fp8e5m2", 2), ("bf16", 7), ("fp16", 10)])
def test_floats_err_by_a_share_of_the_value(name: str, mantissa: int) -> None:
    """A value's error is at most half a unit in its last place, and about 0.4 of that on average."""
    assert 0.25 < nominal_error(FORMATS[name]) / 2.0 ** -(mantissa + 1) < 0.55
