"""Put other modules in the place of a model's."""

from __future__ import annotations

from collections.abc import Mapping

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
    for old, new in replacements.items():
        copy_hook(old, new)
