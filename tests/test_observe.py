"""One pass over the data: which layers' inputs are seen, what is recorded, how often, and when it stops."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from hfquant.calibration.batches import CalibrationError, options_for
from hfquant.observe import observe
from hfquant.statistics import SAMPLE_ROWS, LayerStats


class Net(nn.Module):
    """Two linears on one tensor, one on another, and one that never runs."""

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
    stats = observe(net, watched(net), batches, {"q": {"hessian"}, "k": (), "out": {"hessian"}, "never": {"hessian"}})
    rows = np.concatenate([b.reshape(-1, 6).double().numpy() for b in batches])
    assert set(stats) == {"q", "k", "out"}
    assert stats["q"].count == len(rows) == 28
    np.testing.assert_array_equal(stats["q"].low.numpy(), rows.min(0).astype(np.float32))
    np.testing.assert_array_equal(stats["q"].amax.numpy(), np.abs(rows).max(0).astype(np.float32))
    np.testing.assert_array_equal(stats["q"].high.numpy(), rows.max(0).astype(np.float32))
    np.testing.assert_allclose(stats["q"].sums["hessian"], rows.T @ rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats["q"].hessian, rows.T @ rows / 28, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["k"].sums["power"], (rows**2).sum(0), rtol=1e-5)
    np.testing.assert_allclose(stats["k"].mean_square, (rows**2).mean(0), rtol=1e-5)
    assert "hessian" not in stats["k"].sums
    assert sorted(map(tuple, stats["q"].rows.tolist())) == sorted(map(tuple, rows.astype(np.float32).tolist()))
    assert net.training
    assert net.dropout.training
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_shared_input_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    measure = LayerStats.of
    monkeypatch.setattr(LayerStats, "of", lambda *a: calls.append(1) or measure(*a))
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


def test_the_sample_is_spread_over_the_data() -> None:
    net = nn.Sequential(nn.Linear(8, 1))
    batches = list(torch.eye(8)[:, None].expand(8, 300, 8))
    sample = observe(net, {"0": net[0]}, batches)["0"].rows
    assert len(sample) == SAMPLE_ROWS
    assert (sample.sum(0) > 10).all()  # the expected value is 32


def test_samples_of_a_batch_are_drawn_apart() -> None:
    where = torch.arange(1.0, 301).expand(8, 300).T  # each row encodes its position, and rows have about the same norm
    rows = torch.cat([torch.full((300, 8), 1e4), where], 1)
    net = nn.Sequential(nn.Linear(16, 1))
    positions = observe(net, {"0": net[0]}, [[(rows,), (rows,)]])["0"].rows[:, 8].tolist()
    assert len(positions) == SAMPLE_ROWS
    # If both samples used the same draw, every position but one would occur twice.
    assert len(set(positions)) > 0.6 * SAMPLE_ROWS


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


@pytest.mark.parametrize("form", ["tensors", "lists", "arrays", "positional"])
def test_padding_is_masked_out_in_every_form_of_a_sample(form: str) -> None:
    net = Embeds()
    ids, mask = torch.tensor([[1, 2, 0, 0], [3, 4, 5, 6]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    forms: dict[str, Any] = {
        "tensors": {"input_ids": ids, "attention_mask": mask},
        "lists": {"input_ids": ids.tolist(), "attention_mask": mask.tolist()},
        "arrays": {"input_ids": ids.numpy(), "attention_mask": mask.numpy()},
        "positional": (ids, mask),
    }
    stats = observe(net, {"linear": net.linear}, [forms[form]])["linear"]
    assert stats.count == 6
    assert stats.amax.max() < 100


class Embeds(nn.Module):
    """Embeds tokens; that of padding is huge."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(8, 4), nn.Linear(4, 4)
        self.embedding.weight.data[0] = 1e9

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embedding(input_ids))


def test_padding_of_inputs_with_heads_is_masked_out() -> None:
    """[batch, tokens, heads, in]: each head of a real token is a row."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.linear(x.unflatten(-1, (2, 3)))

    net, mask = Heads(), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    x = torch.randn(2, 4, 6)
    stats = observe(net, {"linear": net.linear}, [{"x": x, "attention_mask": mask}], {"linear": {"hessian"}})["linear"]
    rows = x[mask.bool()].reshape(-1, 3)
    assert stats.count == 12
    assert torch.allclose(stats.high, rows.amax(0))


def test_both_halves_of_an_encoder_decoder_have_a_mask_of_their_own() -> None:
    """Cross attention reads the encoder's tokens, in a layer of the decoder."""
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, num_decoder_layers=1)
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(1, 32, (2, 6))
    sample = {
        "input_ids": ids,
        "attention_mask": (torch.arange(6) < torch.tensor([[2], [6]])).long(),
        "decoder_input_ids": ids.flip(1),
    }
    attention = {half: f"{half}.block.0.layer.0.SelfAttention.q" for half in ("encoder", "decoder")}
    cross = {name: f"decoder.block.0.layer.1.EncDecAttention.{name}" for name in "qk"}
    layers = {name: model.get_submodule(name) for name in [*attention.values(), *cross.values(), "lm_head"]}

    def counts(sample: dict[str, torch.Tensor]) -> list[int]:
        stats = observe(model, layers, [sample])
        first = [stats[name].count for name in (attention["encoder"], cross["k"])]
        return first + [stats[name].count for name in (attention["decoder"], cross["q"], "lm_head")]

    assert counts(sample) == [8, 8, 12, 12, 12]
    sample["decoder_attention_mask"] = (torch.arange(6) < torch.tensor([[3], [4]])).long()
    assert counts(sample) == [8, 8, 7, 7, 7]
    del sample["attention_mask"]
    assert counts(sample) == [12, 12, 7, 7, 7]


