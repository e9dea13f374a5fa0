"""The interface through which the guard (:mod:`hfquant.guard`) checks a quantized layer of any kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfquant.nn.base import See
from hfquant.nn.float_modules import first

if TYPE_CHECKING:
    from hfquant.nn.layer import QuantLayer


class Checked(nn.Module):
    """The methods that compare a :class:`~hfquant.nn.layer.QuantLayer` with its float layer, as linears implement them.

    :class:`~hfquant.nn.experts.QuantExperts`, which has many matrices, has its own :meth:`parts`, :meth:`listen` and
    :meth:`with_parts`; the other methods are those of its parts.
    """

    def parts(self) -> dict[str, QuantLayer]:
        """Return the single-matrix layers of this module by name; "" names the module itself."""
        return {"": cast("QuantLayer", self)}

    def listen(self, see: See) -> RemovableHandle:
        """Call ``see`` with each input that is multiplied and its output until the handle is removed."""
        return self.register_forward_hook(lambda m, args, kwargs, y: see("", first(args, kwargs), y), with_kwargs=True)

    def float_output(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """Return the float layer's output, in float32, for an input seen by :meth:`listen`."""
        return F.linear(x.float(), matrix.float(), None if bias is None else bias.float())

    def output_rows(self, y: Tensor) -> Tensor:
        """Return an output as rows [rows, out]."""
        return y.reshape(-1, y.shape[-1])

    def input_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Return the part of the input from which :meth:`multiply` computes rows ``index`` of the output."""
        return x.reshape(-1, x.shape[-1])[index]

    def with_parts(self, parts: Mapping[str, QuantLayer | None], original: nn.Module) -> nn.Module:
        """Return the replacement for this module with other :meth:`parts`.

        Args:
            parts: layers by name; None for float.
            original: the float module.
        """
        return parts[""] or original
