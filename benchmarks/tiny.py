"""Small models with random weights, from candidate sizes that a class may reject."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn


def built(makers: Iterable[Callable[[str], nn.Module]], most: int) -> Iterator[nn.Module]:
    """Yield the models that can be built and have at most ``most`` parameters.

    Args:
        makers: functions from a device to a model; each may raise any error of its class about such sizes.
        most: largest number of parameters.

    Raises:
        Exception: the first error, if no model can be built.
    """
    first: Exception | None = None
    found = False
    for make in makers:
        try:
            size = sum(p.numel() for p in make("meta").parameters())
            if size > most:
                raise ValueError(f"too large: {size / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = make("cpu").eval().float()
            for parameter in model.parameters():
                if not parameter.isfinite().all():  # uninitialized memory, meant to be filled from a checkpoint
                    nn.init.normal_(parameter, std=0.02)
        except Exception as error:  # noqa: BLE001 (each class has its own)
            first = first or error
            continue
        found = True
        yield model
    if first is not None and not found:
        raise first
