"""Accepted forms of calibration batches, and running a model on one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hfquant.offload import execution_device

# Arguments of transformers models that are always tensors. Other arguments can be lists (QwenImage's img_shapes).
_TENSOR_ARGUMENTS = {
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "inputs_embeds"),
    *("pixel_values", "input_features", "input_values", "decoder_input_ids", "decoder_attention_mask"),
}
# Names of arguments that keep their precision: a timestep of 999 becomes 1000 in bfloat16. Features of a time series do
# not, nor does a pose.
_PRECISE = re.compile(
    r"ids$|(^|_)(time[a-z]*|sigmas?|rot(ary|ations?)?|rope|freq[a-z]*|coord[a-z]*|pos|positions?)(_(?!features$)|$)"
)


class CalibrationError(ValueError):
    """Calibration data that cannot be used. The message names the layer and the batch."""


def length_of(loader: Any) -> int | None:
    """Return the number of batches of a loader; None if it is unknown, as of a DataLoader over a stream."""
    try:
        return len(loader)
    except TypeError:
        return None


class CalibrationData:
    """The batches of a loader, validated once; each pass opens the loader once.

    Peeking at the first batch costs no extra pass: the first pass continues with the same iterator.

    Args:
        loader: a DataLoader or another iterable of batches that restarts each time it is iterated. A batch is a tensor,
            a tuple of positional arguments, a dict of keyword arguments, or a list (see :func:`samples`).

    Raises:
        CalibrationError: ``loader`` is not such an iterable.
    """

    def __init__(self, loader: Any) -> None:
        kind = type(loader).__name__
        if isinstance(loader, (str, bytes, Mapping, Tensor, np.ndarray)) or not isinstance(loader, Iterable):
            hint = "; put it in a list" if isinstance(loader, (Mapping, Tensor)) else ""
            raise CalibrationError(
                f"calibration data: expected a DataLoader or an iterable of batches, got {kind}{hint}"
            )
        if isinstance(loader, Iterator):
            raise CalibrationError(
                f"calibration data: {kind} can be iterated only once; pass a list, a DataLoader or another iterable "
                "that can be restarted"
            )
        self.loader: Any = loader
        self._peeked: list[Any] | None = None  # the first batch, once peeked at
        self._rest: Iterator[Any] | None = None

    @property
    def first(self) -> Any:
        """The first batch, or None if there is none."""
        return next(iter(self._peek()), None)

    def _peek(self) -> list[Any]:
        if self._peeked is None:
            self._rest = iter(self.loader)
            self._peeked = list(islice(self._rest, 1))
        return self._peeked

    def __iter__(self) -> Iterator[Any]:
        peeked = self._peek()
        rest, self._rest = self._rest, None
        if rest is not None:  # not by truth value, which is the length for a DataLoader's iterator
            yield from peeked
            yield from rest
            return
        if not peeked:
            return
        empty = True
        for batch in self.loader:
            empty = False
            yield batch
        if empty:
            raise CalibrationError(
                f"calibration data: {type(self.loader).__name__} yields nothing on a second pass; pass a list, "
                "a DataLoader or another iterable that can be restarted"
            )

    def __len__(self) -> int:
        """Return the number of batches.

        Raises:
            TypeError: the loader has no length.
        """
        return len(self.loader)


def samples(batch: Any) -> list[Any]:
    """Return the samples of a batch.

    A list that contains tensors is one sample of positional arguments: torch's default collate returns this form for
    rows that are tuples. A list of dicts, tuples or such lists is a list of samples, which is what a calibration set's
    loader yields. Anything else is one sample.

    Raises:
        CalibrationError: a list mixes bare tensors with tuples or dicts, so it can be read either way.
    """
    if not isinstance(batch, list):
        return [batch]
    if any(isinstance(item, (Tensor, np.ndarray)) for item in batch):
        if any(isinstance(item, (tuple, Mapping)) for item in batch):
            raise CalibrationError(
                "calibration data: a batch is a list that mixes tensors with tuples or dicts; if it holds the "
                "positional arguments of one call, make it a tuple; otherwise wrap each tensor in its own tuple"
            )
        return [tuple(batch)]
    return [sample for item in batch for sample in samples(item)]


def forward(model: nn.Module, sample: Any, options: Mapping[str, Any] | None = None) -> Any:
    """Run ``model`` on one sample, moved to the device and dtype the model expects, and return its output.

    Args:
        model: called as is.
        sample: its arguments: a tensor, a tuple of positional arguments or a mapping of keyword arguments.
        options: keyword arguments to add to a sample of keyword arguments that lacks them.

    Raises:
        CalibrationError: the sample has none of these types.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(sample, Mapping):
        kwargs = {**applicable(options or {}, sample), **sample}
    elif isinstance(sample, (tuple, Tensor, np.ndarray)):
        args = sample if isinstance(sample, tuple) else (sample,)
    else:
        hint = "; tokenize text first" if isinstance(sample, str) else ""
        raise CalibrationError(
            f"calibration data: a sample is a tensor, a tuple or a dict, got {type(sample).__name__}{hint}"
        )
    args, kwargs = placed(model, args, kwargs)
    return model(*args, **kwargs)


