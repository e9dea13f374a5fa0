"""Attaching: every kind of scheduler, other step counts, sizes and layouts, and no trace left afterwards."""

import copy
import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from hfquant.affiner import Affiner, BlockwiseAffiner, attach, load_affiner
from hfquant.affiner.hooks import Step, intercept, release, step_coefficients
from hfquant.demo import load_digits_pipeline
from tests.affiner.pipelines import Loop, Toy, fitted

SCHEDULERS = [
    DDIMScheduler(clip_sample=False),
    DDPMScheduler(clip_sample=False),
    DPMSolverMultistepScheduler(),
    EulerDiscreteScheduler(),
    EulerAncestralDiscreteScheduler(),
    FlowMatchEulerDiscreteScheduler(),
    HeunDiscreteScheduler(),
    LCMScheduler(),
    LMSDiscreteScheduler(),
    PNDMScheduler(skip_prk_steps=True),
    UniPCMultistepScheduler(),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_every_scheduler(scheduler):
    affiner, real, quant = fitted(scheduler, {"lambda1": 0.0, "lambda2": 0.0})
    torch.manual_seed(0)
    plain = quant.sample()
    torch.manual_seed(0)
    expected = real.sample()
    with affiner.attach(quant):
        assert isinstance(quant.scheduler, type(scheduler))
        assert type(quant.scheduler).__name__ == type(scheduler).__name__
        assert inspect.signature(quant.scheduler.step) == inspect.signature(scheduler.step)
        torch.manual_seed(0)
        torch.testing.assert_close(quant.sample(), expected, rtol=2e-3, atol=2e-3)
    assert type(quant.scheduler) is type(scheduler)
    torch.manual_seed(0)
    assert torch.equal(quant.sample(), plain)
    assert (plain - expected).abs().max() > 0.01


def test_scheduler_swapped_while_attached():
    affiner, _, quant = fitted(DDIMScheduler(clip_sample=False), steps=10)
    first = quant.scheduler
    with affiner.attach(quant):
        with_ddim = quant.sample(10)
        quant.scheduler = DPMSolverMultistepScheduler.from_config(first.config)
        # DPM-Solver++ starts at 999, above the largest fitted timestep of 900; the error shows that affiner is active.
        with pytest.raises(ValueError, match=r"timestep 999 is outside the range .* fitted on, \[0, 900\]"):
            quant.sample(10)
        quant.scheduler = DDIMScheduler.from_config(first.config)
        assert torch.equal(quant.sample(10), with_ddim)
        assert type(first) is DDIMScheduler
    assert type(quant.scheduler) is DDIMScheduler
    assert not torch.equal(quant.sample(10), with_ddim)


def test_deep_copies_of_an_attached_scheduler_step_themselves():
    affiner, _, quant = fitted(EulerDiscreteScheduler())
    with affiner.attach(quant):
        expected = quant.sample()
        quant.scheduler = clone = copy.deepcopy(quant.scheduler)
        assert torch.equal(quant.sample(), expected)
        assert clone.step_index == 4
    assert type(clone) is EulerDiscreteScheduler


def test_a_deep_copy_that_never_ran_is_released_too():
    affiner, _, quant = fitted(EulerDiscreteScheduler())
    plain = quant.sample()
    with affiner.attach(quant):
        quant.scheduler = copy.deepcopy(quant.scheduler)
    assert type(quant.scheduler) is EulerDiscreteScheduler
    assert torch.equal(quant.sample(), plain)


def test_schedulers_that_take_a_timestep_for_each_sample():
    """Stable Cascade's pipelines call `step` this way."""

    class Shift:
        def observe(self, *args): ...

        solve = observe

        def correct(self, timestep, prediction):
            return prediction + timestep

    loop = Loop(Toy(), DDPMWuerstchenScheduler())
    loop.scheduler.set_timesteps(4)
    sample, times = torch.randn(3, 2, 6, 6), loop.scheduler.timesteps[2].expand(3)

    def step(prediction, times=times):
        generator = torch.Generator().manual_seed(0)
        return loop.scheduler.step(prediction, times, sample, generator=generator).prev_sample

    expected = step(torch.full_like(sample, float(times[0])))
    with attach(loop, Shift()):
        assert torch.equal(step(torch.zeros_like(sample)), expected)
        with pytest.raises(ValueError, match="at the same timestep"):
            step(sample, torch.tensor([0.5, 0.25, 0.5]))


def test_a_denoiser_is_not_corrected_twice():
    affiner, _, quant = fitted(DDIMScheduler(clip_sample=False))
    denoiser = quant.transformer
    with affiner.attach(denoiser):
        once = quant.sample()
        with pytest.raises(ValueError, match="attached to this denoiser already"):
            affiner.attach(denoiser)
        with pytest.raises(ValueError, match="attached to this denoiser already"):
            attach(quant, affiner, "text")
        assert torch.equal(quant.sample(), once)
    assert not denoiser._forward_hooks
    assert not denoiser._forward_pre_hooks
    with affiner.attach(quant), pytest.raises(ValueError, match="attached to this denoiser already"):
        affiner.attach(denoiser)


def test_a_wrapped_denoiser_hides_its_timestep():
    """Only guidance halves and bare denoisers need the denoiser's timestep; otherwise the scheduler's is used."""

    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    affiner, real, quant = fitted(DDIMScheduler(clip_sample=False), {"lambda1": 0.0, "lambda2": 0.0})
    quant.transformer = Wrapper(quant.transformer)
    with affiner.attach(quant):
        torch.testing.assert_close(quant.sample(), real.sample(), rtol=2e-3, atol=2e-3)
    with pytest.raises(TypeError, match="Wrapper takes none of the arguments timestep"):
        affiner.attach(quant.transformer)


def test_a_third_party_attaches_the_same_way():
    class Shift:
        def observe(self, timestep, real, quant):
            raise AssertionError("attached affiners do not learn")

        solve = observe

        def correct(self, timestep, prediction):
            return prediction + 0.5

    assert isinstance(Shift(), Affiner)
    loop = Loop(Toy(), EulerDiscreteScheduler())
    plain = loop.sample()
    with attach(loop, Shift()):
        shifted = loop.sample()
    torch.testing.assert_close(shifted, Loop(Toy(offset=[0.5, 0.5]), EulerDiscreteScheduler()).sample())
    assert torch.equal(loop.sample(), plain)


def test_digits_pipeline_with_a_bare_denoiser_attached():
    """Attached to the denoiser alone, the correction applies to both halves of the guidance batch."""
    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)

    class Twice:
        def observe(self, *args): ...

        solve = observe

        def correct(self, timestep, prediction):
            return prediction * 2

    def images():
        generator = torch.Generator().manual_seed(0)
        return pipe([1, 2], 2, generator=generator, output_type="pt").images

    plain = images()
    with attach(pipe.transformer, Twice()):
        bare = images()
    with attach(pipe, Twice()):
        torch.testing.assert_close(images(), bare, rtol=1e-4, atol=1e-4)
    assert torch.equal(images(), plain)
    assert not torch.equal(bare, plain)


