"""QuantModule, the base class of all modules that hold quantized weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfquant.algorithms import TensorSpec
from hfquant.nn.casts import keeping_dtypes

if TYPE_CHECKING:  # circular: layers derive from this class
    from hfquant.layer_plan import LayerPlan
    from hfquant.nn.layer import QuantLayer

See = Callable[[str, Tensor, Tensor], Tensor | None]
"""Called with each product's part name, input and output; may return a replacement for the output."""


class QuantModule(nn.Module):
    """A module that holds the codes of one matrix or of several.

    The two subclasses are :class:`~hfquant.nn.layer.QuantLayer` and :class:`~hfquant.nn.experts.QuantExperts`.

    On disk, codes have a leading dimension of 1 and the format's on-disk dtype, which no float module accepts: a model
    loaded without hfquant fails instead of producing garbage.

    Attributes:
        real_quant: whether products run on low-bit kernels.
    """

    real_quant: bool
    #: Names of the tensors in the model's float dtype; the others keep their dtype when the model is cast.
    _model_floats: set[str]

    @property
    def code_names(self) -> tuple[str, ...]:
        """Names of the tensors that hold the module's own codes."""
        raise NotImplementedError

    def specs(self, on_disk: bool = False) -> dict[str, TensorSpec]:
        """Return shape and dtype (None for floats) of each tensor, in memory or on disk, including biases."""
        raise NotImplementedError

    def held(self) -> list[tuple[LayerPlan, int, dict[str, Tensor]]]:
        """Return for each plan the number of matrices and their tensors by QuantLinear's names, including the bias."""
        raise NotImplementedError

    def in_memory(self, name: str, value: Tensor) -> Tensor:
        """Return the value of tensor ``name`` in its in-memory form, given that or the one on disk."""
        raise NotImplementedError

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the float module with dequantized weights in ``dtype``; default: the one they had, or were cast to."""
        raise NotImplementedError

    def parts(self) -> dict[str, QuantLayer]:
        """Return the single-matrix layers of this module by name; "" names the module itself."""
        raise NotImplementedError

    def listen(self, see: See) -> RemovableHandle:
        """Call ``see`` with the input and output of each part's product until the handle is removed."""
        raise NotImplementedError

    def with_parts(self, parts: Mapping[str, QuantLayer | None], original: nn.Module) -> nn.Module:
        """Return the replacement for this module with other :meth:`parts`.

        Args:
            parts: layers by name; None for float.
            original: the float module.
        """
        raise NotImplementedError

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Replace parameter or buffer ``name`` with ``value``; codes may be in their on-disk form.

        Raises:
            ValueError: there is no such tensor, or its shape or dtype does not fit.
        """
        specs = self.specs()
        if name not in specs:
            raise ValueError(f"{self._get_name()} has no tensor {name!r}; available: {', '.join(specs)}")
        shape, dtype = specs[name]
        value = self.in_memory(name, value)
        fits = value.is_floating_point() if dtype is None else value.dtype == dtype
        if tuple(value.shape) != shape or not fits:
            raise ValueError(
                f"tensor {name!r}: expected shape {shape} of {dtype or 'floats'}, "
                f"got {tuple(value.shape)} of {value.dtype}"
            )
        if name in self._parameters:
            setattr(self, name, nn.Parameter(value, requires_grad=False))
        else:
            self._buffers[name] = value

    def codes_on_disk(self, name: str = "weight") -> Tensor:
        """Return codes in their checkpoint form."""
        shape, dtype = self.specs(on_disk=True)[name]
        assert dtype is not None
        return self.get_parameter(name).data.view(shape).view(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keeping_dtypes(self, fn, self.specs().keys() - self._model_floats), recurse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # torch would truncate float weights to codes. As for sizes that do not match: also without `strict`, and the
        # rest of the model is loaded.
        *_, error_msgs = args
        if foreign := self._foreign(state_dict, prefix):
            error_msgs.append(
                f"dtype mismatch for {', '.join(foreign)}: the layer is quantized, and left as it was. Load float "
                "weights before quantizing, or call hfquant.dequantize(model) first; load the files of a quantized "
                "checkpoint with from_pretrained."
            )
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _foreign(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """Return what a state dict has in place of codes, or of other tensors whose dtype is set by the format."""
        own = {**self._parameters, **self._buffers}
        found = []
        for name, spec in self.specs().items():
            tensor, given = own.get(name), state_dict.get(prefix + name)
            if spec.dtype is None or tensor is None or not isinstance(given, Tensor) or given.dtype == tensor.dtype:
                continue
            if not (_is_wide_float(tensor) and _is_wide_float(given)):  # scales in another precision are no codes
                found.append(f"{prefix}{name} ({given.dtype} instead of {tensor.dtype})")
        return found


def _is_wide_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1
