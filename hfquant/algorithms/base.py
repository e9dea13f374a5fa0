"""What a transform and a rounding have to say of themselves.

Both are sections of a layer's config (their fields are the options) and do the work: one concept an algorithm. A new
one is one file and one line in :mod:`hfquant.algorithms`.
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
    """Shape and dtype of a layer's tensor; a dtype of None is the model's float dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Problem:
    """Rows of one linear that see the same quantized input: what is solved at once.

    Attributes:
        name: of the layer, for messages.
        grid: how the weight's grid is found.
        input: how the input is quantized; None where it is not.
        segments: sizes of the input segments.
        stats: of the raw input; None without data.
        dtype: of tensors that are kept in the model's dtype.
        layers: rows of each layer, where those of several are solved at once; empty for one.
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


#: The alpha of SmoothQuant; None where not smoothing is best.
Strength = float | None


@dataclass(frozen=True)
class Transformed:
    """A weight as it is to be rounded.

    Attributes:
        weight: [rows, in] float32.
        tensors: what the layer stores of the transform, by name.
        divisor: [in], what the input is divided by before it is quantized; None where it is not.
        alphas: smoothing strengths chosen, one a segment, for the report; None for none.
    """

    weight: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    divisor: Tensor | None = None
    alphas: tuple[Strength, ...] = ()


class Transform(Section):
    """Change a layer's weight and input before they are quantized, without changing their product.

    The base class is the transform that does nothing.

    Class attributes:
        needs: names of the statistics it is solved from, beside those that are always collected.
        needs_data: whether it is solved from statistics at all.
        per_output_segment: whether each output segment has a transform of its own.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    needs_data: ClassVar[bool] = False
    per_output_segment: ClassVar[bool] = False
    type: str

    def fitted(self, in_features: int, rows: Sequence[int]) -> Self:
        """Return the transform with options cut to the size of a layer of ``in_features`` inputs.

        Args:
            in_features: of the linear.
            rows: sizes of the groups of rows that are transformed apart.
        """
        return self

    def tensors(self, in_features: int, rows: Sequence[int]) -> dict[str, TensorSpec]:
        """Return what a layer stores, by name; arguments as for :meth:`fitted`."""
        return {}

    def solve(self, weight: Tensor, problem: Problem) -> Transformed:
        """Return the transformed weight of one group of rows, [rows, in] float32."""
        return Transformed(weight)

    def folds(self) -> bool:
        """Return whether its divisor is to go into what comes before the layer, where that can take it."""
        return False

    def folded(self) -> Transform:
        """Return what is left to do at a layer once the divisor has gone into what comes before it."""
        return self

    def common_divisor(self, weight: Tensor, problem: Problem) -> Tensor:
        """Return one divisor [in] for ``weight``, [rows, in] float32, of all the layers that read one input."""
        raise NotImplementedError

    def seen(self, stats: LayerStats, divisor: Tensor | None) -> LayerStats:
        """Return the statistics of what the transformed weight sees, from those of the raw input.

        Args:
            stats: of the raw input.
            divisor: what :meth:`solve` returned as such.
        """
        stats = stats.divided(divisor)
        return stats.rotated(self.rotation) if self.rotation else stats

    def without_data(self) -> Transform:
        """Return what is done to a layer that calibration never ran: a transform that needs no data.

        It mixes channels as this one does: one plan stands for all experts of a parameter, those among them that saw
        too few rows.
        """
        return Identity()

    def unmixed(self) -> Transform:
        """Return what is left of it for layers that take each input several times: they keep channels apart."""
        return self

    def joined(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Return the tensor ``name`` of several groups of rows as one."""
        return torch.cat(list(parts))

    def divisor(self, tensors: Mapping[str, Tensor | None], group: int) -> Tensor | None:
        """Return what the input of row group number ``group`` is divided by, [in] float32; None for nothing.

        Kernels divide on the way, before they quantize.
        """
        return None

    @property
    def rotation(self) -> int:
        """Size of the blocks of input channels that are rotated after the division, a power of two; 0 for none.

        Kernels rotate on the way, before they quantize (:mod:`hfquant.formats.rotation`). Ranges of single channels say
        nothing of what is rotated.
        """
        return 0

    def branch(self, tensors: Mapping[str, Tensor | None], group: int, rows: slice) -> tuple[Tensor, Tensor] | None:
        """Return ``down`` [r, in] and ``up`` [rows, r]: ``(x down^T) up^T`` of the raw input is added to the product.

        Args:
            tensors: of the layer, by name.
            group: number of the row group.
            rows: its rows.
        """
        return None

    def input(self, x: Tensor, tensors: Mapping[str, Tensor | None], group: int) -> Tensor:
        """Return what a kernel gets in place of the input ``x`` [..., in], for what ``divisor`` cannot say."""
        return x

    def output(self, x: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor | None:
        """Return what is added to the output, [..., out] float32, from ``x``, for what ``branch`` cannot say."""
        return None

    def restored(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return the weight [out, in] in terms of the raw input, from the dequantized one (changed in place)."""
        return weight

    def idle(self, name: str) -> Tensor:
        """Return the number, 0-d float32, that fills the stored tensor ``name`` of a transform that does nothing."""
        raise NotImplementedError

    def reapplied(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return the weight to be quantized, [out, in], from one in terms of the raw input (changed in place).

        The inverse of :meth:`restored`: for another weight in the place of the one that the transform was solved for.
        """
        return weight

    def describe(self) -> str:
        """Return what a layer's ``repr`` says of it; empty for nothing."""
        return ""


class Identity(Transform):
    """Quantize weight and input as they are."""

    type: Literal["default"] = "default"


class Rounding(Section):
    """Choose the codes of a weight.

    Class attributes:
        needs: names of the statistics it is solved from, beside those that are always collected.
        needs_data: whether it is solved from statistics at all.
        needs_scale: whether the format must carry a scale.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    needs_data: ClassVar[bool] = False
    needs_scale: ClassVar[bool] = False
    type: str

    def cost(self, in_features: int, out_features: int) -> float:
        """Return roughly how many multiplications solving takes, to share layers out between processes."""
        return 0.0

    def solve(self, weight: Tensor, rule: GridRule, stats: LayerStats | None, name: str) -> tuple[Tensor, Grid]:
        """Return codes [rows, in] and their grid.

        Args:
            weight: [rows, in] float32, transformed.
            rule: how the grid is found.
            stats: of the input that the transformed weight sees; None without data.
            name: of the layer, for messages.
        """
        raise NotImplementedError


def block_slices(sizes: Sequence[int]) -> list[slice]:
    """Return consecutive slices of these sizes."""
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
