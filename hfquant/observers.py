"""What calibration collects: the range of each input channel of each layer, in one pass over the data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)


class CalibrationError(ValueError):
    """Calibration data that cannot be used. The message names the layer and the batch."""


@dataclass
class LayerStats:
    """Statistics of the input of one linear, over all rows (tokens) seen.

    Attributes:
        low, high: [in] float32, smallest and largest value of each channel.
        rows: how many rows were seen.
    """

    low: Tensor
    high: Tensor
    rows: int

    @property
    def amax(self) -> Tensor:
        """[in] float32, largest magnitude of each channel."""
        return torch.maximum(-self.low, self.high)

    def merge(self, other: LayerStats) -> LayerStats:
        """Statistics of both sets of rows: exact, and independent of the order."""
        return LayerStats(
            torch.minimum(self.low, other.low), torch.maximum(self.high, other.high), self.rows + other.rows
        )


def layer_stats(x: Tensor) -> LayerStats:
    """Statistics of inputs ``x`` [rows, in], rows >= 1."""
    low, high = x.float().aminmax(dim=0)
    return LayerStats(low, high, x.shape[0])


def batches(loader: Any) -> Iterable[Any]:
    """``loader`` itself, checked.

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
        raise CalibrationError("calibration data: the loader is empty")
    return loader


def samples(batch: Any) -> list[Any]:
    """The samples of a batch: a list is many, anything else one."""
    return batch if isinstance(batch, list) else [batch]


def arguments(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that a sample stands for.

    Raises:
        TypeError: the sample is not a tensor, a tuple or a mapping.
    """
    if isinstance(sample, Tensor):
        return (sample,), {}
    if isinstance(sample, tuple):
        return sample, {}
    if isinstance(sample, Mapping):
        return (), dict(sample)
    hint = "; tokenize text first" if isinstance(sample, str) else ""
    raise TypeError(f"calibration data: a sample is a tensor, a tuple or a dict, got {type(sample).__name__}{hint}")


def run(model: nn.Module, sample: Any) -> None:
    """One forward of ``model`` on a sample, moved to the device the model expects."""
    args, kwargs = send_to_device(arguments(sample), _device(model))
    model(*args, **kwargs)


def _device(model: nn.Module) -> torch.device | str | int:
    hook = getattr(model, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
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


def observe(
    model: nn.Module, layers: Mapping[str, nn.Module], loader: Any, progress: bool = True
) -> dict[str, LayerStats]:
    """Run ``model`` over the data once and collect the statistics of the inputs of ``layers``.

    Rows that a batch's 2-D ``attention_mask`` masks out (padding) are not counted.

    Args:
        model: run as it is, in eval mode.
        layers: name -> module (of ``model``).
        loader: batches: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of these.
        progress: whether to show a bar.

    Returns:
        name -> statistics; layers that never ran (or saw no rows) are missing.

    Raises:
        CalibrationError: NaN or Inf reached a layer, or the loader is empty.
        TypeError: unusable data.
    """
    stats: dict[str, LayerStats] = {}
    context: dict[str, Any] = {"batch": 0, "mask": None}

    def hook(name: str) -> Any:
        def pre_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else kwargs["input"]).detach()
            mask = context["mask"]
            rows = x[mask] if mask is not None and x.shape[:2] == mask.shape else x.reshape(-1, x.shape[-1])
            if not rows.shape[0]:
                return
            new = layer_stats(rows)
            if not (new.low.isfinite().all() and new.high.isfinite().all()):
                raise CalibrationError(
                    f"layer {name!r}: {int((~rows.isfinite()).sum())} of {rows.numel()} inputs are NaN or Inf "
                    f"in calibration batch {context['batch']}"
                )
            stats[name] = stats[name].merge(new) if name in stats else new

        return pre_forward

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in layers.items()]
    try:
        with evaluating(model):
            for context["batch"], batch in enumerate(tqdm(batches(loader), "calibrating", disable=not progress)):
                for sample in samples(batch):
                    context["mask"] = _padding_mask(sample, _device(model))
                    run(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    return stats


def _padding_mask(sample: Any, device: torch.device | str | int) -> Tensor | None:
    """The rows to keep, where the sample's attention mask is 2-D and masks something out."""
    mask = sample.get("attention_mask") if isinstance(sample, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool((mask != 0).all()):
        return None
    return (mask != 0).to(device)
