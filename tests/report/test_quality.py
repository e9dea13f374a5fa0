"""Metrics of two models against sums written out in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hfquant.report.quality import builtin_text, compare_models, compare_signals
from tests.report.conftest import small_llama


def figures(found) -> dict[str, tuple[float, float | None]]:
    return {figure.name: (figure.value, figure.error) for figure in found.figures}


def noisy(model: nn.Module, scale: float = 0.5) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale * parameter.std())
    return model


@pytest.fixture(scope="module")
def pair():
    reference = small_llama()
    return reference, noisy(small_llama())


def windows(count: int = 3, length: int = 9) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(50, (1, length + i), generator=generator)} for i in range(count)]


@torch.no_grad()
def test_language_models(pair):
    reference, other = pair
    kl, losses, agree, counts = [], [[], []], [], []
    for batch in windows():
        p, q = (m(**batch).logits[0, :-1].double().softmax(-1) for m in pair)
        target = batch["input_ids"][0, 1:]
        kl.append((p * (p / q).log()).sum().item())
        for i, probabilities in enumerate((p, q)):
            losses[i].append(-probabilities[torch.arange(len(target)), target].log().sum().item())
        agree.append((p.argmax(-1) == q.argmax(-1)).sum().item())
        counts.append(len(target))
    found = figures(compare_models(reference, other, windows()))
    total = sum(counts)
    assert found["KL divergence"][0] == pytest.approx(sum(kl) / total, rel=1e-4)
    assert found["perplexity, reference"][0] == pytest.approx(math.exp(sum(losses[0]) / total), rel=1e-5)
    assert found["perplexity"][0] == pytest.approx(math.exp(sum(losses[1]) / total), rel=1e-5)
    assert found["top-1 agreement"][0] == pytest.approx(100 * sum(agree) / total)
    mean = sum(kl) / total
    spread = sum((k - mean * n) ** 2 for k, n in zip(kl, counts, strict=True))
    assert found["KL divergence"][1] == pytest.approx(math.sqrt(spread * 3 / 2) / total, rel=1e-3)


def test_a_model_is_equal_to_itself(pair):
    found = figures(compare_models(pair[0], pair[0], windows()))
    assert found["KL divergence"][0] == pytest.approx(0, abs=1e-7)
    assert found["top-1 agreement"][0] == 100


def test_padding_does_not_count(pair):
    (batch, *_) = windows()
    ids, length = batch["input_ids"], batch["input_ids"].shape[1]
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1),
        "attention_mask": torch.tensor([[1] * length + [0] * 4]),
    }
    plain, masked = (figures(compare_models(*pair, [b])) for b in (batch, padded))
    for name in plain:
        assert masked[name][0] == pytest.approx(plain[name][0], rel=1e-5)


def test_next_tokens_that_differ(pair):
    found = compare_models(*pair, windows(), decode=lambda ids: " ".join(map(str, ids.tolist())))
    assert found.changes
    for change in found.changes:
        assert change.reference[0] != change.other[0]
        assert 0 < change.reference[1] <= 1
    losses = [c.reference[1] for c in found.changes]
    assert len(losses) <= 20


class Encoder(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=x * self.weight)


def test_hidden_states():
    found = figures(compare_models(Encoder(1.0), Encoder(1.1), [torch.randn(2, 5, 4), torch.randn(2, 3, 4)]))
    assert found["SQNR of hidden states"][0] == pytest.approx(20, abs=1e-3)
    assert found["cosine similarity of hidden states"][0] == pytest.approx(1)


def test_outputs_of_nothing_but_zeros():
    silent, loud = torch.zeros(1, 3, 4), torch.randn(1, 3, 4)
    alike = figures(compare_models(Encoder(1.0), Encoder(1.0), [silent, loud]))
    assert alike["SQNR of hidden states"][0] == math.inf
    assert alike["cosine similarity of hidden states"][0] == 1
    found = figures(compare_models(Encoder(1.0), Encoder(1.1), [silent, loud]))
    assert found["SQNR of hidden states"][0] == pytest.approx(20, abs=1e-3)
    assert found["cosine similarity of hidden states"][0] == pytest.approx(1)


def test_bad_models(pair):
    with pytest.raises(ValueError, match="no batches"):
        compare_models(*pair, [])
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        compare_models(Encoder(1.0), Encoder(math.nan), [torch.ones(1, 2, 3)])
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        compare_models(Encoder(math.nan), Encoder(1.0), [torch.ones(1, 2, 3)])
    broken = compare_signals([(torch.ones(3), torch.full((3,), math.nan))], "audio")
    assert all(math.isnan(figure.value) for figure in broken)
    with pytest.raises(ValueError, match="neither logits nor"):
        compare_models(nn.Identity(), nn.Identity(), [torch.ones(1, 2)])


def test_the_text_that_is_always_there():
    (text,) = builtin_text()
    assert len(text) > 300_000
