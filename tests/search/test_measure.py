"""The effect of each choice on each layer: sizes, errors, kinds of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfquant.calibration.batches import CalibrationError
from hfquant.config import parse
from hfquant.experts import unfused
from hfquant.integrations.facts import facts_of
from hfquant.planner import ModelFacts
from hfquant.search.choices import rules_of
from hfquant.search.measure import MeasuredChoices, measure
from tests.integrations.mixtures import mixture, tokens
from tests.search.nets import BASE, Net, inputs


def measured(model: nn.Module, data: Any, choices: Any = ("int3", "int4", "int8"), base: Any = BASE) -> MeasuredChoices:
    facts = facts_of(model) if hasattr(model, "config") else ModelFacts()
    with unfused(model, facts.experts) as experts:
        return measure(model, rules_of(choices, parse(base)), data, facts, experts)


def test_sizes_and_errors():
    net = Net()
    found = measured(net, inputs())
    assert list(found.table) == ["loud", "quiet"]
    assert found.weights == 2 * 64 * 64
    for name, options in found.table.items():
        assert [o.bytes for o in options] == sorted(o.bytes for o in options)
        assert [o.harm for o in options] == sorted((o.harm for o in options), reverse=True)
        for option in options:
            layer = found.solved[name][option.name]
            assert option.bytes == sum(t.nbytes for t in layer.solved_tensors().values())
    # 1000 times the gain means a million times the harm.
    assert found.table["loud"][0].harm / found.table["quiet"][0].harm == pytest.approx(1e6, rel=0.5)
    assert found.table["loud"][0].relative == pytest.approx(found.table["quiet"][0].relative, rel=0.3)
    assert net.loud.weight.requires_grad


def test_roundings_and_quantized_inputs_are_measured_as_they_are():
    mixed = torch.randn(64, 64)
    data = [x @ mixed for x in inputs(8)]
    both = [{"weight_quant": {"type": "int3"}}, {"weight_quant": {"type": "int3"}, "calib": {"type": "gptq"}}]
    static = {"input_quant": {"type": "int4"}, "weight_quant": {"type": "int8", "axis": -1, "group_size": None}}
    found = measured(Net(), data, [*both, static])
    nearest, gptq, inputs4 = found.table["loud"]
    assert gptq.harm < 0.9 * nearest.harm
    assert gptq.bytes == nearest.bytes
    assert inputs4.relative > 1e-3  # weight-only INT8 errs by less than 1e-4


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 1)
        self.never = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_convolutions_take_part_and_layers_that_never_run_do_not():
    found = measured(Pixels(), [torch.randn(2, 16, 6, 6) for _ in range(3)])
    assert list(found.table) == ["first", "second"]
    assert found.weights == 16 * 9 * 32 + 32 * 16
    for options in found.table.values():
        assert options[0].harm > options[1].harm > options[2].harm > 0
    assert "never" in found.plans["int4"]


@pytest.mark.parametrize(("input_quant", "smooths"), [({"type": "int8"}, True), (None, False)])
def test_layers_are_smoothed_on_their_own_where_inputs_are_quantized(input_quant, smooths):
    net = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
    opt = {"opt": {"type": "smooth", "fold": True}, "input_quant": input_quant}
    found = measured(net, inputs(), base={"default": {**BASE["default"], **opt}})
    assert all(plans["1"].folded for plans in found.plans.values())
    layers = found.solved["1"].values()
    assert all(("smooth" in layer.solved_tensors()) == smooths for layer in layers)


def test_experts_of_one_parameter_are_one_layer():
    model = mixture("MixtralForCausalLM")
    found = measured(model, [{"input_ids": tokens(seed=i)} for i in range(3)])
    fused = [name for name, names in found.members.items() if len(names) > 1]
    assert fused
    assert all(len(found.members[name]) == 4 for name in fused)
    whole = dict(model.named_parameters())
    for name in fused:
        sizes = [(p.in_features, p.out_features) for p in (found.plans["int4"][n] for n in found.members[name])]
        assert sum(i * o for i, o in sizes) == whole[name].numel()
        assert found.table[name][0].harm > found.table[name][-1].harm
    assert set(found.modules(dict.fromkeys(found.table, "int8"))) == {n for ns in found.members.values() for n in ns}


def test_nothing_ran():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x.requires_grad_()

    with pytest.raises(CalibrationError, match="none of the layers that could be quantized ran"):
        measured(Idle(), inputs())
