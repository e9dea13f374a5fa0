"""Find the convolutions of autoencoders: their errors damage the image, while a denoiser compensates for its own."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from hfquant.nn.conv import QuantConv
from hfquant.nn.layer import QuantLayer

#: Matches class names of models that convert images or audio to latents or codes, or back.
_NAMES = re.compile(r"VAE|Auto[eE]ncoder|VQ(?!A)|[cC]odec|Vocoder|HifiGan|^Dac|^Mimi")


def autoencoder_convs(model: nn.Module, kinds: Mapping[str, type[QuantLayer]]) -> set[str]:
    """Return the names of the convolutions that belong to an autoencoder: ``model`` or a part of it.

    Args:
        model: any module.
        kinds: its layers that can be quantized, and the kind of each.
    """
    convs = [name for name, kind in kinds.items() if issubclass(kind, QuantConv)]
    parts = [name for name, module in model.named_modules() if _is_autoencoder(type(module))] if convs else []
    return {conv for conv in convs if any(not part or conv.startswith(f"{part}.") for part in parts)}


def _is_autoencoder(kind: type) -> bool:
    """Return whether a class is an autoencoder, by its name, the name of a base class, or its module in diffusers."""
    own = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base.__module__.split(".")[0] != "torch"]
    return any(b.__module__.startswith("diffusers.models.autoencoders.") or _NAMES.search(b.__name__) for b in own)
