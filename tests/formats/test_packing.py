"""Packed codes against Python's integers: a row is a little-endian bit stream."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.formats.packing import pack, packed_width, unpack


def packed_by_hand(row: list[int], bits: int) -> list[int]:
    stream = sum((code % 2**bits) << (j * bits) for j, code in enumerate(row))
    return list(stream.to_bytes(-(-len(row) * bits // 8), "little"))


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)


def as_bytes(packed: torch.Tensor) -> list[int]:
    return packed.flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("columns", [*range(18), 63, 64, 65, 127, 576])
def test_every_width_against_python_integers(bits, columns) -> None:
    codes = random_codes(bits, 3, columns)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int8
    assert packed.is_contiguous()
    assert packed.shape == (3, packed_width(columns, bits)) == (3, -(-columns * bits // 8))
    assert [as_bytes(row) for row in packed] == [packed_by_hand(row, bits) for row in codes.tolist()]
    again = unpack(packed, bits, columns)
    assert again.is_contiguous()
    assert torch.equal(again, codes)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("offset", range(4))
def test_every_code_at_every_position(bits, offset) -> None:
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)
    row = torch.cat([codes.new_full((offset,), -1), codes])
    assert as_bytes(pack(row, bits)) == packed_by_hand(row.tolist(), bits)
    assert torch.equal(unpack(pack(row, bits), bits, len(row)), row)


@pytest.mark.parametrize("bits", range(2, 8))
def test_every_byte_unpacks(bits) -> None:
    packed = torch.arange(-128, 128, dtype=torch.int8)[:, None].repeat(1, 3)
    columns = 24 // bits
    for row, stream in zip(unpack(packed, bits, columns).tolist(), packed.view(torch.uint8).tolist(), strict=True):
        number = int.from_bytes(bytes(stream), "little")
        codes = [(number >> (j * bits)) % 2**bits for j in range(columns)]
        assert row == [c - 2**bits if c >= 2 ** (bits - 1) else c for c in codes]


@given(st.integers(2, 7), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_round_trip(bits, columns, seed) -> None:
    codes = torch.randint(
        -(2 ** (bits - 1)), 2 ** (bits - 1), (2, columns), generator=torch.Generator().manual_seed(seed)
    ).to(torch.int8)
    assert torch.equal(unpack(pack(codes, bits), bits, columns), codes)
    assert [as_bytes(row) for row in pack(codes, bits)] == [packed_by_hand(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (1, 2, 2)])
def test_leading_dimensions(bits, lead) -> None:
    codes = random_codes(bits, *lead, 7)
    packed = pack(codes, bits)
    assert packed.shape == (*lead, packed_width(7, bits))
    assert torch.equal(unpack(packed, bits, 7), codes)


@pytest.mark.parametrize("bits", range(2, 8))
def test_rows_are_independent_and_padding_is_zero(bits) -> None:
    codes = random_codes(bits, 5, 7)
    assert torch.equal(pack(codes, bits)[1:4], pack(codes[1:4], bits))
    spare = packed_width(7, bits) * 8 - 7 * bits
    assert (pack(codes, bits).view(torch.uint8)[:, -1] >> (8 - spare) == 0).all()
    # The input is strided, and the caller's tensor stays unchanged.
    before = codes.clone()
    assert torch.equal(unpack(pack(codes.T, bits), bits, 5), before.T)
    assert torch.equal(codes, before)


def test_sizes_are_what_the_bits_promise() -> None:
    assert packed_width(1024, 4) == 512
    assert packed_width(1024, 6) == 768
    assert pack(random_codes(6, 4, 1024), 6).nbytes == 4 * 768


@pytest.mark.parametrize("bits", [0, 1, 8, 16])
def test_other_widths_are_refused(bits) -> None:
    with pytest.raises(ValueError, match=f"only codes of 2 to 7 bits are packed, not {bits}"):
        pack(torch.zeros(1, 8, dtype=torch.int8), bits)
    with pytest.raises(ValueError, match=f"not {bits}"):
        unpack(torch.zeros(1, 8, dtype=torch.int8), bits, 8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_other_dtypes_are_refused(dtype) -> None:
    with pytest.raises(ValueError, match="expected int8"):
        pack(torch.zeros(1, 8, dtype=dtype), 4)
    with pytest.raises(ValueError, match="expected int8"):
        unpack(torch.zeros(1, 4, dtype=dtype), 4, 8)


@pytest.mark.parametrize(("bits", "columns", "width"), [(4, 8, 3), (4, 8, 5), (6, 8, 8), (6, 5, 3)])
def test_wrong_row_length_is_refused(bits, columns, width) -> None:
    right = packed_width(columns, bits)
    with pytest.raises(ValueError, match=f"{columns} codes of {bits} bits take {right} bytes per row, got {width}"):
        unpack(torch.zeros(2, width, dtype=torch.int8), bits, columns)
