"""Quantization algorithms on tensors. A transform or a rounding is one file and one line of a table here."""

from __future__ import annotations

from hfquant.algorithms.base import (
    Identity,
    Problem,
    Rounding,
    Strength,
    TensorSpec,
    Transform,
    Transformed,
    block_slices,
)
from hfquant.algorithms.gptq import Gptq
from hfquant.algorithms.hadamard import Hadamard, SmoothHadamard
from hfquant.algorithms.low_rank import LowRank
from hfquant.algorithms.nearest import Nearest
from hfquant.algorithms.smooth import Smooth, segment_ranges

__all__ = [
    "ROUNDINGS",
    "TRANSFORMS",
    "Identity",
    "Nearest",
    "Problem",
    "Rounding",
    "Smooth",
    "Strength",
    "TensorSpec",
    "Transform",
    "Transformed",
    "block_slices",
    "segment_ranges",
]


#: ``opt.type`` of a config.
TRANSFORMS: dict[str, type[Transform]] = {
    "default": Identity,
    "smooth": Smooth,
    "svd": LowRank,
    "hadamard": Hadamard,
    "smooth_hadamard": SmoothHadamard,
}
#: ``calib.type`` of a config.
ROUNDINGS: dict[str, type[Rounding]] = {"amax": Nearest, "gptq": Gptq}
