"""b-bit integers: qmax = 2^(b-1) - 1; symmetric codes in [-qmax, qmax], asymmetric ones in [-2^(b-1), 2^(b-1) - 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hfquant.formats import packing
from hfquant.formats.base import MIN_SCALE, NumberFormat


@dataclass(frozen=True)
class IntegerFormat(NumberFormat):
    """Integers of 2 to 16 bits; codes below 8 bits are packed, low bits first.

    Zero points are stored signed, minus 2^(b-1), like the codes.
    """

    is_integer: ClassVar[bool] = True

    @property
    def qmax(self) -> float:
        """Return 2^(b-1) - 1."""
        return float(2 ** (self.bits - 1) - 1)

    @property
    def max_dual_exponent(self) -> int:
        """Bits left for the shift, since the codes of both sides share one 16-bit integer, (Q+ << e) + Q-."""
        return 16 - self.bits

    def scale_from_range(self, low: Tensor, high: Tensor) -> Tensor:
        """Return ``(max - min) / (2^b - 1)``, or 1 for an all-zero range; the range is widened to include 0."""
        low, high = self._widened(low, high)
        # Halved before subtracting, since max - min of float32 extremes overflows.
        scale = ((high / 2 - low / 2) / ((2.0**self.bits - 1) / 2)).clamp(min=MIN_SCALE)
        return torch.where((low == 0) & (high == 0), torch.ones_like(scale), scale)

    def zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        """Return ``round(-min / scale)`` clamped to the code range, minus 2^(b-1)."""
        low, _ = self._widened(low, low)
        return (torch.round(-low / scale).clamp(0, 2.0**self.bits - 1) - 2.0 ** (self.bits - 1)).to(self.code_dtype)

    def _widened(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        # Rounding the zero point shifts the range by up to half a step, which must not overflow float32.
        limit = torch.finfo(torch.float32).max * (1 - 2.0 ** (1 - self.bits))
        return low.float().clamp(-limit, 0), high.float().clamp(0, limit)

    def centered(self, center: Tensor, scale: Tensor) -> Tensor:
        """Return the zero point at which the code range is centered on ``center``, as closely as possible."""
        half = 2.0 ** (self.bits - 1)
        return torch.round(-0.5 - center / scale).clamp(-half, half - 1)

    def quantize(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
        """Return ``clamp(round(x / scale) + zero_point)``."""
        assert scale is not None
        steps = self.snap(x.float() / scale, zero_point)
        return (steps if zero_point is None else steps.add_(zero_point)).to(self.code_dtype)

    def snap(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Return the nearest integers in [-qmax, qmax], or in [-2^(b-1), 2^(b-1) - 1] minus the zero point."""
        if zero_point is None:
            return x.round().clamp_(-self.qmax, self.qmax)
        half = 2 ** (self.bits - 1)
        return x.round().add_(zero_point).clamp_(-half, half - 1).sub_(zero_point)

    def values(self, codes: Tensor, zero_point: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return codes minus their zero point."""
        values = codes.to(dtype)
        return values if zero_point is None else values - zero_point

    def round(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
        """Return the nearest values on the grid, float32."""
        assert scale is not None
        return self.snap(x.float() / scale, zero_point).mul_(scale)

    def packed_width(self, columns: int) -> int:
        """Return the number of bytes per row, or ``columns`` if codes fill whole bytes."""
        return packing.packed_width(columns, self.bits) if self.bits < 8 else columns

    def pack(self, codes: Tensor) -> Tensor:
        """Return int8 bytes [..., ceil(K b / 8)], or the codes unchanged if they fill whole bytes."""
        return packing.pack(codes, self.bits) if self.bits < 8 else codes

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Return unpacked codes [..., columns]."""
        return packing.unpack(packed, self.bits, columns) if self.bits < 8 else packed
