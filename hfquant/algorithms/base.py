"""Base classes of transforms and roundings.

Each algorithm is one class: a section of the layer config, whose fields are its options, that also does the work. To
add one, write one file and add one line to :mod:`hfquant.algorithms`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from hfquant.formats import Grid, GridRule, InputRule
from hfquant.schema import Section
from hfquant.statistics import LayerStats


class TensorSpec(NamedTuple):
    """Shape and dtype of a layer's tensor; a dtype of None stands for the model's float dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Problem:
    """Rows of one linear that see the same quantized input and are solved together.

    Attributes:
        name: layer name, used in messages.
        grid: how to fit the weight's grid.
        input: how the input is quantized; None if it is not.
        segments: sizes of the input segments.
        stats: statistics of the raw input; None without data.
        dtype: dtype of tensors stored in the model's dtype.
        layers: rows of each layer when several layers are solved together; empty for a single layer.
    """

    name: str
    grid: GridRule
    input: InputRule | None
    segments: tuple[int, ...]
    stats: LayerStats | None
    dtype: torch.dtype
    layers: tuple[int, ...] = ()

    def blocks(self) -> list[slice]:
        """Return the columns of each input segment."""
        return block_slices(self.segments)


#: SmoothQuant's alpha; None means no smoothing.
Strength = float | None


@dataclass(frozen=True)
class Transformed:
    """A weight ready for rounding.

    Attributes:
        weight: [rows, in] float32.
        tensors: tensors of the transform that the layer stores, by name.
        divisor: [in], divides the input before quantization; None if the input is not divided.
        alphas: chosen smoothing strengths, one per segment, for the report; empty if there are none.
    """

    weight: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    divisor: Tensor | None = None
    alphas: tuple[Strength, ...] = ()


class Transform(Section):
    """Change a layer's weight and input before quantization without changing their product.

    The base class does nothing.

    Class attributes:
        needs: names of the statistics required to solve it, besides those that are always collected.
        needs_data: whether it is solved from statistics at all.
        per_output_segment: whether each output segment has its own transform.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    needs_data: ClassVar[bool] = False
    per_output_segment: ClassVar[bool] = False
    type: str

    def fitted(self, in_features: int, rows: Sequence[int]) -> Self:
        """Return the transform with its options clamped to the size of a layer with ``in_features`` inputs.

        Args:
            in_features: input features of the linear.
            rows: sizes of the row groups that are transformed separately.
        """
        return self

    def tensors(self, in_features: int, rows: Sequence[int]) -> dict[str, TensorSpec]:
        """Return the tensors that a layer stores, by name; arguments as in :meth:`fitted`."""
        return {}

    def solve(self, weight: Tensor, problem: Problem) -> Transformed:
        """Return the transformed weight of one group of rows, [rows, in] float32."""
        return Transformed(weight)

    def folds(self) -> bool:
        """Return whether to fold the divisor into the preceding module if that module supports it."""
        return False

    def folded(self) -> Transform:
        """Return the transform that remains at the layer once the divisor is folded into the preceding module."""
        return self

    def common_divisor(self, weight: Tensor, problem: Problem) -> Tensor:
        """Return one divisor [in] for all layers that read an input; ``weight`` [rows, in] float32 joins their rows."""
        raise NotImplementedError

    def seen(self, stats: LayerStats, divisor: Tensor | None) -> LayerStats:
        """Return the statistics of the transformed weight's input, derived from those of the raw input.

        Args:
            stats: statistics of the raw input.
            divisor: the divisor returned by :meth:`solve`.
        """
        stats = stats.divided(divisor)
        return stats.rotated(self.rotation) if self.rotation else stats

    def without_data(self) -> Transform:
        """Return the transform for a layer that calibration never ran, which must not need data.

        It mixes channels as this one does, because one plan covers all experts of a parameter, including those that saw
        too few rows.
        """
        return Identity()

    def unmixed(self) -> Transform:
        """Return the part that does not mix channels, for layers that read each input several times."""
        return self

    def joined(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Join the tensors ``name`` of several row groups into one."""
        return torch.cat(list(parts))

    def divisor(self, tensors: Mapping[str, Tensor | None], group: int) -> Tensor | None:
        """Return the divisor [in] float32 for the input of row group ``group``; None for no division.

        Kernels apply it on the fly, before they quantize.
        """
        return None

    @property
    def rotation(self) -> int:
        """Size of the blocks of input channels that are rotated after the division, a power of two; 0 for no rotation.

        Kernels rotate on the fly, before they quantize (:mod:`hfquant.formats.rotation`). Per-channel ranges of the raw
        input say nothing about the rotated values.
        """
        return 0

    def branch(self, tensors: Mapping[str, Tensor | None], group: int, rows: slice) -> tuple[Tensor, Tensor] | None:
        """Return ``down`` [r, in] and ``up`` [rows, r]; ``(x down^T) up^T`` of the raw input is added to the product.

        Args:
            tensors: the layer's tensors, by name.
            group: index of the row group.
            rows: rows of the group.
        """
        return None

    def input(self, x: Tensor, tensors: Mapping[str, Tensor | None], group: int) -> Tensor:
        """Return the kernel input that replaces ``x`` [..., in], for changes that ``divisor`` cannot express."""
        return x

    def output(self, x: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor | None:
        """Return the term [..., out] float32 to add to the output for input ``x`` if ``branch`` cannot express it."""
        return None

    def restored(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return the weight [out, in] for the raw input, computed in place from the dequantized weight."""
        return weight

    def idle(self, name: str) -> Tensor:
        """Return the fill value (0-d float32) with which the stored tensor ``name`` has no effect."""
        raise NotImplementedError

    def reapplied(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return the weight to quantize [out, in], computed in place from a weight for the raw input.

        This is the inverse of :meth:`restored`. It serves weights other than the one that the transform was solved for.
        """
        return weight

    def describe(self) -> str:
        """Return the transform's part of the layer's ``repr``; empty for none."""
        return ""


class Identity(Transform):
    """Quantize weight and input unchanged."""

    type: Literal["default"] = "default"


class Rounding(Section):
    """Choose the codes of a weight.

    Class attributes:
        needs: names of the statistics required to solve it, besides those that are always collected.
        needs_data: whether it is solved from statistics at all.
        needs_scale: whether the format must have a scale.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    needs_data: ClassVar[bool] = False
    needs_scale: ClassVar[bool] = False
    type: str

    def cost(self, in_features: int, out_features: int) -> float:
        """Return the approximate number of multiplications for a layer, used to balance layers across processes."""
        return 0.0

    def solve(self, weight: Tensor, rule: GridRule, stats: LayerStats | None, name: str) -> tuple[Tensor, Grid]:
        """Return codes [rows, in] and their grid.

        Args:
            weight: [rows, in] float32, transformed.
            rule: how to fit the grid.
            stats: statistics of the transformed weight's input; None without data.
            name: layer name, used in messages.
        """
        raise NotImplementedError


def block_slices(sizes: Sequence[int]) -> list[slice]:
    """Return consecutive slices of the given sizes."""
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
