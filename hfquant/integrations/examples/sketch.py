"""Shared by the rules for single inputs: config fields, chosen sizes, and the forward's parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2  # not 1: a batch of one looks like a broadcast dimension
TOKENS = 8
NEVER_LEFT_OUT = (
    "encoder_hidden_states",
    "img_ids",
    "txt_ids",
    "added_cond_kwargs",
)  # defaults that a forward has, but cannot run with


class UnknownInput(LookupError):
    """An input of the forward that cannot be determined."""


Rule = Callable[["Sketch"], Any]  # makes the value of one parameter; None omits it


@dataclass
class Sketch:
    """A model whose inputs are being created.

    Attributes:
        model: the model.
        config: its config.
        layout: latent layout, for diffusers: "image", "video", "packed", "tokens", "audio", "frames first" or "channels
            last".
    """

    model: nn.Module
    config: Any
    layout: str = ""

    def field(self, *names: str, default: Any = None) -> Any:
        """Return the first of the config's fields that exists and is set."""
        get = self.config.get if isinstance(self.config, Mapping) else lambda n: getattr(self.config, n, None)
        return next((value for value in map(get, names) if value is not None), default)

    def need(self, *names: str) -> Any:
        """Return the first of the config's fields that exists and is set.

        Raises:
            UnknownInput: none of them is set.
        """
        value = self.field(*names)
        if value is None:
            raise UnknownInput(f"its config has none of {', '.join(names)}")
        return value

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the model's forward."""
        return inspect.signature(self.model.forward).parameters

    def fill(self, rules: Mapping[str, Rule], needed_rules: Mapping[str, Rule]) -> dict[str, Any]:
        """Return a value for each parameter of the forward that has a rule.

        Args:
            rules: value makers by parameter name.
            needed_rules: the same for parameters that are omitted if they have a default.

        Raises:
            UnknownInput: a parameter without a default has no rule, or its rule lacks a config field.
        """
        made = {}
        for name, parameter in self.parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            optional = parameter.default is not parameter.empty
            rule = rules.get(name) or (None if optional else needed_rules.get(name))
            try:
                value = rule(self) if rule else None
            except UnknownInput as error:
                if not optional or name in NEVER_LEFT_OUT:
                    raise UnknownInput(f"forward's {name}: {error}") from error
                continue
            if value is None and not optional and rule is None:
                raise UnknownInput(f"forward needs {name}, which no rule makes")
            if value is not None or not optional:
                made[name] = value
        return made


def ids(vocabulary: int, *shape: int) -> Tensor:
    """Return token ids below ``vocabulary``."""
    return torch.arange(math.prod(shape)).reshape(shape) % max(vocabulary, 1)


def fixed(value: Any) -> Rule:
    """Return a rule that always returns ``value``."""
    return lambda s: value