def test_inference_tensors_are_measured() -> None:
    """They do not count their changes, so what is known of one cannot be used again."""
    net = Net()
    x = torch.randn(4, 6)
    with torch.inference_mode():
        made = x.clone()
    with torch.inference_mode():
        inside = observe(net, watched(net), [x])
    for stats in (observe(net, watched(net), [made]), inside):
        for name, right in observe(net, watched(net), [x]).items():
            assert torch.equal(stats[name].high, right.high)
            assert torch.equal(stats[name].low, right.low)


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


def test_a_nan_is_noticed_wherever_it_is_in_an_image() -> None:
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 300, 300)  # too many windows to keep: most are left out
    for place in range(0, 300, 37):
        poisoned = x.clone()
        poisoned[0, 1, place, place] = float("nan")
        with pytest.raises(CalibrationError, match="are NaN or Inf in calibration batch 0"):
            observe(conv, {"": conv}, [poisoned])


def test_stop_early_runs_no_further_than_needed() -> None:
    net = Net()
    ran = []
    net.out.register_forward_pre_hook(lambda *_: ran.append(1))
    observe(net, {"q": net.q, "k": net.k}, [torch.randn(2, 6)] * 2, stop_early=True)
    assert len(ran) == 1  # the first forward tells how often each layer runs
    observe(net, {"q": net.q}, [torch.randn(2, 6)] * 2)
    assert len(ran) == 3


def test_stop_early_sees_all_calls() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for _ in range(3):
                x = self.again(x)
            return self.last(x)

    net, ran = Repeats(), []
    net.last.register_forward_pre_hook(lambda *_: ran.append(1))
    stats = observe(net, {"first": net.first, "again": net.again}, [torch.randn(2, 6)] * 4, stop_early=True)
    assert (stats["first"].count, stats["again"].count) == (8, 24)
    assert len(ran) == 1


def test_options_yield_to_a_sample_s_own() -> None:
    net, x = Net(), torch.ones(2, 6)
    samples = [{"x": x}, {"x": x, "scale": 2.0}, (x,), x]
    highs = [observe(net, {"q": net.q}, [s], options={"scale": 3.0})["q"].high[0].item() for s in samples]
    assert highs == [3.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("bad", ["text", 3])
def test_a_sample_that_cannot_be_used_leaves_no_hooks(bad: Any) -> None:
    net = Net().train()
    with pytest.raises(CalibrationError, match="a sample is a tensor, a tuple or a dict"):
        observe(net, watched(net), [torch.ones(1, 6), bad])
    assert net.training
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_process_takes_its_batches_and_all_together_see_each_row_once() -> None:
    """The draws for a batch do not depend on the process that runs it."""
    net, batches = Net(), [torch.randn(1 + i, 6) for i in range(5)]
    whole = observe(net, {"q": net.q}, batches, {"q": {"hessian"}})["q"]
    parts = [observe(net, {"q": net.q}, batches, {"q": {"hessian"}}, shard=(rank, 3))["q"] for rank in range(3)]
    assert [p.count for p in parts] == [1 + 4, 2 + 5, 3]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.count == whole.count
    assert torch.equal(merged.low, whole.low)
    assert torch.equal(merged.high, whole.high)
    assert torch.equal(merged.rows, whole.rows)
    torch.testing.assert_close(merged.hessian, whole.hessian, rtol=1e-5, atol=1e-6)


class Language(nn.Module):
    """The outside of a causal language model's forward."""

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
    stats = observe(
        model, {"body": model.body}, [{"x": torch.randn(2, 5, 6)}], options=options_for(model, [model.body])
    )
    assert model.calls == [(False, 1)]
    assert stats["body"].count == 10


def test_an_observed_head_sees_every_token_and_a_callers_arguments_win() -> None:
    model = Language()
    batch = {"x": torch.randn(2, 5, 6), "use_cache": True}
    stats = observe(model, {"head": model.head}, [batch], options=options_for(model, [model.head]))
    assert model.calls == [(True, 0)]
    assert stats["head"].count == 10
