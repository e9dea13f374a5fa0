"""NumberFormat, the interface of a format. To add one, add one file and one line in :data:`hfquant.formats.FORMATS`.

Codes are integers in memory (a float format's bits are stored as an integer of the same width), so casting the model
never changes them. Arithmetic is float32 for any input dtype, with round-half-to-even.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

#: Scales below the smallest normal float32 would make ``x / scale`` overflow or flush to zero.
MIN_SCALE = 2.0**-126
#: Larger magnitudes are clipped (by at most a millionth); otherwise ``qmax * scale`` could round up to Inf.
_MAX_AMAX = torch.finfo(torch.float32).max * (1 - 2.0**-20)


@dataclass(frozen=True)
class NumberFormat(ABC):
    """A number format for weights and activations.

    ``dequantize(quantize(x)) = (code - zero_point) * scale``.

    Attributes:
        name: name in configs.
        bits: bits per code on disk.
        code_dtype: integer dtype of unpacked codes.
        is_integer: whether codes are integers and can therefore have zero points.
        has_scale: whether codes have a scale; a plain cast has none.
    """

    name: str
    bits: int
    code_dtype: torch.dtype
    is_integer: ClassVar[bool] = False
    has_scale: ClassVar[bool] = True

    @property
    @abstractmethod
    def qmax(self) -> float:
        """Largest magnitude of a code before scaling."""

    @property
    def disk_dtype(self) -> torch.dtype:
        """Dtype of codes in a checkpoint; it has the same width as in memory."""
        return self.code_dtype

    @property
    def max_dual_exponent(self) -> int:
        """Largest exponent e of the negative side's scale ``s+ / 2^e``; 0 if a second scale does not fit or help."""
        return 0

    @property
    def no_dual_scale(self) -> str:
        """Human-readable reason why :attr:`max_dual_exponent` is 0."""
        return f"16-bit codes leave no room for a second scale beside {self.name}"

    def scale_from_amax(self, amax: Tensor) -> Tensor:
        """Return the symmetric scale ``amax / qmax`` (float32), >= 2^-126; 1 if amax is 0. NaN and Inf propagate."""
        amax = amax.float()
        scale = (amax.clamp(max=_MAX_AMAX) / self.qmax).clamp(min=MIN_SCALE)
        scale = torch.where(amax == 0, torch.ones_like(scale), scale)
        return torch.where(amax == torch.inf, amax, scale)

    def scale_from_range(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the asymmetric scale (float32) for the given ranges; integer formats only."""
        raise TypeError(f"{self.name} has no zero point")

    def zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        """Return the zero point (``code_dtype``) at which the codes extend down to ``low``; integer formats only."""
        raise TypeError(f"{self.name} has no zero point")

    def centered(self, center: Tensor, scale: Tensor) -> Tensor:
        """Return the zero point (float) at which the codes are centered on ``center``; integer formats only."""
        raise TypeError(f"{self.name} has no zero point")

    @abstractmethod
    def quantize(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
        """Return the saturated codes of ``x``.

        Args:
            x: values, any float dtype.
            scale: float32, broadcastable to ``x``; None for a format without a scale.
            zero_point: integer, broadcastable; None if symmetric.

        Returns:
            Codes of dtype ``code_dtype``, in the shape of ``x``.
        """

    @abstractmethod
    def values(self, codes: Tensor, zero_point: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the unscaled values of codes: integers minus the zero point, or the floats with these bits."""

    @abstractmethod
    def snap(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Return the nearest representable values of ``x``, float32 in units of the scale."""

    def spacing(self, x: Tensor) -> Tensor:
        """Return the distance between the two representable values around ``x``, float32 in units of the scale.

        Both values are multiples of it.
        """
        return torch.ones_like(x)

    @abstractmethod
    def round(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
        """Return ``dequantize(quantize(x))`` in float32 without computing codes; same arguments as :meth:`quantize`."""

    def dequantize(self, codes: Tensor, scale: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
        """Return ``(code - zero_point) * scale`` in float32."""
        values = self.values(codes, zero_point)
        return values if scale is None else values * scale

    def packed_width(self, columns: int) -> int:
        """Return the number of elements that ``pack`` produces for a row of ``columns`` codes."""
        return columns

    def pack(self, codes: Tensor) -> Tensor:
        """Return codes [..., K] in their in-memory form, [..., packed_width(K)]."""
        return codes

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Return codes [..., columns] from packed ones, the inverse of :meth:`pack`."""
        return packed
