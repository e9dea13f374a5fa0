"""Float formats: FP8 with a scale, as in the OCP specification; FP16 and BF16 as plain casts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hfquant.formats.base import NumberFormat


@dataclass(frozen=True)
class FloatFormat(NumberFormat):
    """A float format with a torch dtype. Codes are its bits; values that a cast would overflow saturate.

    FP8 codes are uint8 on disk so that they are never mistaken for INT8.
    """

    dtype: torch.dtype

    @property
    def qmax(self) -> float:
        """Largest finite value."""
        return torch.finfo(self.dtype).max

    @property
    def disk_dtype(self) -> torch.dtype:
        """Unsigned bytes for FP8, which could otherwise be mistaken for INT8."""
        return torch.uint8 if self.code_dtype == torch.int8 else self.code_dtype

    @property
    def no_dual_scale(self) -> str:
        """Floats need no second scale."""
        return f"{self.name} is as precise for small values as for large ones"

    def _cast(self, x: Tensor, scale: Tensor | None) -> Tensor:
        assert scale is not None
        return (x.float() / scale).clamp_(-self.qmax, self.qmax).to(self.dtype)

    def quantize(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
        """Return the bits of ``clamp(x / scale)``."""
        return self._cast(x, scale).view(self.code_dtype)

    def values(self, codes: Tensor, zero_point: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the floats encoded by the bits."""
        return codes.view(self.dtype).to(dtype)

    def snap(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Return the nearest values of the format."""
        return x.clamp(-self.qmax, self.qmax).to(self.dtype).float()

    def spacing(self, x: Tensor) -> Tensor:
        """Return one unit in the last place (ULP), a power of two."""
        limits = torch.finfo(self.dtype)
        binade = torch.frexp(x.abs().clamp(limits.smallest_normal, limits.max)).exponent - 1
        return torch.ldexp(torch.full_like(x, limits.eps), binade)

    def round(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
        """Return the nearest values on the grid, float32."""
        values = self._cast(x, scale).float()
        return values if scale is None else values.mul_(scale)


@dataclass(frozen=True)
class CastFormat(FloatFormat):
    """FP16 and BF16: a plain cast without a scale."""

    has_scale: ClassVar[bool] = False

    def _cast(self, x: Tensor, scale: Tensor | None) -> Tensor:
        return x.float().clamp(-self.qmax, self.qmax).to(self.dtype)
