"""Rotate the inputs in blocks, so that an outlier is spread over its block (QuaRot, arXiv 2404.00456).

``X W^T = (X R)(W R)^T`` for an orthogonal R. The entries of a Hadamard matrix have one magnitude: what is large in one
channel becomes small in many, and the numbers of a block come close to a bell curve, which few levels serve best.
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
    """Rotate blocks of input channels at run time, and of the weight's columns beforehand.

    Channels that are left over at the end are rotated in blocks of smaller powers of two.
    """

    type: Literal["hadamard"] = "hadamard"
    block_size: _BlockSize = 64

    @property
    def rotation(self) -> int:
        """The size of the blocks."""
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
        """Return the same."""
        return self

    def unmixed(self) -> Transform:
        """Return a transform that does nothing."""
        return Identity()

    def describe(self) -> str:
        """Return the size of the blocks."""
        return f"hadamard={self.block_size}"


class SmoothHadamard(Smooth):
    """Smooth, then rotate: ``X W^T = (X / s R)(W s R)^T``."""

    type: Literal["smooth_hadamard"] = "smooth_hadamard"  # type: ignore[assignment]
    block_size: _BlockSize = 64

    @property
    def rotation(self) -> int:
        """The size of the blocks."""
        return self.block_size

    def applied(
        self, weight: Tensor, divisor: Tensor, problem: Problem, alphas: tuple[Strength, ...] = ()
    ) -> Transformed:
        """Return ``W s R`` for a given divisor s [in]."""
        return Transformed(rotated(weight * divisor, self.block_size), {"smooth": divisor}, divisor, alphas)

    def restored(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return the weight rotated back, divided by s."""
        return super().restored(rotated(weight, self.block_size), tensors, rows)

    def reapplied(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return ``W s R``."""
        return rotated(super().reapplied(weight, tensors, rows), self.block_size)

    def folded(self) -> Transform:
        """Return the rotation alone."""
        return Hadamard(block_size=self.block_size)

    def without_data(self) -> Transform:
        """Return the rotation alone."""
        return self.folded()

    def unmixed(self) -> Transform:
        """Return the smoothing alone."""
        fields = {name: getattr(self, name) for name in self.model_fields_set & Smooth.model_fields.keys() - {"type"}}
        return Smooth(**fields)

    def describe(self) -> str:
        """Return the size of the blocks."""
        return f"hadamard={self.block_size}"
