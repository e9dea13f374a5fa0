"""Judging an affiner by the final latents of runs."""

import pytest
import torch

from hfquant.affiner.judge import JUDGED, fresh_samples, gain, pays


def test_samples_begin_with_other_noise():
    samples = [
        {"latents": torch.zeros(4, 2, 8, 8, dtype=torch.bfloat16), "class_labels": [1, 2, 3, 4]},
        {"generator": torch.Generator().manual_seed(0), "prompt": ["a", "b"]},
        {"prompt": ["c"]},
    ]
    found = fresh_samples(samples, 1)
    again = fresh_samples(samples, 1)
    assert torch.equal(found[0]["latents"], again[0]["latents"])
    assert found[0]["latents"].dtype is torch.bfloat16
    assert 0.5 < found[0]["latents"].float().std() < 1.5
    assert not samples[0]["latents"].any()
    assert found[1]["generator"].initial_seed() not in (0, 1)
    assert found[2] == {"prompt": ["c"]}
    assert not torch.equal(fresh_samples(samples, 2)[0]["latents"], found[0]["latents"])


def test_no_more_samples_than_are_needed():
    samples = [{"prompt": ["a"] * 6} for _ in range(9)]
    assert len(fresh_samples(samples, 0)) == -(-JUDGED // 6)


def test_gains_are_decibels_of_the_squared_error():
    real = torch.zeros(2, 1, 2, 2)
    found = gain(real, real + 1, real + torch.tensor([0.1, 10.0]).view(2, 1, 1, 1))
    assert torch.allclose(found, torch.tensor([20.0, -20.0], dtype=torch.float64), atol=1e-4)
    assert gain(real, real, real).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([1.0, 1.2, 0.8], True),
        ([3.0, -2.9, 0.2], False),
        ([-1.0, -1.1], False),
        ([0.1], True),
        ([-0.1], False),
        ([0.0, 0.0], False),
    ],
)
def test_a_gain_pays_beyond_its_error(gains, expected):
    assert pays(torch.tensor(gains)) is expected
