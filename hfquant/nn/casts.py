"""Casting quantized modules: codes and scales keep their dtypes, floats follow the model."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn


def keeping_dtypes(
    module: nn.Module, fn: Callable[[Tensor], Tensor], names: Collection[str]
) -> Callable[[Tensor], Tensor]:
    """Wrap ``fn`` for ``nn.Module._apply`` so that the tensors ``names`` are moved but never cast."""
    tensors = {**module._parameters, **module._buffers}
    fixed = {id(tensor) for name, tensor in tensors.items() if name in names}

    def applied(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return tensor.to(new.device) if id(tensor) in fixed and new.dtype != tensor.dtype else new

    return applied


def cast_by(fn: Callable[[Tensor], Tensor], dtype: torch.dtype, like: Tensor | None) -> torch.dtype:
    """Return the dtype that ``fn``, as passed to ``nn.Module._apply``, gives to a tensor of ``dtype``.

    Args:
        fn: the function.
        dtype: any.
        like: a tensor on the device that the function expects; None: the CPU.
    """
    return fn(torch.empty(0, dtype=dtype, device="cpu" if like is None else like.device)).dtype
