"""NumberFormat: what a format has to say of itself. One file and one line in :data:`hfquant.formats.FORMATS` add one.

Codes are integers in memory (for floats the bits of the float as an integer of equal width), so that a cast of the
model never touches them. Arithmetic is float32 whatever the input's dtype, rounding is half to even.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

#: Scales below the smallest normal float32 would make ``x / scale`` overflow or flush to zero.
MIN_SCALE = 2.0**-126
#: Magnitudes above this are clipped (by a millionth at most), or ``qmax * scale`` could round up to Inf.
_MAX_AMAX = torch.finfo(torch.float32).max * (1 - 2.0**-20)


@dataclass(frozen=True)
class NumberFormat(ABC):
    """A number format for weights and activations.

    ``dequantize(quantize(x)) = (code - zero_point) * scale``.

    Attributes:
        name: as configs spell it.
        bits: that one code takes on disk.
        code_dtype: integer dtype of unpacked codes.
        is_integer: whether codes are integers, and so may have zero points.
        has_scale: whether codes carry a scale; a plain cast has none.
    """

    name: str
    bits: int
    code_dtype: torch.dtype
    is_integer: ClassVar[bool] = False
    has_scale: ClassVar[bool] = True

    @property
    @abstractmethod
    def qmax(self) -> float:
        """Largest magnitude that a code stands for before the scale."""

    @property
    def disk_dtype(self) -> torch.dtype:
        """Dtype of codes in a checkpoint, as wide as in memory."""
        return self.code_dtype

    @property
    def max_dual_exponent(self) -> int:
        """Largest e of a negative side's scale ``s+ / 2^e``; 0 where a second scale does not fit or does not help."""
        return 0

    @property
    def no_dual_scale(self) -> str:
        """Why :attr:`max_dual_exponent` is 0, for people."""
        return f"16-bit codes leave no room for a second scale beside {self.name}"

    def scale_from_amax(self, amax: Tensor) -> Tensor:
        """Return the symmetric scale ``amax / qmax`` (float32); 1 where amax is 0, at least 2^-126. NaN, Inf stay."""
        amax = amax.float()
        scale = (amax.clamp(max=_MAX_AMAX) / self.qmax).clamp(min=MIN_SCALE)
        scale = torch.where(amax == 0, torch.ones_like(scale), scale)
        return torch.where(amax == torch.inf, amax, scale)

    def scale_from_range(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the asymmetric scale (float32) of ranges; integer formats only."""
        raise TypeError(f"{self.name} has no zero point")

    def zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        """Return the zero point (``code_dtype``) with which codes reach ``low``; integer formats only."""
        raise TypeError(f"{self.name} has no zero point")

    def centered(self, center: Tensor, scale: Tensor) -> Tensor:
        """Return the zero point (float) with which codes reach as far below ``center`` as above; integers only."""
        raise TypeError(f"{self.name} has no zero point")

    @abstractmethod
    def quantize(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
        """Return codes of ``x``, saturated.

        Args:
            x: values, any float dtype.
            scale: float32, broadcastable to ``x``; None for a format without one.
            zero_point: integer, broadcastable; None where symmetric.

        Returns:
            ``code_dtype``, of ``x``'s shape.
        """

    @abstractmethod
    def values(self, codes: Tensor, zero_point: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return what codes stand for before the scale: integers less the zero point, or the float of these bits."""

    @abstractmethod
    def snap(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Return the nearest values that codes stand for, of ``x`` float32 in units of the scale."""

    def spacing(self, x: Tensor) -> Tensor:
        """Return how far apart the two values are between which ``x`` lies, all float32 in units of the scale.

        Both are multiples of it.
        """
        return torch.ones_like(x)

    @abstractmethod
    def round(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
        """Return ``dequantize(quantize(x))`` in float32 without the detour over codes; arguments as there."""

    def dequantize(self, codes: Tensor, scale: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
        """Return ``(code - zero_point) * scale`` in float32."""
        values = self.values(codes, zero_point)
        return values if scale is None else values * scale

    def packed_width(self, columns: int) -> int:
        """Return how many elements of ``pack``'s result a row of ``columns`` codes takes."""
        return columns

    def pack(self, codes: Tensor) -> Tensor:
        """Return codes [..., K] as they are kept in memory: [..., packed_width(K)]."""
        return codes

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Return the inverse of :meth:`pack`: codes [..., columns]."""
        return packed
