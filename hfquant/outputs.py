"""Model outputs: the tensor to compare, and the distance between two outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.calibration.batches import mask_name, mask_of

#: Config attributes with the number of tokens or labels.
_COUNTS = ("vocab_size", "num_labels")
#: Relative differences of divergences that rounding causes.
_ROUNDING = 1e-6


def main_tensor(output: Any) -> Tensor:
    """Return the logits of a model's output, or else its first floating-point tensor.

    Raises:
        ValueError: the output has neither.
    """
    if isinstance(logits := getattr(output, "logits", None), Tensor):
        return logits
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, Mapping) else list(output) if output is not None else []
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if isinstance(value, (list, tuple, Mapping)) and value:
            return main_tensor(value)
    raise ValueError(f"a {type(output).__name__} holds no tensor of floats to compare")


def is_distribution(model: nn.Module, output: Tensor) -> bool:
    """Return whether a model's output is logits over tokens or labels along its last dimension."""
    config = getattr(model, "config", None)
    counts = [getattr(c, n, None) for c in (config, getattr(config, "text_config", None)) for n in _COUNTS]
    return output.dim() > 1 and output.shape[-1] > 1 and output.shape[-1] in counts


def divergence(output: Tensor, expected: Tensor, are_logits: bool, mask: Tensor | None = None) -> Tensor:
    """Return how far ``output`` is from ``expected`` for each element of the batch, [batch].

    Args:
        output, expected: [batch, ...] float32.
        are_logits: whether to return the mean KL divergence ``KL(expected || output)`` per token or label, in nats,
            rather than the relative squared error.
        mask: [batch, tokens], 0 for tokens that do not count; None if all do.
    """
    if not are_logits:
        error, size = (x.square().reshape(len(x), -1).sum(1) for x in (output - expected, expected))
        return error / size.clamp(min=torch.finfo(torch.float32).tiny)
    log_p, log_q = expected.log_softmax(-1), output.log_softmax(-1)
    each = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if mask is None:
        return each.reshape(len(each), -1).mean(1)
    return (each * mask).sum(1) / mask.sum(1).clamp(min=1)


def decibels(signal: Tensor, noise: Tensor) -> Tensor:
    """Return the ratio of two sums of squares in dB; infinite without noise, even where there is no signal either."""
    return (10 * (signal / noise).log10()).where(noise != 0, math.inf)


def better(one: Tensor, other: Tensor) -> bool:
    """Return whether ``one``'s divergences are less than ``other``'s by more than two standard errors of the mean.

    A single divergence is too few to tell, so the result is then False, as it is if the difference is of the size of
    float32's rounding, which can be the same in all divergences.
    """
    difference = one - other
    if len(difference) < 2:
        return False
    error = 2 * difference.std().item() / math.sqrt(len(difference))
    return difference.mean().item() < -max(error, _ROUNDING * other.mean().item())


def padding_mask(model: nn.Module, sample: Any, output: Tensor, module: nn.Module | None = None) -> Tensor | None:
    """Return the attention mask [batch, tokens] of a call, if it fits an output [batch, tokens, ...]; else None.

    Args:
        model: the model that was called.
        sample: its arguments.
        output: output of the model, or of ``module``.
        module: a part of the model.
    """
    mask = mask_of(model, sample, mask_name(model, module or model))
    if mask is None or output.dim() != 3 or mask.shape != output.shape[:2]:
        return None
    return mask.to(output.device)
