"""Inputs and weights in blocks of channels, each times a Hadamard matrix, before they are quantized."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: The largest blocks.
MOST_ROTATED = 4096


def rotated(x: Tensor, size: int) -> Tensor:
    """Return ``x`` [..., in] with blocks of ``size`` channels rotated, the rest in blocks of smaller powers of two.

    Its own inverse: the matrix is symmetric. A size of 0 rotates nothing.
    """
    if not size:
        return x
    whole = x.shape[-1] // size * size
    parts = []
    if whole:
        blocks = x[..., :whole].unflatten(-1, (-1, size))
        parts.append((blocks @ _matrix(size, x)).flatten(-2))
    if whole < x.shape[-1]:
        rest = x[..., whole:]
        parts.append(rotated(rest, size // 2) if size > 2 else rest)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def hadamard(size: int) -> Tensor:
    """Return Sylvester's Hadamard matrix of ``size``, a power of two, made orthogonal; [size, size] float32."""
    matrix = torch.ones(1, 1, device="cpu")
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu")
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    return matrix / size**0.5


_known: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}


def _matrix(size: int, like: Tensor) -> Tensor:
    """Return the matrix on the device and in the dtype of another tensor, made once for each."""
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        return hadamard(size).to(like)  # what is traced must not outlive its trace
    key = size, like.device, like.dtype
    if key not in _known:
        with torch.inference_mode(False):  # a tensor of that mode could not be saved for a backward later
            _known[key] = hadamard(size).to(like)
    return _known[key]
