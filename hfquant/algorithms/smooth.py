"""SmoothQuant (arXiv 2211.10438): move the difficulty of outlier channels from activations to weights.

``X W^T = (X / s)(W s)^T`` with ``s_j = |X_j|^alpha / |W_j|^(1 - alpha)`` for each input channel j. ``|.|`` is the
largest magnitude, since a scale has to cover it. Float activations have no scale to cover anything; there, the error of
a weight column grows with the mean square of its inputs, so root mean squares work better, as AWQ found for the mean
magnitude (arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, model_validator
from torch import Tensor

from hfquant.algorithms.base import Identity, Problem, Strength, TensorSpec, Transform, Transformed
from hfquant.formats import expand_columns, range_columns
from hfquant.formats.rotation import rotated
from hfquant.schema import Section, is_patch
from hfquant.statistics import LayerStats

#: Each alpha costs a pass over the sampled rows, and a finer grid gains nothing.
MAX_ALPHAS = 1000


class SearchAlpha(Section):
    """Grid of smoothing strengths to try for each layer, besides no smoothing: ``min, min + step, ... max``."""

    enable: bool = Field(False, description="Search for alpha; no smoothing and `alpha` itself are tried too.")
    min: float = Field(0.0, ge=0.0, le=1.0, description="Smallest alpha tried.")
    max: float = Field(1.0, ge=0.0, le=1.0, description="Largest alpha tried.")
    step: float = Field(0.1, gt=0.0, le=1.0, description="Distance between two alphas; at most 1,000 are tried.")

    @model_validator(mode="after")
    def _sane(self, info: ValidationInfo) -> SearchAlpha:
        if is_patch(info):
            return self
        if self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}")
        count = (self.max - self.min) / self.step + 1
        if count > MAX_ALPHAS:
            raise ValueError(f"step={self.step} makes {count:.3g} alphas, at most {MAX_ALPHAS} are tried")
        return self

    def grid(self) -> list[float]:
        """Return the alphas to try in ascending order, always including ``max``, even if ``step`` does not hit it."""
        steps = int((self.max - self.min) / self.step + 1e-9)
        alphas = [round(self.min + i * self.step, 10) for i in range(steps + 1)]
        return alphas if alphas[-1] >= self.max - 1e-9 else [*alphas, self.max]


class Smooth(Transform):
    """Divide each input channel by s and multiply the matching weight column by s.

    ``magnitude`` selects what is balanced between an input channel and its weight column: the largest values, which set
    the scale of quantized activations, or the root mean squares, for weight-only quantization. With ``fold``, the
    parameters of the preceding norm or linear are divided by s wherever this changes nothing else, which leaves no
    division at run time. All layers that read the same input then share one s.
    """

    needs_data: ClassVar[bool] = True
    per_output_segment: ClassVar[bool] = True
    type: Literal["smooth"] = "smooth"
    alpha: float = Field(
        0.5, ge=0.0, le=1.0, description="Share of the input outliers moved into the weights, from 0 (none) to 1 (all)."
    )
    magnitude: Literal["amax", "rms"] = Field(
        "amax",
        description="What is balanced between an input channel and its weights: largest values (quantized activations) "
        "or root mean squares (weight-only).",
    )
    search_alpha_config: SearchAlpha = Field(
        SearchAlpha(), description="Search alpha for each layer, by the error of its output on sampled rows."
    )
    fold: bool = Field(
        False,
        description="Divide the preceding norm or linear once instead of dividing the input at run time, if nothing "
        "else reads its output. Layers that read the same input then share one divisor.",
    )

    def tensors(self, in_features: int, rows: Sequence[int]) -> dict[str, TensorSpec]:
        """Return ``smooth``, the divisor, [in] or [groups, in]."""
        shape = (in_features,) if len(rows) == 1 else (len(rows), in_features)
        return {"smooth": TensorSpec(shape, torch.float32)}

    def joined(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Stack divisors, one per row group."""
        return torch.stack(list(parts)) if name == "smooth" else super().joined(name, parts)

    def divisor(self, tensors: Mapping[str, Tensor | None], group: int) -> Tensor | None:
        """Return s."""
        smooth = tensors.get("smooth")  # None if folded into the preceding module
        return smooth if smooth is None or smooth.dim() == 1 else smooth[group]

    def restored(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return ``W / s``."""
        for group, part in enumerate(weight.split(list(rows))):
            if (divisor := self.divisor(tensors, group)) is not None:
                part.div_(divisor)
        return weight

    def idle(self, name: str) -> Tensor:
        """Return 1 for the divisor and 0 for any other tensor."""
        return torch.tensor(float(name == "smooth"))

    def reapplied(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return ``W s``."""
        for group, part in enumerate(weight.split(list(rows))):
            if (divisor := self.divisor(tensors, group)) is not None:
                part.mul_(divisor)
        return weight

    def folds(self) -> bool:
        """Return ``fold``."""
        return self.fold

    def folded(self) -> Transform:
        """Return a transform that does nothing."""
        return Identity()

    def common_divisor(self, weight: Tensor, problem: Problem) -> Tensor:
        """Return s, balanced against the geometric mean of the layers' columns, so layers of any size count equally."""
        return self.found(weight, problem)[0]

    def solve(self, weight: Tensor, problem: Problem) -> Transformed:
        """Smooth with the configured alpha, or with the best alpha per input segment on the sampled rows."""
        divisor, alphas = self.found(weight, problem)
        return self.applied(weight, divisor, problem, alphas)

    def found(self, weight: Tensor, problem: Problem) -> tuple[Tensor, tuple[Strength, ...]]:
        """Return s [in] and the alpha of each input segment; ties go to the earlier candidate, no smoothing first."""
        assert problem.stats is not None
        magnitudes = self.magnitudes(weight, problem.stats, problem.layers)
        search = self.search_alpha_config
        alphas: list[Strength] = [self.alpha] * len(problem.segments)
        if not search.enable:
            divisor = smoothing_vector(*magnitudes, self.alpha)
        else:
            grid: list[Strength] = [None, *dict.fromkeys([*search.grid(), self.alpha])]
            alphas = [grid[i] for i in self.losses(weight, problem, grid).argmin(0).tolist()]
            vectors = {alpha: smoothing_vector(*magnitudes, alpha) for alpha in alphas}
            divisor = torch.cat([vectors[alpha][c] for alpha, c in zip(alphas, problem.blocks(), strict=True)])
        return divisor, tuple(alphas)

    def applied(
        self, weight: Tensor, divisor: Tensor, problem: Problem, alphas: tuple[Strength, ...] = ()
    ) -> Transformed:
        """Return ``W s`` for a given divisor s [in]."""
        return Transformed(weight * divisor, {"smooth": divisor}, divisor, alphas)

    def magnitudes(self, weight: Tensor, stats: LayerStats, layers: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Return the magnitudes to balance, [in] each: of the input channels and of the columns of ``weight``.

        Args:
            weight: [rows, in].
            stats: statistics of the input.
            layers: rows of each layer in ``weight``; with several layers, a column's magnitude is their geometric mean.
        """
        parts = weight.split(list(layers or [len(weight)]))
        if self.magnitude == "rms":
            return stats.mean_square.sqrt(), _geometric_mean([part.square().mean(0).sqrt() for part in parts])
        return stats.amax, _geometric_mean([part.abs().amax(0) for part in parts])

    def losses(self, weight: Tensor, problem: Problem, grid: Sequence[Strength]) -> Tensor:
        """Return ``||Q(X_i / s) Q(W_i s)^T - X_i W_i^T||^2`` for each alpha and input segment i.

        Estimated on the sampled rows, with round-to-nearest in place of costlier roundings. A static activation scale
        is taken from the half of the data that does not contain the row, because rows that set the scale are never
        clipped by it. The losses of both halves are summed. An alpha does not have to win on each half separately: the
        loss from clipping a few large rows differs so much between halves that this requirement raised KL by 60 % on
        SmolLM2 (W8A8).

        Returns:
            [alphas, segments].
        """
        stats = problem.stats
        assert stats is not None
        row_weights = stats.row_weights
        everything = [(stats, torch.ones_like(stats.sample.second_half))]
        sets = stats.halves() if problem.input is not None and problem.input.static else everything
        # Mixed channels make each quantized segment depend on the others, so all share one alpha.
        blocks = [slice(None)] if self.rotation else problem.blocks()
        losses = torch.zeros(len(grid), len(blocks), device=weight.device)
        for half, held_out in sets:
            rows = held_out.to(weight.device)
            x, weights = stats.rows[rows], row_weights[rows, None]
            exact = [x[:, columns] @ weight[:, columns].T for columns in blocks]
            magnitudes = self.magnitudes(weight, half, problem.layers)
            for i, alpha in enumerate(grid):
                candidate = self.applied(weight, smoothing_vector(*magnitudes, alpha), problem)
                outputs = self._outputs(x, candidate, problem, half, blocks)
                for j, (output, target) in enumerate(zip(outputs, exact, strict=True)):
                    losses[i, j] += (output.sub_(target).square_() * weights).sum()
        return losses.expand(-1, len(problem.segments))

    def _outputs(
        self, x: Tensor, candidate: Transformed, problem: Problem, half: LayerStats, blocks: Sequence[slice]
    ) -> Iterator[Tensor]:
        """Yield the contribution of each block of the quantized layer's input to the output, [rows, out] each."""
        assert candidate.divisor is not None
        seen = self.seen(half, candidate.divisor)
        weight = problem.grid.fit(candidate.weight, seen.mean_square).round(candidate.weight)
        quantized, rule = rotated(x / candidate.divisor, self.rotation), problem.input
        if rule is not None:
            static = rule.scales(*segment_ranges(seen, problem.segments)) if rule.static else (None, None)
            quantized, scale = rule.quantize(quantized, *static)
            if scale is not None:
                quantized = quantized * expand_columns(scale, problem.segments)
        for columns in blocks:
            output = quantized[:, columns] @ weight[:, columns].T
            extra = self.added(x, candidate.tensors, columns)
            yield output if extra is None else output.add_(extra)

    def added(self, x: Tensor, tensors: Mapping[str, Tensor], columns: slice) -> Tensor | None:
        """Return the output of a branch beside the quantized product for some input columns; None without a branch."""
        return None


def _geometric_mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).double().log().mean(0).exp().float()


def segment_ranges(stats: LayerStats, segments: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest input of each segment, [segments] each."""
    low, _ = range_columns(stats.low, segments)
    _, high = range_columns(stats.high, segments)
    return low, high


def smoothing_vector(x: Tensor, w: Tensor, alpha: Strength) -> Tensor:
    """Return ``s = x^alpha / w^(1 - alpha)``.

    A channel with a magnitude of 0 takes no part in the product. It has ``s = 1``, unless its weights or its inputs
    would then be the largest: the scale of all others depends on those.

    Args:
        x: [in], magnitude of each input channel, >= 0.
        w: [in], magnitude of each weight column, >= 0.
        alpha: share of the difficulty to move to the weights, in [0, 1]; None for no smoothing (s = 1).

    Returns:
        [in] float32, positive and finite.
    """
    if alpha is None:
        return torch.ones_like(x, dtype=torch.float32)
    # In float64: a magnitude of 1e30 to the power alpha, divided by a tiny weight, overflows float32.
    x, w = x.double(), w.double()
    scale = x.pow(alpha) / w.pow(1 - alpha)
    limits = torch.finfo(torch.float32)
    scale = scale.clamp(limits.tiny, limits.max)
    live = (x > 0) & (w > 0)
    if not live.any():
        return torch.ones_like(scale, dtype=torch.float32)
    weights, inputs = (w * scale)[live].max(), (x / scale)[live].max()
    dead = torch.where(w > 0, (weights / w).clamp(limits.tiny, 1.0), (x / inputs).clamp(1.0, limits.max))
    return torch.where(live, scale, dead).float()
