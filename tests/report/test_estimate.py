"""The estimate of what calibration takes: what can be checked of it without a clock."""

from __future__ import annotations

import hfquant
from hfquant.report.estimate import calibration_cost
from hfquant.statistics import stats_bytes
from tests.report.conftest import small_llama


def test_nothing_to_calibrate():
    cost = calibration_cost(hfquant.plan(small_llama(), "w4a16"))
    assert (cost.tokens, cost.passes, cost.statistics_bytes, cost.forward_seconds) == (0, 0, 0, 0)
    assert cost.solve_seconds > 0


def test_statistics_are_those_of_the_layers():
    plan = hfquant.plan(small_llama(), "w4a16-gptq")
    cost = calibration_cost(plan, tokens=1024, measured=64)
    assert cost.tokens == 1024
    assert cost.passes == 1
    assert cost.statistics_bytes == sum(stats_bytes(x.in_features, x.config.needs) for x in plan.layers.values())
    assert min(cost.forward_seconds, cost.observe_seconds, cost.solve_seconds) > 0
    assert "1024 rows" in str(cost)
    assert set(cost.to_dict()) >= {"tokens", "solve_seconds", "passes"}


def test_memory_that_is_short_takes_more_passes(monkeypatch):
    plan = hfquant.plan(small_llama(), "w4a16-gptq")
    total = calibration_cost(plan, 1024, 64).statistics_bytes
    monkeypatch.setattr("hfquant.report.estimate.free_memory", lambda: total)
    assert calibration_cost(plan, 1024, 64).passes == 4
