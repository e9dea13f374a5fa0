"""Configs that several tests share and no preset stands for."""

from __future__ import annotations

from typing import Any

#: SVDQuant's own format (arXiv 2411.05007): INT4 weights in groups of 64, INT4 inputs with one scale per token and 64
#: channels, a low-rank branch.
SVDQUANT: dict[str, Any] = {
    "default": {
        "real_quant": True,
        "opt": {"type": "svd", "low_rank": 32, "alpha": 0.5},
        "calib": {"type": "amax"},
        "weight_quant": {"type": "int4", "group_size": 64},
        "input_quant": {"type": "int4", "axis": -1, "dynamic": True, "segments": 256},
    }
}
