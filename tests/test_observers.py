"""Statistics: exact against numpy, mergeable, deduplicated, padding masked, bad data refused."""

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hfquant import observers
from hfquant.calibration.batches import CalibrationError
from hfquant.observers import SAMPLE_ROWS, LayerStats, layer_stats, observe


class Net(nn.Module):
    """Two linears on one tensor, one on another, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 4)
        self.out, self.never = nn.Linear(6, 3), nn.Linear(6, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        x = self.dropout(x) * scale
        return self.out(self.q(x) + self.k(x).sum(-1, keepdim=True))


def watched(net: Net) -> dict[str, nn.Module]:
    return {name: getattr(net, name) for name in ("q", "k", "out", "never")}


def test_statistics_are_those_of_all_rows() -> None:
    net = Net().train()
    batches = [torch.randn(4, 5, 6), torch.randn(2, 6), torch.randn(3, 1, 2, 6)]
    stats = observe(net, watched(net), batches, {"q": True, "k": False, "out": True, "never": True})
    rows = np.concatenate([b.reshape(-1, 6).double().numpy() for b in batches])
    assert set(stats) == {"q", "k", "out"}
    assert stats["q"].count == len(rows) == 28
    np.testing.assert_array_equal(stats["q"].low.numpy(), rows.min(0).astype(np.float32))
    np.testing.assert_array_equal(stats["q"].amax.numpy(), np.abs(rows).max(0).astype(np.float32))
    np.testing.assert_allclose(stats["q"].hessian, rows.T @ rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats["k"].power, (rows**2).sum(0), rtol=1e-5)
    assert stats["k"].hessian is None
    assert sorted(map(tuple, stats["q"].sample.tolist())) == sorted(map(tuple, rows.astype(np.float32).tolist()))
    assert net.training
    assert net.dropout.training
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_shared_input_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(observers, "layer_stats", lambda *a: calls.append(1) or layer_stats(*a))
    net = Net()
    stats = observe(net, watched(net), [torch.randn(4, 6)] * 3)
    assert stats["q"] is stats["k"]
    assert len(calls) == 3 * 2  # q and k together, and out


def test_a_tensor_changed_in_place_is_measured_again() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.clone()
            self.a(y)
            return self.b(y.mul_(2))

    net = InPlace()
    stats = observe(net, {"a": net.a, "b": net.b}, [torch.ones(2, 3)])
    assert stats["a"].high.tolist() == [1, 1, 1]
    assert stats["b"].high.tolist() == [2, 2, 2]


@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_merging_does_not_depend_on_the_order(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        layer_stats(torch.randn(n, 5, generator=generator), torch.rand(n, generator=generator).double(), True)
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
    assert len(one.sample) == min(SAMPLE_ROWS, sum(sizes))
    assert torch.equal(one.sample[one.keys.argsort()], other.sample[other.keys.argsort()])
    torch.testing.assert_close(one.hessian, other.hessian, rtol=1e-6, atol=1e-4)


def test_the_sample_is_spread_over_the_data() -> None:
    net = nn.Sequential(nn.Linear(8, 1))
    batches = list(torch.eye(8)[:, None].expand(8, 300, 8))
    sample = observe(net, {"0": net[0]}, batches)["0"].sample
    assert len(sample) == SAMPLE_ROWS
    assert (sample.sum(0) > 10).all()  # expectation 32


def test_samples_of_a_batch_are_drawn_apart() -> None:
    where = torch.arange(1.0, 301).expand(8, 300).T  # a row says its position, rows are about as large
    rows = torch.cat([torch.full((300, 8), 1e4), where], 1)
    net = nn.Sequential(nn.Linear(16, 1))
    positions = observe(net, {"0": net[0]}, [[(rows,), (rows,)]])["0"].sample[:, 8].tolist()
    assert len(positions) == SAMPLE_ROWS
    # With one draw for both, every position but one would be there twice.
    assert len(set(positions)) > 0.6 * SAMPLE_ROWS


def test_the_sample_holds_the_rows_that_matter_and_stands_for_all() -> None:
    """One row in 500 has nearly all of the energy; weighted sums over the sample are unbiased with little variance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=generator) * torch.rand(4000, 1, generator=generator).exp()
    x[::500] *= 1000
    noise = torch.rand(4000, generator=generator) + 0.5  # an error a row in proportion to its norm, more or less
    x[:, 5] = x[:, :5].norm(dim=1) * noise
    ratios = []
    for seed in range(40):
        draw = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        stats = layer_stats(x[:1500], draw[:1500]).merge(layer_stats(x[1500:], draw[1500:]))
        assert {tuple(r) for r in x[::500].tolist()} <= {tuple(r) for r in stats.sample.tolist()}
        light = stats.sample[:, 5] < 100
        estimate = (stats.sample[light, 5].double().square() * stats.row_weights[light]).sum()
        ratios.append(float(estimate / x[x[:, 5] < 100, 5].double().square().sum()))
    assert np.std(ratios) < 0.1
    assert abs(np.mean(ratios) - 1) < 3 * np.std(ratios) / len(ratios) ** 0.5
    everything = layer_stats(x[:SAMPLE_ROWS], draw[:SAMPLE_ROWS])
    assert everything.row_weights.tolist() == [1.0] * SAMPLE_ROWS


