"""The float modules behind quantized layers: finding their input, copying them without weights, checking subclasses."""

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

#: Attributes of ``nn.Module`` that hold the hooks which users register.
HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)


def first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return a layer's input from the arguments of its forward."""
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


def with_first(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a layer's forward with another input."""
    if args:
        return (value, *args[1:]), dict(kwargs)
    return (), {**kwargs, next(iter(kwargs)): value}


class _Undo:
    """A handle like those of torch hooks."""

    def __init__(self, remove: Callable[[], Any]) -> None:
        self.remove = remove


def overridden(module: nn.Module, name: str, method: Callable[..., Tensor]) -> RemovableHandle:
    """Override a method on this one module until the handle is removed."""
    vars(module)[name] = method
    return cast(RemovableHandle, _Undo(lambda: vars(module).pop(name, None)))


def hollow(module: nn.Module) -> nn.Module:
    """Return a copy of a module without children or hooks and with its parameters on the meta device."""
    new = object.__new__(type(module))
    nn.Module.__init__(new)
    for key, value in vars(module).items():
        if key not in vars(new):
            vars(new)[key] = value
    forget_hook(new)
    new._buffers, new._non_persistent_buffers_set = dict(module._buffers), set(module._non_persistent_buffers_set)
    for key, param in module._parameters.items():
        if key not in ("weight", "bias"):
            continue
        empty = None if param is None else torch.empty(param.shape, dtype=param.dtype, device="meta")
        new._parameters[key] = None if empty is None else nn.Parameter(empty, requires_grad=False)
    return new.train(module.training)


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a subclass of ``nn.Linear`` has no additional state and behaves like ``nn.Linear``."""
    tensors = {*module._parameters, *module._buffers, *module._modules}
    attributes = {key for key in vars(module) if not key.startswith("_")}
    adds = tensors - {"weight", "bias"} or attributes - {"in_features", "out_features", "training", "forward"}
    return not adds and _runs_as_linear(cast(Any, type(module)))


@cache
def _runs_as_linear(kind: Any) -> bool:
    """Return whether the forward of a stateless subclass equals ``F.linear``, tested on a few numbers."""
    # torch defines its own subclasses for special treatment.
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
        except Exception:  # noqa: BLE001 (third-party code may raise anything; then it is no plain linear)
            return False
        if not same:
            return False
    return True
