"""Tables of affine maps, one per timestep: solved from sums, applied to latents of any layout, stored as tensors.

Each class is an :class:`~hfquant.affiner.hooks.Affiner` in its own right, like a third-party one, and defines how K and
b follow from the sums.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from hfquant.affiner import solvers
from hfquant.affiner.config import AffinerConfig
from hfquant.affiner.hooks import Step, step_coefficients
from hfquant.affiner.solvers import BlockLayout, Moments
from hfquant.denoisers import from_grid, to_grid

Maps = tuple[Tensor, Tensor]

#: Number of folds. Each is held out of one fit to measure how well the fit carries over to other samples.
FOLDS = 4


class AffineMaps:
    """A table of maps `x <- K_t x + b_t`, float32 `[C, h, w]` per timestep, and the sums that they are solved from.

    Attributes:
        blocksize: Side of the blocks in pixels; None for one block per channel.
        interpolate: Maps are bilinear between block centers instead of constant on blocks.
        enabled: Indices of the timesteps that get a map, in order of their first observation; the others keep the
            identity. None for all.
        size: Height and width of the latents.
        frames_first: Whether video latents are `[B, T, C, H, W]` instead of `[B, C, T, H, W]`.
        table: Timestep to (K, b).
        errors: Timestep to the mean squared error over all samples and pixels, before and after.
    """

    blocksize: int | None = None
    interpolate = False
    #: Whether to weaken a timestep's map until it does no harm on held-out samples.
    checked = False

    def __init__(self, config: AffinerConfig) -> None:
        self.enabled = config.stepper.enable_timesteps
        self.size: tuple[int, int] | None = None
        self.frames_first = False
        self.table: dict[float, Maps] = {}
        self.errors: dict[float, tuple[float, float]] = {}
        self._order: list[float] = []
        self._sums: dict[float, dict[int, Moments]] = {}
        self._counts: dict[float, int] = {}

    def fit(self, sums: Moments) -> Maps:
        """Return K and b, `[C, h, w]`, from sums of blocks (of pixels if `interpolate`)."""
        raise NotImplementedError

    @classmethod
    def of_latents(cls, config: AffinerConfig) -> AffineMaps | None:
        """Return an empty table for the latents after each step if the method corrects these too, else None."""
        return None

    def noise_scale(self, step: Step) -> float:
        """Return the factor for the scheduler's own noise."""
        return 1.0

    def observe(self, timestep: float, real: Tensor, quant: Tensor) -> None:
        """Add a batch in any layout that :func:`~hfquant.denoisers.to_grid` supports."""
        height, width = to_grid(real[:1], self.frames_first).shape[-2:]
        size = (height, width)
        if self.size not in (None, size):
            raise ValueError(f"all samples must have latents of the same size, got {self.size} and {size}")
        self.size = size
        if timestep not in self._order:
            self._order.append(timestep)
        count, folds = self._counts.get(timestep, 0), self._sums.setdefault(timestep, {})
        self._counts[timestep] = count + len(real)
        for fold in range(FOLDS):
            rows = slice((fold - count) % FOLDS, None, FOLDS)
            if len(real[rows]):
                r, q = (to_grid(values[rows], self.frames_first) for values in (real, quant))
                sums = solvers.moments(r, q, 1 if self.interpolate else self.blocksize)
                folds[fold] = folds[fold] + sums if fold in folds else sums

    def solve(self, timestep: float) -> None:
        """Fit the map of one timestep to everything observed at it."""
        folds = list(self._sums[timestep].values())
        total = reduce(operator.add, folds)
        scale, shift = self.fit(total)
        if self.checked and len(folds) > 1:
            others = [reduce(operator.add, folds[:i] + folds[i + 1 :]) for i in range(len(folds))]
            strength = solvers.held_out_strength(folds, [self._spread(*self.fit(sums)) for sums in others])
            scale, shift = 1 + strength * (scale - 1), strength * shift
        if self.enabled is not None and self._order.index(timestep) not in self.enabled:
            scale, shift = torch.ones_like(scale), torch.zeros_like(shift)
        self.table[timestep] = scale.float(), shift.float()
        count = float(total.n.sum())
        before, after = total.squared_error(), total.squared_error(*self._spread(scale, shift))
        self.errors[timestep] = float(before.sum()) / count, float(after.sum()) / count
        # Second-order schedulers revisit a timestep immediately; sums of earlier timesteps are no longer needed.
        self._sums = {t: s for t, s in self._sums.items() if t == timestep or t not in self.table}

    def forget(self) -> None:
        """Make all maps the identity, in place."""
        for timestep, (scale, shift) in self.table.items():
            self.table[timestep] = torch.ones_like(scale), torch.zeros_like(shift)
            self.errors[timestep] = self.errors[timestep][0], self.errors[timestep][0]

    def _spread(self, scale: Tensor, shift: Tensor) -> Maps:
        """Return K and b at the resolution of the sums, blocks or pixels."""
        if not self.interpolate:
            return scale, shift
        return solvers.expand(scale, self._grid(), True), solvers.expand(shift, self._grid(), True)

    def correct(self, timestep: float, values: Tensor) -> Tensor:
        """Return `K_t x + b_t` for latents of any size, computed in float32 and returned in the dtype of `values`.

        Of a learned-sigma prediction `[B, 2C, H, W]`, only the first C channels are corrected. Between fitted
        timesteps, K and b are interpolated linearly. For latents of another size than the fitted one, the maps are
        stretched (nearest block, or bilinear if `interpolate`). Packed tokens can only be stretched from a square to a
        square, since the height and width of others are unknown.

        Raises:
            ValueError: The timestep lies outside the fitted range, the channels differ, or packed tokens of another
                number than fitted are not a square.
        """
        scale, shift = self.at(timestep)
        if values.dim() == 4 and values.shape[1] == 2 * len(scale):
            noise, variance = values.chunk(2, dim=1)
            return torch.cat([self.correct(timestep, noise), variance], dim=1)
        grid = to_grid(values, self.frames_first)
        size = (grid.shape[-2], grid.shape[-1])
        if grid.shape[1] != len(scale):
            raise ValueError(f"the affiner was fitted on {len(scale)} channels, got {grid.shape[1]}")
        assert self.size is not None
        if values.dim() == 3 and size != self.size and 1 in (size[1], self.size[1]) and scale[0].numel() > 1:
            raise ValueError(
                f"the affiner was fitted on {self.size[0] * self.size[1]} packed tokens and cannot be stretched to "
                f"{values.shape[1]}: both must be squares. Fit it at this size, or with solver.blocksize=null"
            )
        scale, shift = (self._stretched(x, size).to(values.device) for x in (scale, shift))
        return from_grid((grid.float() * scale + shift).to(values.dtype), values, self.frames_first)

    def at(self, timestep: float) -> Maps:
        """Return K and b of a timestep, `[C, h, w]`.

        Raises:
            ValueError: The timestep lies outside the fitted range.
        """
        if timestep in self.table:
            return self.table[timestep]
        below = max((t for t in self.table if t < timestep), default=None)
        above = min((t for t in self.table if t > timestep), default=None)
        if below is None or above is None:
            fitted = f"[{min(self.table):g}, {max(self.table):g}]" if self.table else "nothing"
            raise ValueError(
                f"timestep {timestep:g} is outside the range that the affiner was fitted on, {fitted}: fit it with "
                "the scheduler and the number of steps that you run, or with more steps"
            )
        share = (timestep - below) / (above - below)
        (k0, b0), (k1, b1) = self.table[below], self.table[above]
        return torch.lerp(k0, k1, share), torch.lerp(b0, b1, share)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the table: timesteps [T], highest first, scale and shift [T, C, h, w], errors [T, 2]."""
        times = sorted(self.table, reverse=True)
        return {
            f"{prefix}.timesteps": torch.tensor(times, dtype=torch.float64),
            f"{prefix}.scale": torch.stack([self.table[t][0] for t in times]),
            f"{prefix}.shift": torch.stack([self.table[t][1] for t in times]),
            f"{prefix}.errors": torch.tensor([self.errors[t] for t in times], dtype=torch.float64),
        }

    def load(self, prefix: str, size: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors returned by :meth:`tensors`.

        Raises:
            ValueError: A tensor is missing, has another dtype, or the shapes do not match each other.
        """
        self.size = size
        kinds = {"timesteps": torch.float64, "scale": torch.float32, "shift": torch.float32, "errors": torch.float64}
        times, scale, shift, errors = (checked_tensor(tensors, f"{prefix}.{k}", dtype) for k, dtype in kinds.items())
        shape = (*times.shape, scale.shape[1] if scale.dim() == 4 else -1, *self._grid().shape)
        if scale.shape != shape or shift.shape != shape or errors.shape != (*times.shape, 2) or times.dim() != 1:
            raise ValueError(
                f"{prefix}: timesteps {list(times.shape)}, scale {list(scale.shape)}, shift {list(shift.shape)} and "
                f"errors {list(errors.shape)} do not fit a grid of {list(size)} in blocks of {self.blocksize}"
            )
        self._order = times.tolist()
        self.table = dict(zip(self._order, zip(scale, shift, strict=True), strict=True))
        self.errors = {t: (before, after) for t, (before, after) in zip(self._order, errors.tolist(), strict=True)}

    def _grid(self) -> BlockLayout:
        assert self.size is not None
        return BlockLayout(*self.size, self.blocksize or max(self.size))

    def _stretched(self, blocks: Tensor, size: tuple[int, int]) -> Tensor:
        pixels = solvers.expand(blocks, self._grid(), self.interpolate)
        if size == self.size:
            return pixels
        if self.interpolate:
            return F.interpolate(pixels[None], size, mode="bilinear", align_corners=False)[0]
        return F.interpolate(pixels[None], size, mode="nearest-exact")[0]


