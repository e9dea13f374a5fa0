"""Quantization algorithms on tensors. To add a transform or a rounding, add one file and one table entry here."""

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


#: Transforms by their name in a config (``opt.type``).
TRANSFORMS: dict[str, type[Transform]] = {
    "default": Identity,
    "smooth": Smooth,
    "svd": LowRank,
    "hadamard": Hadamard,
    "smooth_hadamard": SmoothHadamard,
}
#: Roundings by their name in a config (``calib.type``).
ROUNDINGS: dict[str, type[Rounding]] = {"amax": Nearest, "gptq": Gptq}
