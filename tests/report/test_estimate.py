"""The estimate of calibration cost, as far as it can be checked without a clock."""

from __future__ import annotations

import pytest
from torch import nn

import hfquant
from hfquant.report import estimate
from hfquant.report.estimate import calibration_cost
from hfquant.statistics import stats_bytes
from tests.integrations.mixtures import mixture
from tests.report.conftest import small_llama


def test_nothing_to_calibrate():
    model = small_llama()
    cost = calibration_cost(model, hfquant.plan(model, "w4a16"))
    assert (cost.tokens, cost.passes, cost.statistics_bytes, cost.forward_seconds) == (0, 0, 0, 0)
    assert cost.solve_seconds > 0


def test_statistics_are_those_of_the_layers():
    model = small_llama()
    plan = hfquant.plan(model, "w4a16-gptq")
    cost = calibration_cost(model, plan, tokens=1024, measured=64)
    assert cost.tokens == 1024
    assert cost.passes == 1
    assert cost.statistics_bytes == sum(stats_bytes(x.in_features, x.config.needs) for x in plan.layers.values())
    assert min(cost.forward_seconds, cost.observe_seconds, cost.solve_seconds) > 0
    assert "1024 rows" in str(cost)
    assert set(cost.to_dict()) >= {"tokens", "solve_seconds", "passes"}


def test_memory_that_is_short_takes_more_passes(monkeypatch):
    model = small_llama()
    plan = hfquant.plan(model, "w4a16-gptq")
    total = calibration_cost(model, plan, 1024, 64).statistics_bytes
    monkeypatch.setattr("hfquant.report.estimate.free_memory", lambda: total)
    assert calibration_cost(model, plan, 1024, 64).passes == 4


@pytest.fixture
def a_second_each(monkeypatch):
    """Make every measurement take one second, so that only the counting remains."""
    monkeypatch.setattr(estimate, "_seconds", lambda call: (call(), 1.0)[1])


def test_each_expert_of_a_parameter_is_solved_and_sees_what_is_routed_to_it(a_second_each):
    model = mixture("MixtralForCausalLM")
    plan = hfquant.plan(model, "w4a16-gptq")
    experts, chosen = model.config.num_local_experts, model.config.num_experts_per_tok
    assert 1 < chosen < experts
    fused = [name for name in plan.layers if ".experts." in name]
    cost = calibration_cost(model, plan, tokens=64, measured=64)
    plain = len(plan.layers) - len(fused)
    assert fused
    assert cost.solve_seconds == pytest.approx(plain + experts * len(fused))
    assert cost.forward_seconds == cost.observe_seconds == pytest.approx(plain + chosen * len(fused))
    assert cost.statistics_bytes == sum(
        (experts if name in fused else 1) * stats_bytes(layer.in_features, layer.config.needs)
        for name, layer in plan.layers.items()
    )


def test_what_the_first_use_takes_is_not_counted(monkeypatch):
    """The kernels may be compiled at that point."""
    took = iter([1000.0, 1000.0, 1000.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(estimate, "_seconds", lambda call: (call(), next(took))[1])
    model = nn.Sequential(nn.Linear(96, 32))
    cost = calibration_cost(model, hfquant.plan(model, "w4a16-gptq"), tokens=64, measured=64)
    assert cost.forward_seconds == cost.observe_seconds == cost.solve_seconds == 1


def test_a_convolution_counts_with_every_position_of_its_kernel(a_second_each):
    """The layer exceeds the measured size, so its cost is scaled up by its window's columns, not by its channels."""
    model = nn.Sequential(nn.Conv2d(512, 64, 3))
    plan = hfquant.plan(model, "w4a16-gptq")
    cost = calibration_cost(model, plan, tokens=64, measured=64)
    assert cost.statistics_bytes == stats_bytes(9 * 512, plan.layers["0"].config.needs)
    assert cost.forward_seconds == pytest.approx(9 * 512 / 1024)
    assert cost.solve_seconds == pytest.approx((9 * 512 / 1024) ** 2)
