"""Which steps the samplers keep, on real schedulers and models, and that samplers leave no trace."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hfquant.calibration import BaseSampler, LanguageModelSampler, NormalSampler, UniformSampler
from tests.calibration.tiny_models import tiny_dit, tiny_llama, tiny_pipeline, tiny_unet
from tests.calibration.tiny_modular import tiny_modular

PROMPTS = ["a cat", "dogs run fast"]


def times(recording) -> list[float]:
    return [float(recording[i]["timestep"]) for i in range(len(recording))]


@given(st.integers(2, 300), st.data())
def test_selections_are_distinct_steps(steps, data):
    count = data.draw(st.integers(1, steps - 1))
    seed = data.draw(st.integers(0, 10))
    for sampler in (BaseSampler(), UniformSampler(), NormalSampler(0.3)):
        chosen = sampler.select(steps, count, torch.Generator().manual_seed(seed))
        assert len(set(chosen)) == len(chosen) == count
        assert all(type(step) is int and 0 <= step < steps for step in chosen)


def test_base_keeps_the_last():
    assert BaseSampler().select(10, 3, torch.Generator()) == [7, 8, 9]


@given(st.integers(2, 1000), st.data())
def test_uniform_keeps_a_fixed_interval(steps, data):
    count = data.draw(st.integers(1, steps - 1))
    chosen = UniformSampler().select(steps, count, torch.Generator().manual_seed(data.draw(st.integers(0, 100))))
    gaps = np.diff(chosen)
    assert set(gaps.tolist()) <= {int(steps / count), int(np.ceil(steps / count))}
    assert chosen[0] < steps / count


def test_uniform_reaches_every_step():
    seen = [UniformSampler().select(40, 4, torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert set(np.concatenate(seen).tolist()) == set(range(40))


def test_normal_follows_its_distribution():
    """Over many runs of one step each, the frequencies match the normal density over the diffusion time."""
    steps, runs = 50, 4000
    sampler = NormalSampler(0.2, std=0.15)
    drawn = [sampler.select(steps, 1, torch.Generator().manual_seed(seed))[0] for seed in range(runs)]
    observed = np.bincount(drawn, minlength=steps) / runs
    time = 1 - np.arange(steps) / (steps - 1)
    expected = np.exp(-(((time - 0.2) / 0.15) ** 2) / 2)
    expected /= expected.sum()
    # Pearson's statistic over the steps with a large enough expected count; the 99.9 % quantile of chi2(30) is 59.7.
    often = expected * runs > 5
    assert often.sum() <= 31
    assert (runs * (observed[often] - expected[often]) ** 2 / expected[often]).sum() < 59.7


@pytest.mark.parametrize(
    "make",
    [lambda: BaseSampler(0), lambda: BaseSampler(True), lambda: BaseSampler(seed=-1), lambda: NormalSampler(1.5)],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError):
        make()


SCHEDULERS = {
    "ddim": (DDIMScheduler, 12),
    "ddim1000": (DDIMScheduler, 1000),
    "lcm": (LCMScheduler, 4),
    "dpm": (lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True), 4),
    "euler": (EulerDiscreteScheduler, 7),
    "heun": (HeunDiscreteScheduler, 5),
    "pndm": (PNDMScheduler, 8),
    "flow": (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), 6),
}


@pytest.fixture(params=SCHEDULERS)
def pipeline(request):
    make, steps = SCHEDULERS[request.param]
    pipe = tiny_pipeline(make())
    if request.param == "flow":
        pipe.scheduler.scale_model_input = lambda sample, t: sample
        pipe.scheduler.init_noise_sigma = 1.0
    return pipe, steps


def test_every_scheduler(pipeline):
    """Asking for all steps gives all of them, and the last steps are the right ones."""
    pipe, steps = pipeline
    everything, _ = BaseSampler(None).sample(pipe, PROMPTS, "unet", {"num_inference_steps": steps})
    pipe.scheduler.set_timesteps(steps)
    assert times(everything) == pytest.approx(pipe.scheduler.timesteps.tolist())
    assert pipe.runs == 1

    distinct = list(dict.fromkeys(times(everything)))
    last, _ = BaseSampler(3).sample(pipe, PROMPTS, "unet", {"num_inference_steps": steps})
    assert set(times(last)) == set(distinct[-3:])
    few, _ = UniformSampler(3).sample(pipe, PROMPTS, "unet", {"num_inference_steps": steps})
    assert len(set(times(few))) == 3
    assert pipe.runs == 3, "the scheduler told the number of steps, so nothing had to run twice"


def test_recorded_inputs_are_the_denoiser_s_inputs():
    """Replaying a sample gives the denoiser's output in the run; guidance arrives as one batch of four."""
    pipe = tiny_pipeline(DDIMScheduler(), tiny_unet())
    seen = []
    handle = pipe.unet.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(output[0]), with_kwargs=True
    )
    recording, steps = BaseSampler(None).sample(pipe, PROMPTS, "unet", {"num_inference_steps": 3})
    handle.remove()
    assert steps == len(seen) == len(recording) == 3
    with torch.no_grad():
        for i, output in enumerate(seen):
            sample = recording[i]
            assert sample["sample"].shape == (4, 2, 8, 8)
            assert sample["return_dict"] is False
            assert torch.equal(pipe.unet(**sample)[0], output)


