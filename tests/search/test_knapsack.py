"""The knapsack solver against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfquant.search.knapsack import Option, cheapest, relaxed

sizes = st.integers(1, 60)
errors = st.integers(0, 100).map(float)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.tuples(sizes, errors), min_size=2, max_size=3), min_size=1, max_size=5), st.integers(0, 150)
)
def test_the_choice_is_the_best_that_there_is(layers, spare):
    table = {
        str(i): [Option(str(j), size, error, error) for j, (size, error) in enumerate(options)]
        for i, options in enumerate(layers)
    }
    limit = sum(min(size for size, _ in options) for options in layers) + spare
    every = [(sum(o.bytes for o in picks), sum(o.harm for o in picks)) for picks in itertools.product(*table.values())]
    best = min(error for size, error in every if size <= limit)
    chosen = cheapest(table, limit, lambda _, option: option.harm)
    picked = [next(o for o in table[name] if o.name == label) for name, label in chosen.items()]
    assert sum(o.bytes for o in picked) <= limit
    assert sum(o.harm for o in picked) == pytest.approx(best, abs=1e-9)
    assert relaxed(table, limit) <= best + 1e-9


def test_what_one_layer_takes_the_others_do_not_get():
    table = {
        name: [Option("small", 1, 10.0, 10.0), Option("large", 11, error, error)]
        for name, error in (("first", 1.0), ("second", 0.5), ("third", 0.0))
    }

    def harm(_: str, option: Option) -> float:
        return option.harm

    assert cheapest(table, 14, harm) == {"first": "small", "second": "small", "third": "large"}
    assert cheapest(table, 24, harm) == {"first": "small", "second": "large", "third": "large"}


def test_a_layer_may_weigh_more_than_it_says():
    table = {name: [Option("small", 1, 2.0, 0), Option("large", 11, 0.0, 0)] for name in ("first", "second")}
    for heavy in table:
        chosen = cheapest(table, 12, lambda name, option, heavy=heavy: option.harm * (1 + (name == heavy)))
        assert [name for name, label in chosen.items() if label == "large"] == [heavy]


def test_a_budget_that_nothing_fits():
    with pytest.raises(ValueError, match=r"budget: 4 bytes is too small; the smallest .* take 5 bytes"):
        cheapest({"layer": [Option("small", 5, 1.0, 1.0)]}, 4, lambda _, option: option.harm)
