"""The float modules that quantized layers replace: their input, a copy without weights, what a subclass really does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from inspect import signature
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfquant.offload import forget_hook


def first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input of a layer from the arguments that its forward got."""
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


class _Undo:
    """A handle like those of torch's hooks."""

    def __init__(self, remove: Callable[[], Any]) -> None:
        self.remove = remove


def overridden(module: nn.Module, name: str, method: Callable[..., Tensor]) -> RemovableHandle:
    """Have ``method`` in the place of a method of this one module, until the handle is removed."""
    vars(module)[name] = method
    return cast(RemovableHandle, _Undo(lambda: vars(module).pop(name, None)))


def hollow(module: nn.Module) -> nn.Module:
    """Return a copy of a module without children, without hooks, its parameters on the meta device."""
    new = object.__new__(type(module))
    nn.Module.__init__(new)
    for key, value in vars(module).items():
        if key not in vars(new):
            vars(new)[key] = value
    forget_hook(new)
    new._buffers, new._non_persistent_buffers_set = dict(module._buffers), set(module._non_persistent_buffers_set)
    for key in {"weight", "bias"} & module._parameters.keys():
        param = module._parameters[key]
        empty = None if param is None else torch.empty(param.shape, dtype=param.dtype, device="meta")
        new._parameters[key] = None if empty is None else nn.Parameter(empty, requires_grad=False)
    return new.train(module.training)


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a subclass of ``nn.Linear`` has nothing that a plain one has not, and does what that does."""
    tensors = {*module._parameters, *module._buffers, *module._modules}
    attributes = {key for key in vars(module) if not key.startswith("_")}
    adds = tensors - {"weight", "bias"} or attributes - {"in_features", "out_features", "training", "forward"}
    return not adds and _runs_as_linear(cast(Any, type(module)))


@cache
def _runs_as_linear(kind: Any) -> bool:
    """Return whether the forward of a subclass that adds no state is ``F.linear``, by running it on a few numbers."""
    # torch's own subclasses are there to be treated otherwise.
    if kind.__module__.startswith("torch.") or len(signature(kind.forward).parameters) != 2:
        return False
    numbers = torch.arange(64, dtype=torch.float64, device="cpu").sin()
    x, weight = numbers[:20].view(2, 2, 5), numbers[20:35].view(3, 5)
    for bias in (None, numbers[35:38]):
        probe: Any = object.__new__(kind)
        nn.Linear.__init__(probe, 5, 3, bias is not None, "meta")
        probe.weight = nn.Parameter(weight, requires_grad=False)
        probe.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        try:
            same = torch.allclose(probe.forward(x), F.linear(x, weight, bias))
        except Exception:  # noqa: BLE001 (whatever a stranger's code raises: it is no plain linear)
            return False
        if not same:
            return False
    return True
