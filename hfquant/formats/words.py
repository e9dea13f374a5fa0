"""Codes in int32 words, as compressed-tensors, GPTQ and AWQ store them: unsigned, low bits first.

A row is the same stream of bits as ours (:mod:`hfquant.formats.packing`) but for the top bit of each code, since they
store ``code + 2^(b-1)``, and for its padding to whole words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfquant.formats.base import NumberFormat


def to_words(codes: Tensor, form: NumberFormat) -> Tensor:
    """Return signed codes [rows, K] int8 as int32 [rows, ceil(K b / 32)], padded with zeros.

    Args:
        codes: any strides.
        form: an integer format of at most 8 bits.
    """
    packed = form.pack(_turned(codes, form))
    # Flat, since a single row may be contiguous with any stride.
    return pad(packed, (0, -packed.shape[-1] % 4)).flatten().view(torch.int32).unflatten(0, (len(codes), -1))


def from_words(words: Tensor, form: NumberFormat, columns: int) -> Tensor:
    """Return the inverse of :func:`to_words`: int32 [rows, ceil(columns b / 32)] to signed codes [rows, columns] int8.

    Raises:
        ValueError: wrong dtype, rank or width.
    """
    width = -(-columns * form.bits // 32)
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != width:
        raise ValueError(
            f"{columns} codes of {form.bits} bits take {width} int32 words a row, "
            f"got {tuple(words.shape)} of {words.dtype}"
        )
    packed = words.flatten().view(torch.int8).unflatten(0, (len(words), -1))[:, : form.packed_width(columns)]
    return _turned(form.unpack(packed, columns), form)


def _turned(codes: Tensor, form: NumberFormat) -> Tensor:
    # Adding or subtracting 2^(b-1) turns the top bit of b over; those above it are the sign's.
    return codes ^ -(1 << (form.bits - 1))
