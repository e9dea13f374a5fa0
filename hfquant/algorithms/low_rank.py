"""The low-rank branch of SVDQuant (arXiv 2411.05007): ``W ~ up @ down + quantized residual``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from hfquant.algorithms.base import Problem, Strength, TensorSpec, Transform, Transformed
from hfquant.algorithms.smooth import Smooth

#: Narrowest block of the Krylov basis: below it products are no cheaper, and there would be more of them.
BLOCK = 16
#: Gain from the last block, as a share of the energy captured or of that left (the lesser), below which the basis is
#: done. A gain is a fifth to half of the one before it, so what is still missing is less.
TOLERANCE = 5e-4


class LowRank(Smooth):
    """Smooth, then take the best rank-r part of the weight out into a float branch; the rest is quantized."""

    type: Literal["svd"] = "svd"  # type: ignore[assignment]
    low_rank: int = Field(32, ge=1, description="Rank of the branch; cut to the layer's smaller side.")

    def fitted(self, in_features: int, rows: Sequence[int]) -> Self:
        """Cut the rank to the smallest side of a group of rows."""
        limit = min(in_features, *rows)
        return self if self.low_rank <= limit else self.model_copy(update={"low_rank": limit})

    def tensors(self, in_features: int, rows: Sequence[int]) -> dict[str, TensorSpec]:
        """Return ``smooth``, ``svd_down`` [groups r, in] and ``svd_up`` [out, r]."""
        return super().tensors(in_features, rows) | {
            "svd_down": TensorSpec((len(rows) * self.low_rank, in_features), None),
            "svd_up": TensorSpec((sum(rows), self.low_rank), None),
        }

    def applied(
        self, weight: Tensor, divisor: Tensor, problem: Problem, alphas: tuple[Strength, ...] = ()
    ) -> Transformed:
        """Return the residual of ``W s``, and the factors as cast; ``svd_down`` acts on the raw input: 1/s is in it."""
        smoothed = weight * divisor
        up, down = low_rank(smoothed, self.low_rank)
        # Contiguous, as a checkpoint stores them: products of other strides round otherwise.
        up, down = up.to(problem.dtype).contiguous(), (down / divisor).to(problem.dtype).contiguous()
        residual = smoothed - up.float() @ (down.float() * divisor)
        return Transformed(residual, {"smooth": divisor, "svd_down": down, "svd_up": up}, divisor, alphas)

    def added(self, x: Tensor, tensors: Mapping[str, Tensor], columns: slice) -> Tensor | None:
        """Return the low-rank branch's output for some input columns, [rows, out]."""
        return x[:, columns] @ tensors["svd_down"].float()[:, columns].T @ tensors["svd_up"].float().T

    def branch(self, tensors: Mapping[str, Tensor | None], group: int, rows: slice) -> tuple[Tensor, Tensor] | None:
        """Return the factors."""
        down, up = tensors["svd_down"], tensors["svd_up"]
        assert down is not None
        assert up is not None
        return (
            (down, up)
            if len(down) == self.low_rank
            else (down.view(-1, self.low_rank, down.shape[-1])[group], up[rows])
        )

    def restored(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return ``W / s + up @ down``."""
        return self._with_branch(super().restored(weight, tensors, rows), tensors, rows, 1)

    def reapplied(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        """Return ``(W - up @ down) s``."""
        return super().reapplied(self._with_branch(weight, tensors, rows, -1), tensors, rows)

    def _with_branch(
        self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int], sign: int
    ) -> Tensor:
        start = 0
        for group, part in enumerate(weight.split(list(rows))):
            factors = self.branch(tensors, group, slice(start, start + len(part)))
            assert factors is not None
            down, up = factors
            part.addmm_(up.float(), down.float(), alpha=sign)
            start += len(part)
        return weight

    def folded(self) -> Transform:
        """Return the branch alone."""
        return Branch(low_rank=self.low_rank)

    def describe(self) -> str:
        """Return the rank."""
        return f"rank={self.low_rank}"


class Branch(LowRank):
    """What is left of :class:`LowRank` where the divisor has gone into what comes before the layer.

    Both the codes and the branch see the divided input.
    """

    needs_data: ClassVar[bool] = False

    def tensors(self, in_features: int, rows: Sequence[int]) -> dict[str, TensorSpec]:
        """Return ``svd_down`` [groups r, in] and ``svd_up`` [out, r]."""
        specs = super().tensors(in_features, rows)
        return {name: spec for name, spec in specs.items() if name != "smooth"}

    def solve(self, weight: Tensor, problem: Problem) -> Transformed:
        """Return the residual of ``W``, and the factors as cast."""
        made = self.applied(weight, torch.ones_like(weight[0]), problem)
        return Transformed(made.weight, {name: made.tensors[name] for name in ("svd_down", "svd_up")})


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of ``weight`` [out, in] of rank ``rank`` in the Frobenius norm (Eckart-Young).

    Randomized where that is cheaper and has converged, else exact.

    Returns:
        up [out, rank] and down [rank, in], float32, singular values split evenly between them.
    """
    width = max(rank, BLOCK)
    if width * 4 <= min(weight.shape):
        factors = _block_krylov(weight.float(), rank, width)
        if factors is not None:
            return factors
    return _exact(weight, rank)


def _exact(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    w = weight.double()
    tall = w.shape[0] > w.shape[1]
    if tall:
        w = w.T
    # Eigenvectors of the smaller Gram matrix, in float64: several times cheaper than a full SVD.
    vectors = torch.linalg.eigh(w @ w.T).eigenvectors[:, -rank:]
    left, right = _factors(vectors, vectors.T @ w)
    return (right.T, left.T) if tall else (left, right)


def _factors(vectors: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``vectors @ rows`` (singular vectors, and those times the matrix) with the singular values shared out."""
    root = rows.norm(dim=1).sqrt()
    return (vectors * root).float(), (rows / root.clamp(min=torch.finfo(rows.dtype).tiny)[:, None]).float()


def _block_krylov(weight: Tensor, rank: int, width: int) -> tuple[Tensor, Tensor] | None:
    """Musco and Musco, arXiv 1504.05477, algorithm 2, the basis orthonormal as it grows; None where it grows too large.

    Unlike subspace iteration, which keeps the last block alone, it converges in a few products even where singular
    values decay slowly, as those of weights do.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(weight.shape[1], width, generator=generator).to(weight)
    basis = torch.linalg.qr(weight @ probe).Q
    rows = basis.T @ weight
    energy, captured = weight.double().square().sum(), torch.zeros(())
    noise = torch.finfo(weight.dtype).eps * energy
    while True:
        values, vectors = torch.linalg.eigh(rows.double() @ rows.double().T)
        before, captured = captured, values[-rank:].sum()
        if captured - before <= (TOLERANCE * torch.minimum(captured, energy - captured)).clamp(min=noise):
            vectors = vectors[:, -rank:].to(weight)
            return _factors(basis @ vectors, vectors.T @ rows)
        if 2 * (basis.shape[1] + width) > min(weight.shape):
            return None
        block = weight @ rows[-width:].T
        for _ in range(2):  # once leaves what rounding lets through
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis, rows = torch.cat([basis, block], 1), torch.cat([rows, block.T @ weight])
