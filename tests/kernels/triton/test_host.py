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
    plain = host.layout(product((32, 32, 32), (96,)), cpu)
    assert plain.blocks.tolist() == [[0, 32, 64], [32, 64, 96], [0, 0, 0]]
    assert (plain.group, plain.aligned, plain.pairs) == (32, True, True)
    short = host.layout(product((10, 3, 10, 1), (13, 11)), cpu)
    assert short.blocks.tolist() == [[0, 10, 13, 23], [10, 13, 23, 24], [0, 0, 1, 1]]
    assert (short.group, short.aligned, short.pairs) == (0, False, False)
    assert host.layout(product((4, 4, 3), (11,)), cpu)[1:] == (0, False, True)
    assert host.layout(product((16, 16), (16, 16)), cpu)[1:] == (0, True, True)


def test_segments_of() -> None:
    assert host.segments_of(product((13, 11), (13, 11)), torch.device("cpu")).tolist() == [[0, 13], [13, 24], [8, 0]]


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
    tile = host.tile(tokens, columns, 64)
    assert tile.BM == 1 if tokens <= host.FEW else tile.BM >= 16
    assert all(size & (size - 1) == 0 for size in tile[:4])
    assert 32 <= tile.BK <= (256 if tile.BM == 1 else 64)


def test_branch() -> None:
    x, down, up = torch.randn(5, 12).bfloat16(), torch.randn(3, 12).bfloat16(), torch.randn(7, 3).bfloat16()
    low = host.branch(x, Operands(torch.empty(7, 12), down=down, up=up))
    torch.testing.assert_close(low.narrow, x.float() @ down.float().T)
    assert (low.rank, low.padded) == (3, 16)
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
