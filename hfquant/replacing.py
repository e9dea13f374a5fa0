"""Put other modules in the place of a model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hfquant.offload import copy_hook


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value in the place of its key, wherever ``model`` refers to it; accelerate's hooks move along."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                new = replacements[child]
                new.training = child.training
                parent._modules[name] = new
        _replace_in_attributes(parent, replacements)
    for old, new in replacements.items():
        copy_hook(old, new)


def _replace_in_attributes(parent: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others in plain lists and tuples too, from which some classes take them to run.

    MaskFormer's ``self.layers = [convolution, norm]`` is one: each is registered by another name beside it.
    """

    def new(value: Any) -> Any:
        return replacements.get(value, value) if isinstance(value, nn.Module) else value

    for name, value in vars(parent).items():
        if isinstance(value, list):
            value[:] = map(new, value)
        elif type(value) is tuple:
            vars(parent)[name] = tuple(map(new, value))
