"""The kinds of layers: which float modules can be quantized, and by which class.

To add a kind, write a subclass of :class:`~hfquant.nn.layer.QuantLayer` in one file and add it to :data:`KINDS`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hfquant.nn.conv import QuantConv
from hfquant.nn.conv1d import QuantConv1D
from hfquant.nn.embedding import QuantEmbedding
from hfquant.nn.layer import QuantLayer
from hfquant.nn.linear import QuantLinear
from hfquant.offload import hooks_of

KINDS: list[type[QuantLayer]] = [QuantLinear, QuantConv1D, QuantConv, QuantEmbedding]

#: Modules that have matrices but that no kind supports, with the reason.
_OTHERS = {
    nn.MultiheadAttention: "nn.MultiheadAttention reads its projections as raw parameters",
    nn.ConvTranspose1d: "a transposed convolution",
    nn.ConvTranspose2d: "a transposed convolution",
    nn.ConvTranspose3d: "a transposed convolution",
    nn.Bilinear: "a bilinear layer",
}


def find_kind(module: nn.Module) -> type[QuantLayer] | None:
    """Return the kind of layer that ``module`` can be quantized as; None if it cannot be quantized."""
    kind = _taken(module)
    return None if kind is None or _refused(kind, module) else kind


def kind_of(module: nn.Module) -> type[QuantLayer]:
    """Return the kind of layer that ``module`` can be quantized as.

    Raises:
        TypeError: it cannot be quantized; use :func:`find_kind` if that may be.
    """
    kind = find_kind(module)
    if kind is None:
        why = refusal(module) or "none of the kinds in hfquant.nn.kinds takes it"
        raise TypeError(f"{type(module).__name__} cannot be quantized: {why}")
    return kind


def matrix_of(module: nn.Module) -> Tensor:
    """Return the weight of a module that can be quantized as its matrix [out, in], a detached view."""
    return kind_of(module).matrix(module.get_parameter("weight").detach())


def refusal(module: nn.Module) -> str:
    """Return why a module with a matrix cannot be quantized; "" if it can, or if it has no matrix."""
    kind = _taken(module)
    if kind is not None:
        return _refused(kind, module)
    return next((why for other, why in _OTHERS.items() if isinstance(module, other)), "")


def layers_in(model: nn.Module) -> dict[str, type[QuantLayer]]:
    """Return the modules of ``model`` that can be quantized, as name -> kind."""
    kinds = {name: find_kind(module) for name, module in model.named_modules()}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def size_of(module: nn.Module) -> tuple[int, int]:
    """Return in_features and out_features of the matrix of a module that can be quantized."""
    shape = module.get_parameter("weight").shape
    out, columns = kind_of(module).matrix(torch.empty(shape, device="meta")).shape
    return columns, out


def _taken(module: nn.Module) -> type[QuantLayer] | None:
    if isinstance(module, QuantLayer):
        return None
    return next((kind for kind in KINDS if kind.takes(module)), None)


def _refused(kind: type[QuantLayer], module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight):
        return "its weight is computed as it runs"
    if not weight.numel():
        return "its weight is empty"
    known = (weight, module._parameters.get("bias"), None)
    if module._modules or any(all(p is not k for k in known) for p in module._parameters.values()):
        return f"{type(module).__name__} has more than a weight and a bias"
    for name in ("forward", "_conv_forward"):
        if _overrides(module, name):
            return f"its {name} is overridden in this one module"
    return kind.refuses(module)


def _overrides(module: nn.Module, name: str) -> bool:
    """Return whether a module has a method of its own in the place of its class's; hooks of libraries do not count."""
    method = vars(module).get(name)
    if method is None or (name == "forward" and any(hooks_of(module))):
        return False
    # A hook that is removed leaves the class's method in the module.
    return getattr(method, "__func__", None) is not getattr(type(module), name, None)
