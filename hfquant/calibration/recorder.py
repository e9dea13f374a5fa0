"""Record the arguments of a layer's calls.

A recorded call becomes a *structure*, plain JSON in which each tensor is replaced by a placeholder, plus a table of
tensors keyed by a digest of their content. A tensor that recurs at every step (the text embedding, say) is stored once.
Calibration sets use the same representation in memory and on disk, so both behave alike, and nothing needs pickle.

JSON scalars represent themselves, and JSON arrays represent lists; everything else is an object with one key, its tag:

    {"$tensor": [digest, dtype, shape]}    {"$tuple": [...]}        {"$dict": [[key, value], ...]}
    {"$array": {"$tensor": ...}}           {"$float": "nan"}        {"$dtype": "bfloat16"}    {"$device": "cuda:0"}
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from hfquant.denoisers import is_pipeline
from hfquant.digests import content


@dataclass
class Recording:
    """Recorded calls: one structure per call, and the tensors that the structures refer to, keyed by digest."""

    samples: list[Any] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def add(self, sample: Any, where: str = "sample") -> None:
        """Append a copy of ``sample``, detached and on the CPU.

        Raises:
            TypeError: the sample holds something that cannot be stored; the message says where.
        """
        self.samples.append(encode(sample, self.tensors, where))

    def take(self, other: Recording, index: int) -> None:
        """Append sample ``index`` of another recording, sharing its tensors."""
        structure = other.samples[index]
        self.samples.append(structure)
        for key, _, _ in placeholders(structure):
            self.tensors[key] = other.tensors[key]

    def __getitem__(self, index: int) -> Any:
        """Rebuild one sample; its tensors are copies that the caller may write to."""
        return decode(self.samples[index], self.tensors)


def encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """Return the JSON structure of a value and add its tensors to the table.

    Args:
        value: tensors, arrays, None, Python scalars, strings, dtypes, devices, or lists, tuples and mappings of them.
        tensors: receives a copy of each tensor that it does not hold yet.
        where: path of the value, for error messages.

    Raises:
        TypeError: the value is none of these.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        return {"$tensor": _store(value, tensors, where)}
    if isinstance(value, (np.ndarray, np.generic)):
        try:
            return {"$array": encode(torch.from_numpy(np.array(value)), tensors, where)}
        except TypeError as error:
            raise TypeError(f"{where}: a numpy array of dtype {value.dtype} cannot be recorded") from error
    if type(value) in (list, tuple, torch.Size):
        items = [encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, Mapping) and not is_dataclass(
        value
    ):  # a model's output class is both and would not be restored
        items = [[encode(k, tensors, f"{where} key"), encode(v, tensors, f"{where}[{k!r}]")] for k, v in value.items()]
        return {"$dict": items}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    hint = "; call the model with use_cache=False" if "Cache" in type(value).__name__ else ""
    raise TypeError(f"{where}: a {type(value).__module__}.{type(value).__qualname__} cannot be recorded{hint}")


def _store(value: Tensor, tensors: dict[str, Tensor], where: str) -> list[Any]:
    if value.layout is not torch.strided or value.is_meta or value.is_quantized or value.is_nested:
        raise TypeError(f"{where}: a tensor with layout {value.layout} on {value.device} cannot be recorded")
    tensor = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
    digest = xxhash.xxh3_128(f"{dtype}{shape}".encode())
    digest.update(content(tensor))
    key = digest.hexdigest()
    if key not in tensors:
        # Copy, because the layer may modify its input in place and a view would keep its whole storage alive. Copy into
        # a new tensor, because clone() keeps unusual strides of size-1 dimensions, such as 0 for an expanded timestep.
        tensors[key] = torch.empty(shape, dtype=tensor.dtype).copy_(tensor)
    return [key, dtype, shape]


