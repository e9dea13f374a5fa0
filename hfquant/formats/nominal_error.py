"""The error to expect from a number format on the kind of values it is designed for."""

from __future__ import annotations

from functools import cache

import torch

from hfquant.formats.base import NumberFormat


@cache
def nominal_error(form: NumberFormat) -> float:
    """Return the relative L2 error on a normal distribution cut at 3.5 standard deviations, with a single scale."""
    values = torch.special.ndtri(torch.linspace(0, 1, 4099)[1:-1])
    scale = form.scale_from_amax(values.abs().max()) if form.has_scale else None
    return float((form.round(values, scale) - values).norm() / values.norm())
