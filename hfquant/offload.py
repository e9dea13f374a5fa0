"""Modules whose forward accelerate or diffusers has wrapped, to fetch weights or move inputs, say.

Neither library has a public way to ask for such a hook, so the attributes that hold them are read here alone.
``tests/smoke/test_offload.py`` checks them against the installed versions, the oldest allowed among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from torch import nn

_ACCELERATE, _DIFFUSERS = "_hf_hook", "_diffusers_hook"


def has_hook(model: nn.Module) -> bool:
    """Return whether accelerate runs some module of ``model``, and so may fetch its weights when they are needed."""
    return any(_ACCELERATE in vars(module) for module in model.modules())


def execution_device(module: nn.Module) -> torch.device | str | int | None:
    """Return where accelerate runs ``module``; None where it does not say."""
    hook = vars(module).get(_ACCELERATE)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    said = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in said if device is not None), None)


def fetches_weights(module: nn.Module) -> bool:
    """Return whether accelerate keeps the module's weights elsewhere and fetches them for each forward."""
    hook = vars(module).get(_ACCELERATE)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return any(getattr(hook, "offload", False) for hook in hooks)


def copy_hook(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the hook of accelerate that ``old`` has, unless it has one. ``old`` keeps its own."""
    if _ACCELERATE in vars(old) and _ACCELERATE not in vars(new):
        add_hook_to_module(new, _renewed(vars(old)[_ACCELERATE]))


def forget_hook(copied: nn.Module) -> None:
    """Take what accelerate bound to the original off a shallow copy of a module."""
    for key in (_ACCELERATE, "_old_forward", "forward"):
        vars(copied).pop(key, None)


def _renewed(hook: Any) -> Any:
    """Return a hook for another module: one that offloads has its module's weights, and must take the new one's."""
    if isinstance(hook, SequentialHook):
        return SequentialHook(*map(_renewed, hook.hooks))
    if not isinstance(hook, AlignDevicesHook):
        return hook
    return AlignDevicesHook(
        execution_device=hook.execution_device,
        offload=hook.offload,
        io_same_device=hook.io_same_device,
        offload_buffers=hook.offload_buffers,
        place_submodules=hook.place_submodules,
        skip_keys=hook.skip_keys,
    )


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """Yield what either library keeps of its own in ``module``, weights included; a copy of the module may share it."""
    yield from (vars(module)[name] for name in (_ACCELERATE, _DIFFUSERS) if name in vars(module))


def drop_wrappers(copied: nn.Module, fetch: bool) -> None:
    """Have a copied module run its own forward.

    Args:
        copied: What ``copy.deepcopy`` made of a module, its hooks shared with it.
        fetch: Leave accelerate's wrapper, which fetches weights. diffusers' goes in any case: it runs the module that
            was copied, not the copy.
    """
    if _DIFFUSERS in vars(copied) or (not fetch and _ACCELERATE in vars(copied)):
        vars(copied).pop("forward", None)
