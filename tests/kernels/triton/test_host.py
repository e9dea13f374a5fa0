"""Decisions of the Triton kernels' host code."""

import sys

import pytest
import torch

from hfquant.formats import FORMATS, InputRule
from hfquant.kernels.base import Operands, Product
from hfquant.kernels.triton import host


def product(columns: tuple[int, ...], segments: tuple[int, ...]) -> Product:
    rule = InputRule(FORMATS["int8"], True, True, segments, (True, *[False] * (len(segments) - 1)))
    return Product(FORMATS["int4"], columns, segments, rule)


def test_layout() -> None:
    cpu = torch.device("cpu")
    # The programs compute the bounds of equal blocks in equal segments.
    assert host.layout(product((32, 32, 32), (96,)), cpu) == (None, 32, 3, 32, True, True, True)
    assert host.layout(product((16,) * 4, (32, 32)), cpu) == (None, 16, 2, 16, True, True, True)
    assert host.layout(product((25,), (25,)), cpu) == (None, 25, 1, 25, False, True, False)
    short = host.layout(product((10, 3, 10, 1), (13, 11)), cpu)
    assert short.blocks is not None
    assert short.blocks.tolist() == [[0, 10, 13, 23], [10, 13, 23, 24], [0, 0, 1, 1]]
    assert short[1:] == (0, 1, 10, False, False, False)
    assert host.layout(product((4, 4, 3), (11,)), cpu)[1:] == (0, 1, 4, False, True, False)
    assert host.layout(product((16, 16), (16, 16)), cpu).group == 16
    assert host.layout(product((16, 16, 32), (32, 32)), cpu)[1:] == (0, 1, 32, True, True, False)


@pytest.mark.parametrize(("bits", "codes"), [(2, 4), (3, 8), (4, 2), (5, 8), (6, 4), (7, 8), (8, 1)])
def test_sets_of_codes_fill_whole_bytes(bits, codes) -> None:
    assert host.codes_per_set(bits) == codes
    for size, whole in ((codes, True), (codes + 1, codes == 1)):
        form = FORMATS[f"int{bits}"]
        assert host.layout(Product(form, (size, 1), (size + 1,), None), torch.device("cpu")).sets == whole


@pytest.mark.parametrize(
    ("columns", "width", "steps"),
    [
        ((64,) * 3, 64, 1),
        ((128,) * 3, 64, 2),
        ((96,) * 3, 64, 2),
        ((4096,), 64, 0),
        ((64, 32), 64, 1),
        ((96, 32), 64, 0),
    ],
)
def test_steps(columns, width, steps) -> None:
    assert host.layout(product(columns, (sum(columns),)), torch.device("cpu")).steps(width) == steps


def test_segments_of() -> None:
    cpu = torch.device("cpu")
    found = host.segments_of(product((13, 11), (13, 11)), cpu)
    assert found.bounds is not None
    assert found.bounds.tolist() == [[0, 13], [13, 24], [8, 0]]
    assert found[1:] == (0, 0, False)
    assert host.segments_of(product((8, 8), (16,)), cpu) == (None, 16, 8, True)
    # Only the first segment has dual scale.
    assert host.segments_of(product((16, 16), (16, 16)), cpu).bounds is not None


@pytest.mark.parametrize(
    ("columns", "segments", "expected"),
    [
        ((32, 32), (64,), True),
        ((2,), (2,), True),
        ((32, 32), (32, 32), False),
        ((24, 24), (48,), False),
        ((32, 16), (48,), False),
        ((512,), (512,), False),
        ((1, 1), (2,), False),
    ],
)
def test_in_groups(columns, segments, expected) -> None:
    assert host.in_groups(product(columns, segments)) == expected


@pytest.mark.parametrize("tokens", [1, 4, 5, 16, 17, 64, 65, 600])
@pytest.mark.parametrize("columns", [(4096,), (16,) * 4, (100, 28), (3,)])
def test_tile(columns, tokens) -> None:
    tile = host.tile(tokens, max(columns), 64)
    assert tile.BM == 1 if tokens <= host.FEW else tile.BM >= 16
    assert all(size & (size - 1) == 0 for size in tile[:4])
    assert 32 <= tile.BK <= (256 if tile.BM == 1 else 64)


def test_branch() -> None:
    x, down, up = torch.randn(5, 12).bfloat16(), torch.randn(3, 12).bfloat16(), torch.randn(7, 3).bfloat16()
    low = host.branch(x, Operands(torch.empty(7, 12), down=down, up=up))
    torch.testing.assert_close(low.narrow, x.float() @ down.float().T)
    assert low.rank == 3
    assert host.branch(x, Operands(torch.empty(7, 12))).narrow is None


def test_missing_says_what(monkeypatch) -> None:
    monkeypatch.setattr(host, "find_spec", lambda name: None)
    assert host.missing() == "the package triton is not installed"
    monkeypatch.setattr(host, "find_spec", lambda name: sys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert host.missing() == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert host.missing() == "it needs compute capability 8.0, this device has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert host.missing() == ""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert host.missing() == "the Triton kernels do not compile for AMD devices"
