"""Quantization of activations, per tensor or per token, separately for each segment, with single or dual scales.

DualScale (SegQuant, arXiv 2507.14811): after SiLU, GELU and similar functions the negative side is small, so it gets a
finer scale ``s- = s+ / 2^e``. With an integer e, both sides fit in one integer code, ``x ~ s- * ((Q+ << e) + Q-)``, and
a single product suffices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfquant.formats.base import MIN_SCALE, NumberFormat
from hfquant.formats.columns import expand_columns, range_columns


@dataclass(frozen=True)
class InputRule:
    """How a linear's input is quantized.

    Attributes:
        format: number format of the codes.
        dynamic: compute scales from the data at run time instead of by calibration.
        per_token: use one scale per token (dynamic only) instead of one per tensor.
        segments: sizes of the column segments with their own scale.
        dual: for each segment, whether the negative side has its own scale.
    """

    format: NumberFormat
    dynamic: bool
    per_token: bool
    segments: tuple[int, ...]
    dual: tuple[bool, ...]

    @property
    def static(self) -> bool:
        """Whether activations have a calibrated scale."""
        return self.format.has_scale and not self.dynamic

    def scales(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales of the positive and negative sides for the range of each segment.

        Args:
            low, high: smallest and largest value, [..., segments].

        Returns:
            Two [..., segments] float32, equal if a segment is not dual or e = 0.
        """
        scale = self.format.scale_from_amax(torch.maximum(-low, high))
        if not any(self.dual):
            return scale, scale
        flags = torch.tensor(list(self.dual), device=low.device)
        exponent = torch.where(flags, dual_exponent(low, high, self.format), torch.zeros_like(scale))
        negative = scale / torch.exp2(exponent)
        return scale, torch.where(negative < MIN_SCALE, scale, negative)

    def quantize(
        self, x: Tensor, scale: Tensor | None = None, scale_neg: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Quantize activations.

        Args:
            x: [..., in] float32.
            scale, scale_neg: [segments] float32, static only (``scale_neg`` only with dual).

        Returns:
            values [..., in] float32, the codes as numbers (integers of at most 16 bits, or floats of the format), and
            their scale [..., segments] or [segments] (None for a format without one): ``x ~ values * scale``.
        """
        if not self.format.has_scale:
            return self.format.round(x, None), None
        if self.dynamic:
            low, high = range_columns(x, self.segments) if x.numel() else (x.new_zeros(len(self.segments)),) * 2
            if not self.per_token:
                low, high = (v.reshape(-1, len(self.segments)) for v in (low, high))
                low, high = low.amin(0), high.amax(0)
            scale, scale_neg = self.scales(low, high)
        assert scale is not None
        positive = expand_columns(scale, self.segments)
        if scale_neg is None or not any(self.dual):
            return self._spoiled(self.format.snap(x / positive), x), scale
        negative = expand_columns(scale_neg, self.segments)
        fine = self._spoiled(self.format.snap(x / torch.where(x < 0, negative, positive)), x)
        return torch.where(x < 0, fine, fine * (positive / negative)), scale_neg

    def _spoiled(self, values: Tensor, x: Tensor) -> Tensor:
        """Return ``values`` with NaN where ``x`` is infinite or NaN; a static scale would saturate it to a number."""
        return values if self.dynamic else values.add_(x * 0)


def dual_exponent(low: Tensor, high: Tensor, number_format: NumberFormat) -> Tensor:
    """Return ``e = floor(log2(s+ / s-))``, clamped to what the format has room for; 0 means a single scale.

    Args:
        low, high: smallest and largest value, of any common shape.
        number_format: format of the activations.

    Returns:
        float32 of the same shape. ``s+ / 2^e`` is never below ``-low / qmax``.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    most = number_format.max_dual_exponent
    # log2 and the quotient round; frexp does not: floor(log2(a / b)) for a = m 2^i, b = n 2^j, m and n in [0.5, 1).
    (m, i), (n, j) = torch.frexp(high), torch.frexp(-low)
    exponent = (i - j - (m < n).int()).float()
    exponent = torch.where(low == 0, torch.full_like(exponent, most), exponent)
    return torch.where(high == 0, torch.zeros_like(exponent), exponent).clamp(0, most)


def segment_of(columns: Sequence[int], segments: Sequence[int]) -> list[int]:
    """Return the index of the input segment that contains each column block."""
    found, end, segment = [], segments[0], 0
    start = 0
    for size in columns:
        while start >= end:
            segment += 1
            end += segments[segment]
        found.append(segment)
        start += size
    return found
