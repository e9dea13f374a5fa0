"""Shared by the tests of the number formats: the formats by kind, every code, and values that break things."""

import numpy as np
import torch
from hypothesis import strategies as st

from hfquant.formats import FORMATS, NumberFormat
from tests import oracle

ALL = list(FORMATS.values())
SCALED = [f for f in ALL if f.has_scale]
INTEGERS = [f for f in ALL if f.is_integer]
FLOATS = [f for f in ALL if not f.is_integer]
CASTS = [f for f in ALL if not f.has_scale]
MAX = torch.finfo(torch.float32).max
SCALES = [2.0**-126, 1e-30, 2.0**-20, 1 / 3, 1.0, 7.77, 1e30]

values = st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**126, min_value=-(2.0**126))


def name(form: NumberFormat) -> str:
    return form.name


def all_codes(form: NumberFormat) -> torch.Tensor:
    """Return every code that quantize can produce, unpacked, as stored."""
    if form.is_integer:
        limit = int(form.qmax)
        return torch.arange(-limit, limit + 1).to(form.code_dtype)
    bits = np.flatnonzero(np.isfinite(oracle.decode(form.name)))
    return torch.from_numpy(bits.astype(f"uint{form.bits}")).view(form.code_dtype)


def code_values(codes: torch.Tensor, form: NumberFormat) -> np.ndarray:
    """Return the values of stored codes, according to the oracle."""
    array = codes.numpy()
    return array.astype(np.float64) if form.is_integer else oracle.decode(form.name)[array.view(f"u{array.itemsize}")]


def adversarial() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.cat(
        [
            torch.randn(512, generator=generator),
            torch.randn(64, generator=generator) * 1e-3,
            torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, -3e-39, 2.0**-126, 1e-20, 1e30, -1e30, MAX, -MAX]),
            torch.arange(-200, 200) / 2 + 0.0,
        ]
    )