def test_unfitted_and_unfit():
    with pytest.raises(ValueError, match="has not been fitted"):
        BlockwiseAffiner({}).attach(Loop(Toy(), DDIMScheduler()))

    class Odd:
        def step(self, x): ...

    with pytest.raises(ValueError, match="no step\\(model_output, timestep, sample\\)"):
        intercept(Odd(), lambda step: None)
    with pytest.raises(ValueError, match="none of the denoisers"):
        attach(type("Pipe", (), {"scheduler": DDIMScheduler()})(), load_affiner.__class__)


# ------------------------------------------------------------------------------------------------ PTQD and the noise


def coefficients(scheduler, index, **options):
    found = []

    def around(step: Step):
        found.append(step_coefficients(step))
        return step.run(step.prediction)

    scheduler.set_timesteps(10)
    intercept(scheduler, around)
    draw = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 1, 4, 4, generator=draw)
    for t in scheduler.timesteps[: index + 1]:
        prediction = torch.randn(2, 1, 4, 4, generator=draw)
        state = draw.get_state()
        step_generator = torch.Generator().manual_seed(1)
        sample = scheduler.step(prediction, t, sample, generator=step_generator, **options).prev_sample
        assert torch.equal(draw.get_state(), state)
    release(scheduler)
    return found[-1]


def test_coefficients_of_ddpm_are_the_posterior_formulas():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", clip_sample=True)
    c, sigma = coefficients(scheduler, 4)
    t, previous = (int(scheduler.timesteps[i]) for i in (4, 5))
    total, before = (scheduler.alphas_cumprod[x].double() for x in (t, previous))
    alpha = total / before
    expected = -(1 - alpha) / (alpha.sqrt() * (1 - total).sqrt())
    assert c == pytest.approx(float(expected), rel=1e-4)
    assert sigma**2 == pytest.approx(float((1 - before) / (1 - total) * (1 - alpha)), rel=1e-4)


