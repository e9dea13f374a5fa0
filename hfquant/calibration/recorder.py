"""Records what a layer is called with.

A recorded call becomes a *structure*, plain JSON in which each tensor is replaced by a placeholder, plus a table of
tensors keyed by a digest of their content. A tensor that comes back at every step (the text embedding, say) is kept
once. The same pair is what a calibration set holds in memory and on disk, so both behave alike, and nothing in it needs
pickle.

JSON scalars and arrays stand for themselves (lists); everything else is an object with one key, its tag:

    {"$tensor": [digest, dtype, shape]}    {"$tuple": [...]}    {"$dict": [[key, value], ...]}
    {"$array": {"$tensor": ...}}           {"$dtype": "bfloat16"}   {"$device": "cuda:0"}   {"$float": "nan"}
    {"$complex": [re, im]}                 {"$object": ["module:Class", [[field, value], ...]]}
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import nn

# Output classes of these packages may be imported when a stored sample names one; any other class must be loaded
# already, because importing a module that a file names is running code that a file names.
_IMPORTABLE = ("diffusers", "transformers")


@dataclasses.dataclass
class Recording:
    """Recorded calls: one structure a call, and by digest the bytes of the tensors that the structures refer to."""

    samples: list[Any] = dataclasses.field(default_factory=list)
    tensors: dict[str, memoryview] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:
        return {"samples": self.samples, "tensors": {k: bytes(v) for k, v in self.tensors.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.samples = state["samples"]
        self.tensors = {key: memoryview(bytearray(value)) for key, value in state["tensors"].items()}

    def add(self, sample: Any, where: str = "sample") -> None:
        """Appends a copy of `sample`, detached and on the CPU.

        Raises:
            TypeError: The sample holds something that cannot be stored; the message says where.
        """
        self.samples.append(encode(sample, self.tensors, where))

    def take(self, other: Recording, index: int) -> None:
        """Appends sample `index` of another recording, sharing its tensors."""
        structure = other.samples[index]
        self.samples.append(structure)
        for key, _, _ in placeholders(structure):
            self.tensors[key] = other.tensors[key]

    def __getitem__(self, index: int) -> Any:
        """Rebuilds one sample; its tensors are copies that the caller may write to."""
        return decode(self.samples[index], self.tensors)


def encode(value: Any, tensors: dict[str, memoryview], where: str) -> Any:
    """Turns a value into a JSON structure, adding its tensors to the table.

    Args:
        value: Tensors, arrays, None, Python scalars, strings, dtypes, devices; lists, tuples, named tuples, mappings
            and dataclasses of them, nested.
        tensors: Table that receives a copy of the bytes of each tensor that is not there yet.
        where: Path of the value, for the error message.

    Raises:
        TypeError: The value is none of these.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, torch.Tensor):
        return {"$tensor": _store(value, tensors, where)}
    if isinstance(value, (np.ndarray, np.generic)):
        try:
            return {"$array": encode(torch.from_numpy(np.array(value)), tensors, where)}
        except TypeError as error:
            raise TypeError(f"{where}: a numpy array of dtype {value.dtype} cannot be recorded.") from error
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return _encode_object(value, names, tensors, where)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _encode_object(value, value._fields, tensors, where)
    if isinstance(value, (list, tuple)):
        items = [encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        return {
            "$dict": [
                [encode(k, tensors, f"{where} key"), encode(v, tensors, f"{where}[{k!r}]")] for k, v in value.items()
            ]
        }
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    if type(value) is complex:
        return {"$complex": [encode(value.real, tensors, where), encode(value.imag, tensors, where)]}
    hint = " Call the model with use_cache=False." if "Cache" in type(value).__name__ else ""
    raise TypeError(f"{where}: a {type(value).__module__}.{type(value).__qualname__} cannot be recorded.{hint}")


def _encode_object(value: Any, names: Any, tensors: dict[str, memoryview], where: str) -> Any:
    kind = type(value)
    fields = [[name, encode(getattr(value, name, None), tensors, f"{where}.{name}")] for name in names]
    return {"$object": [f"{kind.__module__}:{kind.__qualname__}", fields]}


def _store(value: torch.Tensor, tensors: dict[str, memoryview], where: str) -> list[Any]:
    if value.layout is not torch.strided or value.is_meta or value.is_quantized or value.is_nested:
        raise TypeError(f"{where}: a tensor with layout {value.layout} on {value.device} cannot be recorded.")
    tensor = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
    digest = xxhash.xxh3_128(f"{dtype}{shape}".encode())
    digest.update(content(tensor))
    key = digest.hexdigest()
    if key not in tensors:
        # The layer may go on to change its input in place; contiguous() and cpu() copy only when they must.
        tensors[key] = content(tensor.clone() if tensor.data_ptr() == value.data_ptr() else tensor)
    return [key, dtype, shape]


def content(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def decode(structure: Any, tensors: Mapping[str, memoryview]) -> Any:
    """Rebuilds what :func:`encode` took apart. Mappings come back as dicts, every tensor as a copy on the CPU.

    Nothing in the structure is trusted: sizes are checked before memory is taken, and no constructor of a class that it
    names is run.

    Raises:
        ValueError: The structure is malformed, does not fit the tensors, or names a class that is not loaded.
    """
    if isinstance(structure, list):
        return [decode(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if len(structure) != 1:
        raise ValueError(f"expected an object with one key, got keys {list(structure)[:8]}")
    ((tag, body),) = structure.items()
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
                return _dtype(body)
            case "$device":
                return torch.device(body)
            case "$float":
                return float(body)
            case "$complex":
                return complex(*decode(body, tensors))
            case "$object":
                return _decode_object(body[0], [(name, decode(item, tensors)) for name, item in body[1]])
    except (TypeError, AttributeError, IndexError, RuntimeError, OverflowError, ImportError) as error:
        raise ValueError(f"malformed {tag}: {error}") from error
    raise ValueError(f"unknown tag {tag!r}")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def _load(body: Any, tensors: Mapping[str, memoryview]) -> torch.Tensor:
    key, name, shape = body
    if key not in tensors:
        raise ValueError(f"tensor {key!r} is missing")
    stored, dtype = tensors[key], _dtype(name)
    if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != stored.nbytes:
        raise ValueError(f"tensor {key!r} has {stored.nbytes} bytes, which is not {name}{shape}")
    if not stored.nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(stored), dtype=torch.uint8).view(dtype).reshape(shape)


def _decode_object(path: str, fields: list[tuple[str, Any]]) -> Any:
    module, _, qualname = path.partition(":")
    if module not in sys.modules and module.partition(".")[0] in _IMPORTABLE:
        importlib.import_module(module)
    kind: Any = sys.modules.get(module)
    for part in qualname.split("."):
        kind = getattr(kind, part, None)
    if not isinstance(kind, type):
        raise ValueError(f"the sample holds a {path}: import its module before reading the set")
    names = [name for name, _ in fields]
    if issubclass(kind, tuple) and names == list(getattr(kind, "_fields", ())):
        return tuple.__new__(kind, [value for _, value in fields])
    if not dataclasses.is_dataclass(kind) or names != [field.name for field in dataclasses.fields(kind)]:
        raise ValueError(f"{path} is no dataclass with fields {names}")
    if issubclass(kind, OrderedDict):  # ModelOutput and BaseOutput: both a dict without its Nones and attributes
        output: Any = OrderedDict.__new__(kind)
        for name, value in fields:
            object.__setattr__(output, name, value)
            if value is not None:
                OrderedDict.__setitem__(output, name, value)
        return output
    instance = object.__new__(kind)
    for name, value in fields:
        object.__setattr__(instance, name, value)
    return instance


def placeholders(structure: Any, path: str = "") -> Iterator[tuple[str, str, list[Any]]]:
    """Yields (digest, path, [dtype, shape]) of each tensor in a structure."""
    if isinstance(structure, list):
        for i, item in enumerate(structure):
            yield from placeholders(item, f"{path}.{i}")
    elif isinstance(structure, dict):
        ((tag, body),) = structure.items()
        match tag:
            case "$tensor":
                yield body[0], path.removeprefix("."), body[1:]
            case "$tuple" | "$array":
                yield from placeholders(body, path)
            case "$dict" | "$object":
                for name, item in body if tag == "$dict" else body[1]:
                    yield from placeholders(item, f"{path}.{name}")


def layout(structure: Any) -> dict[str, list[Any]]:
    """The tensors of a sample: path of each to [dtype, shape]."""
    return {path: spec for _, path, spec in placeholders(structure)}


class Target(NamedTuple):
    """A layer whose calls are recorded, and the component of the model that it belongs to."""

    layer: nn.Module
    name: str
    component: nn.Module


def is_pipeline(model: Any) -> bool:
    """Whether `model` is a pipeline: something callable made of named components, and no module itself."""
    return (
        not isinstance(model, nn.Module) and callable(model) and isinstance(getattr(model, "components", None), Mapping)
    )


def find_layer(model: Any, calib_layer: nn.Module | str) -> Target:
    """Finds a layer in a model, or in the components of a pipeline.

    Args:
        model: A module, or a pipeline with `components`.
        calib_layer: The module itself or its dotted name; in a pipeline the name starts with the component's, as in
            "transformer" or "unet.mid_block.attentions.0". The empty name is the model itself.

    Raises:
        TypeError: `model` is neither a module nor a pipeline.
        ValueError: The layer is not there.
    """
    if isinstance(model, nn.Module):
        parts = {"": model}
    elif is_pipeline(model):
        parts = {name: part for name, part in model.components.items() if isinstance(part, nn.Module)}
    else:
        raise TypeError(f"model must be a torch module or a diffusers pipeline, got {type(model).__name__}.")
    names: list[str] = []
    for prefix, part in parts.items():
        for suffix, module in part.named_modules():
            name = f"{prefix}.{suffix}".strip(".")
            if module is calib_layer or (isinstance(calib_layer, str) and name == calib_layer):
                return Target(module, name, part)
            names.append(name)
    if not isinstance(calib_layer, str):
        raise ValueError(f"calib_layer, a {type(calib_layer).__name__}, is no part of this {type(model).__name__}.")
    close = difflib.get_close_matches(calib_layer, names, n=3) or names[:3]
    raise ValueError(f"{type(model).__name__} has no layer {calib_layer!r}; did you mean one of {close}?")


@contextmanager
def record(target: Target, recording: Recording, keep: Callable[[], bool]) -> Iterator[None]:
    """While open, appends the arguments of each call of the layer for which `keep()` is true.

    A sample is a tuple of positional arguments or a dict of keyword arguments; a call with both is stored by name.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if keep():
            recording.add(_as_sample(module, target.name, args, kwargs), target.name or "model")

    # First in line: other hooks will act again when the sample is fed back.
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
            f"names only {named}: record a layer inside it, or the one that calls it."
        )
    return dict(zip(named, args, strict=False)) | kwargs
