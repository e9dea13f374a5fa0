"""Round to nearest."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from hfquant.algorithms.base import Rounding
from hfquant.formats import Grid, GridRule
from hfquant.statistics import LayerStats


class Nearest(Rounding):
    """Round to nearest on the grid that reaches the largest weight (or, with ``clip``, errs the least)."""

    type: Literal["amax"] = "amax"

    def solve(self, weight: Tensor, rule: GridRule, stats: LayerStats | None, name: str) -> tuple[Tensor, Grid]:
        """Return codes [rows, in] and their grid; the mean square of the inputs weighs errors under clipping."""
        grid = rule.fit(weight, None if stats is None else stats.mean_square)
        return grid.quantize(weight), grid