def test_coefficients_of_ddim_follow_eta():
    for eta in (0.0, 0.5):
        scheduler = DDIMScheduler(clip_sample=False)
        c, sigma = coefficients(scheduler, 4, eta=eta)
        t, previous = (int(scheduler.timesteps[i]) for i in (4, 5))
        total, before = (scheduler.alphas_cumprod[x].double() for x in (t, previous))
        variance = eta**2 * (1 - before) / (1 - total) * (1 - total / before)
        expected = (1 - before - variance).sqrt() - (before * (1 - total) / total).sqrt()
        assert c == pytest.approx(float(expected), rel=1e-4)
        assert sigma == pytest.approx(float(variance.sqrt()), rel=1e-4, abs=1e-9)


def test_coefficients_where_samples_have_their_own_timesteps():
    """Stable Cascade's scheduler takes one timestep per sample; each coefficient is still one number per batch."""
    found = []
    for each in (False, True):
        scheduler = DDPMWuerstchenScheduler()
        scheduler.set_timesteps(4)
        t, sample = scheduler.timesteps[1], torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))

        def around(step):
            found.append(step_coefficients(step))
            return step.run(step.prediction)

        intercept(scheduler, around)
        scheduler.step(sample, t.expand(3) if each else t[None], sample, generator=torch.Generator().manual_seed(0))
    assert found[0] == found[1]
    c, sigma = found[0]
    assert c < 0 < sigma < 1


def test_ptqd_lowers_the_noise_of_stochastic_schedulers_alone():
    def around_noise(affiner, scheduler):
        scheduler.set_timesteps(4)
        factors = []

        def around(step):
            factors.append(affiner.noise_scale(step))
            return step.run(step.prediction)

        intercept(scheduler, around)
        sample = torch.zeros(1, 2, 6, 6)
        for t in scheduler.timesteps:
            sample = scheduler.step(torch.zeros_like(sample), t, sample).prev_sample
        release(scheduler)
        return factors

    for scheduler, stochastic in ((DDPMScheduler(clip_sample=False), True), (DDIMScheduler(clip_sample=False), False)):
        affiner, _, _ = fitted(scheduler, type="ptqd", stepper={"max_timestep": 4, "recurrent": False})
        # Set the remaining error by hand: half the variance that a step adds.
        for t in affiner.timesteps:
            affiner.prediction.errors[t] = (1.0, 0.01)
        factors = around_noise(affiner, copy.deepcopy(scheduler))
        if stochastic:
            assert all(0 <= f < 1 for f in factors[:-1])
        else:
            assert factors == [1.0] * 4


def test_ptqd_leaves_the_noise_of_steps_that_are_not_enabled():
    settings = {"max_timestep": 4, "recurrent": False, "enable_timesteps": [0]}
    affiner, _, quant = fitted(DDPMScheduler(clip_sample=False), type="ptqd", stepper=settings)
    scheduler = quant.scheduler
    scheduler.set_timesteps(4)
    factors = []
    intercept(scheduler, lambda step: (factors.append(affiner.noise_scale(step)), step.run(step.prediction))[1])
    sample = torch.zeros(1, 2, 6, 6)
    for t in scheduler.timesteps:
        sample = scheduler.step(torch.zeros_like(sample), t, sample).prev_sample
    release(scheduler)
    assert 0 < factors[0] < 1
    assert factors[1:] == [1.0] * 3


def test_scaled_noise_is_what_the_step_adds():
    """DDPM with PTQD: the mean of the step stays the same, and its noise shrinks by the factor."""
    affiner, _, quant = fitted(DDPMScheduler(clip_sample=False), type="ptqd", stepper={"max_timestep": 4})
    results = {}
    for variance in (0.0, 1e9):
        for t in affiner.timesteps:
            affiner.prediction.errors[t] = (0.0, variance)
        with affiner.attach(quant):
            scheduler = quant.scheduler
            scheduler.set_timesteps(4)
            t, sample = scheduler.timesteps[0], torch.ones(4000, 2, 2, 2)
            generator = torch.Generator().manual_seed(0)
            results[variance] = scheduler.step(torch.zeros_like(sample), t, sample, generator=generator).prev_sample
    noisy, still = results[0.0], results[1e9]
    assert still.std(0).max() < 1e-6
    assert noisy.std(0).min() > 0.1
    torch.testing.assert_close(noisy.mean(0), still.mean(0), rtol=0, atol=5 * float(noisy.std(0).max()) / 4000**0.5)
