"""Rotate the inputs in blocks, so that an outlier is spread over its block (QuaRot, arXiv 2404.00456).

``X W^T = (X R)(W R)^T`` for an orthogonal R. The entries of a Hadamard matrix have one magnitude: what is large in one
channel becomes small in many, and the numbers of a block come close to a bell curve, which few levels serve best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from hfquant.algorithms.base import Identity, Problem, Transform, Transformed
from hfquant.algorithms.smooth import Smooth
from hfquant.statistics import LayerStats


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"expected a power of two, got {value}")
    return value


_BlockSize = Annotated[
    int,
    Field(ge=2, le=4096, description="Input channels that are rotated together, a power of two."),
    AfterValidator(_power_of_two),
]


class Hadamard(Transform):
    """Rotate blocks of input channels at run time, and of the weight's columns beforehand.

    Channels that are left over at the end are rotated in blocks of smaller powers of two.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    mixes_channels: ClassVar[bool] = True
    type: Literal["hadamard"] = "hadamard"
    block_size: _BlockSize = 64

    def solve(self, weight: Tensor, problem: Problem) -> Transformed:
        """Return ``W R``."""
        return Transformed(rotated(weight, self.block_size))

    def seen(self, stats: LayerStats, divisor: Tensor | None) -> LayerStats:
        """Return the statistics of ``X R``."""
        return stats.divided(divisor).rotated(lambda x: rotated(x, self.block_size))

    def input(self, x: Tensor, tensors: Mapping[str, Tensor | None], group: int) -> Tensor:
        """Return ``X R``."""
        return rotated(x, self.block_size)

    def restored(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return the weight rotated back."""
        return rotated(weight, self.block_size)

    def reapplied(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return ``W R``."""
        return rotated(weight, self.block_size)

    def unmixed(self) -> Transform:
        """Return a transform that does nothing."""
        return Identity()

    def describe(self) -> str:
        """Return the size of the blocks."""
        return f"hadamard={self.block_size}"


class SmoothHadamard(Smooth):
    """Smooth, then rotate: ``X W^T = (X / s R)(W s R)^T``."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    mixes_channels: ClassVar[bool] = True
    type: Literal["smooth_hadamard"] = "smooth_hadamard"  # type: ignore[assignment]
    block_size: _BlockSize = 64

    def divisor(self, tensors: Mapping[str, Tensor | None], group: int) -> Tensor | None:
        """Return None: :meth:`input` divides before it rotates."""
        return None

    def input(self, x: Tensor, tensors: Mapping[str, Tensor | None], group: int) -> Tensor:
        """Return ``X / s R``."""
        smooth = self.smoothing(tensors, group)
        assert smooth is not None
        return self.turned(x / smooth).to(x.dtype)

    def turned(self, x: Tensor) -> Tensor:
        """Return ``x R``."""
        return rotated(x, self.block_size)

    def applied(self, weight: Tensor, divisor: Tensor, problem: Problem, alphas: tuple[float, ...] = ()) -> Transformed:
        """Return ``W s R`` for a given divisor s [in]."""
        return Transformed(self.turned(weight * divisor), {"smooth": divisor}, divisor, alphas)

    def seen(self, stats: LayerStats, divisor: Tensor | None) -> LayerStats:
        """Return the statistics of ``X / s R``."""
        return stats.divided(divisor).rotated(self.turned)

    def restored(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return the weight rotated back, divided by s."""
        return super().restored(self.turned(weight), tensors, rows)

    def reapplied(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return ``W s R``."""
        return self.turned(super().reapplied(weight, tensors, rows))

    def folded(self) -> Transform:
        """Return the rotation alone."""
        return Hadamard(block_size=self.block_size)

    def unmixed(self) -> Transform:
        """Return the smoothing alone."""
        fields = {name: getattr(self, name) for name in self.model_fields_set & Smooth.model_fields.keys() - {"type"}}
        return Smooth(**fields)

    def describe(self) -> str:
        """Return the size of the blocks."""
        return f"hadamard={self.block_size}"


def rotated(x: Tensor, size: int) -> Tensor:
    """Return ``x`` [..., in] with blocks of ``size`` channels rotated, the rest in blocks of smaller powers of two.

    Its own inverse: the matrix is symmetric.
    """
    whole = x.shape[-1] // size * size
    parts = []
    if whole:
        blocks = x[..., :whole].unflatten(-1, (-1, size))
        parts.append((blocks @ _matrix(size, x)).flatten(-2))
    if whole < x.shape[-1]:
        rest = x[..., whole:]
        parts.append(rotated(rest, size // 2) if size > 2 else rest)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def hadamard(size: int) -> Tensor:
    """Return Sylvester's Hadamard matrix of ``size``, a power of two, made orthogonal; [size, size] float32."""
    matrix = torch.ones(1, 1, device="cpu")
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu")
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    return matrix / size**0.5


_known: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}


def _matrix(size: int, like: Tensor) -> Tensor:
    """Return the matrix on the device and in the dtype of another tensor, made once for each."""
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        return hadamard(size).to(like)  # what is traced must not outlive its trace
    key = size, like.device, like.dtype
    if key not in _known:
        with torch.inference_mode(False):  # a tensor of that mode could not be saved for a backward later
            _known[key] = hadamard(size).to(like)
    return _known[key]
