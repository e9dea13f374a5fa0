"""Two-level group scales: one byte per group times one float32 per row.

The byte is an unsigned float with 3 exponent and 5 mantissa bits, ``2^(e - 7) (1 + m / 32)``. On SmolLM2's weights in
INT4 with groups of 64, it adds 0.03 to 0.14 % squared error over float32 scales, even in rows where one group is a
hundred times as large as the others. FP8 E4M3 bytes add 6 to 10 %; uniform steps (k / 255 of the row's largest scale)
add nothing in even rows, but 1.5 to 4 % in rows with such a group. Decoding is a shift and an add on the bits of the
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfquant.formats.base import MIN_SCALE

_MANTISSA = 5
_SHIFT = 23 - _MANTISSA
_OFFSET = (127 - 7) << 23
#: Value of the largest byte.
LARGEST = 2.0 - 2.0**-_MANTISSA


def values(codes: Tensor) -> Tensor:
    """Return the values of bytes of any shape, float32 in [2^-7, 2)."""
    return ((codes.to(torch.int32) << _SHIFT) + _OFFSET).view(torch.float32)


def row_scale(scale: Tensor, used: Tensor) -> Tensor:
    """Return the float32 scale of each row, [out, 1], at which the scale of its largest group is representable.

    Args:
        scale: [out, G] float32, positive.
        used: [out, G] bool, the groups with any nonzero weight.
    """
    largest = torch.where(used, scale, torch.zeros_like(scale)).amax(-1, keepdim=True)
    largest = torch.where(largest == 0, torch.ones_like(largest), largest)
    return (largest / LARGEST).clamp(min=MIN_SCALE)


def encode(scale: Tensor, row: Tensor, up: bool = False) -> Tensor:
    """Return the bytes of the nearest scales, or of the nearest that are not smaller, saturated.

    Args:
        scale: [out, G] float32, positive.
        row: [out, 1] float32, from :func:`row_scale`.
        up: never round down, for formats of so many codes that 1/64 of the largest is more than rounding costs.

    Returns:
        [out, G] uint8. ``values(bytes) * row`` is within 1/64 of ``scale``, or up to 1/32 above it, down to about 1/256
        of the row's largest.
    """
    bits = (scale / row).view(torch.int32) - _OFFSET
    return ((bits + ((1 << _SHIFT) - 1 if up else 1 << (_SHIFT - 1))) >> _SHIFT).clamp(0, 255).to(torch.uint8)
