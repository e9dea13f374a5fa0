"""Pipeline calls that pause at every step, so that two models can run in lockstep.

A pipeline's loop is its own code and cannot be left and re-entered, so each call lives in a thread that hands control
back and forth. Only one thread runs at a time: these are coroutines, without parallelism.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hfquant.affiner.hooks import Step, intercept, refuse_intercepted, timestep_reader
from hfquant.denoisers import compute_dtype, find_denoisers, output_tensor, weights_device, with_tensor


class Event(NamedTuple):
    """The point where a run has paused, and the tensor it continues with unless :meth:`PausedRun.resume` gets another.

    "denoised": `value` is the denoiser's output (only if the run pauses there). "predicted": the guided prediction
    passed to the scheduler. "stepped": the latents after the step. `sample` is the latents before it.
    """

    kind: Literal["denoised", "predicted", "stepped"]
    timestep: float
    value: Tensor
    sample: Tensor | None = None


class _Stop(BaseException):
    """Raised inside a pipeline to end it; not an Exception, so no `except Exception` on the way catches it."""


RandomState = tuple[Tensor, list[Tensor]]


def random_state() -> RandomState:
    """Return the state of torch's global generators, for the CPU and the CUDA devices in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_state(state: RandomState) -> None:
    """Restore torch's global generators."""
    torch.set_rng_state(state[0])
    for device, values in enumerate(state[1]):
        torch.cuda.set_rng_state(values, device)


