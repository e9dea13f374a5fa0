"""Round-to-nearest: the oracle's codes; the inputs' mean squares only weight the error of the clipping search."""

import numpy as np
import pytest
import torch

from hfquant.algorithms import Nearest
from hfquant.formats import FORMATS, GridRule
from hfquant.statistics import LayerStats
from tests import oracle


@pytest.mark.parametrize("form", FORMATS)
def test_codes_are_the_oracle_s(form) -> None:
    weight = torch.randn(3, 144)
    codes, grid = Nearest().solve(weight, GridRule(FORMATS[form], (64, 64, 16)), None, "layer")
    back = grid.dequantize(codes).numpy()
    for columns in (slice(0, 64), slice(64, 128), slice(128, 144)):
        for row in range(3):
            part = weight[row, columns].numpy()
            scale = oracle.scale_of(np.abs(part).max(), form) if FORMATS[form].has_scale else None
            expected = oracle.codes_of(part, scale, form) * np.float64(1 if scale is None else scale)
            np.testing.assert_array_equal(back[row, columns], expected.astype(np.float32))


@pytest.mark.parametrize("clip", ["amax", "mse"])
def test_statistics_only_weigh(clip) -> None:
    weight, x = torch.randn(8, 64), torch.randn(100, 64) * torch.logspace(-2, 2, 64)
    rule = GridRule(FORMATS["int4"], (64,), clip=clip)
    stats = LayerStats.of(x, torch.rand(100).double())
    codes, grid = Nearest().solve(weight, rule, stats, "layer")
    importance = x.square().mean(0)
    assert torch.allclose(grid.scale, rule.fit(weight, importance).scale)
    assert torch.equal(codes, grid.quantize(weight))
    unweighted = Nearest().solve(weight, rule, None, "layer")[1]
    assert torch.equal(grid.scale, unweighted.scale) == (clip == "amax")
