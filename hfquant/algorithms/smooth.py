"""SmoothQuant (arXiv 2211.10438): move the difficulty of outlier channels from activations to weights.

``X W^T = (X / s)(W s)^T`` with ``s_j = |X_j|^alpha / |W_j|^(1 - alpha)`` for each input channel j, where ``|.|`` is the
largest magnitude: a scale has to reach it. With float activations nothing has to; the error that a column of the weight
makes grows with the mean square of its inputs. There the root mean squares serve better, as AWQ found for the mean
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

#: Each alpha costs a pass over the sampled rows; a finer grid gains nothing.
MAX_ALPHAS = 1000


class SearchAlpha(Section):
    """Grid of smoothing strengths tried for each layer, beside no smoothing: ``min, min + step, ... max``."""

    enable: bool = Field(False, description="Search; no smoothing at all is tried too, and `alpha`.")
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
        """Return the alphas to try, ascending; ``max`` is included even where ``step`` does not hit it."""
        steps = int((self.max - self.min) / self.step + 1e-9)
        alphas = [round(self.min + i * self.step, 10) for i in range(steps + 1)]
        return alphas if alphas[-1] >= self.max - 1e-9 else [*alphas, self.max]


class Smooth(Transform):
    """Divide each input channel by s and multiply its weights by it.

    ``magnitude`` is what is balanced between a channel of the inputs and its column of the weights: the largest values,
    which set the scale of quantized activations, or the root mean squares, for weights alone. ``fold`` has s divide the
    parameters of the norm or linear before the layer wherever that changes nothing else, so that nothing is left to
    divide at run time; all layers that read the same input share one s then.
    """

    needs_data: ClassVar[bool] = True
    per_output_segment: ClassVar[bool] = True
    type: Literal["smooth"] = "smooth"
    alpha: float = Field(
        0.5, ge=0.0, le=1.0, description="Share of the inputs' outliers that the weights take over: 0 none, 1 all."
    )
    magnitude: Literal["amax", "rms"] = Field(
        "amax",
        description="What is balanced between an input channel and its weights: largest values (quantized activations) "
        "or root mean squares (weights alone).",
    )
    search_alpha_config: SearchAlpha = Field(
        SearchAlpha(), description="Search alpha for each layer, by the error of its output on sampled rows."
    )
    fold: bool = Field(
        False,
        description="Divide the norm or linear before the layer once instead of dividing the input at run time, where "
        "nothing else reads what is divided. Layers that read the same input share one divisor then.",
    )

    def tensors(self, in_features: int, rows: Sequence[int]) -> dict[str, TensorSpec]:
        """Return ``smooth``: the divisor, [in] or [groups, in]."""
        shape = (in_features,) if len(rows) == 1 else (len(rows), in_features)
        return {"smooth": TensorSpec(shape, torch.float32)}

    def joined(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Stack divisors, one a group of rows."""
        return torch.stack(list(parts)) if name == "smooth" else super().joined(name, parts)

    def divisor(self, tensors: Mapping[str, Tensor | None], group: int) -> Tensor | None:
        """Return s."""
        smooth = tensors.get("smooth")  # it may have gone into what comes before the layer
        return smooth if smooth is None or smooth.dim() == 1 else smooth[group]

    def restored(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return ``W / s``."""
        for group, part in enumerate(weight.split(list(rows))):
            if (divisor := self.divisor(tensors, group)) is not None:
                part.div_(divisor)
        return weight

    def idle(self, name: str) -> Tensor:
        """Return 1 for the divisor, 0 for all else."""
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
        """Return s, balanced against the geometric mean of the layers' columns: no layer's size counts more."""
        return self.found(weight, problem)[0]

    def solve(self, weight: Tensor, problem: Problem) -> Transformed:
        """Smooth by the config's alpha, or for each input segment by the best on the sampled rows."""
        divisor, alphas = self.found(weight, problem)
        return self.applied(weight, divisor, problem, alphas)

    def found(self, weight: Tensor, problem: Problem) -> tuple[Tensor, tuple[Strength, ...]]:
        """Return s [in] and the alpha of each input segment; of equally good ones the first, none before all."""
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
        """Return what is balanced: of each input channel, and of each column of ``weight``, two [in].

        Args:
            weight: [rows, in].
            stats: of the input.
            layers: rows of each layer that the weight is of; of several, columns count by their geometric mean.
        """
        parts = weight.split(list(layers or [len(weight)]))
        if self.magnitude == "rms":
            return stats.mean_square.sqrt(), _geometric_mean([part.square().mean(0).sqrt() for part in parts])
        return stats.amax, _geometric_mean([part.abs().amax(0) for part in parts])

    def losses(self, weight: Tensor, problem: Problem, grid: Sequence[Strength]) -> Tensor:
        """Return ``||Q(X_i / s) Q(W_i s)^T - X_i W_i^T||^2`` of each alpha and input segment i.

        Estimated on the sampled rows, with round to nearest in place of a costlier rounding. Where the activations'
        scale is static it comes from the half of the data that the row is not in: rows that made the scale are never
        clipped by it. What the sum over both halves finds is not asked to gain on each half as well: the loss that
        clipping a few large rows makes differs so much between halves that this lost 60 % of KL on SmolLM2 (W8A8).

        Returns:
            [alphas, segments].
        """
        stats = problem.stats
        assert stats is not None
        row_weights = stats.row_weights
        everything = [(stats, torch.ones_like(stats.sample.fold))]
        sets = stats.halves() if problem.input is not None and problem.input.static else everything
        # Where channels are mixed, what is quantized in a segment is of others as well: one alpha for all.
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
        """Yield what each block of the quantized layer's input contributes to the output, [rows, out] each."""
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
        """Return what a branch beside the quantized product adds for some input columns; None without one."""
        return None


def _geometric_mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).double().log().mean(0).exp().float()


def segment_ranges(stats: LayerStats, segments: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest input of each segment, two [segments]."""
    low, _ = range_columns(stats.low, segments)
    _, high = range_columns(stats.high, segments)
    return low, high


def smoothing_vector(x: Tensor, w: Tensor, alpha: Strength) -> Tensor:
    """Return ``s = x^alpha / w^(1 - alpha)``, 1 where either is 0.

    Args:
        x: [in], magnitude of each input channel, >= 0.
        w: [in], magnitude of each weight column, >= 0.
        alpha: how much of the difficulty moves to the weights, in [0, 1]; None for s = 1, no smoothing.

    Returns:
        [in] float32, positive and finite.
    """
    if alpha is None:
        return torch.ones_like(x, dtype=torch.float32)
    # In float64: a magnitude of 1e30 to the power alpha, over a tiny weight, leaves float32.
    x, w = x.double(), w.double()
    scale = x.pow(alpha) / w.pow(1 - alpha)
    limits = torch.finfo(torch.float32)
    scale = scale.clamp(limits.tiny, limits.max).float()
    return torch.where((x == 0) | (w == 0), torch.ones_like(scale), scale)
