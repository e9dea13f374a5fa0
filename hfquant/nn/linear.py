"""QuantLinear, the quantized replacement for a linear."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hfquant.kernels.table import VARIABLE
from hfquant.nn.direct import Direct, direct_call
from hfquant.nn.float_modules import is_plain_linear
from hfquant.nn.layer import QuantLayer

if TYPE_CHECKING:  # circular: layer_plan imports the kinds of layers
    from hfquant.layer_plan import LayerPlan


class QuantLinear(QuantLayer, nn.Linear):  # type: ignore[misc]
    """A quantized ``nn.Linear``, or a quantized subclass with the same behavior."""

    bias: nn.Parameter | None  # type: ignore[assignment]
    #: The call that the last input on the CPU took.
    _direct: Direct | None = None

    def __init__(
        self,
        plan: LayerPlan,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(plan, bias, device, dtype)
        self.in_features, self.out_features = plan.in_features, plan.out_features
        self._remember(nn.Linear(self.in_features, self.out_features, bias, "meta"))

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Return whether ``module`` is an ``nn.Linear``."""
        return isinstance(module, nn.Linear)

    @staticmethod
    def refuses(module: nn.Module) -> str:
        """Return why a subclass of ``nn.Linear`` does not behave like one; "" if it does."""
        kind = type(module)
        if kind is nn.Linear or is_plain_linear(module):
            return ""
        return f"it is a subclass of nn.Linear, {kind.__name__}"

    def forward(self, input: Tensor) -> Tensor:
        """Map ``input`` [..., in] of any float dtype to [..., out] of the same dtype.

        Sums are exact or float32, with or without autocast. In training, gradients pass to the input straight through.

        Raises:
            TypeError: ``input`` is not floating point (it was cast to the dtype of the codes).
            ValueError: its last dimension is not ``in_features``.
        """
        if type(input) is Tensor and not torch.compiler.is_compiling():
            weight, tensors = self._parameters["weight"], self._buffers
            assert weight is not None
            key = input.dtype, input.shape, self.real_quant, weight.shape, len(tensors), os.environ.get(VARIABLE)
            if (call := self._direct) is None or call.key != key:
                self._check(input)
                call = self._direct = direct_call(self, input, key)
            op, bias = call.op, self._parameters.get("bias")
            learns = input.requires_grad or (bias is not None and bias.requires_grad)
            plain = input.is_cpu and input.is_contiguous() and weight.dtype == self._code_dtype
            if op is not None and plain and not (learns and torch.is_grad_enabled()) and forward_ad._current_level < 0:
                return op(input, weight, *map(tensors.get, call.names), bias, *call.last)
        self._check(input)
        return self.multiply(input)

    def _check(self, input: Tensor) -> None:
        if not input.is_floating_point():
            raise TypeError(
                f"QuantLinear({self.in_features}, {self.out_features}) got an input of {input.dtype}: code that casts "
                f"to `linear.weight.dtype` sees the dtype of the codes here; cast to the model's dtype instead"
            )
        if not input.dim() or input.shape[-1] != self.in_features:
            raise ValueError(
                f"QuantLinear({self.in_features}, {self.out_features}) got an input of shape {tuple(input.shape)}"
            )

    def __getstate__(self) -> dict[str, Any]:
        # An op cannot be pickled, and another machine may lack it.
        return {name: value for name, value in vars(self).items() if name != "_direct"}