class Blockwise(AffineMaps):
    """Ridge regression per block or between block centers, weakened to what holds on other samples."""

    checked = True

    def __init__(self, config: AffinerConfig) -> None:
        super().__init__(config)
        self.solver = config.solver
        self.blocksize, self.interpolate = self.solver.blocksize, self.solver.sample_mode == "interpolate"

    @classmethod
    def of_latents(cls, config: AffinerConfig) -> AffineMaps | None:
        """See :meth:`AffineMaps.of_latents`."""
        return cls(config) if config.stepper.enable_latent_affine else None

    def fit(self, sums: Moments) -> Maps:
        """See :meth:`AffineMaps.fit`."""
        solver, grid = self.solver, self._grid()
        terms = solver.alpha, solver.lambda1, solver.lambda2
        if self.interpolate:
            scale, shift = solvers.solve_interpolated(sums, grid, *terms)
        else:
            scale, shift = solvers.solve_blocks(sums, *terms)
        limited = solvers.limit(scale, shift, solver.percentile, solver.greater, solver.scale)
        if not self.interpolate:
            return limited
        # Pixels between a limited node and an unlimited one may end up worse than without correction.
        identity = torch.ones_like(scale), torch.zeros_like(shift)
        return min(limited, identity, key=lambda maps: solvers.objective(sums, maps[0], maps[1], *terms, grid))


