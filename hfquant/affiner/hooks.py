"""How an affiner hooks into a pipeline: around `scheduler.step` and after the denoiser, without changing its code.

The guided prediction only exists as the argument of `scheduler.step`, so `noise_target` "all" corrects it there. The
halves of classifier-free guidance exist at the denoiser's output, so "uncond" and "text" use a forward hook there.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hfquant.denoisers import TIME_ARGUMENTS, find_denoisers, output_tensor, time_reader, with_tensor

NoiseTarget = Literal["all", "uncond", "text"]
Undo = Callable[[], None]

NEEDS_CFG = (
    'noise_target "uncond" and "text" need classifier-free guidance with both halves in one batch of the denoiser '
    "(a guidance_scale above 1, and a pipeline that batches): here the denoiser ran {0} samples for {1} latents"
)


@runtime_checkable
class Affiner(Protocol):
    """The interface that `load_affiner` trains and :func:`attach` applies; any object with these three methods works.

    Predictions are `[B, C, H, W]`, or any shape that the pipeline passes to its scheduler. `timestep` is the
    scheduler's (the denoiser's if a half of the guidance is corrected). If a model also predicts its variance,
    `observe` gets the first C channels and `correct` gets all channels. Second-order schedulers visit a timestep twice;
    with `recurrent`, it is then observed and solved again.

    Optional attributes: `noise_target` tells :func:`attach` what to correct. `uncond_half`, 0 or 1, is set during
    training if a half is corrected, and says which half of the denoiser's batch is the unconditional one. `latents`, if
    not None, is an affiner for the latents after each step, trained against those of the real model's own run
    (recurrent fitting only). Optional method: `noise_scale(step) -> float`, a factor for the noise that a step adds
    (target "all" only).
    """

    def observe(self, timestep: float, real: Tensor, quant: Tensor) -> None:
        """Add one batch of predictions of both models for the same latents."""

    def solve(self, timestep: float) -> None:
        """Fit the correction of one timestep. Called after all batches have been observed at that timestep."""

    def correct(self, timestep: float, prediction: Tensor) -> Tensor:
        """Return the corrected prediction, of the same shape, dtype and device."""


class Step(NamedTuple):
    """One call of `scheduler.step`.

    `run(prediction)` executes it; with `scheduler` and `sample`, it executes the same step for those. It returns what
    the caller asked for (tuple or output object).
    """

    scheduler: Any
    prediction: Tensor
    timestep: float
    sample: Tensor
    run: Callable[..., Any]
    options: dict[str, Any]


def intercept(scheduler: Any, around: Callable[[Step], Any]) -> None:
    """Route `scheduler.step` through `around` until :func:`release`.

    The object's class is replaced with a subclass of the same name. An attribute on the object would not survive a deep
    copy by a pipeline: it would be lost or still refer to the original.

    Raises:
        ValueError: The scheduler has no `step(model_output, timestep, sample)`, or is already intercepted.
    """
    original = type(scheduler)
    refuse_intercepted(scheduler)
    signature = inspect.signature(original.step) if hasattr(original, "step") else inspect.Signature()
    if not {"model_output", "timestep", "sample"} <= set(signature.parameters):
        raise ValueError(f"{original.__name__} has no step(model_output, timestep, sample), which an affiner needs")

    @functools.wraps(original.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        own, prediction, timestep, sample = (
            given.pop(name) for name in (next(iter(given)), "model_output", "timestep", "sample")
        )
        options = given.pop("kwargs", {}) | given

        def run(prediction: Tensor, scheduler: Any = own, sample: Tensor = sample) -> Any:
            return original.step(scheduler, model_output=prediction, timestep=timestep, sample=sample, **options)

        return around(Step(own, prediction, as_float(timestep), sample, run, options))

    names = {"step": step, "__module__": original.__module__, "__qualname__": original.__qualname__}
    scheduler.__class__ = type(original.__name__, (original,), names | {"_hfquant_intercepted": True})


def release(scheduler: Any) -> None:
    """Undo an interception; a deep copy of an intercepted scheduler is intercepted as well."""
    scheduler.__class__ = type(scheduler).__mro__[1]


def refuse_intercepted(scheduler: Any) -> None:
    """Raise ValueError if an affiner is attached to the pipeline of this scheduler."""
    if "_hfquant_intercepted" in vars(type(scheduler)):
        raise ValueError("an affiner is attached to this pipeline already; call its detach() first")


def refuse_attached(denoiser: nn.Module) -> None:
    """Raise ValueError if an affiner is already attached to this denoiser."""
    if any(isinstance(getattr(hook, "__self__", None), Attachment) for hook in denoiser._forward_pre_hooks.values()):
        raise ValueError("an affiner is attached to this denoiser already; call its detach() first")


def as_float(timestep: Any) -> float:
    """Return a timestep as a float from what schedulers and denoisers accept: a number, or a tensor per sample.

    Raises:
        ValueError: The samples are at different timesteps.
    """
    if not isinstance(timestep, Tensor):
        return float(timestep)
    values = timestep.flatten()
    if len(values) > 1 and bool((values != values[0]).any()):
        raise ValueError("an affiner needs all samples of a batch to be at the same timestep")
    return float(values[0])


def timestep_reader(denoiser: nn.Module) -> Callable[[tuple[Any, ...], Mapping[str, Any]], float]:
    """Return a function that extracts the timestep from the arguments of a denoiser's call.

    Raises:
        TypeError: The denoiser takes no timestep.
    """
    read = time_reader(denoiser)
    if read is None:
        raise TypeError(f"{type(denoiser).__name__} takes none of the arguments {', '.join(TIME_ARGUMENTS)}")
    return lambda args, kwargs: as_float(read(args, kwargs))


def half(batch: Tensor, target: NoiseTarget, uncond_half: int) -> slice:
    """Return the slice of a denoiser's batch for the half named by `target`."""
    size = len(batch) // 2
    second = uncond_half if target == "uncond" else 1 - uncond_half
    return slice(size, 2 * size) if second else slice(0, size)


