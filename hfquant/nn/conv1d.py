"""GPT-2's ``Conv1D``: a linear that stores its weight as [in, out]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hfquant.nn.linear import QuantLinear


class QuantConv1D(QuantLinear):
    """A quantized ``Conv1D`` of transformers. It runs as a linear and converts back to a ``Conv1D``."""

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Return whether ``module`` is a ``Conv1D`` by class name and tensors; ``nn.Conv1d`` does not match."""
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        sizes = getattr(module, "nx", None), getattr(module, "nf", None)
        if type(module).__name__ != "Conv1D" or weight is None or bias is None:
            return False
        return (tuple(weight.shape), tuple(bias.shape)) == (sizes, sizes[1:])

    @staticmethod
    def refuses(module: nn.Module) -> str:
        """Return "", since every ``Conv1D`` can be quantized."""
        return ""

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """Return [in, out] as [out, in]."""
        return weight.T

    @staticmethod
    def float_weight(matrix: Tensor, shape: torch.Size) -> Tensor:
        """Return [out, in] as [in, out]."""
        return matrix.T
