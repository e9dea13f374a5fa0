"""Codes in int32 words as compressed-tensors, GPTQ and AWQ store them: unsigned, low bits first.

A row is the same bit stream as ours (:mod:`hfquant.formats.packing`), except that the top bit of each code is flipped,
since these formats store ``code + 2^(b-1)``, and that rows are padded to whole words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfquant.formats.base import NumberFormat


def to_words(codes: Tensor, form: NumberFormat) -> Tensor:
    """Return signed codes [rows, K] int8 as int32 [rows, ceil(K b / 32)], zero-padded.

    Args:
        codes: with any strides.
        form: an integer format of at most 8 bits.
    """
    packed = form.pack(_turned(codes, form))
    # Flattened, since a single row may count as contiguous with any stride.
    return pad(packed, (0, -packed.shape[-1] % 4)).flatten().view(torch.int32).unflatten(0, (len(codes), -1))


def from_words(words: Tensor, form: NumberFormat, columns: int) -> Tensor:
    """Invert :func:`to_words`: int32 [rows, ceil(columns b / 32)] to signed codes [rows, columns] int8.

    Raises:
        ValueError: wrong dtype, rank or width.
    """
    width = -(-columns * form.bits // 32)
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != width:
        raise ValueError(
            f"{columns} codes of {form.bits} bits take {width} int32 words per row, "
            f"got {tuple(words.shape)} of {words.dtype}"
        )
    packed = words.flatten().view(torch.int8).unflatten(0, (len(words), -1))[:, : form.packed_width(columns)]
    return _turned(form.unpack(packed, columns), form)


def _turned(codes: Tensor, form: NumberFormat) -> Tensor:
    # Adding or subtracting 2^(b-1) flips the top bit of b; the bits above it belong to the sign.
    return codes ^ -(1 << (form.bits - 1))
