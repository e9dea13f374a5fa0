"""Two-level group scales against Python's floats: every byte, the nearest byte, and what a row cannot represent."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.formats import FORMATS, MIN_SCALE, Grid, GridRule
from hfquant.formats.scales import LARGEST, encode, row_scale, values
from tests import oracle

BYTES = torch.arange(256, dtype=torch.uint8)
ALL = np.array([oracle.group_scale(code) for code in range(256)])


def test_every_byte_stands_for_its_float() -> None:
    found = values(BYTES)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.double().numpy(), ALL)
    assert (np.diff(ALL) > 0).all()
    assert (ALL[0], ALL[-1]) == (2.0**-7, LARGEST)
    assert values(BYTES.view(4, 8, 8)).shape == (4, 8, 8)


@pytest.mark.parametrize("row", [1.0, 1 / 3, 7e-5, 2.0**-120, 1e30])
def test_bytes_come_back(row) -> None:
    scale = torch.full((1, 1), row)
    assert torch.equal(encode(values(BYTES)[None] * scale, scale), BYTES[None])


@given(st.lists(st.floats(2.0**-12, 4.0, width=32), min_size=1, max_size=20))
def test_the_byte_is_the_nearest(scales) -> None:
    """Within half a step of the exponent's grid, and saturated at both ends."""
    codes = encode(torch.tensor([scales], dtype=torch.float32), torch.ones(1, 1))
    assert codes.dtype == torch.uint8
    for scale, code in zip(scales, codes[0].tolist(), strict=True):
        distance = np.abs(ALL - scale)
        assert distance[code] == distance.min()


@given(st.lists(st.floats(2.0**-12, LARGEST, width=32), min_size=1, max_size=20))
def test_rounded_up_the_byte_is_the_least_that_covers(scales) -> None:
    codes = encode(torch.tensor([scales], dtype=torch.float32), torch.ones(1, 1), up=True)
    for scale, code in zip(scales, codes[0].tolist(), strict=True):
        assert ALL[code] >= scale
        assert code == 0 or ALL[code - 1] < scale


@given(st.lists(st.floats(2.0**-10, 1.0, width=32), min_size=1, max_size=12), st.floats(1e-20, 1e20))
def test_within_a_64th_of_any_scale_that_is_not_tiny_beside_the_largest(scales, factor) -> None:
    scale = torch.tensor([scales], dtype=torch.float64).mul(factor).float()
    row = row_scale(scale, torch.ones_like(scale, dtype=torch.bool))
    stored = (values(encode(scale, row)) * row).double()
    near = scale >= scale.max() / 128
    assert ((stored - scale.double()).abs() <= scale.double() / 64 * (1 + 1e-6))[near].all()
    torch.testing.assert_close(stored.max(), scale.double().max(), rtol=1e-6, atol=0)


def test_groups_of_zeros_do_not_set_a_row_s_scale() -> None:
    scale = torch.tensor([[1.0, 0.002, 0.001], [1.0, 1.0, 1.0], [2.0**-126, 2.0**-126, 1.0]])
    used = torch.tensor([[False, True, True], [False, False, False], [True, True, False]])
    row = row_scale(scale, used)
    assert row.shape == (3, 1)
    assert row[0].item() == pytest.approx(0.002 / LARGEST)
    assert row[1].item() == pytest.approx(1 / LARGEST)
    assert row[2].item() == MIN_SCALE


@pytest.mark.parametrize("form", ["int4", "int8", "fp8e4m3"])
@pytest.mark.parametrize("clip", ["amax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [(48, 48, 48), (64, 64, 16)])
def test_a_grid_s_scales_are_what_is_stored_of_it(form, clip, symmetric, columns) -> None:
    """Codes and zero points are computed with the stored scales, so loading changes nothing."""
    if not symmetric and not FORMATS[form].is_integer:
        return
    weight = torch.randn(6, 144) * torch.logspace(-2, 2, 6)[:, None] * torch.logspace(-1, 0, 144) + 0.01
    weight[3, : columns[0]] = 0
    rule = GridRule(FORMATS[form], columns, None, symmetric, clip, two_level=True)
    grid = rule.fit(weight)
    stored = grid.tensors()
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in stored.items() if name != "weight_zero_point"}
    assert shapes == {"weight_scale": ((6, 3), torch.uint8), "weight_scale_row": ((6, 1), torch.float32)}
    assert ("weight_zero_point" in stored) == (not symmetric)
    loaded = Grid.from_tensors(FORMATS[form], columns, stored)
    assert torch.equal(loaded.scale, grid.scale)
    assert symmetric or torch.equal(loaded.zero_point, grid.zero_point)
    by_hand = ALL[stored["weight_scale"].long()].astype(np.float32) * stored["weight_scale_row"].numpy()
    np.testing.assert_array_equal(loaded.scale.numpy(), by_hand)
    codes = grid.quantize(weight)
    assert torch.equal(loaded.dequantize(codes), grid.round(weight))
    assert (grid.dequantize(codes)[3, : columns[0]] == 0).all()


def test_rows_of_zeros_and_groups_of_zeros() -> None:
    weight = torch.zeros(3, 8)
    weight[1, :4] = torch.tensor([1e-3, -7e-3, 2e-3, 0.0])
    grid = GridRule(FORMATS["int4"], (4, 4), two_level=True).fit(weight)
    assert grid.scale.isfinite().all()
    assert (grid.scale > 0).all()
    assert torch.equal(grid.round(weight)[0], weight[0])
    assert grid.scale[1, 0].item() == pytest.approx(1e-3, rel=1e-6)


def error_beside_float32_scales(form: str, group: int, symmetric: bool, clip: str) -> float:
    weight, columns = torch.randn(64, 1024), (group,) * (1024 // group)
    errors = []
    for two_level in (False, True):
        grid = GridRule(FORMATS[form], columns, None, symmetric, clip, two_level).fit(weight)
        errors.append((grid.round(weight) - weight).square().sum().item())
    return errors[1] / errors[0]


@pytest.mark.parametrize(("clip", "most"), [("amax", 1.002), ("mse", 1.01)])
def test_it_costs_next_to_nothing(clip, most) -> None:
    assert error_beside_float32_scales("int4", 64, False, clip) <= most


@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", ["amax", "mse"])
@pytest.mark.parametrize("form", ["int7", "int8", "int16"])
def test_many_codes_are_not_clipped(form, clip, symmetric, group) -> None:
    """The more codes, the more of its steps the largest weight of a group loses by a scale that is too small."""
    assert error_beside_float32_scales(form, group, symmetric, clip) <= 1.12
