"""AWQ checkpoints in the layout of its "gemm" kernel (AutoAWQ, LLM-AWQ's successor).

Each linear has ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [G, out / 8] and ``scales`` [G, out]. Words run along
the output; the eight codes of a word, low bits first, belong to columns 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hfquant.formats import NumberFormat
from hfquant.importers.layers import ImportedLayer, checked, group_size, number_format, option, take, words
from hfquant.integrations.checkpoint import CheckpointError

_KEYS = {"qweight": torch.int32, "qzeros": torch.int32, "scales": None}
#: Position within a word of each of its eight columns.
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


def take_layers(section: Mapping[str, Any], tensors: dict[str, Tensor]) -> Iterator[tuple[str, ImportedLayer]]:
    """Take the tensors of quantized linears out of ``tensors``, and yield the linears with their names.

    Args:
        section: the checkpoint's quantization config.
        tensors: tensors of the whole checkpoint.

    Raises:
        CheckpointError: the checkpoint's content is unrecognized or incomplete.
    """
    version = str(option(section, "version", "format", default="gemm")).lower()
    if version != "gemm":
        raise CheckpointError(f"AWQ version {version!r} cannot be imported, only 'gemm'")
    bits = option(section, "bits", "w_bit")
    if bits != 4:
        raise CheckpointError(f"AWQ with {bits!r} bits cannot be imported, only with 4")
    form = number_format(bits)
    group = group_size(option(section, "group_size", "q_group_size"))
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        found = take(tensors, name, _KEYS)
        rows = found["scales"].shape[-1]
        codes, zero_point = (_columns(f"{name}.{key}", found[key], form, rows).T for key in ("qweight", "qzeros"))
        yield name, checked(name, ImportedLayer(bits, group, codes, found["scales"].T, zero_point))


def _columns(name: str, packed: Tensor, form: NumberFormat, columns: int) -> Tensor:
    """Return signed codes [rows, columns] from words with interleaved codes."""
    codes = words(name, packed, form, columns)
    return codes.unflatten(-1, (-1, len(_PLACES)))[..., _PLACES].flatten(-2)
