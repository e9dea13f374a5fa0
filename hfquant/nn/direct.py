"""Direct calls: a layer's product as a single call of the kernel's op.

Between other work, when caches are cold, the Python code that leads to a kernel takes as long as the product of a small
layer and one token. What it decides depends on little, so a layer remembers it until that changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from hfquant.algorithms import Transform
from hfquant.kernels.base import Op
from hfquant.kernels.table import pick

if TYPE_CHECKING:  # circular: layers make direct calls
    from hfquant.nn.layer import QuantLayer


class Direct(NamedTuple):
    """A layer's call of an op: ``op(x, weight, *buffers, bias, *last)``.

    It keeps no tensor of the layer, so that these may be replaced or offloaded.

    Attributes:
        key: what may change and decides how the layer multiplies a contiguous input on the CPU.
        op: None if the layer has to take the long way.
        names: names of the buffers that are passed, "" for none.
        last: the last arguments.
    """

    key: tuple[Any, ...]
    op: Op | None = None
    names: tuple[str, ...] = ()
    last: tuple[Any, ...] = ()


def direct_call(layer: QuantLayer, x: Tensor, key: tuple[Any, ...]) -> Direct:
    """Return the direct call for inputs like ``x``.

    Args:
        layer: a linear.
        x: an input that the layer accepts.
        key: see :class:`Direct`.

    Raises:
        ValueError: see :func:`hfquant.kernels.table.pick`.
    """
    long_way, product, plan, transform = Direct(key), layer.product, layer.plan, type(layer._transform)
    overridden = transform.input is not Transform.input or transform.output is not Transform.output
    if not (layer.real_quant and x.is_cpu and x.numel()) or layer.get_parameter("weight").dim() != 2:
        return long_way
    if overridden or len(plan.row_groups) > 1:
        return long_way
    kernel = pick(product, "cpu", x.dtype, x.numel() // product.in_features, plan.out_features)
    found = kernel.direct(product, x.dtype)
    names = {id(tensor): name for name, tensor in layer._buffers.items()} | {id(None): ""}
    between = layer.operands(0, slice(None))[1:-1]
    if found is None or not all(id(tensor) in names for tensor in between):
        return long_way
    return Direct(key, found[0], tuple(names[id(tensor)] for tensor in between), found[1])
