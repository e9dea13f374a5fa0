"""What the guard (:mod:`hfquant.guard`) asks of a quantized layer, so that it need not know which kind it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfquant.nn.float_modules import first

if TYPE_CHECKING:
    from hfquant.nn.layer import QuantLayer

See = Callable[[str, Tensor, Tensor], Tensor | None]
"""Is told of a product: which of a module's parts made it, of what, and the output; may return another output."""


class Checked(nn.Module):
    """The side of a :class:`~hfquant.nn.layer.QuantLayer` that is compared with its float one, as linears have it.

    :class:`~hfquant.nn.experts.QuantExperts`, which has many matrices, has :meth:`parts`, :meth:`listen` and
    :meth:`with_parts` of its own; its parts have the rest.
    """

    def parts(self) -> dict[str, QuantLayer]:
        """Return the layers of one matrix that this is made of, by name: "" for itself."""
        return {"": cast("QuantLayer", self)}

    def listen(self, see: See) -> RemovableHandle:
        """Have ``see`` called with each input that is multiplied and its output, until the handle is removed."""
        return self.register_forward_hook(lambda m, args, kwargs, y: see("", first(args, kwargs), y), with_kwargs=True)

    def float_output(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the float layer gives for an input that :meth:`listen` saw, in float32."""
        return F.linear(x.float(), matrix.float(), None if bias is None else bias.float())

    def output_rows(self, y: Tensor) -> Tensor:
        """Return an output as rows [rows, out]."""
        return y.reshape(-1, y.shape[-1])

    def input_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Return what :meth:`multiply` makes rows ``index`` of the output of, from the input."""
        return x.reshape(-1, x.shape[-1])[index]

    def with_parts(self, parts: Mapping[str, QuantLayer | None], original: nn.Module) -> nn.Module:
        """Return what this becomes with other :meth:`parts`.

        Args:
            parts: by name; None for float.
            original: the float module.
        """
        return parts[""] or original
