"""Hadamard rotation of inputs and weights, in blocks of channels, before quantization."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

#: Largest block size.
MOST_ROTATED = 4096


def rotated(x: Tensor, size: int) -> Tensor:
    """Return ``x`` [..., in] rotated in blocks of ``size`` channels, and the rest in blocks of smaller powers of two.

    The function is its own inverse, since the matrix is symmetric. A size of 0 rotates nothing.
    """
    if not size:
        return x
    whole = x.shape[-1] // size * size
    parts = []
    if whole:
        blocks = x[..., :whole].unflatten(-1, (-1, size))
        # In half precision, only the matrices of powers of four are exact.
        wide = blocks.float() if x.dtype.itemsize == 2 and size.bit_length() % 2 == 0 else blocks
        parts.append((wide @ _matrix(size, wide)).to(x.dtype).flatten(-2))
    if whole < x.shape[-1]:
        rest = x[..., whole:]
        parts.append(rotated(rest, size // 2) if size > 2 else rest)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def hadamard(size: int) -> Tensor:
    """Return Sylvester's Hadamard matrix of ``size``, a power of two, scaled to be orthogonal; [size, size] float32."""
    matrix = torch.ones(1, 1, device="cpu")
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu")
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    return matrix / size**0.5


def keep(columns: int, size: int, device: torch.device, dtype: torch.dtype) -> None:
    """Create the matrices with which :func:`rotated` will rotate ``columns`` channels in blocks of ``size``."""
    while size > 1:
        if columns >= size:
            _kept(size, device, dtype)
        columns, size = columns % size, size // 2


@cache
def _kept(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
        return hadamard(size).to(device, dtype)


def _matrix(size: int, like: Tensor) -> Tensor:
    """Return the matrix with the device and dtype of another tensor, cached for each pair."""
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        return hadamard(size).to(like)  # a traced tensor must not outlive its trace
    return _kept(size, like.device, like.dtype)