class PausedRun:
    """One call of a pipeline that pauses at every step.

    Runs created at the same state of torch's global generators draw the same numbers from them, in whatever order they
    advance. This matters because not all pipelines pass their generator on everywhere (SD3's ControlNet encodes its
    image without it).

    Args:
        pipeline: Called with `kwargs`, as a copy that has its own scheduler; the modules are shared.
        kwargs: The call's arguments.
        at_denoiser: Also pause after the denoiser.
        finish: Runs the scheduler, `finish(step, prediction) -> result`; default: `step.run(prediction)`.

    Raises:
        ValueError: The scheduler has no usable `step`, or an affiner is attached.
    """

    def __init__(
        self,
        pipeline: Any,
        kwargs: Mapping[str, Any],
        *,
        at_denoiser: bool = False,
        finish: Callable[[Step, Tensor], Any] = lambda step, prediction: step.run(prediction),
    ) -> None:
        self.pipeline = own_copy(pipeline)
        intercept(self.pipeline.scheduler, self._around_step)  # never released: the copy ends with the run
        self.timesteps: list[float] = []
        self._finish, self._kwargs = finish, dict(kwargs)
        devices = {"cpu", *(weights_device(denoiser).type for denoiser in find_denoisers(self.pipeline))}
        self._autocasts = [(d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d)]
        self._replies: SimpleQueue[Any] = SimpleQueue()
        self._events: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._at_denoiser = at_denoiser
        self._over = False
        self._steps = 0
        self._random = random_state()

    def resume(self, value: Tensor | None = None) -> Event | None:
        """Continue to the next pause with `value` instead of the last event's tensor; None if no step is left.

        Raises:
            Exception: Whatever the pipeline raised.
        """
        if self._over:
            return None
        if self._steps and self._steps == len(self.timesteps):
            self.close()  # only decoding is left of the call
            return None
        outside = random_state()
        set_random_state(self._random)
        try:
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._replies.put(value)
            event = self._events.get()
        finally:
            self._random = random_state()
            set_random_state(outside)
        if isinstance(event, Event):
            return event
        self._over = True
        self._thread.join()
        if event is not None:
            raise event
        return None

    def close(self) -> None:
        """End the call wherever it has paused."""
        if not self._over and self._thread.ident is not None:
            self._replies.put(_Stop)
            self._events.get()
            self._thread.join()
        self._over = True

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            # A thread does not inherit the caller's modes.
            with ExitStack() as stack, torch.no_grad():
                for device, dtype in self._autocasts:
                    stack.enter_context(torch.autocast(device, dtype))
                for denoiser in find_denoisers(self.pipeline) if self._at_denoiser else ():
                    hook = partial(self._behind_denoiser, timestep_reader(denoiser))
                    stack.callback(denoiser.register_forward_hook(hook, with_kwargs=True).remove)
                self.pipeline(**self._kwargs)
        except _Stop:
            pass
        except BaseException as caught:  # passed on to the caller waiting in resume()
            error = caught
        finally:
            # The class made by intercept() is part of a cycle that leads here; free these without waiting for garbage
            # collection.
            self.pipeline, self._kwargs = None, {}
        self._events.put(error)

    def _pause(self, event: Event) -> Tensor:
        self._events.put(event)
        reply = self._replies.get()
        if reply is _Stop:
            raise _Stop  # a new instance: kept in this frame, it would form a cycle with all frames of the pipeline
        return event.value if reply is None else reply.to(event.value.device, event.value.dtype)

    def _around_step(self, step: Step) -> Any:
        if not self._steps:
            # From the current timestep on: image-to-image starts late.
            timesteps = [float(t) for t in step.scheduler.timesteps]
            self.timesteps = timesteps[timesteps.index(step.timestep) :] if step.timestep in timesteps else []
        prediction = self._pause(Event("predicted", step.timestep, step.prediction, step.sample))
        result = self._finish(step, prediction)
        self._steps += 1
        return with_tensor(result, self._pause(Event("stepped", step.timestep, output_tensor(result), step.sample)))

    def _behind_denoiser(self, read: Any, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        # The module is shared, so every run triggers the hooks of all runs.
        if threading.get_ident() != self._thread.ident:
            return None
        return with_tensor(output, self._pause(Event("denoised", read(args, kwargs), output_tensor(output))))


def own_copy(pipeline: Any) -> Any:
    """Return a pipeline with the same modules, its own scheduler and no progress bar.

    Raises:
        ValueError: An affiner is attached to it.
    """
    refuse_intercepted(pipeline.scheduler)
    clone = copy.copy(pipeline)
    clone.scheduler = copy.deepcopy(pipeline.scheduler)
    if hasattr(clone, "set_progress_bar_config"):
        clone.set_progress_bar_config(disable=True)
    return clone


class DenoisingLoop:
    """A minimal pipeline around a bare denoiser: scale the latents, predict, step. No guidance.

    Args:
        denoiser: Called as `denoiser(latents, timestep=[B], **arguments)`.
        scheduler: Any diffusers scheduler.
    """

    def __init__(self, denoiser: nn.Module, scheduler: Any) -> None:
        self.transformer = denoiser
        self.scheduler = scheduler

    @torch.no_grad()
    def __call__(
        self,
        num_inference_steps: int = 50,
        latents: Tensor | None = None,
        generator: torch.Generator | None = None,
        **arguments: Any,
    ) -> tuple[Tensor]:
        """Run all steps from `latents` (unit Gaussian noise), or from noise with the shape given by the config.

        `generator` draws that noise and the noise of stochastic schedulers.

        Raises:
            ValueError: There are no latents, and the config does not define their shape.
        """
        device = weights_device(self.transformer)
        if latents is None:
            config = getattr(self.transformer, "config", None)
            size, channels = (getattr(config, key, None) for key in ("sample_size", "in_channels"))
            if not isinstance(size, int) or not isinstance(channels, int):
                raise ValueError("pass latents: the denoiser's config does not define their shape")
            batch = next((len(v) for v in arguments.values() if isinstance(v, Tensor) and v.dim()), 1)
            latents = torch.randn(batch, channels, size, size, generator=generator)
        arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents.to(device, compute_dtype(self.transformer)) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scale = getattr(self.scheduler, "scale_model_input", lambda sample, _: sample)
        noise = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        for t in self.scheduler.timesteps:
            # Positional, since UNets call it sample and transformers hidden_states.
            output = self.transformer(scale(latents, t), timestep=t.expand(len(latents)), **arguments)
            prediction = output_tensor(output)[:, : latents.shape[1]]
            latents = self.scheduler.step(prediction, t, latents, return_dict=False, **noise)[0]
        return (latents,)
