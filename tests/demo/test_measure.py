"""The demo's measurements against numbers computed by hand."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hfquant.demo.measure import Speed, psnr, speeds


def test_psnr_of_a_known_error():
    rng = np.random.default_rng(0)
    reference = rng.uniform(0.2, 0.8, (5, 8, 8)).astype(np.float32)
    sign = rng.choice([-0.1, 0.1], reference.shape).astype(np.float32)
    assert psnr(reference + sign, reference) == pytest.approx(20.0, abs=1e-4)
    assert psnr(reference, reference) == float("inf")


def test_speeds_are_medians_of_turns_taken_in_order(monkeypatch):
    """The clock is faked: each run takes the time in its list, so nothing depends on the machine."""
    now, order = [0.0], []
    costs = {"full": iter([2.0, 2.0, 8.0]), "a": iter([1.0, 1.0, 4.0]), "b": iter([4.0, 1.0, 2.0])}

    def run(name):
        order.append(name)
        now[0] += next(costs[name])

    monkeypatch.setattr(time, "process_time", lambda: now[0])
    a, b = speeds(lambda: run("full"), [lambda: run("a"), lambda: run("b")], repeats=3)
    assert order == ["full", "a", "b"] * 3
    assert (a.ratio, a.spread, a.seconds, a.noisy) == (2.0, 0.0, (2.0, 1.0), False)  # a slow round slows all alike
    assert (b.ratio, b.spread, b.noisy) == (2.0, 1.75, True)  # 0.5, 2, 4


def test_noise_is_a_share_of_the_speed():
    assert not Speed(10.0, 1.9, (1.0, 0.1)).noisy
    assert Speed(1.0, 0.25, (1.0, 1.0)).noisy
