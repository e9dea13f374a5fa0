"""Content digests of tensors, models and nested values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate.utils import align_module_device
from torch import Tensor, nn


def content(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor of any dtype, without a copy."""
    # A dimension of size 1 may have any stride, and a view as bytes rejects some of them.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def update(digest: xxhash.xxh3_128, value: Any) -> None:
    """Feed a value to a digest: tensors, arrays and images by content, containers item by item, the rest by type."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        if not value.is_meta:
            digest.update(content(value.detach().cpu().contiguous()))
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(f"{key!r}:".encode())
            update(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{type(value).__name__}{len(value)}".encode())
        for item in value:
            update(digest, item)
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        digest.update(f"{value!r};".encode())
    elif hasattr(value, "tobytes") and hasattr(value, "mode"):  # a PIL image
        digest.update(f"{value.mode}{value.size}".encode())
        digest.update(value.tobytes())
    else:
        digest.update(type(value).__qualname__.encode())


def update_with_weights(digest: xxhash.xxh3_128, module: nn.Module) -> None:
    """Feed a module's parameters and buffers to a digest: names, dtypes, shapes and all bytes, offloaded or not."""
    for name in [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]:
        path, _, key = name.rpartition(".")
        part = module.get_submodule(path)
        with align_module_device(part):
            digest.update(name.encode())
            update(digest, getattr(part, key))


def digest_of_each(values: Iterable[Any]) -> str:
    """Return the hexadecimal digest of values that are taken one at a time."""
    digest = xxhash.xxh3_128()
    for value in values:
        update(digest, (value,))
    return digest.hexdigest()


def digest_of(*values: Any) -> str:
    """Return the hexadecimal digest of values."""
    digest = xxhash.xxh3_128()
    update(digest, values)
    return digest.hexdigest()
