"""The low-rank branch of SVDQuant (arXiv 2411.05007): ``W ~ up @ down + quantized residual``."""

from __future__ import annotations

import torch
from torch import Tensor

#: Extra columns and power iterations of the randomized SVD (Halko et al., arXiv 0909.4061, algorithm 4.4).
OVERSAMPLING = 16
ITERATIONS = 4
#: Gain in captured energy from the last two iterations above which the randomized result is not trusted.
TOLERANCE = 2e-4


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of ``weight`` [out, in] of rank ``rank`` in the Frobenius norm (Eckart-Young).

    Randomized where that is cheaper and has converged, else exact.

    Returns:
        up [out, rank] and down [rank, in], float32, singular values split evenly between them.
    """
    width = rank + OVERSAMPLING
    if width * 4 <= min(weight.shape):
        factors = _randomized(weight.float(), rank, width)
        if factors is not None:
            return factors
    return _exact(weight, rank)


def _exact(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    w = weight.double()
    tall = w.shape[0] > w.shape[1]
    if tall:
        w = w.T
    # Eigenvectors of the smaller Gram matrix, in float64: several times cheaper than a full SVD.
    vectors = torch.linalg.eigh(w @ w.T).eigenvectors[:, -rank:].flip(-1)
    other = vectors.T @ w
    root = other.norm(dim=1).sqrt()
    left, right = vectors * root, other / root.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    return (right.T.float(), left.T.float()) if tall else (left.float(), right.float())


def _randomized(weight: Tensor, rank: int, width: int) -> tuple[Tensor, Tensor] | None:
    generator = torch.Generator(device="cpu").manual_seed(0)
    probe = torch.randn(weight.shape[1], width, generator=generator).to(weight)
    basis = torch.linalg.qr(weight @ probe).Q
    energy = None
    for iteration in range(ITERATIONS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
        if iteration in (ITERATIONS - 3, ITERATIONS - 1):
            u, s, vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
            captured = s[:rank].double().square().sum()
            if energy is not None and not captured - energy <= TOLERANCE * captured:
                return None
            energy = captured
    root = s[:rank].sqrt()
    return (basis @ u[:, :rank]) * root, root[:, None] * vh[:rank]