def test_several_calls_a_step():
    pipe = tiny_pipeline(DDIMScheduler())
    kwargs = {"num_inference_steps": 6, "twice": True}
    recording, steps = BaseSampler(2).sample(pipe, PROMPTS, "unet", kwargs)
    assert steps == 6
    assert times(recording) == [166, 166, 0, 0]
    inner, _ = BaseSampler(2).sample(pipe, PROMPTS, "unet.inner", kwargs)
    assert len(inner) == 4
    assert torch.equal(inner[1][0], inner[0][0] * 0.5)


def test_inner_layer_follows_the_denoiser_s_clock():
    pipe = tiny_pipeline(DDIMScheduler(), tiny_unet())
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    recording, _ = UniformSampler(2).sample(pipe, PROMPTS, name, {"num_inference_steps": 5})
    assert len(recording) == 2
    assert recording[0]["encoder_hidden_states"].shape == (4, 3, 12)


def test_component_without_timesteps_keeps_every_call():
    recording, steps = BaseSampler(1).sample(tiny_pipeline(DDIMScheduler()), PROMPTS, "text_encoder", {})
    assert steps is None
    assert [recording[i][0].tolist() for i in range(2)] == [[[1, 3, 0], [4, 3, 4]], [[0, 0, 0]] * 2]


def test_run_with_fewer_steps_than_the_scheduler_says():
    """Image-to-image starts in the middle: the run is repeated once, and later batches use what it found."""
    pipe = tiny_pipeline(DDIMScheduler())
    kwargs = {"num_inference_steps": 10, "strength": 0.5}
    recording, steps = UniformSampler(5).sample(pipe, PROMPTS, "unet", kwargs)
    assert (steps, pipe.runs, times(recording)) == (5, 2, [400, 300, 200, 100, 0])
    again, _ = UniformSampler(5).sample(pipe, PROMPTS, "unet", kwargs, steps=steps)
    assert pipe.runs == 3
    assert again.samples == recording.samples


def test_noise_depends_on_seed_and_batch_number_only():
    pipe = tiny_pipeline(DDIMScheduler())

    def first(seed, index):
        torch.rand(3)  # whatever the state of the global generator
        recording, _ = BaseSampler(None, seed=seed).sample(
            pipe, PROMPTS, "unet", {"num_inference_steps": 2}, index=index
        )
        return recording[0]["sample"]

    assert torch.equal(first(0, 0), first(0, 0))
    assert not torch.equal(first(0, 0), first(0, 1))
    assert not torch.equal(first(0, 0), first(1, 0))


