"""Splitting samples into those to measure on and those to judge by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hfquant.calibration.batches import CalibrationError


def apart(samples: Sequence[Any], most: int | None = None) -> tuple[list[Any], list[Any]]:
    """Return the samples to measure on and every fourth to judge by; a single batch is split internally.

    Taking every fourth respects an order with meaning: a denoiser's samples come timestep by timestep.

    Args:
        samples: all samples.
        most: largest number to judge by; if a fourth is more, they are spread evenly over all samples.

    Raises:
        CalibrationError: there is only one sample, and it is not a batch of several.
    """
    if len(samples) > 1:
        step = min(4 if most is None else max(4, -(-len(samples) // most)), len(samples))
        return [s for i, s in enumerate(samples, 1) if i % step], list(samples[step - 1 :: step])
    # Most tensors have one element per sample; positions and other ids may be shared by all.
    sizes = Counter(len(t) for t in _tensors(samples[0]) if len(t) > 1) if samples else Counter[int]()
    count = max(sizes, key=lambda size: (sizes[size], size), default=0)
    if not count:
        raise CalibrationError("at least two samples are needed: some to measure or train on, some held out")
    cut = count - max(1, count // 4)
    return [_part(samples[0], count, slice(cut))], [_part(samples[0], count, slice(cut, None))]


def _tensors(sample: Any) -> list[Tensor]:
    values = sample.values() if isinstance(sample, Mapping) else sample if isinstance(sample, tuple) else [sample]
    return [value for value in values if isinstance(value, Tensor) and value.dim()]


def _part(sample: Any, count: int, rows: slice) -> Any:
    """Return some elements of a batch of ``count``; anything without one element per sample stays whole."""
    if isinstance(sample, Mapping):
        return {key: _part(value, count, rows) for key, value in sample.items()}
    if isinstance(sample, tuple):
        return tuple(_part(value, count, rows) for value in sample)
    return sample[rows] if isinstance(sample, Tensor) and sample.dim() and len(sample) == count else sample
