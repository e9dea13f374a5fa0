"""The error to expect from a number format on the kind of values it is designed for."""

from __future__ import annotations

from functools import cache

import torch

from hfquant.formats.base import NumberFormat


@cache
def bell_error(form: NumberFormat) -> float:
    """Return the relative L2 error on a normal distribution cut at 3.5 standard deviations, with a single scale."""
    bell = torch.special.ndtri(torch.linspace(0, 1, 4099)[1:-1])
    scale = form.scale_from_amax(bell.abs().max()) if form.has_scale else None
    return float((form.round(bell, scale) - bell).norm() / bell.norm())
