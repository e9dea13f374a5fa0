"""The report's one-line description of a layer."""

from __future__ import annotations

import pytest

from hfquant.report.layers import LayerReport


@pytest.mark.parametrize(
    ("alphas", "expected"),
    [((0.5,), "alpha 0.5,"), ((None, 0.45), "alpha none/0.45,"), ((0.1,) * 5, "alpha 0.1/0.1/0.1/0.1/...,")],
)
def test_strengths_of_smoothing(alphas: tuple[float | None, ...], expected: str) -> None:
    line = str(LayerReport("layer", "QuantLinear()", alphas, 0, None, None, 0.25, False))
    assert expected in line
