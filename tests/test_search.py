"""Bits a layer under a budget: the knapsack against brute force, the measured effects against autograd's own."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hfquant
from hfquant.config import ConfigError
from hfquant.integrations.facts import facts_of
from hfquant.search import Choice, _knapsack, _sensitivity, relaxed, search
from tests.report.conftest import small_llama

BASE = {
    "default": {
        "opt": {"type": "default"},
        "calib": {"type": "amax"},
        "input_quant": None,
        "weight_quant": {"type": "int4", "group_size": 32, "symmetric": False, "clip": "mse"},
    }
}


class Net(nn.Module):
    """Two layers of very different weight in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.loud(x) + 0.01 * self.quiet(x)


def inputs(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 64, generator=generator) for _ in range(count)]


sizes = st.integers(1, 60)
errors = st.integers(0, 100).map(float)
spares = st.integers(0, 100)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.tuples(sizes, errors), min_size=2, max_size=3), min_size=1, max_size=5), st.integers(0, 150)
)
def test_the_choice_is_the_best_that_there_is(layers, spare):
    table = {
        str(i): [Choice(str(j), size, error, error) for j, (size, error) in enumerate(choices)]
        for i, choices in enumerate(layers)
    }
    limit = sum(min(size for size, _ in choices) for choices in layers) + spare
    every = [(sum(c.bytes for c in picks), sum(c.error for c in picks)) for picks in itertools.product(*table.values())]
    best = min(error for size, error in every if size <= limit)
    chosen = _knapsack(table, limit, lambda c: c.error)
    picked = [next(c for c in table[name] if c.name == kind) for name, kind in chosen.items()]
    assert sum(c.bytes for c in picked) <= limit
    assert sum(c.error for c in picked) == pytest.approx(best, abs=1e-9)
    assert relaxed(table, limit) <= best + 1e-9


def test_what_one_layer_takes_the_others_do_not_get():
    table = {
        name: [Choice("small", 1, 10.0, 10.0), Choice("large", 11, error, error)]
        for name, error in (("first", 1.0), ("second", 0.5), ("third", 0.0))
    }
    assert _knapsack(table, 14, lambda c: c.error) == {"first": "small", "second": "small", "third": "large"}
    assert _knapsack(table, 24, lambda c: c.error) == {"first": "small", "second": "large", "third": "large"}


def test_sensitivity_is_the_mean_square_of_the_gradient():
    net = Net()
    found = _sensitivity(net, ["loud", "quiet"], inputs())
    # The output's gradient is a random direction of unit variance, scaled by each layer's factor.
    assert found["loud"].shape == (64,)
    assert found["loud"].mean().item() == pytest.approx(100, rel=0.15)
    assert found["quiet"].mean().item() == pytest.approx(1e-4, rel=0.15)
    assert torch.allclose(found["loud"] / found["quiet"], torch.tensor(1e6))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_bits_go_where_they_count():
    found = search(Net(), inputs(), 7.2, ("int4", "int8"), BASE, width=4)
    assert found.chosen == {"loud": "int8", "quiet": "int4"}
    assert found.bits <= 7.2
    assert found.error >= found.bound > 0


def test_a_budget_in_bytes_is_that_in_bits():
    bits = search(Net(), inputs(), 7.2, ("int4", "int8"), BASE, width=4)
    weights = 2 * 64 * 64
    size = search(Net(), inputs(), 7.2 * weights / 8, ("int4", "int8"), BASE, width=4)
    assert size.chosen == bits.chosen
    assert size.bytes == bits.bytes == round(bits.bits * weights / 8)


def test_more_budget_lowers_the_bound():
    net = Net()
    found = [search(net, inputs(), bits, ("int4", "int6", "int8"), BASE) for bits in (5.3, 6, 7, 8, 9.5)]
    bounds = [choice.bound for choice in found]
    assert bounds == sorted(bounds, reverse=True)
    assert all(choice.error >= choice.bound - 1e-9 for choice in found)


def test_a_language_model_and_its_config():
    model = small_llama()
    before = copy.deepcopy(model.state_dict())
    data = [{"input_ids": torch.randint(50, (2, 12))} for _ in range(4)]
    found = search(model, data, 6.5, ("int4", "int6", "int8"), BASE, facts_of(model), width=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(found.chosen) == set(hfquant.plan(model, BASE).layers)
    assert len(set(found.chosen.values())) > 1
    plan = hfquant.plan(model, found.config)
    assert {name: layer.config.weight_quant.type for name, layer in plan.layers.items()} == found.chosen
    quantized = hfquant.quantize(model, None, found.config)
    size = sum(
        t.nbytes
        for layer in quantized.modules()
        if isinstance(layer, hfquant.QuantLinear)
        for t in layer.solved_tensors().values()
    )
    assert size == found.bytes
    assert all(math.isfinite(value) for value in found.judged.values())


class NoGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_without_a_gradient_each_layers_own_error_decides(caplog):
    found = search(NoGradient(), inputs(), 7.2, ("int4", "int8"), BASE)
    assert "no gradient" in caplog.text
    assert sorted(found.chosen.values()) == ["int4", "int8"]


class TestBadInput:
    def test_choices(self):
        with pytest.raises(ConfigError, match="unknown number format 'int5x'"):
            search(Net(), inputs(), 5, ("int4", "int5x"), BASE)
        with pytest.raises(ConfigError, match="at least two"):
            search(Net(), inputs(), 5, ("int4",), BASE)

    def test_a_budget_that_nothing_fits(self):
        with pytest.raises(ValueError, match=r"budget: \d+ bytes; the smallest choice of each layer takes \d+"):
            search(Net(), inputs(), 2, ("int4", "int8"), BASE)

    def test_too_little_data(self):
        with pytest.raises(ValueError, match="at least two samples"):
            search(Net(), inputs(1), 7, ("int4", "int8"), BASE)
