"""Rotate the inputs in blocks, which spreads each outlier over its block (QuaRot, arXiv 2404.00456).

``X W^T = (X R)(W R)^T`` for an orthogonal R. All entries of a Hadamard matrix have the same magnitude: a large value in
one channel becomes small values in many, and the values of a block approach a normal distribution, which low-bit
formats represent best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from torch import Tensor

from hfquant.algorithms.base import Identity, Problem, Strength, Transform, Transformed
from hfquant.algorithms.smooth import Smooth
from hfquant.formats.rotation import MOST_ROTATED, rotated


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"expected a power of two, got {value}")
    return value


_BlockSize = Annotated[
    int,
    Field(ge=2, le=MOST_ROTATED, description="Input channels that are rotated together, a power of two."),
    AfterValidator(_power_of_two),
]


class Hadamard(Transform):
    """Rotate blocks of input channels at run time and the weight's columns ahead of time.

    Leftover channels at the end are rotated in blocks of smaller powers of two.
    """

    type: Literal["hadamard"] = "hadamard"
    block_size: _BlockSize = 64

    @property
    def rotation(self) -> int:
        """Size of the rotated blocks."""
        return self.block_size

    def solve(self, weight: Tensor, problem: Problem) -> Transformed:
        """Return ``W R``."""
        return Transformed(rotated(weight, self.block_size))

    def restored(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return the weight rotated back."""
        return rotated(weight, self.block_size)

    def reapplied(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return ``W R``."""
        return rotated(weight, self.block_size)

    def without_data(self) -> Transform:
        """Return the transform itself, since it needs no data."""
        return self

    def unmixed(self) -> Transform:
        """Return a transform that does nothing."""
        return Identity()

    def describe(self) -> str:
        """Return the block size as text."""
        return f"hadamard={self.block_size}"


class SmoothHadamard(Smooth):
    """Smooth, then rotate: ``X W^T = (X / s R)(W s R)^T``."""

    type: Literal["smooth_hadamard"] = "smooth_hadamard"  # type: ignore[assignment]
    block_size: _BlockSize = 64

    @property
    def rotation(self) -> int:
        """Size of the rotated blocks."""
        return self.block_size

    def applied(
        self, weight: Tensor, divisor: Tensor, problem: Problem, alphas: tuple[Strength, ...] = ()
    ) -> Transformed:
        """Return ``W s R`` for a given divisor s [in]."""
        return Transformed(rotated(weight * divisor, self.block_size), {"smooth": divisor}, divisor, alphas)

    def restored(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return the weight rotated back and divided by s."""
        return super().restored(rotated(weight, self.block_size), tensors, rows)

    def reapplied(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return ``W s R``."""
        return rotated(super().reapplied(weight, tensors, rows), self.block_size)

    def folded(self) -> Transform:
        """Return only the rotation."""
        return Hadamard(block_size=self.block_size)

    def without_data(self) -> Transform:
        """Return only the rotation."""
        return self.folded()

    def unmixed(self) -> Transform:
        """Return only the smoothing."""
        fields = {name: getattr(self, name) for name in self.model_fields_set & Smooth.model_fields.keys() - {"type"}}
        return Smooth(**fields)

    def describe(self) -> str:
        """Return the block size as text."""
        return f"hadamard={self.block_size}"
