"""Tables of affine maps, one a timestep: solved from sums, applied to latents of any layout, stored as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hfquant.affiner import solvers
from hfquant.affiner.solvers import Grid, Moments


class AffineMaps:
    """A table of maps `x <- K_t x + b_t`, float32 `[C, h, w]` a timestep, and the sums that they are solved from.

    Args:
        blocksize: Side of the blocks in pixels; None for one block a channel.
        solve: Gives K and b from sums of blocks (of pixels where `interpolate`).
        interpolate: Maps are bilinear between block centres instead of constant on blocks.
        enabled: Numbers of the timesteps, in order of their first observation, that get a map; the others keep the
            identity.
    """

    def __init__(
        self,
        blocksize: int | None,
        solve: Callable[[Moments, Grid], tuple[Tensor, Tensor]],
        interpolate: bool = False,
        enabled: tuple[int, ...] | None = None,
    ) -> None:
        self.blocksize, self.interpolate, self.enabled = blocksize, interpolate, enabled
        self.size: tuple[int, int] | None = None
        #: timestep -> (K, b)
        self.table: dict[float, tuple[Tensor, Tensor]] = {}
        #: timestep -> mean squared error over all samples and pixels (before, after)
        self.errors: dict[float, tuple[float, float]] = {}
        self._solve = solve
        self._order: list[float] = []
        self._sums: dict[float, Moments] = {}

    def observe(self, timestep: float, real: Tensor, quant: Tensor) -> None:
        """Adds a batch: `[B, C, H, W]`, or packed or video latents (see :func:`to_grid`)."""
        real, quant = to_grid(real), to_grid(quant)
        size = (real.shape[-2], real.shape[-1])
        if self.size not in (None, size):
            raise ValueError(f"all samples must have latents of one size; after {self.size} came {size}")
        self.size = size
        sums = solvers.moments(real, quant, 1 if self.interpolate else self.blocksize)
        if timestep not in self._order:
            self._order.append(timestep)
        self._sums[timestep] = self._sums[timestep] + sums if timestep in self._sums else sums

    def solve(self, timestep: float) -> None:
        """Fits the map of one timestep to all that was observed there."""
        sums, grid = self._sums[timestep], self._grid()
        scale, shift = self._solve(sums, grid)
        if self.enabled is not None and self._order.index(timestep) not in self.enabled:
            scale, shift = torch.ones_like(scale), torch.zeros_like(shift)
        self.table[timestep] = scale.float(), shift.float()
        spread = [solvers.expand(x, grid, True) for x in (scale, shift)] if self.interpolate else (scale, shift)
        after = sums.squared_error(*spread)
        count = float(sums.n.sum())
        self.errors[timestep] = float(sums.squared_error().sum()) / count, float(after.sum()) / count
        # Second-order schedulers come back to a timestep at once; sums of earlier ones are done with.
        self._sums = {t: s for t, s in self._sums.items() if t == timestep or t not in self.table}

    def apply(self, timestep: float, values: Tensor) -> Tensor:
        """`K_t x + b_t`, computed in float32, for latents of any size; in the dtype of `values`.

        K and b are interpolated linearly between the neighbouring timesteps that were fitted. Latents of another size
        than fitted have the maps stretched to theirs (nearest block, or bilinear where `interpolate`); packed tokens
        only from a square to a square, as nothing tells the height and width of others.

        Raises:
            ValueError: The timestep lies outside the fitted ones, the channels differ, or packed tokens of another
                number than fitted are no square.
        """
        grid = to_grid(values)
        size, (scale, shift) = (grid.shape[-2], grid.shape[-1]), self.at(timestep)
        if grid.shape[1] != len(scale):
            raise ValueError(f"the affiner was fitted on {len(scale)} channels, got {grid.shape[1]}")
        assert self.size is not None
        if values.dim() == 3 and size != self.size and 1 in (size[1], self.size[1]) and scale[0].numel() > 1:
            raise ValueError(
                f"the affiner was fitted on {self.size[0] * self.size[1]} packed tokens and cannot be stretched to "
                f"{values.shape[1]}: both must be squares. Fit it at this size, or with solver.blocksize=null"
            )
        scale, shift = (self._stretched(x, size).to(values.device) for x in (scale, shift))
        return from_grid((grid.float() * scale + shift).to(values.dtype), values)

    def _grid(self) -> Grid:
        assert self.size is not None
        return Grid(*self.size, self.blocksize or max(self.size))

    def _stretched(self, blocks: Tensor, size: tuple[int, int]) -> Tensor:
        pixels = solvers.expand(blocks, self._grid(), self.interpolate)
        if size == self.size:
            return pixels
        if self.interpolate:
            return F.interpolate(pixels[None], size, mode="bilinear", align_corners=False)[0]
        return F.interpolate(pixels[None], size, mode="nearest-exact")[0]

    def at(self, timestep: float) -> tuple[Tensor, Tensor]:
        """K and b of a timestep, `[C, h, w]`.

        Raises:
            ValueError: It lies outside the fitted range.
        """
        if timestep in self.table:
            return self.table[timestep]
        below, above = (
            max((t for t in self.table if t < timestep), default=None),
            min((t for t in self.table if t > timestep), default=None),
        )
        if below is None or above is None:
            fitted = f"[{min(self.table):g}, {max(self.table):g}]" if self.table else "nothing"
            raise ValueError(
                f"timestep {timestep:g} is outside what the affiner was fitted on, {fitted}: fit it with the scheduler "
                "and the number of steps that you run, or more steps"
            )
        share = (timestep - below) / (above - below)
        (k0, b0), (k1, b1) = self.table[below], self.table[above]
        return torch.lerp(k0, k1, share), torch.lerp(b0, b1, share)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The table as tensors: timesteps [T], scale and shift [T, C, h, w], errors [T, 2]; highest timestep first."""
        times = sorted(self.table, reverse=True)
        return {
            f"{prefix}.timesteps": torch.tensor(times, dtype=torch.float64),
            f"{prefix}.scale": torch.stack([self.table[t][0] for t in times]),
            f"{prefix}.shift": torch.stack([self.table[t][1] for t in times]),
            f"{prefix}.errors": torch.tensor([self.errors[t] for t in times], dtype=torch.float64),
        }

    def load(self, prefix: str, size: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        """The reverse of :meth:`tensors`.

        Raises:
            ValueError: A tensor is missing, has another dtype, or shapes do not fit each other.
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
        self.table = {t: (scale[i].clone(), shift[i].clone()) for i, t in enumerate(self._order)}
        self.errors = {t: (float(errors[i, 0]), float(errors[i, 1])) for i, t in enumerate(self._order)}


def to_grid(values: Tensor) -> Tensor:
    """Any latents as `[B, C, H, W]`.

    Video `[B, C, T, H, W]`: frames become samples. Packed tokens `[B, L, C]`: a square of side sqrt(L) if L is a square
    number, else a column of L pixels.

    Raises:
        ValueError: Another number of dimensions.
    """
    match values.dim():
        case 4:
            return values
        case 5:
            return values.transpose(1, 2).flatten(0, 1)
        case 3:
            side = math.isqrt(values.shape[1])
            size = (side, side) if side * side == values.shape[1] else (values.shape[1], 1)
            return values.transpose(1, 2).unflatten(2, size)
    raise ValueError(f"an affiner corrects latents of 3, 4 or 5 dimensions, got shape {list(values.shape)}")


def from_grid(grid: Tensor, like: Tensor) -> Tensor:
    """The reverse of :func:`to_grid`, given what it was called with."""
    match like.dim():
        case 5:
            return grid.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
        case 3:
            return grid.flatten(2).transpose(1, 2)
    return grid


def checked_tensor(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """The tensor of that name.

    Raises:
        ValueError: It is missing, of another dtype, or not finite.
    """
    if name not in tensors:
        raise ValueError(f"there is no tensor {name!r}")
    if tensors[name].dtype != dtype or not bool(tensors[name].isfinite().all()):
        raise ValueError(f"tensor {name!r} must be finite {dtype}, got {tensors[name].dtype}")
    return tensors[name]
