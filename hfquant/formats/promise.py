"""What a number format promises: its error on values that it was made for."""

from __future__ import annotations

from functools import cache

import torch

from hfquant.formats.base import NumberFormat


@cache
def bell_error(form: NumberFormat) -> float:
    """Return the relative error, in L2, of values on a bell curve cut at 3.5 standard deviations, one scale for all."""
    bell = torch.special.ndtri(torch.linspace(0, 1, 4099)[1:-1])
    scale = form.scale_from_amax(bell.abs().max()) if form.has_scale else None
    return float((form.round(bell, scale) - bell).norm() / bell.norm())
