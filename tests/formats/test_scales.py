"""Group scales in two levels, against the definition of the byte in Python's floats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.formats import FORMATS, Grid, GridRule, scales

ALL = torch.arange(256, dtype=torch.int32).to(torch.uint8)


def value(byte: int) -> float:
    return 2.0 ** ((byte >> 5) - 7) * (1 + (byte & 31) / 32)


def test_each_byte_is_an_unsigned_float_of_three_and_five_bits() -> None:
    assert scales.values(ALL).tolist() == [value(byte) for byte in range(256)]
    assert value(255) == scales.LARGEST


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=9), st.floats(-60, 60))
def test_the_nearest_byte_is_taken(exponents: list[float], shift: float) -> None:
    scale = torch.exp2(torch.tensor([exponents]) + shift)
    row = scales.row_scale(scale, torch.ones_like(scale, dtype=torch.bool))
    assert row.shape == (1, 1)
    table = torch.tensor([value(byte) for byte in range(256)], dtype=torch.float64) * row.double()
    distance = (table - scale.double().T).abs()
    taken = scales.encode(scale, row)[0].long()
    chosen = distance.gather(1, taken[:, None])[:, 0]
    # The nearest but for ties and for the rounding of one float32 quotient.
    assert (chosen <= distance.amin(1) + 1e-6 * scale.double()[0]).all()
    assert taken[scale[0].argmax()] == 255


def test_what_was_stored_is_found_again() -> None:
    for row in (torch.tensor([[1e-30]]), torch.tensor([[0.0123]]), torch.tensor([[3e30]])):
        assert torch.equal(scales.encode(scales.values(ALL)[None] * row, row)[0], ALL)


def test_rows_of_zeros_and_groups_of_zeros() -> None:
    weight = torch.zeros(3, 8)
    weight[1, :4] = torch.tensor([1e-3, -7e-3, 2e-3, 0.0])
    grid = GridRule(FORMATS["int4"], (4, 4), two_level=True).fit(weight)
    assert grid.scale.isfinite().all()
    assert (grid.scale > 0).all()
    assert torch.equal(grid.round(weight)[0], weight[0])
    assert grid.scale[1, 0].item() == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", ["amax", "mse"])
@pytest.mark.parametrize("columns", [(16,) * 4, (16, 16, 16, 7)])
def test_a_grid_is_what_its_tensors_say(symmetric: bool, clip: str, columns: tuple[int, ...]) -> None:
    weight = torch.randn(12, sum(columns)) * torch.logspace(-1, 1, 12)[:, None]
    rule = GridRule(FORMATS["int4"], columns, None, symmetric, clip, two_level=True)
    grid = rule.fit(weight)
    stored = grid.tensors()
    assert stored["weight_scale"].dtype == torch.uint8
    assert set(stored) == {"weight_scale", "weight_scale_row"} | (set() if symmetric else {"weight_zero_point"})
    again = Grid.from_tensors(FORMATS["int4"], columns, stored)
    assert torch.equal(again.scale, grid.scale)
    codes = grid.quantize(weight)
    assert torch.equal(again.dequantize(codes), grid.round(weight))


def test_it_costs_next_to_nothing() -> None:
    weight = torch.randn(64, 1024)
    for clip, most in (("amax", 1.002), ("mse", 1.0)):
        errors = []
        for two_level in (False, True):
            grid = GridRule(FORMATS["int4"], (64,) * 16, None, False, clip, two_level).fit(weight)
            errors.append((grid.round(weight) - weight).square().sum())
        assert errors[1] <= most * errors[0]


def test_clipping_finds_the_best_of_all_stored_scales() -> None:
    weight, importance = torch.randn(8, 64), torch.rand(64)
    rule = GridRule(FORMATS["int4"], (32, 32), None, True, "mse", two_level=True)
    grid = rule.fit(weight, importance)
    loss = ((grid.round(weight) - weight).square() * importance).view(8, 2, 32).sum(-1)
    for step in range(36):
        codes = (255 - torch.full((8, 2), step)).to(torch.uint8)
        other = Grid.two_level(grid.format, grid.columns, codes, grid.scale_row)
        theirs = ((other.round(weight) - weight).square() * importance).view(8, 2, 32).sum(-1)
        assert (loss <= theirs * 1.05).all()
