"""Round to nearest."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from hfquant.algorithms.base import Rounding
from hfquant.formats import Grid, GridRule
from hfquant.statistics import LayerStats


class Nearest(Rounding):
    """Round to nearest on the grid that spans the largest weight, or on the least-error grid with ``clip``."""

    type: Literal["amax"] = "amax"

    def solve(self, weight: Tensor, rule: GridRule, stats: LayerStats | None, name: str) -> tuple[Tensor, Grid]:
        """Return codes [rows, in] and their grid; clipping weights errors by the mean square of the inputs."""
        grid = rule.fit(weight, None if stats is None else stats.mean_square)
        return grid.quantize(weight), grid
