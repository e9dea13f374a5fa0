"""Calibration batches: what they may be, and a model's forward on one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from inspect import signature
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn


class CalibrationError(ValueError):
    """Calibration data that cannot be used. The message names the layer and the batch."""


def batches(loader: Any, may_be_empty: bool = False) -> Any:
    """``loader`` itself, checked; None where it is empty and may be.

    Raises:
        TypeError: not an iterable, or an iterator (which cannot be walked again).
        CalibrationError: empty.
    """
    if isinstance(loader, (str, bytes, Mapping)) or not isinstance(loader, Iterable):
        raise TypeError(
            f"calibration data: expected a DataLoader or an iterable of batches, got {type(loader).__name__}"
        )
    if isinstance(loader, Iterator):
        raise TypeError(
            f"calibration data: {type(loader).__name__} can be walked only once; pass a list, a DataLoader or another "
            "iterable that starts anew"
        )
    if not list(islice(loader, 1)):
        if may_be_empty:
            return None
        raise CalibrationError("calibration data: the loader is empty")
    return loader


def samples(batch: Any) -> list[Any]:
    """The samples of a batch: a list is many, anything else one."""
    return batch if isinstance(batch, list) else [batch]


def run(model: nn.Module, sample: Any, options: Mapping[str, Any] | None = None) -> None:
    """One forward of ``model`` on a sample, moved to the device the model expects.

    Args:
        model: called as it is.
        sample: its arguments.
        options: keyword arguments that a sample of keyword arguments may lack.

    Raises:
        TypeError: the sample is not a tensor, a tuple of positional or a mapping of keyword arguments.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(sample, Mapping):
        kwargs = {**(options or {}), **sample}
    elif isinstance(sample, tuple):
        args = sample
    elif isinstance(sample, Tensor):
        args = (sample,)
    else:
        hint = "; tokenize text first" if isinstance(sample, str) else ""
        raise TypeError(f"calibration data: a sample is a tensor, a tuple or a dict, got {type(sample).__name__}{hint}")
    args, kwargs = send_to_device((args, kwargs), device_of(model))
    model(*args, **kwargs)


def device_of(model: nn.Module) -> torch.device | str | int:
    """Where ``model`` wants its inputs: where accelerate executes it, else where its first tensor lies."""
    execution = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if execution is not None:
        return execution
    tensors = (t.device for t in [*model.parameters(), *model.buffers()] if t.device.type != "meta")
    return next(tensors, torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients, the training flags restored after."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def options_for(model: nn.Module, layers: Iterable[nn.Module]) -> dict[str, Any]:
    """Arguments that spare a language model what nobody looks at: its cache, and logits of all but the last token."""
    accepted = signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    if head is not None and "logits_to_keep" in accepted and not any(layer is head for layer in layers):
        options["logits_to_keep"] = 1
    return options


def release_free_memory() -> None:
    """Give pages that malloc keeps for later back to the system, where the C library can (glibc).

    Statistics that are replaced with every batch, and all that solving a layer takes, leave holes between what stays;
    they would come to more than is in use.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