def test_nothing_is_left_behind():
    pipe = tiny_pipeline(DDIMScheduler(), tiny_unet())
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    pipe.set_progress_bar_config(desc="mine")
    modes = [module.training for module in pipe.unet.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    seen = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, args: seen.append((module.training, torch.is_grad_enabled()))
    )
    BaseSampler(1).sample(pipe, PROMPTS, "unet", {"num_inference_steps": 2})
    with pytest.raises(TypeError, match="unexpected keyword"):
        BaseSampler(1).sample(pipe, PROMPTS, "unet", {"no_such_argument": 1})
    handle.remove()
    assert seen == [(False, False)] * 2
    assert [module.training for module in pipe.unet.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def test_batches_of_every_form():
    dit = tiny_dit()
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4])
    named = {"hidden_states": x, "timestep": t, "class_labels": labels}

    def record(batch, **kwargs):
        recording, steps = BaseSampler(1).sample(dit, batch, "", kwargs)
        assert steps is None, "a model run by itself has no steps"
        return [recording[i] for i in range(len(recording))]

    assert record(named)[0].keys() == named.keys()
    assert [a.tolist() for a in record((x, t, labels))[0]] == [x.tolist(), t.tolist(), labels.tolist()]
    assert len(record([named, (x, t, labels)])) == 2
    assert record((x, t), class_labels=labels)[0].keys() == named.keys()
    assert record({**named, "return_dict": True}, return_dict=False)[0]["return_dict"] is True, "the batch's own wins"
    layer = nn.Linear(3, 2)
    recording, _ = BaseSampler().sample(layer, torch.ones(4, 3), layer)
    assert recording[0][0].shape == (4, 3)


def test_prompts_of_a_modular_pipeline_are_passed_by_name():
    """Its first input is an image, and the first parameter of its call is a state."""
    pipe = tiny_modular()
    named, _ = BaseSampler(None).sample(pipe, {"prompt": PROMPTS}, "unet", {"num_inference_steps": 2})
    for batch in (PROMPTS, (PROMPTS,)):
        recording, steps = BaseSampler(None).sample(pipe, batch, "unet", {"num_inference_steps": 2, "prompt": "other"})
        assert steps == len(recording) == 2
        assert torch.equal(recording[0]["encoder_hidden_states"], named[0]["encoder_hidden_states"])
    assert recording[0]["encoder_hidden_states"].shape == (2, 3, 12)
    with pytest.raises(TypeError, match=r"ModularPipeline takes its arguments by name.*got a tuple of 2"):
        BaseSampler().sample(pipe, ("a cat", "a dog"), "unet")


def test_language_model():
    model = tiny_llama()
    ids = torch.arange(18).reshape(2, 9)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    heads = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: heads.append(output.shape[1]))
    recording, steps = LanguageModelSampler().sample(model, batch, "model.layers.1")
    assert steps is None
    assert recording[0]["past_key_values"] is None
    with torch.no_grad():
        assert model.model.layers[1](**recording[0])[0].shape[-1] == 24
    LanguageModelSampler().sample(model, ids, "lm_head")
    whole, _ = LanguageModelSampler().sample(model, ids, "")
    handle.remove()
    assert heads[0] == 1, "logits that nobody records are not computed"
    assert heads[1:] == [9, 9], "the head's own inputs are whole"
    assert whole[0]["input_ids"].tolist() == ids.tolist()
    assert "logits_to_keep" not in whole[0]
    with pytest.raises(TypeError, match="use_cache=False"):
        BaseSampler().sample(model, batch, "model.layers.1", {"use_cache": True})
    with pytest.raises(TypeError, match="got TinyPipeline"):
        LanguageModelSampler().sample(tiny_pipeline(DDIMScheduler()), PROMPTS, "unet")
