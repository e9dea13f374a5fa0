"""End-to-end evaluation of choices, and the repairs it leads to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hfquant.search.knapsack import Option, cheapest
from hfquant.search.repair import Judge, groups_of, repaired
from tests.report.conftest import small_llama
from tests.search.nets import Net, inputs


def test_divergence_of_a_plain_model():
    net, data = Net(), inputs()
    judge = Judge.of(net, data)
    assert not judge.is_distribution
    assert judge.divergence({}).tolist() == [0.0] * 32
    other = copy.deepcopy(net.loud)
    with torch.no_grad():
        other.weight *= 1.1
        x = torch.cat(data)
        y = net(x).double()
        expected = (net.loud(x).double()).square().sum(1) / y.square().sum(1)
    assert torch.allclose(judge.divergence({"loud": other}), expected, rtol=1e-4)
    assert net.loud is not other


def test_divergence_of_a_language_model_leaves_padding_out():
    model = small_llama()
    ids, mask = torch.randint(50, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    judge = Judge.of(model, [{"input_ids": ids, "attention_mask": mask}])
    assert judge.is_distribution
    head = copy.deepcopy(model.lm_head)
    with torch.no_grad():
        head.weight += 0.1 * torch.randn_like(head.weight)
        states = model.model(input_ids=ids, attention_mask=mask).last_hidden_state.double()
        p, q = (states @ w.double().T for w in (model.lm_head.weight, head.weight))
        each = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    found = judge.divergence({"lm_head": head})
    assert torch.allclose(found, torch.stack([each[0].mean(), each[1, :8].mean()]), rtol=1e-3)


def test_the_model_is_put_back_where_a_layer_fails():
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError

    net = Net()
    judge, loud = Judge.of(net, inputs()), net.loud
    with pytest.raises(ArithmeticError):
        judge.divergence({"loud": Broken()})
    assert net.loud is loud


def test_groups():
    names = [f"layers.{i}.{role}" for i in range(3) for role in ("up", "down")] + ["experts.gate.0"]
    groups = groups_of(names)
    assert ["layers.0.up", "layers.1.up", "layers.2.up"] in groups
    assert ["experts.gate.0"] in groups
    assert names[:3] in groups
    assert names[-3:] in groups
    assert groups_of(["a", "b"]) == [["a"], ["b"]]
    assert groups_of(["only"]) == []


def options(harm: float) -> list[Option]:
    return [Option(f"int{bits}", bits, harm * 4.0**-bits, 0.0) for bits in (3, 4, 5, 6)]


def test_a_role_that_is_thought_little_of_gets_its_bits():
    table = {f"{i}.{role}": options(1.0) for i in range(6) for role in ("up", "down")}
    truth = {name: 40.0 if name.endswith("down") else 1.0 for name in table}
    calls = []

    def judged(chosen: dict[str, str]) -> torch.Tensor:
        calls.append(chosen)
        harm = sum(truth[n] * next(o.harm for o in table[n] if o.name == label) for n, label in chosen.items())
        return harm * torch.tensor([0.9, 1.0, 1.1])

    limit = 12 * 4 + 6
    start = cheapest(table, limit, lambda _, o: o.harm)
    best = cheapest(table, limit, lambda name, o: truth[name] * o.harm)
    chosen, divergences = repaired(table, limit, lambda _, o: o.harm, judged, tries=12)
    assert len(calls) <= 13
    assert sum(int(label[3:]) for label in chosen.values()) <= limit
    first, least = judged(start).mean(), judged(best).mean()
    assert divergences.mean() == judged(chosen).mean()
    # Most of the possible gain is achieved.
    assert (first - divergences.mean()) > 0.8 * (first - least)


def test_noise_changes_nothing():
    table = {f"{i}.{role}": options(1.0) for i in range(4) for role in ("up", "down")}
    generator = torch.Generator().manual_seed(0)
    start = cheapest(table, 34, lambda _, o: o.harm)
    chosen, _ = repaired(
        table, 34, lambda _, o: o.harm, lambda _: torch.rand(8, generator=generator) * 1e-3 + 1, tries=5
    )
    assert chosen == start