def as_tensors(sample: Any, names: Sequence[str] = ()) -> Any:
    """Return a sample with its arrays, and its lists whose names imply tensors, as tensors.

    Args:
        sample: arguments of a call, in any form that :func:`forward` takes.
        names: of positional arguments.
    """
    if isinstance(sample, Mapping):
        return {name: _as_tensor(name, value) for name, value in sample.items()}
    if not isinstance(sample, tuple):
        return _as_tensor("", sample)
    return tuple(_as_tensor(n, value) for n, value in zip_longest(names[: len(sample)], sample, fillvalue=""))


def decoder_side(model: nn.Module) -> set[nn.Module]:
    """Return the modules of an encoder-decoder that see the decoder's tokens; none for other models."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    found = [getattr(model, name)() for name in ("get_decoder", "get_output_embeddings") if hasattr(model, name)]
    return {m for part in found if isinstance(part, nn.Module) and part is not model for m in part.modules()}


def mask_name(model: nn.Module, module: nn.Module) -> str:
    """Return the argument that masks tokens in the output of a module, or of the model itself."""
    decodes = decoder_side(model)
    return "decoder_attention_mask" if module in decodes or (decodes and module is model) else "attention_mask"


def mask_of(model: nn.Module, sample: Any, name: str) -> Tensor | None:
    """Return the argument ``name`` of a call of ``model``, if it is a mask over [batch, tokens]; else None."""
    if isinstance(sample, tuple):
        sample = dict(zip(signature(model.forward).parameters, sample, strict=False))
    mask = _as_tensor(name, batched(model, sample).get(name)) if isinstance(sample, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def placed(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call of ``model`` as tensors, on the device and in the dtype that it expects.

    Floating-point tensors are cast to the model's dtype. Exceptions are tensors whose values would lose too much
    precision (times, positions and angles, recognized by argument name) and scalars and vectors ([], [n]), which models
    cast themselves.
    """
    dtype, names = dtype_of(model), list(signature(model.forward).parameters)
    args, kwargs = batched(model, args), batched(model, kwargs)
    args = tuple(
        _cast(name, value, dtype)
        for name, value in zip_longest(names[: len(args)], as_tensors(args, names), fillvalue="")
    )
    kwargs = {name: _cast(name, value, dtype) for name, value in as_tensors(kwargs).items()}
    return send_to_device((args, kwargs), device_of(model))


