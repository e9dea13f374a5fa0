"""Packing of codes below 8 bits into bytes, and unpacking.

Each row is a little-endian bit stream: code ``j`` occupies bits ``[j * b, (j + 1) * b)`` of the row, low bits first, as
an unsigned b-bit pattern of its two's complement. Rows are padded with zero bits to whole bytes.
"""

from __future__ import annotations

from math import lcm

import torch
from torch import Tensor
from torch.nn.functional import pad


def packed_width(columns: int, bits: int) -> int:
    """Return the number of bytes for a row of ``columns`` codes of ``bits`` bits: ceil(columns * bits / 8)."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes [..., K] into int8 bytes [..., ceil(K * bits / 8)].

    Raises:
        ValueError: ``codes`` are not int8, or ``bits`` is not between 2 and 7.
    """
    _check(codes, bits)
    columns, per_block = codes.shape[-1], lcm(bits, 8) // bits
    codes = pad(codes, (0, -columns % per_block)).unflatten(-1, (-1, per_block)) & (2**bits - 1)
    packed = codes.new_zeros(*codes.shape[:-1], per_block * bits // 8)
    for j in range(per_block):
        byte, shift = divmod(j * bits, 8)
        packed[..., byte] |= codes[..., j] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= codes[..., j] >> (8 - shift)
    return packed.flatten(-2)[..., : packed_width(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack int8 bytes [..., ceil(columns * bits / 8)] into int8 codes [..., columns], the inverse of :func:`pack`.

    Raises:
        ValueError: wrong dtype, ``bits`` or width.
    """
    _check(packed, bits)
    if packed.shape[-1] != packed_width(columns, bits):
        raise ValueError(
            f"{columns} codes of {bits} bits take {packed_width(columns, bits)} bytes per row, got {packed.shape[-1]}"
        )
    per_block = lcm(bits, 8) // bits
    bytes_per_block = per_block * bits // 8
    blocks = pad(packed, (0, -packed.shape[-1] % bytes_per_block)).unflatten(-1, (-1, bytes_per_block))
    codes = packed.new_empty(*blocks.shape[:-1], per_block)
    for j in range(per_block):
        byte, shift = divmod(j * bits, 8)
        low, free = blocks[..., byte], 8 - bits
        if shift + bits <= 8:
            # Shift up to the byte's top and back down: the arithmetic right shift extends the sign.
            codes[..., j] = (low << (free - shift)) >> free
        else:
            low = (low >> shift) & (2 ** (8 - shift) - 1)
            codes[..., j] = ((low | (blocks[..., byte + 1] << (8 - shift))) << free) >> free
    return codes.flatten(-2)[..., :columns].contiguous()


def _check(tensor: Tensor, bits: int) -> None:
    if not 2 <= bits <= 7:
        raise ValueError(f"only codes of 2 to 7 bits are packed, not {bits}")
    if tensor.dtype != torch.int8:
        raise ValueError(f"expected int8, got {tensor.dtype}")
