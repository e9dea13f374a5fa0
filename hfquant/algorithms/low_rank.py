"""The low-rank branch of SVDQuant (arXiv 2411.05007): ``W ~ up @ down + quantized residual``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from hfquant.algorithms.base import Problem, Strength, TensorSpec, Transform, Transformed
from hfquant.algorithms.smooth import Smooth

#: Minimum block width of the Krylov basis. Narrower products are no cheaper, and more of them would be needed.
BLOCK = 16
#: Convergence threshold: the basis is complete once the last block's gain falls below this share of the captured or the
#: remaining energy, whichever is smaller. Each gain is a fifth to half of the previous one, so the missing energy is
#: even smaller.
TOLERANCE = 5e-4


class LowRank(Smooth):
    """Smooth, then move the best rank-r approximation of the weight into a float branch and quantize the rest."""

    type: Literal["svd"] = "svd"  # type: ignore[assignment]
    low_rank: int = Field(32, ge=1, description="Rank of the branch, capped at the layer's smaller dimension.")

    def fitted(self, in_features: int, rows: Sequence[int]) -> Self:
        """Return the transform with its rank capped at the smallest side of a row group."""
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
        """Return the residual of ``W s`` and the cast factors; ``svd_down`` acts on the raw input and includes 1/s."""
        smoothed = weight * divisor
        up, down = low_rank(smoothed, self.low_rank)
        # Contiguous, as in a checkpoint: products with other strides round differently.
        up, down = up.to(problem.dtype).contiguous(), (down / divisor).to(problem.dtype).contiguous()
        residual = smoothed - up.float() @ (down.float() * divisor)
        return Transformed(residual, {"smooth": divisor, "svd_down": down, "svd_up": up}, divisor, alphas)

    def added(self, x: Tensor, tensors: Mapping[str, Tensor], columns: slice) -> Tensor | None:
        """Return the low-rank branch's output for the given input columns, [rows, out]."""
        return x[:, columns] @ tensors["svd_down"].float()[:, columns].T @ tensors["svd_up"].float().T

    def branch(self, tensors: Mapping[str, Tensor | None], group: int, rows: slice) -> tuple[Tensor, Tensor] | None:
        """Return the low-rank factors."""
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
        """Return only the branch."""
        return Branch(low_rank=self.low_rank)

    def describe(self) -> str:
        """Return the rank as text."""
        return f"rank={self.low_rank}"


class Branch(LowRank):
    """The part of :class:`LowRank` that remains once the divisor is folded into the preceding module.

    Both the codes and the branch see the divided input.
    """

    needs_data: ClassVar[bool] = False

    def tensors(self, in_features: int, rows: Sequence[int]) -> dict[str, TensorSpec]:
        """Return ``svd_down`` [groups r, in] and ``svd_up`` [out, r]."""
        specs = super().tensors(in_features, rows)
        return {name: spec for name, spec in specs.items() if name != "smooth"}

    def solve(self, weight: Tensor, problem: Problem) -> Transformed:
        """Return the residual of ``W`` and the cast factors."""
        made = self.applied(weight, torch.ones_like(weight[0]), problem)
        return Transformed(made.weight, {name: made.tensors[name] for name in ("svd_down", "svd_up")})


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best rank-``rank`` approximation of ``weight`` [out, in] in the Frobenius norm (Eckart-Young).

    Uses a randomized method if it is cheaper and converges, otherwise an exact one.

    Returns:
        up [out, rank] and down [rank, in], float32, with the singular values split evenly between them.
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
    # The eigenvectors of the smaller Gram matrix in float64 are several times cheaper than a full SVD.
    vectors = torch.linalg.eigh(w @ w.T).eigenvectors[:, -rank:]
    left, right = _factors(vectors, vectors.T @ w)
    return (right.T, left.T) if tall else (left, right)


def _factors(vectors: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split the singular values of ``vectors @ rows`` evenly; ``rows`` are the vectors times the matrix."""
    root = rows.norm(dim=1).sqrt()
    return (vectors * root).float(), (rows / root.clamp(min=torch.finfo(rows.dtype).tiny)[:, None]).float()


def _block_krylov(weight: Tensor, rank: int, width: int) -> tuple[Tensor, Tensor] | None:
    """Run algorithm 2 of Musco and Musco, arXiv 1504.05477, on a growing orthonormal basis; None if it grows too large.

    Unlike subspace iteration, which keeps only the last block, it converges in a few products even if singular values
    decay slowly, as those of weights do.
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
        for _ in range(2):  # one pass leaves rounding errors behind
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis, rows = torch.cat([basis, block], 1), torch.cat([rows, block.T @ weight])
