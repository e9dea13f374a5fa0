"""Replace modules of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hfquant.nn.float_modules import HOOKS
from hfquant.offload import copy_hook


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace each key with its value wherever ``model`` refers to it; its hooks, and accelerate's, go along."""
    found: set[nn.Module] = set()
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                found.add(child)
                new = replacements[child]
                new.training = child.training
                parent._modules[name] = new
        _replace_in_attributes(parent, replacements)
    for old, new in replacements.items():
        copy_hook(old, new)
        if old in found:
            # Shared, so that handles of old hooks remove them from the new module.
            vars(new).update({name: vars(old)[name] for name in HOOKS})


def _replace_in_attributes(parent: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules in plain lists and tuples too, since some classes run modules from there.

    One example is MaskFormer's ``self.layers = [convolution, norm]``, whose modules are also registered by other names.
    """

    def new(value: Any) -> Any:
        return replacements.get(value, value) if isinstance(value, nn.Module) else value

    for name, value in vars(parent).items():
        if isinstance(value, list):
            value[:] = map(new, value)
        elif type(value) is tuple:
            vars(parent)[name] = tuple(map(new, value))
