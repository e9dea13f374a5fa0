"""INT4 and INT6 codes to bytes and back.

Each row is a little-endian bit stream: code ``j`` takes bits ``[j * b, (j + 1) * b)`` of the row, low bits first, as
an unsigned b-bit pattern of its two's complement; rows are padded with zero bits to whole bytes.
"""

from __future__ import annotations

from math import lcm

import torch
from torch import Tensor
from torch.nn.functional import pad


def packed_width(columns: int, bits: int) -> int:
    """Bytes that a row of ``columns`` codes of ``bits`` bits takes: ceil(columns * bits / 8)."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes [..., K] into int8 bytes [..., ceil(K * bits / 8)].

    Raises:
        ValueError: ``codes`` are not int8, or ``bits`` is neither 4 nor 6.
    """
    _check(codes, bits)
    columns = codes.shape[-1]
    per_block, bytes_per_block = lcm(bits, 8) // bits, lcm(bits, 8) // 8
    codes = pad(codes, (0, -columns % per_block)).unflatten(-1, (-1, per_block)).to(torch.int32) & (2**bits - 1)
    shifts = torch.arange(0, per_block * bits, bits, device=codes.device, dtype=torch.int32)
    words = (codes << shifts).sum(-1, keepdim=True, dtype=torch.int32)
    byte_shifts = torch.arange(0, bytes_per_block * 8, 8, device=codes.device, dtype=torch.int32)
    packed = ((words >> byte_shifts) & 0xFF).to(torch.uint8).view(torch.int8)
    return packed.flatten(-2)[..., : packed_width(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of :func:`pack`: int8 bytes [..., ceil(columns * bits / 8)] to int8 codes [..., columns].

    Raises:
        ValueError: wrong dtype, ``bits`` or width.
    """
    _check(packed, bits)
    if packed.shape[-1] != packed_width(columns, bits):
        raise ValueError(
            f"{columns} codes of {bits} bits take {packed_width(columns, bits)} bytes a row, got {packed.shape[-1]}"
        )
    per_block, bytes_per_block = lcm(bits, 8) // bits, lcm(bits, 8) // 8
    blocks = pad(packed.view(torch.uint8), (0, -packed.shape[-1] % bytes_per_block)).unflatten(
        -1, (-1, bytes_per_block)
    )
    byte_shifts = torch.arange(0, bytes_per_block * 8, 8, device=packed.device, dtype=torch.int32)
    words = (blocks.to(torch.int32) << byte_shifts).sum(-1, keepdim=True, dtype=torch.int32)
    shifts = torch.arange(0, per_block * bits, bits, device=packed.device, dtype=torch.int32)
    # Shift the code's top bit to bit 31 and back, so that the sign is extended.
    codes = ((words >> shifts) << (32 - bits)) >> (32 - bits)
    return codes.to(torch.int8).flatten(-2)[..., :columns].contiguous()


def _check(tensor: Tensor, bits: int) -> None:
    if bits not in (4, 6):
        raise ValueError(f"only 4- and 6-bit codes are packed, not {bits}")
    if tensor.dtype != torch.int8:
        raise ValueError(f"expected int8, got {tensor.dtype}")