def decode(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild a value from its :func:`encode` structure. Mappings become dicts; every tensor is a copy on the CPU.

    Raises:
        ValueError: the structure is malformed or does not fit the tensors.
    """
    if isinstance(structure, list):
        return [decode(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    tag, body = _tag(structure)
    try:
        match tag:
            case "$tensor":
                return _load(body, tensors)
            case "$tuple":
                return tuple(decode(item, tensors) for item in body)
            case "$dict":
                return {decode(key, tensors): decode(item, tensors) for key, item in body}
            case "$array":
                return decode(body, tensors).numpy()[()]
            case "$dtype":
                return dtype_of(body)
            case "$device":
                return torch.device(body)
            case "$float":
                return float(body)
    except (TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"malformed {tag}: {error}") from error
    raise ValueError(f"unknown tag {tag!r}")


def _tag(structure: dict[str, Any]) -> tuple[str, Any]:
    if len(structure) != 1:
        raise ValueError(f"expected an object with one key, got keys {list(structure)[:8]}")
    return next(iter(structure.items()))


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype called ``name``.

    Raises:
        ValueError: torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def size_of(dtype: str, shape: list[int]) -> int:
    """Return the size of a tensor in bytes.

    Raises:
        ValueError: invalid dtype or shape.
    """
    if any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{shape} is not a shape")
    return math.prod(shape) * dtype_of(dtype).itemsize


def _load(body: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    key, name, shape = body
    if key not in tensors:
        raise ValueError(f"tensor {key!r} is missing")
    stored = tensors[key]
    if size_of(name, shape) != stored.nbytes:
        raise ValueError(f"tensor {key!r} has {stored.nbytes} bytes, which is not {name}{shape}")
    if not stored.nbytes:
        return torch.empty(shape, dtype=dtype_of(name))
    return stored.clone().reshape(-1).view(torch.uint8).view(dtype_of(name)).reshape(shape)


def placeholders(structure: Any, path: str = "") -> Iterator[tuple[str, str, list[Any]]]:
    """Yield (digest, path, [dtype, shape]) of each tensor in a structure.

    Raises:
        ValueError: the structure is malformed.
    """
    if isinstance(structure, list):
        for i, item in enumerate(structure):
            yield from placeholders(item, f"{path}.{i}")
    elif isinstance(structure, dict):
        tag, body = _tag(structure)
        match tag:
            case "$tensor":
                yield body[0], path.removeprefix("."), body[1:]
            case "$tuple" | "$array":
                yield from placeholders(body, path)
            case "$dict":
                for name, item in body:
                    yield from placeholders(name, f"{path} key")
                    yield from placeholders(item, f"{path}.{name}")


def layout(structure: Any) -> dict[str, list[Any]]:
    """Return the tensors of a sample as a mapping from path to [dtype, shape]."""
    return {path: spec for _, path, spec in placeholders(structure)}


class Target(NamedTuple):
    """A layer whose calls are recorded, and the model component that contains it."""

    layer: nn.Module
    name: str
    component: nn.Module


def find_layer(model: Any, calib_layer: nn.Module | str) -> Target:
    """Find a layer in a model, or in the components of a pipeline.

    Args:
        model: A module, or a pipeline with `components`.
        calib_layer: The module itself or its dotted name. In a pipeline, the name starts with the component's name, as
            in "transformer" or "unet.mid_block.attentions.0". The empty name is the model itself.

    Raises:
        TypeError: `model` is neither a module nor a pipeline.
        ValueError: There is no such layer.
    """
    if isinstance(model, nn.Module):
        parts = {"": model}
    elif is_pipeline(model):
        parts = {name: part for name, part in model.components.items() if isinstance(part, nn.Module)}
    else:
        raise TypeError(f"model must be a torch module or a diffusers pipeline, got {type(model).__name__}")
    names: list[str] = []
    for prefix, part in parts.items():
        for suffix, module in part.named_modules():
            name = f"{prefix}.{suffix}".strip(".")
            if module is calib_layer or (isinstance(calib_layer, str) and name == calib_layer):
                return Target(module, name, part)
            names.append(name)
    if not isinstance(calib_layer, str):
        raise ValueError(f"calib_layer, a {type(calib_layer).__name__}, is not part of this {type(model).__name__}")
    close = difflib.get_close_matches(calib_layer, names, n=3) or names[:3]
    raise ValueError(f"{type(model).__name__} has no layer {calib_layer!r}; did you mean one of {close}?")


@contextmanager
def record(target: Target, recording: Recording, keep: Callable[[], bool]) -> Iterator[None]:
    """While open, append the arguments of each call of the layer for which `keep()` is true.

    A sample is a tuple of positional arguments or a dict of keyword arguments; a call with both is stored by name.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if keep():
            recording.add(_as_sample(module, target.name, args, kwargs), target.name or "model")

    # Run first: other hooks will modify the inputs again when the sample is fed back.
    handle = target.layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _as_sample(
    module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | dict[str, Any]:
    if not args or not kwargs:
        return kwargs or args
    named = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(args) > len(named):
        raise TypeError(
            f"{name or 'model'} is called with {len(args)} positional and some keyword arguments, but its forward "
            f"names only {named}: record a layer inside it, or the one that calls it"
        )
    return dict(zip(named, args, strict=False)) | kwargs
