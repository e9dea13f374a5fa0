"""The low-rank branch of SVDQuant (arXiv 2411.05007): ``W ~ up @ down + quantized residual``."""

from __future__ import annotations

import torch
from torch import Tensor

#: Narrowest block of the Krylov basis: below it products are no cheaper, and there would be more of them.
BLOCK = 16
#: Gain from the last block, as a share of the energy captured or of that left (the lesser), below which the basis is
#: done. A gain is a fifth to half of the one before it, so what is still missing is less.
TOLERANCE = 5e-4


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
