"""Tables of maps between timesteps and at other sizes, and the methods that fit them."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from hfquant.affiner import BlockwiseAffiner
from hfquant.affiner.config import parse
from hfquant.affiner.maps import PTQD, TAC
from hfquant.affiner.solvers import moments
from tests.affiner.pipelines import fitted
from tests.affiner.test_solvers import predictions


def test_unseen_timesteps_are_between_their_neighbours():
    affiner, _, quant = fitted(DDIMScheduler(clip_sample=False))
    high, low = affiner.timesteps[:2]
    (k0, b0), (k1, b1) = affiner.prediction.at(low), affiner.prediction.at(high)
    scale, shift = affiner.prediction.at(0.25 * low + 0.75 * high)
    torch.testing.assert_close(scale, 0.25 * k0 + 0.75 * k1)
    torch.testing.assert_close(shift, 0.25 * b0 + 0.75 * b1)
    with affiner.attach(quant), pytest.raises(ValueError, match="outside the range that the affiner was fitted on"):
        quant.sample(steps=8)


@pytest.mark.parametrize("mode", ["block", "interpolate"])
def test_other_sizes_stretch_the_maps(mode):
    affiner, _, quant = fitted(EulerDiscreteScheduler(), {"blocksize": 3, "sample_mode": mode})
    timestep = affiner.timesteps[0]
    ones = torch.ones(1, 2, 6, 6)
    fitted_map = affiner.correct(timestep, ones)
    doubled = affiner.correct(timestep, torch.ones(4, 2, 12, 12))
    assert doubled.shape == (4, 2, 12, 12)
    if mode == "block":
        assert torch.equal(doubled[3:], fitted_map.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(doubled[:1].mean((2, 3)), fitted_map.mean((2, 3)), rtol=1e-3, atol=1e-3)
    with affiner.attach(quant):
        assert quant.sample(size=10).shape == (3, 2, 10, 10)
    with pytest.raises(ValueError, match="fitted on 2 channels, got 3"):
        affiner.correct(timestep, torch.ones(1, 3, 6, 6))


@pytest.mark.parametrize(("fitted_on", "used_on"), [(16, 15), (15, 16), (15, 30)])
def test_packed_tokens_stretch_from_square_to_square(fitted_on, used_on):
    """Another token count does not reveal height and width; a map with a single block does not need them."""
    for blocksize in (2, None):
        affiner = BlockwiseAffiner({"solver": {"blocksize": blocksize}})
        real = torch.randn(3, fitted_on, 2)
        affiner.observe(1.0, real, real * torch.rand(1, fitted_on, 1))
        affiner.solve(1.0)
        if blocksize is None:
            assert affiner.correct(1.0, torch.ones(2, used_on, 2)).shape == (2, used_on, 2)
        else:
            with pytest.raises(ValueError, match=f"fitted on {fitted_on} packed tokens .* to {used_on}"):
                affiner.correct(1.0, torch.ones(2, used_on, 2))
        assert affiner.correct(1.0, torch.ones(2, fitted_on, 2)).shape == (2, fitted_on, 2)


def test_half_precision_identity_is_exact():
    affiner, _, _ = fitted(EulerDiscreteScheduler(), stepper={"max_timestep": 4, "enable_timesteps": [0]})
    values = torch.randn(2, 2, 6, 6).half()
    corrected = affiner.correct(affiner.timesteps[2], values)
    assert corrected.dtype == torch.float16
    assert torch.equal(corrected, values)


def test_ptqd_is_the_regression_slope_and_the_channel_means():
    real, quant = predictions()
    scale, shift = PTQD(parse({})).fit(moments(real, quant, None))
    slope = np.polyfit(real.numpy().ravel(), (quant - real).numpy().ravel(), 1)[0]
    assert scale.flatten().tolist() == pytest.approx([1 / (1 + slope)] * 2, abs=1e-12)
    rest = scale * quant + shift - real
    torch.testing.assert_close(rest.mean((0, 2, 3)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_tac_is_a_line_through_the_origin():
    real, quant = predictions()
    scale, _ = TAC(parse({})).fit(moments(real, quant, None))
    for c in range(2):
        expected = np.linalg.lstsq(quant[:, c].numpy().reshape(-1, 1), real[:, c].numpy().ravel(), rcond=None)[0]
        assert scale[c].item() == pytest.approx(expected[0], abs=1e-12)