def batched(model: nn.Module, sample: Any) -> Any:
    """Return a sample of a transformers model with a batch dimension, if it is token ids of a single text without one.

    A tokenizer returns these for a text that is not in a list. All vectors of the same length get the dimension, and
    those that a decoder reads.

    Raises:
        CalibrationError: a tensor in the place of token ids does not hold integers.
    """
    if not hasattr(model, "main_input_name"):
        return sample
    if not isinstance(sample, Mapping):
        args = sample if isinstance(sample, tuple) else (sample,)
        named = dict(zip(signature(model.forward).parameters, args, strict=False))
        values = (*batched(model, named).values(), *args[len(named) :])
        return values if isinstance(sample, tuple) else values[0]
    ids = sample.get("input_ids")
    if isinstance(ids, list) and ids and isinstance(ids[0], int):
        ids = np.asarray(ids)
    if not isinstance(ids, (Tensor, np.ndarray)):
        return sample
    if (ids.is_floating_point() if isinstance(ids, Tensor) else ids.dtype.kind not in "iu") or not ids.ndim:
        raise CalibrationError(
            f"calibration data: {type(model).__name__} reads token ids, which are integers [batch, length], "
            f"got {ids.dtype} {list(ids.shape)}"
        )
    if ids.ndim > 1:
        return sample

    def one_text(name: str, value: Any) -> bool:
        vector = isinstance(value, Tensor) and value.dim() == 1
        decoded = name.startswith("decoder_") or (name == "labels" and vector and len(value) > 1)
        return vector and (decoded or value.shape == ids.shape)

    return {n: v[None] if one_text(n, v) else v for n, v in as_tensors(sample).items()}


def _cast(name: str, value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        fits = dtype is None or not value.is_floating_point() or value.dim() < 2 or _PRECISE.search(name)
        return value if fits else value.to(dtype)
    if isinstance(value, Mapping):
        return {key: _cast(str(key), item, dtype) for key, item in value.items()}
    return type(value)(_cast(name, item, dtype) for item in value) if type(value) in (list, tuple) else value


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return the dtype that ``model`` declares, else the one of all its float parameters; None if they differ."""
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    said = getattr(model, "dtype", None)
    found = {said} if isinstance(said, torch.dtype) else {p.dtype for p in model.parameters() if p.is_floating_point()}
    return found.pop() if len(found) == 1 and found <= set(floats) else None


def applicable(options: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` without those that would break the loss that a model computes from labels."""
    if any("label" in str(name) for name in sample):
        return {name: value for name, value in options.items() if name != "logits_to_keep"}
    return dict(options)


def _as_tensor(name: str, value: Any) -> Any:
    """Convert arrays to tensors, and lists too if their name implies a tensor; return anything else unchanged."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value)
    if name not in _TENSOR_ARGUMENTS or not isinstance(value, list):
        return value
    try:
        # torch's default collate transposes lists from several rows: one tensor [rows] per position.
        on_their_side = bool(value) and all(isinstance(item, Tensor) for item in value)
        return torch.stack(value, 1) if on_their_side and value[0].dim() else torch.as_tensor(np.asarray(value))
    except (ValueError, TypeError, RuntimeError) as error:
        raise CalibrationError(
            f"calibration data: {name!r} is a list that cannot be converted to a tensor ({error}); pad or group the "
            "rows to one length"
        ) from None


def device_of(model: nn.Module) -> torch.device | str | int:
    """Return the device for the inputs of ``model``: accelerate's execution device, else that of its first tensor."""
    if (execution := execution_device(model)) is not None:
        return execution
    tensors = (t.device for t in [*model.parameters(), *model.buffers()] if t.device.type != "meta")
    return next(tensors, torch.device("cpu"))


@contextmanager
def evaluating(*models: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Run models in eval mode; restore the mode of each of their modules afterwards.

    Args:
        models: any number of models.
        gradients: whether to leave gradients as they are, rather than disable them.
    """
    training = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            if any(training[module] for module in model.modules()):
                model.eval()  # rather than the attribute alone, since some models prepare for eval mode in it
        with nullcontext() if gradients else torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def options_for(model: nn.Module, layers: Iterable[nn.Module]) -> dict[str, Any]:
    """Return arguments that spare a language model unused work: its cache, and logits of all but the last token."""
    accepted = signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    if head is not None and "logits_to_keep" in accepted and not any(layer is head for layer in layers):
        options["logits_to_keep"] = 1
    return options