def corrected(affiner: Affiner, timestep: float, batch: Tensor, target: NoiseTarget, uncond_half: int) -> Tensor:
    """Return predictions with the part selected by `target` corrected: all of them, or half of a denoiser's batch."""
    if target == "all":
        return affiner.correct(timestep, batch)
    where = half(batch, target, uncond_half)
    changed = batch.clone()
    changed[where] = affiner.correct(timestep, batch[where])
    return changed


class Attachment:
    """An affiner active in a pipeline until :meth:`detach` or the end of a `with` block; see :func:`attach`."""

    def __init__(self, model: Any, affiner: Affiner, noise_target: NoiseTarget, uncond_half: int) -> None:
        self._affiner, self._target, self._uncond_half = affiner, noise_target, uncond_half
        self._pipeline: Any = None if isinstance(model, nn.Module) else model
        self._scheduler: Any = None
        self._ran = 0
        denoisers = find_denoisers(model)
        hooks = []
        if self._pipeline is None or noise_target != "all":
            for denoiser in denoisers:
                refuse_attached(denoiser)
                hooks.append((denoiser, functools.partial(self._behind_denoiser, timestep_reader(denoiser))))
        self._follow_scheduler()
        self._handles = [denoiser.register_forward_pre_hook(self._before_denoiser) for denoiser in denoisers]
        self._handles += [denoiser.register_forward_hook(hook, with_kwargs=True) for denoiser, hook in hooks]

    def detach(self) -> None:
        """Remove every hook, restoring the pipeline. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._scheduler is not None:
            self._release_copy(self._pipeline.scheduler)
            release(self._scheduler)
            self._scheduler = None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _release_copy(self, scheduler: Any) -> None:
        """Release a deep copy of our scheduler, which is intercepted too and may have replaced the original."""
        if scheduler is not self._scheduler and type(scheduler) is type(self._scheduler):
            release(scheduler)

    def _before_denoiser(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._follow_scheduler()

    def _follow_scheduler(self) -> None:
        """Move the correction to the current `pipe.scheduler`, which users may swap."""
        if self._pipeline is not None and self._pipeline.scheduler is not self._scheduler:
            new = self._pipeline.scheduler
            self._release_copy(new)
            if self._scheduler is not None:
                release(self._scheduler)
                self._scheduler = None
            intercept(new, self._around_step)
            self._scheduler = new

    def _around_step(self, step: Step) -> Any:
        if self._target != "all" and self._ran != 2 * len(step.sample):
            raise ValueError(NEEDS_CFG.format(self._ran, len(step.sample)))
        prediction = step.prediction
        if self._target == "all":
            prediction = self._affiner.correct(step.timestep, prediction)
        result = run_step(self._affiner, self._target, step, prediction)
        latents = getattr(self._affiner, "latents", None)
        return result if latents is None else with_tensor(result, latents.correct(step.timestep, output_tensor(result)))

    def _behind_denoiser(self, read: Any, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        batch = output_tensor(output)
        self._ran = len(batch)
        changed = corrected(self._affiner, read(args, kwargs), batch, self._target, self._uncond_half)
        return with_tensor(output, changed)


def attach(
    model: Any, affiner: Affiner, noise_target: NoiseTarget | None = None, uncond_half: int | None = None
) -> Attachment:
    """Attach any affiner, including third-party ones.

    Args:
        model: A diffusers pipeline, or a bare denoiser, whose own output is then corrected.
        affiner: The affiner.
        noise_target: What to correct; default: the affiner's own attribute of that name, else "all".
        uncond_half: Which half of the denoiser's batch is the unconditional one; default: the affiner's own attribute
            of that name, else 0 (the order in most pipelines).

    Raises:
        ValueError: The scheduler has no usable `step`, an affiner is already attached, or `model` has no denoiser.
        TypeError: The timestep is needed, but the denoiser does not take one.
    """
    target = noise_target or getattr(affiner, "noise_target", None) or "all"
    if uncond_half is None:
        uncond_half = getattr(affiner, "uncond_half", None) or 0
    return Attachment(model, affiner, target, uncond_half)


def run_step(affiner: Affiner, target: NoiseTarget, step: Step, prediction: Tensor) -> Any:
    """Run the scheduler on a corrected prediction, with its own noise scaled as the affiner asks."""
    noise_scale = getattr(affiner, "noise_scale", None)
    scale = 1.0 if noise_scale is None or target != "all" else noise_scale(step)
    if scale == 1:
        return step.run(prediction)
    with _Noise(lambda func, args, kwargs: func(*args, **kwargs) * scale):
        return step.run(prediction)


class _Noise(torch.overrides.TorchFunctionMode):
    """Replaces `torch.randn` and `randn_like` with `draw(func, args, kwargs)` within its context.

    diffusers' schedulers draw their noise with these functions (through `randn_tensor`), except the two that integrate
    a Brownian tree.
    """

    def __init__(self, draw: Callable[..., Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handle one call of a torch function."""
        if func in (torch.randn, torch.randn_like):
            return self.draw(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def step_coefficients(step: Step) -> tuple[float, float]:
    """Return the factors of prediction and own noise in a step: `prev = ... + c prediction + sigma noise`.

    They are measured on copies of the scheduler with one-pixel inputs, so this works for any scheduler; small inputs
    avoid clipping. No generator advances. Returns (0, 0) if the scheduler does not draw the noise itself or its
    variance is predicted.
    """
    if "variance_noise" in step.options or step.prediction.shape != step.sample.shape:
        return 0.0, 0.0
    small, pixel = 2.0**-10, torch.zeros((1,) * step.sample.dim())

    def run(prediction: float, noise: float) -> float:
        scheduler = copy.copy(step.scheduler)
        # Multistep schedulers keep earlier outputs in the shape of the latents; they cancel in the differences below.
        for name, value in vars(scheduler).items():
            if isinstance(value, Tensor) and value.shape == step.sample.shape:
                setattr(scheduler, name, pixel)
            elif isinstance(value, list):
                setattr(scheduler, name, [pixel if isinstance(x, Tensor) and x.dim() else x for x in value])

        def constant(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
            zeros = torch.zeros if func is torch.randn else torch.zeros_like
            return zeros(*args, **{k: v for k, v in kwargs.items() if k != "generator"}) + noise

        with _Noise(constant):
            # One pixel, unless each sample has its own timestep (all equal).
            return float(output_tensor(step.run(pixel + prediction, scheduler, pixel)).flatten()[0])

    still = run(0.0, 0.0)
    return (run(small, 0.0) - still) / small, (run(0.0, small) - still) / small
