"""Pipeline calls that stop at every step."""

import gc
import weakref

import pytest
import torch
from diffusers import DDIMScheduler

from hfquant.affiner.runs import DenoisingLoop, PausedRun
from tests.affiner.pipelines import Toy, noise


def test_a_finished_run_keeps_no_tensors():
    """Not even before garbage collection; otherwise tensors would pile up batch after batch."""
    gc.collect()
    gc.disable()
    try:
        loop, latents = DenoisingLoop(Toy(), DDIMScheduler()), noise(2)
        alive = weakref.ref(latents)
        run = PausedRun(loop, {"latents": latents, "class_labels": torch.arange(2), "num_inference_steps": 2})
        while run.resume() is not None:
            pass
        del latents, run
        assert alive() is None
    finally:
        gc.enable()


def test_a_run_goes_on_with_what_it_is_given_and_can_be_left():
    loop = DenoisingLoop(Toy(), DDIMScheduler(clip_sample=False))
    arguments = {"latents": noise(2), "class_labels": torch.arange(2), "num_inference_steps": 3}
    run = PausedRun(loop, arguments)
    first = run.resume()
    assert (first.kind, first.timestep) == ("predicted", 666)
    assert run.resume(torch.zeros_like(first.value)).kind == "stepped"
    marked = torch.full_like(first.value, 3.0)
    assert torch.equal(run.resume(marked).sample, marked)
    run.close()
    assert run.resume() is None
    assert type(loop.scheduler) is DDIMScheduler


def test_the_callers_autocast_holds_in_runs():
    """It belongs to a thread, and a run has its own."""
    denoiser, seen = Toy(), []
    denoiser.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    arguments = {"latents": noise(2), "class_labels": torch.arange(2), "num_inference_steps": 2}
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            run = PausedRun(DenoisingLoop(denoiser, DDIMScheduler()), arguments)
        while run.resume() is not None:
            pass
    assert seen == [True, True, False, False]


def test_what_the_pipeline_raises_reaches_the_caller():
    run = PausedRun(DenoisingLoop(Toy(), DDIMScheduler()), {"class_labels": torch.arange(2)})
    with pytest.raises(ValueError, match="pass latents"):
        run.resume()
    assert run.resume() is None


def test_runs_draw_alike_from_the_global_generator():
    """Some pipelines draw from the global generator instead of the one they are given."""

    class Careless(DenoisingLoop):
        def __call__(self, **arguments):
            return super().__call__(latents=torch.randn(2, 2, 6, 6), **arguments)

    arguments = {"class_labels": torch.arange(2), "num_inference_steps": 2}
    torch.manual_seed(3)
    runs = [PausedRun(Careless(Toy(), DDIMScheduler()), arguments) for _ in range(2)]
    events = []
    for turn in ((0, 1), (1, 0), (0, 1)):
        for i in turn:
            torch.rand(i + 1)  # noise drawn by other code
            events.append((i, runs[i].resume()))
    first, second = ([event for i, event in events if i == which] for which in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert one.kind == other.kind
        assert torch.equal(one.value, other.value)
    for run in runs:
        run.close()