class PTQD(AffineMaps):
    """PTQD's correction (He et al., NeurIPS 2023, arXiv 2305.10657, section 3): one K, and one b per channel.

    The quantization noise is split into `q - r = k r + rest`, where k is the slope of its linear regression on r.
    `K = 1 / (1 + k)` removes the correlated part; b removes the mean of the rest. K is 1 if r is constant or 1 + k is
    not positive.
    """

    def fit(self, sums: Moments) -> Maps:
        """See :meth:`AffineMaps.fit`."""
        n, q, r, qr, rr = (x.sum() for x in (sums.n, sums.q, sums.r, sums.qr, sums.rr))
        variance, covariance = rr - r * r / n, qr - q * r / n
        scale = variance / covariance if bool(covariance > 1e-12 * rr) and bool(variance > 0) else torch.ones_like(n)
        scale = scale.expand_as(sums.n).clone()
        return scale, (sums.r - scale * sums.q) / sums.n

    def noise_scale(self, step: Step) -> float:
        """Return the factor for the scheduler's own noise (section 3.4, variance schedule calibration).

        A stochastic step adds noise of variance sigma^2 and carries over c^2 times the remaining variance of the
        quantization noise; the former is reduced by the latter, to no less than 0. Returns 1 for deterministic
        schedulers, timesteps between fitted ones, and steps that are not enabled.
        """
        if step.timestep not in self.errors:
            return 1.0
        scale, shift = self.table[step.timestep]
        if bool((scale == 1).all()) and not bool(shift.any()):
            return 1.0
        c, sigma = step_coefficients(step)
        if not (math.isfinite(c) and math.isfinite(sigma)) or sigma == 0:
            return 1.0
        return math.sqrt(max(0.0, 1 - c * c * self.errors[step.timestep][1] / (sigma * sigma)))


class TAC(AffineMaps):
    """TAC-Diffusion's noise estimation reconstruction (Yao et al., ECCV 2024, arXiv 2407.03917): one K per channel.

    It is a least-squares fit through the origin. The absolute and relative error, which the paper blends, have the same
    minimum here, because one K covers all pixels that share a weight. The paper's input bias correction acts on the
    latents.
    """

    @classmethod
    def of_latents(cls, config: AffinerConfig) -> AffineMaps | None:
        """See :meth:`AffineMaps.of_latents`."""
        return MeanShift(config) if config.stepper.recurrent else None

    def fit(self, sums: Moments) -> Maps:
        """See :meth:`AffineMaps.fit`."""
        scale = torch.where(sums.qq > 0, sums.qr / torch.where(sums.qq > 0, sums.qq, 1.0), 1.0)
        return scale, torch.zeros_like(scale)


class MeanShift(AffineMaps):
    """Only the mean difference of each channel, K = 1."""

    def fit(self, sums: Moments) -> Maps:
        """See :meth:`AffineMaps.fit`."""
        return torch.ones_like(sums.n), (sums.r - sums.q) / sums.n


METHODS: dict[str, type[AffineMaps]] = {"blockwise": Blockwise, "ptqd": PTQD, "tac": TAC}


def checked_tensor(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """Return the tensor of the given name.

    Raises:
        ValueError: The tensor is missing, has another dtype, or is not finite.
    """
    if name not in tensors:
        raise ValueError(f"there is no tensor {name!r}")
    if tensors[name].dtype != dtype or not bool(tensors[name].isfinite().all()):
        raise ValueError(f"tensor {name!r} must be finite {dtype}, got {tensors[name].dtype}")
    return tensors[name]
