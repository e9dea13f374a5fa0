"""``load_state_dict`` of quantized modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hfquant.algorithms import TensorSpec


class TakesCodes(nn.Module):
    """A module whose ``load_state_dict`` refuses float weights, which torch would truncate to codes."""

    def specs(self) -> dict[str, TensorSpec]:
        """Return shape and dtype (None for floats) of each tensor."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # As for sizes that do not match: also without `strict`, and the rest of the model is loaded.
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
