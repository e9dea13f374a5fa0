"""Codes in int32 words, against Python's integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.formats import FORMATS
from hfquant.formats.int32_words import from_words, to_words


@given(
    st.sampled_from([f"int{bits}" for bits in range(2, 9)]),
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(0, 2**32),
)
def test_words_are_one_stream_of_unsigned_codes(name: str, rows: int, columns: int, seed: int) -> None:
    form, half = FORMATS[name], 2 ** (FORMATS[name].bits - 1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
    found = to_words(codes, form)
    for row, stored in zip(codes.tolist(), found.tolist(), strict=True):
        stream = sum((code + half) << (form.bits * i) for i, code in enumerate(row))
        count = -(-columns * form.bits // 32)
        expected = [(stream >> (32 * i)) % 2**32 for i in range(count)]
        assert [word % 2**32 for word in stored] == expected
    assert torch.equal(from_words(found, form, columns), codes)


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("rows", [1, 16])
def test_strides_do_not_matter(name: str, rows: int) -> None:
    codes = torch.randint(-8, 8, (24, rows), dtype=torch.int8)
    words = to_words(codes.T, FORMATS[name])
    assert torch.equal(words, to_words(codes.T.clone(memory_format=torch.contiguous_format), FORMATS[name]))
    assert torch.equal(from_words(words.T.contiguous().T, FORMATS[name], 24), codes.T)


def test_a_wrong_width_or_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"9 codes of 4 bits take 2 int32 words per row, got \(2, 3\) of torch\.int32"):
        from_words(torch.zeros(2, 3, dtype=torch.int32), FORMATS["int4"], 9)
    with pytest.raises(ValueError, match=r"got \(2,\) of torch\.int32"):
        from_words(torch.zeros(2, dtype=torch.int32), FORMATS["int4"], 16)
    with pytest.raises(ValueError, match=r"got \(2, 1\) of torch\.int64"):
        from_words(torch.zeros(2, 1, dtype=torch.int64), FORMATS["int4"], 8)
