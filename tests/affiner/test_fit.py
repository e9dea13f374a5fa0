"""Fitting: known distortions are recovered exactly, and steps are fitted on the right latents."""

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from hfquant import quantize
from hfquant.affiner import Affiner, BlockwiseAffiner, attach, load_affiner
from hfquant.affiner.config import parse
from hfquant.affiner.maps import METHODS
from hfquant.affiner.runs import DenoisingLoop
from tests.affiner.pipelines import (
    BUILDERS,
    EXACT,
    W4A8,
    Recorder,
    Toy,
    call,
    noise,
    real_and_quant,
    toy_config,
)


def run(denoiser, scheduler, steps=4):
    return DenoisingLoop(denoiser, scheduler)(steps, latents=noise(3, seed=8), class_labels=torch.arange(3))[0]


def digits_images(pipe, steps=3, **kwargs):
    generator = torch.Generator().manual_seed(1)
    return pipe([3, 5, 8], steps, generator=generator, output_type="pt", **kwargs).images


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("sample_mode", ["block", "interpolate"])
def test_planted_distortion_is_undone(recurrent, sample_mode):
    real, quant = Toy(), Toy(gain=[0.8, 1.3], offset=[0.2, -0.1])
    config = toy_config(solver={**EXACT, "sample_mode": sample_mode, "blocksize": 4}, recurrent=recurrent)
    affiner = load_affiner(config, list(range(5)), real, quant, latents=noise())
    for scale, shift in affiner.prediction.table.values():
        torch.testing.assert_close(scale[:, 0, 0], torch.tensor([1 / 0.8, 1 / 1.3]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shift[:, 0, 0], torch.tensor([-0.2 / 0.8, 0.1 / 1.3]), rtol=1e-5, atol=1e-5)
    scheduler = config["scheduler"]
    expected, distorted = run(real, scheduler), run(quant, scheduler)
    with affiner.attach(quant):
        torch.testing.assert_close(run(quant, scheduler), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(quant, scheduler), distorted)
    assert (distorted - expected).abs().max() > 0.1


def test_equal_models_give_the_identity():
    config = toy_config(solver={"blocksize": 2}, enable_latent_affine=True)
    affiner = load_affiner(config, list(range(5)), Toy(), Toy(), latents=noise())
    for maps in (affiner.prediction, affiner.latents):
        assert len(maps.table) == 4
        for scale, shift in maps.table.values():
            assert torch.equal(scale, torch.ones_like(scale))
            assert torch.equal(shift, torch.zeros_like(shift))


@pytest.mark.parametrize("scheduler", [DDPMScheduler(clip_sample=False), EulerAncestralDiscreteScheduler()])
def test_the_noise_of_steps_is_the_same_in_every_run(scheduler):
    """The real model's run draws the same step noise as the quantized one's; otherwise latents are not comparable."""
    config = toy_config(scheduler, enable_latent_affine=True)
    affiner = load_affiner(config, list(range(5)), Toy(), Toy(), latents=noise())
    assert all(errors == (0.0, 0.0) for errors in affiner.latents.errors.values())


@pytest.mark.parametrize("recurrent", [True, False])
def test_predictions_are_observed_on_the_right_latents(recurrent):
    """Checked against a plain loop: recurrent steps continue from corrected predictions, others along the real run."""
    real, quant = Toy(), Toy(gain=[0.9, 1.1])
    config = toy_config(recurrent=recurrent)
    affiner = Recorder()
    samples = list(range(4))
    latents = noise(4)
    returned = load_affiner(config, samples, real, quant, latents=latents, shuffle=False, thirdparty_affiner=affiner)
    assert returned is affiner
    scheduler = copy.deepcopy(config["scheduler"])
    scheduler.set_timesteps(4)
    assert affiner.solved == scheduler.timesteps.tolist()
    assert affiner.corrected == ([t for t in affiner.solved for _ in range(2)] if recurrent else [])
    labels = torch.arange(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            seen = [x for x in affiner.seen if x[0] == t]
            times = t.expand(4)
            r, q = real(latents, times, labels)[0], quant(latents, times, labels)[0]
            torch.testing.assert_close(torch.cat([x[1] for x in seen]), r, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(torch.cat([x[2] for x in seen]), q, rtol=1e-5, atol=1e-5)
            latents = scheduler.step(q + 0.05 if recurrent else r, t, latents).prev_sample


@pytest.mark.parametrize("kind", [{}, {"type": "ptqd"}, {"type": "tac"}, {"solver": {"blocksize": 2}}])
def test_every_type_lowers_the_error_on_its_own_samples(digits, kind):
    quant = copy.deepcopy(digits)
    quant.transformer.register_forward_hook(lambda m, a, out: type(out)(sample=out.sample * 0.9 + 0.05 * out.sample**2))
    config = {**kind, "stepper": {"max_timestep": 3}}
    affiner = load_affiner(config, [0, 1, 2, 3], digits, quant)
    assert isinstance(affiner, BlockwiseAffiner)
    assert len(affiner.errors) == 3
    for before, after in affiner.errors.values():
        assert after < before
    reference, plain = digits_images(digits), digits_images(quant)
    with affiner.attach(quant):
        corrected = digits_images(quant)
    assert (corrected - reference).square().mean() < 0.5 * (plain - reference).square().mean()
    assert torch.equal(digits_images(quant), plain)


@pytest.mark.parametrize("kind", ["blockwise", "ptqd", "tac"])
def test_a_method_alone_is_a_third_partys_affiner(kind):
    """A method object follows the third-party protocol, except for latents, which belong to the whole affiner."""
    real, quant = Toy(), Toy(gain=[0.8, 1.3], offset=[0.2, -0.1])
    config = {**toy_config(DDPMScheduler(clip_sample=False), recurrent=False), "type": kind}
    config.pop("solver")
    method = METHODS[kind](parse({}))
    assert isinstance(method, Affiner)
    assert load_affiner(config, range(5), real, quant, noise(), thirdparty_affiner=method) is method
    ours = load_affiner(config, range(5), real, quant, noise())
    expected = ours.prediction.tensors("p")
    assert all(torch.equal(value, expected[key]) for key, value in method.tensors("p").items())
    loop = DenoisingLoop(quant, config["scheduler"])
    found = []
    for affiner in (method, ours):
        with attach(loop, affiner):
            draw = torch.Generator().manual_seed(9)
            found.append(loop(4, latents=noise(3, seed=8), class_labels=torch.arange(3), generator=draw)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("target", ["uncond", "text"])
def test_one_half_of_the_guidance_is_corrected(digits, target):
    """Digits put the labels first and the null class second, so the halves are identified by the effect of guidance."""
    quant = copy.deepcopy(digits)

    def distort(module, args, output):
        batch = output.sample.clone()
        where = slice(len(batch) // 2, None) if target == "uncond" else slice(0, len(batch) // 2)
        batch[where] = batch[where] * 0.8 + 0.1
        return type(output)(sample=batch)

    quant.transformer.register_forward_hook(distort)
    config = {"solver": EXACT, "stepper": {"max_timestep": 3, "noise_target": target}}
    affiner = load_affiner(config, [0, 1, 2, 3], digits, quant)
    assert affiner.uncond_half == 1
    for scale, shift in affiner.prediction.table.values():
        torch.testing.assert_close(scale, torch.full_like(scale, 1.25), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shift, torch.full_like(shift, -0.125), rtol=1e-5, atol=1e-5)
    with affiner.attach(quant):
        torch.testing.assert_close(digits_images(quant), digits_images(digits), rtol=0, atol=1e-4)
        with pytest.raises(ValueError, match="classifier-free guidance"):
            digits_images(quant, guidance_scale=1.0)


class Guided:
    """A pipeline whose guidance is rescaled, with the unconditional half first or second."""

    def __init__(self, first):
        self.transformer, self.scheduler, self.first = Toy(), DDIMScheduler(clip_sample=False), first

    @torch.no_grad()
    def __call__(self, prompt, latents, rescale=1.0):
        self.scheduler.set_timesteps(2)
        labels = torch.arange(2.0).repeat_interleave(len(latents))
        for t in self.scheduler.timesteps:
            times = t.expand(2 * len(latents))
            batch = self.transformer(torch.cat([latents] * 2), times, labels if self.first else 1 - labels)[0]
            uncond, text = batch.chunk(2) if self.first else batch.chunk(2)[::-1]
            guided = rescale * (uncond + 4 * (text - uncond))
            latents = self.scheduler.step(guided, t, latents).prev_sample
        return (latents,)


@pytest.mark.parametrize("rescale", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("first", [True, False])
def test_halves_are_told_apart_under_rescaled_guidance(first, rescale):
    config = {"stepper": {"noise_target": "uncond"}, "extra_args": {"rescale": rescale}}
    affiner = load_affiner(config, ["a", "b"], Guided(first), Guided(first), latents=noise(2))
    assert affiner.uncond_half == (0 if first else 1)


@pytest.fixture
def unjudged(monkeypatch):
    """Skip the judge: tiny random models gain nothing worth keeping, and two steps and three rows could not show it."""
    monkeypatch.setattr("hfquant.affiner.fit.pays", lambda gains: True)


def test_most_pipelines_put_the_unconditional_half_first(unjudged):
    real, quant, rows, arguments = real_and_quant("sd3")
    config = {"stepper": {"max_timestep": 2, "noise_target": "uncond"}, "extra_args": arguments}
    affiner = load_affiner(config, rows, real, quant)
    assert affiner.uncond_half == 0
    plain = call(quant, rows, arguments, steps=2)
    with affiner.attach(quant):
        assert not torch.equal(call(quant, rows, arguments, steps=2), plain)
    assert torch.equal(call(quant, rows, arguments, steps=2), plain)


def test_a_generator_given_draws_the_same_noise_for_both(digits):
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    config = {"stepper": {"max_timestep": 2}, "extra_args": {"generator": generator}}
    affiner = load_affiner(config, [0, 1], digits, copy.deepcopy(digits))
    assert all(before == after == 0 for before, after in affiner.errors.values())
    assert torch.equal(generator.get_state(), before)


def test_a_list_of_generators_draws_the_same_noise_for_both(digits):
    generators = [torch.Generator().manual_seed(i) for i in (3, 4)]
    before = [g.get_state() for g in generators]
    config = {"stepper": {"max_timestep": 2}, "extra_args": {"generator": generators}}
    affiner = load_affiner(config, [0, 1], digits, copy.deepcopy(digits))
    assert all(before == after == 0 for before, after in affiner.errors.values())
    assert all(torch.equal(g.get_state(), b) for g, b in zip(generators, before, strict=True))


def test_guidance_is_needed_to_fit_one_half(digits):
    config = {"stepper": {"max_timestep": 3, "noise_target": "text"}, "extra_args": {"guidance_scale": 1.0}}
    with pytest.raises(ValueError, match="classifier-free guidance"):
        load_affiner(config, [0, 1], digits, copy.deepcopy(digits))


def test_latents_are_led_back_to_the_real_run():
    """A drift that prediction maps cannot see: both predict alike, but the quantized model starts every step off."""
    real, quant = Toy(), Toy(gain=[0.7, 1.2], offset=[0.3, 0.0])
    scheduler = EulerDiscreteScheduler()
    config = toy_config(scheduler, {"lambda1": 1e4, "lambda2": 1e4}, enable_latent_affine=True)
    affiner = load_affiner(config, list(range(5)), real, quant, latents=noise())
    assert all(after <= before for before, after in affiner.latents.errors.values())
    config = toy_config(scheduler, EXACT, enable_latent_affine=True)
    affiner = load_affiner(config, list(range(5)), real, quant, latents=noise())
    with affiner.attach(quant):
        torch.testing.assert_close(run(quant, scheduler), run(real, scheduler), rtol=1e-3, atol=1e-3)


def test_tac_moves_the_mean_of_latents():
    real, quant = Toy(), Toy(offset=[0.3, -0.2])
    config = {**toy_config(), "type": "tac"}
    del config["solver"]
    affiner = load_affiner(config, list(range(5)), real, quant, latents=noise())
    assert all(torch.equal(scale, torch.ones_like(scale)) for scale, _ in affiner.latents.table.values())
    assert all(after < before for before, after in affiner.latents.errors.values())
    assert len(affiner.latents.errors) == 4


def test_latents_go_by_the_schedulers_time():
    """The denoiser's, by which a half of the guidance is corrected, may have another unit."""
    real, quant, rows, arguments = real_and_quant("auraflow")
    stepper = {"max_timestep": 4, "noise_target": "text", "enable_latent_affine": True}
    affiner = load_affiner({"stepper": stepper, "extra_args": arguments}, rows, real, quant)
    assert max(affiner.prediction.table) <= 1
    assert max(affiner.latents.table) == 1000
    plain, expected = call(quant, rows, arguments), call(real, rows, arguments)
    with affiner.attach(quant):
        found = call(quant, rows, arguments)
    assert (found - expected).norm() <= (plain - expected).norm()


def test_only_enabled_steps_are_corrected():
    config = toy_config(enable_timesteps=[1, 3])
    affiner = load_affiner(config, list(range(5)), Toy(), Toy(gain=[0.8, 0.9]), latents=noise())
    changed = [bool((affiner.prediction.table[t][0] != 1).any()) for t in affiner.timesteps]
    assert changed == [False, True, False, True]


def test_second_order_schedulers_share_a_map_between_calls_of_a_timestep():
    real, quant = Toy(), Toy(gain=[0.8, 1.2])
    config = toy_config(HeunDiscreteScheduler())
    affiner = load_affiner(config, list(range(5)), real, quant, latents=noise())
    config["scheduler"].set_timesteps(4)
    assert affiner.timesteps == sorted(set(config["scheduler"].timesteps.tolist()), reverse=True)
    with affiner.attach(quant):
        corrected = run(quant, config["scheduler"])
    torch.testing.assert_close(corrected, run(real, config["scheduler"]), rtol=1e-3, atol=1e-3)


def test_learned_variance_is_left_alone():
    class Learned(Toy):
        def forward(self, sample, timestep, class_labels=None):
            (out,) = super().forward(sample, timestep, class_labels)
            return (torch.cat([out, out * 0 + 0.3], 1),)

    real, quant = Learned(), Learned(gain=[0.8, 1.2])
    affiner = load_affiner(toy_config(), list(range(5)), real, quant, latents=noise())
    assert next(iter(affiner.prediction.table.values()))[0].shape[0] == 2
    with affiner.attach(quant), torch.no_grad():
        t, labels = torch.tensor([affiner.timesteps[0]] * 3), torch.arange(3)
        out, want = quant(noise(3), timestep=t, class_labels=labels)[0], real(noise(3), t, labels)[0]
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["unet", "sd3"])
@pytest.mark.parametrize("given", [True, False])
def test_models_of_two_dtypes(name, given, unjudged):
    """Arguments and recorded calls have the real model's dtype; the quantized model gets them in its own."""
    real, _, rows, arguments = real_and_quant(name)
    part = "unet" if name == "unet" else "transformer"
    quant = copy.copy(real)
    setattr(quant, part, quantize(copy.deepcopy(getattr(real, part)).bfloat16(), None, W4A8))
    quant.scheduler = copy.deepcopy(real.scheduler)
    config = {
        "stepper": {"max_timestep": 2},
        "blocks": {"modules": ["*_blocks.*"], "timesteps": 1},
        "extra_args": arguments,
    }
    affiner = load_affiner(config, rows, real, quant, latents=noise(3, 4, 8) if given else None)
    assert len(affiner.errors) == 2
    assert all(after < before for before, after in affiner.errors.values())


def test_a_bare_denoiser_that_begins_with_a_quantized_layer():
    """Its first parameter has an integer dtype, which the latents must not inherit."""

    class Linears(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

        def forward(self, sample, timestep):
            return (self.second(torch.tanh(self.first(sample))),)

    real = Linears()
    quant = quantize(copy.deepcopy(real), None, W4A8)
    latents = torch.randn(3, 2, 4, 16, generator=torch.Generator().manual_seed(1))
    affiner = load_affiner(toy_config(), [{}] * 3, real, quant, latents=latents)
    assert all(after < before < 0.1 * latents.var() for before, after in affiner.errors.values())


def state(pipe):
    part = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in part.modules())
    return hooks, type(pipe.scheduler), part.training, repr(vars(pipe.scheduler)), pipe._progress_bar_config


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "recurrent"), [*((name, True) for name in BUILDERS), ("sd3", False)])
def test_real_pipelines_attach_run_detach(name, recurrent, tmp_path):
    real, quant, rows, arguments = real_and_quant(name)
    before = [state(p) for p in (real, quant)]
    plain = call(quant, rows, arguments)
    quant.scheduler = copy.deepcopy(real.scheduler)
    config = {"stepper": {"max_timestep": 4, "batch_size": 2, "recurrent": recurrent}, "extra_args": arguments}
    random_state = torch.get_rng_state()
    affiner = load_affiner(config, rows, real, quant)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [state(p) for p in (real, quant)] == before
    assert all(after < error for error, after in affiner.errors.values())
    with affiner.attach(quant):
        corrected = call(quant, rows, arguments)
        alone = call(quant, rows[:1], arguments)
    assert not torch.equal(corrected, plain)
    assert alone.shape[0] == 1
    assert torch.equal(call(quant, rows, arguments), plain)
    affiner.save_pretrained(tmp_path)
    with BlockwiseAffiner.from_pretrained(tmp_path).attach(quant):
        assert torch.equal(call(quant, rows, arguments), corrected)
    assert torch.equal(call(quant, rows, arguments), plain)


def test_a_map_that_holds_on_no_other_sample_is_not_kept():
    """The quantized model adds new noise to every sample: a map per pixel would fit that noise and do harm."""

    class Noisy(Toy):
        draw = torch.Generator().manual_seed(0)

        def forward(self, *args, **kwargs):
            (value,) = super().forward(*args, **kwargs)
            return (value + 0.2 * torch.randn(value.shape, generator=self.draw),)

    config = {**toy_config(), "solver": {"blocksize": 1, "lambda1": 0.0, "lambda2": 0.0}}
    affiner = load_affiner(config, list(range(5)), Toy(), Noisy(), latents=noise())
    for timestep, (before, after) in affiner.errors.items():
        scale, shift = affiner.prediction.table[timestep]
        assert after <= before
        assert (scale - 1).abs().mean() < 0.05
        assert shift.abs().mean() < 0.05


def test_an_affiner_that_does_not_pay_corrects_nothing(caplog):
    """The errors have no pattern, so there is nothing to learn, and what three runs teach would do harm."""

    class Noisy(Toy):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            (out,) = super().forward(sample, timestep, class_labels)
            return (out + 0.3 * torch.randn(out.shape, generator=torch.Generator().manual_seed(int(out.sum() * 1e4))),)

    config = toy_config(solver={"blocksize": 1, "lambda1": 0.0, "lambda2": 0.0}, enable_latent_affine=True)
    real, quant = Toy(), Noisy()
    affiner = load_affiner(config, list(range(3)), real, quant, latents=noise(3))
    assert "the affiner does not help" in caplog.text
    for maps in (affiner.prediction, affiner.latents):
        assert all(bool((k == 1).all()) and not bool(b.any()) for k, b in maps.table.values())
    assert all(before == after for before, after in affiner.errors.values())
    expected = run(quant, config["scheduler"])
    with affiner.attach(quant):
        assert torch.equal(run(quant, config["scheduler"]), expected)
