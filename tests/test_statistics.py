"""Statistics: exact against numpy, declared once, independent of order and split."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.statistics import (
    SAMPLE_ROWS,
    STATISTICS,
    Collector,
    LayerStats,
    Reduction,
    Statistic,
    collected,
    stats_bytes,
    within_budget,
)


def some_rows(count: int, features: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator)
    return x, torch.rand(count, dtype=torch.float64, generator=generator)


@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_merging_does_not_depend_on_the_order(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        LayerStats.of(torch.randn(n, 5, generator=generator), torch.rand(n, generator=generator).double(), {"hessian"})
        for n in sizes
    ]

    def merged(order: list[LayerStats]) -> LayerStats:
        total = order[0]
        for part in order[1:]:
            total = total.merge(part)
        return total

    one, other = merged(parts), merged(parts[::-1])
    assert one.count == other.count == sum(sizes)
    assert torch.equal(one.low, other.low)
    assert torch.equal(one.high, other.high)
    assert len(one.rows) == min(SAMPLE_ROWS, sum(sizes))
    for name in ("rows", "keys", "second_half"):
        assert torch.equal(getattr(one.sample, name), getattr(other.sample, name))
    torch.testing.assert_close(one.hessian, other.hessian, rtol=1e-6, atol=1e-4)


def test_the_sample_holds_the_rows_that_matter_and_stands_for_all() -> None:
    """One row in 500 has nearly all of the energy; weighted sums over the sample are unbiased, with little variance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=generator) * torch.rand(4000, 1, generator=generator).exp()
    x[::500] *= 1000
    noise = torch.rand(4000, generator=generator) + 0.5  # an error per row, roughly proportional to its norm
    x[:, 5] = x[:, :5].norm(dim=1) * noise
    ratios = []
    for seed in range(40):
        draw = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        stats = LayerStats.of(x[:1500], draw[:1500]).merge(LayerStats.of(x[1500:], draw[1500:]))
        assert {tuple(r) for r in x[::500].tolist()} <= {tuple(r) for r in stats.rows.tolist()}
        light = stats.rows[:, 5] < 100
        estimate = (stats.rows[light, 5].double().square() * stats.row_weights[light]).sum()
        ratios.append(float(estimate / x[x[:, 5] < 100, 5].double().square().sum()))
    assert np.std(ratios) < 0.1
    assert abs(np.mean(ratios) - 1) < 3 * np.std(ratios) / len(ratios) ** 0.5
    everything = LayerStats.of(x[:SAMPLE_ROWS], draw[:SAMPLE_ROWS])
    assert everything.row_weights.tolist() == [1.0] * SAMPLE_ROWS


def test_halves_have_each_others_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    x, draw = torch.randn(100, 6, generator=generator), torch.rand(100, dtype=torch.float64, generator=generator)
    stats = LayerStats.of(x[:60], draw[:60]).merge(LayerStats.of(x[60:], draw[60:]))
    (first, first_rows), (second, second_rows) = stats.halves()
    assert torch.equal(first_rows, ~second_rows)
    for half, rows in ((first, first_rows), (second, second_rows)):
        others = stats.rows[~rows]
        assert len(others) > 30
        assert torch.equal(half.amax, others.abs().amax(0))
    assert torch.equal(torch.maximum(first.high, second.high), stats.high)

    ((whole, rows),) = LayerStats.of(x[:1], draw[:1]).halves()
    assert rows.all()
    assert torch.equal(whole.amax, x[0].abs())


def test_measurements_go_with_their_tensor() -> None:
    """If they were kept until the end of a batch, the samples and Hessians of all layers would add up."""
    seen = Collector({"q": {"hessian"}})
    seen.start(0)
    x = torch.randn(4, 6)
    assert seen.add("q", x) == 0
    measured = weakref.ref(next(iter(seen._measured.values())).stats)
    seen.stats.clear()
    assert measured() is not None
    del x
    assert measured() is None
    assert not seen._measured


@pytest.mark.parametrize("shift", [-10.0, 0.0, 10.0])
def test_statistics_of_nothing_change_nothing(shift) -> None:
    x, draw = some_rows(9)
    stats = LayerStats.of(x + shift, draw, {"hessian"})
    nothing = LayerStats.empty(6, {"hessian"})
    for merged in (nothing.merge(stats), stats.merge(nothing)):
        assert merged.count == 9
        assert merged.sums.keys() == stats.sums.keys() == set(STATISTICS)
        for name, value in stats.sums.items():
            assert torch.equal(merged.sums[name], value), name
        for name, value in vars(stats.sample).items():
            assert torch.equal(getattr(merged.sample, name), value), name