def test_halves_have_each_others_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    x, draw = torch.randn(100, 6, generator=generator), torch.rand(100, dtype=torch.float64, generator=generator)
    stats = layer_stats(x[:60], draw[:60]).merge(layer_stats(x[60:], draw[60:]))
    (first, first_rows), (second, second_rows) = stats.halves()
    assert torch.equal(first_rows, ~second_rows)
    for half, rows in ((first, first_rows), (second, second_rows)):
        others = stats.sample[~rows]
        assert len(others) > 30
        assert torch.equal(half.amax, others.abs().amax(0))
    assert torch.equal(torch.maximum(first.high, second.high), stats.high)

    ((whole, rows),) = layer_stats(x[:1], draw[:1]).halves()
    assert rows.all()
    assert torch.equal(whole.amax, x[0].abs())


def test_padding_is_masked_out() -> None:
    net = Net()
    x = torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    x[0, 2:] = 1e9
    stats = observe(net, {"q": net.q}, [{"x": x, "attention_mask": mask}])
    assert stats["q"].count == 6
    assert stats["q"].amax.max() < 100
    nothing = {"x": x, "attention_mask": torch.zeros(2, 4, dtype=torch.long)}
    assert observe(net, {"q": net.q}, [nothing]) == {}


def test_every_kind_of_sample() -> None:
    net, x = Net(), torch.randn(3, 6)
    samples = [x, (x,), {"x": x, "scale": 1.0}, [(x,), (x, None), {"x": x}]]
    assert observe(net, {"q": net.q}, samples)["q"].count == 6 * 3


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x / (x - 3))


@pytest.mark.parametrize("bad", [3.0, float("nan"), float("inf")])
def test_nan_and_inf_name_layer_batch_and_count(bad: float) -> None:
    net, x = Broken(), torch.ones(2, 4)
    poisoned = x.clone()
    poisoned[1, :2] = bad
    with pytest.raises(CalibrationError, match=r"layer 'linear': 2 of 8 inputs are NaN or Inf in calibration batch 1"):
        observe(net, {"linear": net.linear}, [x, poisoned])
    assert not net.linear._forward_pre_hooks


def generator() -> Iterator[torch.Tensor]:
    yield torch.ones(1, 6)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], CalibrationError, "empty"),
        (generator(), CalibrationError, "walked only once"),
        ("text", CalibrationError, "expected a DataLoader"),
        (7, CalibrationError, "expected a DataLoader"),
        ({"x": torch.ones(1, 6)}, CalibrationError, "expected a DataLoader"),
        (["text"], CalibrationError, "tokenize text first"),
        ([3], CalibrationError, "a sample is a tensor"),
    ],
)
def test_unusable_data(loader: Any, error: type[Exception], message: str) -> None:
    net = Net()
    with pytest.raises(error, match=message):
        observe(net, watched(net), loader)


def test_stop_early_runs_no_further_than_needed() -> None:
    net = Net()
    ran = []
    net.out.register_forward_pre_hook(lambda *_: ran.append(1))
    observe(net, {"q": net.q, "k": net.k}, [torch.randn(2, 6)] * 2, stop_early=True)
    assert not ran
    observe(net, {"q": net.q}, [torch.randn(2, 6)] * 2)
    assert len(ran) == 2


def test_measurements_go_with_their_tensor() -> None:
    """Kept to the end of a batch, the samples and Hessians of all layers would add up."""
    seen = observers.Observer({"q": True})
    seen.start(0, 0, None, "cpu")
    x = torch.randn(4, 6)
    seen.see("q", x)
    measured = weakref.ref(next(iter(seen._measured.values())).stats)
    seen.stats.clear()
    assert measured() is not None
    del x
    assert measured() is None
    assert not seen._measured


class Language(nn.Module):
    """What a causal language model's forward looks like from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 50)
        self.calls: list[tuple[Any, int]] = []

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor, use_cache: bool | None = None, logits_to_keep: int = 0) -> torch.Tensor:
        self.calls.append((use_cache, logits_to_keep))
        return self.head(self.body(x)[:, -logits_to_keep:])


def test_a_language_model_makes_no_cache_and_logits_of_the_last_token_alone() -> None:
    model = Language()
    stats = observe(model, {"body": model.body}, [{"x": torch.randn(2, 5, 6)}])
    assert model.calls == [(False, 1)]
    assert stats["body"].count == 10


def test_an_observed_head_sees_every_token_and_a_callers_arguments_win() -> None:
    model = Language()
    stats = observe(model, {"head": model.head}, [{"x": torch.randn(2, 5, 6), "use_cache": True}])
    assert model.calls == [(True, 0)]
    assert stats["head"].count == 10