def test_statistics_of_a_divided_input_follow_from_those_of_the_raw_one() -> None:
    x, draw = some_rows(300)
    divisor = torch.rand(6) + 0.5
    found = LayerStats.of(x, draw, {"hessian"}).divided(divisor)
    seen = (x / divisor).double()
    torch.testing.assert_close(found.low.double(), seen.amin(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.high.double(), seen.amax(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.amax.double(), seen.abs().amax(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.mean_square.double(), seen.square().mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.hessian.double(), seen.T @ seen / 300, rtol=1e-5, atol=1e-5)
    assert {tuple(r) for r in found.rows.tolist()} <= {tuple(r) for r in (x / divisor).tolist()}
    for half, rows in found.halves():
        others = found.rows[~rows].abs().amax(0)
        assert (half.amax >= others).all()
    plain = LayerStats.of(x, draw)
    assert plain.divided(None) is plain
    twice = plain.divided(divisor).divided(divisor.flip(0))
    torch.testing.assert_close(twice.amax.double(), (seen / divisor.flip(0).double()).abs().amax(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("needs", [(), {"hessian"}])
def test_bytes_are_those_of_the_tensors(needs) -> None:
    stats = LayerStats.of(*some_rows(2 * SAMPLE_ROWS, 40), needs)
    held = sum(t.nbytes for t in stats.sums.values()) + stats.sample.rows.nbytes
    assert stats_bytes(40, needs) == held
    assert held == sum(t.nbytes for t in LayerStats.empty(40, needs).sums.values()) + 4 * 40 * SAMPLE_ROWS


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([], []),
        ([3, 3, 4, 1], [[3, 3, 4], [1]]),
        ([11, 2], [[11], [2]]),
        ([9, 20, 0, 1], [[9], [20], [0, 1]]),
        ([0, 10, 0, 1], [[0, 10, 0], [1]]),
    ],
)
def test_groups_keep_to_the_budget_and_only_a_larger_item_is_on_its_own(sizes, groups) -> None:
    assert list(within_budget(sizes, lambda size: size, 10)) == groups


# Declared once.


def test_only_what_is_needed_is_collected() -> None:
    assert collected(()) == ("low", "high", "power")
    assert collected({"hessian"}) == ("low", "high", "power", "hessian")
    with pytest.raises(ValueError, match=r"unknown statistics \['median'\]; available: low, high, power, hessian"):
        collected({"hessian", "median"})


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize(
    ("reduction", "measure"),
    [
        (Reduction.SUM, lambda r: r.x.abs().sum(0)),
        (Reduction.MAX, lambda r: r.x.abs().amax(0)),
        (Reduction.MIN, lambda r: r.x.abs().amin(0)),
    ],
    ids=["sum", "max", "min"],
)
def test_one_line_adds_a_statistic(monkeypatch, reduction, measure, always) -> None:
    """It is collected if needed (or always), merged, counted, and preserved by halves and divisions."""
    monkeypatch.setitem(STATISTICS, "magnitude", Statistic(lambda n: (n,), reduction, measure, always))
    needs = () if always else {"magnitude"}
    assert stats_bytes(6, needs) == stats_bytes(6, {"magnitude"}) == 4 * (5 * 6 + 6 + SAMPLE_ROWS * 6)
    collector = Collector({"with": needs, "without": ()})
    parts = [some_rows(n, seed=n)[0] for n in (5, 1, 30)]
    for seed, x in enumerate(parts):
        collector.start(seed)
        collector.add("with", x)
        collector.add("without", x)
    x = torch.cat(parts).abs().double()
    exact = {Reduction.SUM: x.sum(0), Reduction.MAX: x.amax(0), Reduction.MIN: x.amin(0)}[reduction]
    torch.testing.assert_close(collector.stats["with"].sums["magnitude"].double(), exact, rtol=1e-6, atol=0)
    assert ("magnitude" in collector.stats["without"].sums) == always
    found = collector.stats["with"].divided(torch.rand(6) + 1)
    merged = LayerStats.empty(6, needs).merge(found)
    for stats in (found, merged, *(half for half, _ in found.halves()), found.to(torch.device("cpu"))):
        assert torch.equal(stats.sums["magnitude"], collector.stats["with"].sums["magnitude"])


# The collector.


def test_what_shares_an_input_and_a_history_shares_its_statistics() -> None:
    collector = Collector({"q": {"hessian"}, "k": {"hessian"}, "v": ()})
    for seed in range(3):
        collector.start(seed)
        x = some_rows(7, seed=seed)[0]
        for name in ("q", "k", "v"):
            collector.add(name, x)
    assert collector.stats["q"] is collector.stats["k"]
    assert collector.stats["q"] is not collector.stats["v"]
    assert "hessian" not in collector.stats["v"].sums
    assert collector.stats["v"].count == 21


def test_bad_values_are_counted_and_not_taken_in() -> None:
    collector = Collector({"q": ()})
    collector.start(0)
    x = torch.ones(2, 3, 6)
    assert collector.add("q", x) == 0
    bad = x.clone()
    bad[0, 1, 2:4], bad[1, 2, 0] = torch.nan, torch.inf
    assert collector.add("q", bad) == 3
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert collector.add("q", bad, mask) == 0
    assert collector.stats["q"].count == 6 + 4
    assert collector.add("q", x.clone(), torch.zeros(2, 3, dtype=torch.bool)) == 0
    assert collector.stats["q"].count == 10


def test_seeds_of_any_size_are_taken() -> None:
    collector = Collector({"q": ()})
    for seed in (0, 2**32 + 5, 2**40):
        collector.start(seed)
        collector.add("q", some_rows(3)[0])
    assert collector.stats["q"].count == 9
