"""Where an affiner meets a pipeline: around `scheduler.step`, and behind the denoiser. No pipeline code is touched.

The guided prediction exists in one place only, as the argument of `scheduler.step`, so that is where `noise_target`
"all" corrects it. The halves of classifier-free guidance exist behind the denoiser, so "uncond" and "text" use a
forward hook there.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

NoiseTarget = Literal["all", "uncond", "text"]
Undo = Callable[[], None]

_DENOISERS = ("transformer", "unet", "prior")
_TIME_ARGUMENTS = ("timestep", "timesteps", "t")


@runtime_checkable
class Affiner(Protocol):
    """What `load_affiner` trains and :func:`attach` applies; any object with these three methods will do.

    Predictions are `[B, C, H, W]`, or whatever shape the scheduler of the pipeline gets. `timestep` is the scheduler's
    (the denoiser's where a half of the guidance is corrected). An attribute `uncond_half`, where there is one, is set
    while training for a half: 0 or 1, which half of the denoiser's batch is the unconditional one. An attribute
    `noise_target` tells :func:`attach` what to correct; without one give it there, unless it is "all".

    Where a model predicts its variance too, `observe` gets the first C channels and `correct` all that there are.
    Second-order schedulers come to a timestep twice: with `recurrent` it is then observed and solved again.
    """

    def observe(self, timestep: float, real: Tensor, quant: Tensor) -> None:
        """Takes in the predictions of both models on the same latents, one batch at a time."""

    def solve(self, timestep: float) -> None:
        """Fits the correction of one timestep. Called once all batches have been observed there."""

    def correct(self, timestep: float, prediction: Tensor) -> Tensor:
        """Gives the corrected prediction, of the same shape, dtype and device."""


class Step(NamedTuple):
    """One call of `scheduler.step`.

    `run(prediction)` does it, or with `scheduler` and `sample` another one like it; what it returns is in the form that
    the caller asked for (tuple or output object).
    """

    scheduler: Any
    prediction: Tensor
    timestep: float
    sample: Tensor
    run: Callable[..., Any]
    options: dict[str, Any]


def intercept(scheduler: Any, around: Callable[[Step], Any]) -> None:
    """Routes `scheduler.step` through `around` until :func:`release`.

    The object's class is replaced by a subclass of the same name. An attribute on the object would be lost, or still
    refer to the original, when a pipeline makes a deep copy.

    Raises:
        ValueError: The scheduler has no `step(model_output, timestep, sample)`, or is intercepted already.
    """
    original = type(scheduler)
    if is_intercepted(scheduler):
        raise ValueError("an affiner is attached to this pipeline already; call its detach() first")
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
    """Takes an interception back; a deep copy of an intercepted scheduler is one as well."""
    scheduler.__class__ = type(scheduler).__mro__[1]


def is_intercepted(scheduler: Any) -> bool:
    """Whether an affiner is attached."""
    return "_hfquant_intercepted" in vars(type(scheduler))


def previous_sample(result: Any) -> Tensor:
    """The latents that a scheduler's step returned."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


def with_sample(result: Any, sample: Tensor) -> Any:
    """The same result with other latents."""
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result.prev_sample = sample
    return result


def find_denoiser(model: Any) -> nn.Module:
    """The denoiser of a pipeline: its transformer or UNet; a module is its own.

    Raises:
        TypeError: `model` is neither, or a pipeline without one.
    """
    if isinstance(model, nn.Module):
        return model
    for name in _DENOISERS:
        if isinstance(component := getattr(model, name, None), nn.Module):
            return component
    raise TypeError(f"{type(model).__name__} has none of the denoisers {', '.join(_DENOISERS)}")


def float_dtype(module: nn.Module) -> torch.dtype:
    """What a model computes in: of its first parameter in a common float type; codes of quantized layers are none."""
    common = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return next((p.dtype for p in module.parameters() if p.dtype in common), torch.get_default_dtype())


def as_float(timestep: Any) -> float:
    """A timestep as schedulers and denoisers take it, a number or a tensor of one value for each sample.

    Raises:
        ValueError: The samples are at different timesteps.
    """
    if not isinstance(timestep, Tensor):
        return float(timestep)
    values = timestep.flatten()
    if len(values) > 1 and bool((values != values[0]).any()):
        raise ValueError("an affiner corrects batches whose samples are all at one timestep")
    return float(values[0])


def timestep_reader(denoiser: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], float]:
    """A function that picks the timestep from the arguments of a denoiser's call.

    Raises:
        TypeError: The denoiser takes no timestep.
    """
    plain = getattr(denoiser, "_orig_mod", denoiser)  # torch.compile hides the signature
    parameters = list(inspect.signature(plain.forward).parameters)
    name = next((name for name in _TIME_ARGUMENTS if name in parameters), None)
    if name is None:
        raise TypeError(f"{type(denoiser).__name__} takes none of the arguments {', '.join(_TIME_ARGUMENTS)}")
    position = parameters.index(name)

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        return as_float(kwargs[name] if name in kwargs else args[position])

    return read


def output_tensor(output: Any) -> Tensor:
    """The prediction in what a denoiser returned: a tensor, or the first entry of a tuple or output object."""
    return output if isinstance(output, Tensor) else output[0]


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """The same output with another prediction."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    changed = copy.copy(output)
    changed[next(iter(output.keys()))] = tensor
    return changed


def half(batch: Tensor, target: NoiseTarget, uncond_half: int) -> slice:
    """Where in a denoiser's batch the half that `target` names lies."""
    size = len(batch) // 2
    second = uncond_half if target == "uncond" else 1 - uncond_half
    return slice(size, 2 * size) if second else slice(0, size)


def corrected_half(batch: Tensor, where: slice, correct: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of the batch with one half corrected."""
    changed = batch.clone()
    changed[where] = correct(batch[where])
    return changed


NEEDS_CFG = (
    'noise_target "uncond" and "text" need classifier-free guidance with both halves in one batch of the denoiser '
    "(a guidance_scale above 1, and a pipeline that batches): here the denoiser ran {0} samples for {1} latents"
)


class Attachment:
    """An affiner at work in a pipeline, until :meth:`detach` or the end of a `with` block.

    Args:
        model: A diffusers pipeline, or a bare denoiser, whose own output is corrected then.
        affiner: See :class:`Affiner`. Its methods `correct_latents(timestep, latents)` and
            `noise_scale(step)`, if it has them, act on the result of a step and on the noise that the step adds.
        noise_target: What to correct.
        uncond_half: Which half of the denoiser's batch is the unconditional one, 0 or 1.

    Raises:
        ValueError: The scheduler has no usable `step`, or an affiner is attached already.
        TypeError: `model` has no denoiser.
    """

    def __init__(self, model: Any, affiner: Affiner, noise_target: NoiseTarget = "all", uncond_half: int = 0) -> None:
        self._affiner = affiner
        self._target, self._uncond_half = noise_target, uncond_half
        self._pipeline = None if isinstance(model, nn.Module) else model
        self._scheduler: Any = None
        self._ran = 0
        denoiser = find_denoiser(model)
        behind = self._pipeline is None or noise_target != "all"
        if behind:
            refuse_attached(denoiser)
            self._read_time = timestep_reader(denoiser)
        self._follow_scheduler()
        self._handles = [denoiser.register_forward_pre_hook(self._before_denoiser)]
        if behind:
            self._handles.append(denoiser.register_forward_hook(self._behind_denoiser, with_kwargs=True))

    def detach(self) -> None:
        """Takes every hook away; the pipeline is as it was before. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._pipeline is not None:
            self._release_copy(self._pipeline.scheduler)
        self._release_scheduler()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _release_scheduler(self) -> None:
        if self._scheduler is not None:
            release(self._scheduler)
        self._scheduler = None

    def _release_copy(self, scheduler: Any) -> None:
        """Deep copies of our scheduler, which users may put in its place, are intercepted as it is."""
        if scheduler is not self._scheduler and type(scheduler) is type(self._scheduler):
            release(scheduler)

    def _before_denoiser(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._follow_scheduler()

    def _follow_scheduler(self) -> None:
        """Users swap `pipe.scheduler`; the correction moves to the one in use."""
        if self._pipeline is not None and self._pipeline.scheduler is not self._scheduler:
            new = self._pipeline.scheduler
            self._release_copy(new)
            self._release_scheduler()
            intercept(new, self._around_step)
            self._scheduler = new

    def _around_step(self, step: Step) -> Any:
        prediction = step.prediction
        if self._target == "all":
            prediction = self._affiner.correct(step.timestep, prediction)
        elif self._ran != 2 * len(step.sample):
            raise ValueError(NEEDS_CFG.format(self._ran, len(step.sample)))
        result = run_step(self._affiner, step, prediction)
        correct_latents = getattr(self._affiner, "correct_latents", None)
        if correct_latents is None:
            return result
        return with_sample(result, correct_latents(step.timestep, previous_sample(result)))

    def _behind_denoiser(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        batch = output_tensor(output)
        timestep = self._read_time(args, kwargs)
        self._ran = len(batch)
        if self._target == "all":
            return with_tensor(output, self._affiner.correct(timestep, batch))
        where = half(batch, self._target, self._uncond_half)
        return with_tensor(output, corrected_half(batch, where, lambda x: self._affiner.correct(timestep, x)))


def refuse_attached(denoiser: nn.Module) -> None:
    """Refuses a denoiser that an affiner corrects already.

    Raises:
        ValueError: It does.
    """
    hooks = (*denoiser._forward_pre_hooks.values(), *denoiser._forward_hooks.values())
    if any(isinstance(getattr(hook, "__self__", None), Attachment) for hook in hooks):
        raise ValueError("an affiner is attached to this denoiser already; call its detach() first")


def run_step(affiner: Affiner, step: Step, prediction: Tensor) -> Any:
    """Runs the scheduler on a corrected prediction, its own noise scaled as the affiner asks."""
    noise_scale = getattr(affiner, "noise_scale", None)
    scale = 1.0 if noise_scale is None else noise_scale(step)
    if scale == 1:
        return step.run(prediction)
    with ScaledNoise(scale):
        return step.run(prediction)


class ScaledNoise(torch.overrides.TorchFunctionMode):
    """Within it, `torch.randn` and `randn_like` are multiplied by a factor; what they draw is drawn as ever.

    diffusers' schedulers draw their noise with these (through `randn_tensor`), all but the two that integrate a
    Brownian tree.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for each function."""
        result = func(*args, **(kwargs or {}))
        return result * self.factor if func in (torch.randn, torch.randn_like) else result


class _FixedNoise(torch.overrides.TorchFunctionMode):
    """Within it, Gaussian noise is a constant, and no generator moves."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.randn, torch.randn_like):
            kwargs.pop("generator", None)
            result = (torch.zeros if func is torch.randn else torch.zeros_like)(*args, **kwargs)
            return result + self.value
        return func(*args, **kwargs)


def step_coefficients(step: Step) -> tuple[float, float]:
    """What a step multiplies the prediction and its own noise by: `prev = ... + c prediction + sigma noise`.

    Read off copies of the scheduler on inputs of one pixel, so it holds for any of them; small inputs stay clear of
    clipping. (0, 0) where noise is not drawn by the scheduler, or its variance is predicted.
    """
    if "variance_noise" in step.options or step.prediction.shape != step.sample.shape:
        return 0.0, 0.0
    small, pixel = 2.0**-10, torch.zeros((1,) * step.sample.dim())

    def run(prediction: float, noise: float) -> float:
        scheduler = copy.copy(step.scheduler)
        # Multistep schedulers keep earlier outputs, of the latents' shape; they cancel in the differences below.
        for name, value in vars(scheduler).items():
            if isinstance(value, Tensor) and value.shape == step.sample.shape:
                setattr(scheduler, name, pixel)
            elif isinstance(value, list):
                setattr(scheduler, name, [pixel if isinstance(x, Tensor) and x.dim() else x for x in value])
        with _FixedNoise(noise):
            # One pixel, except where each sample has its own timestep (all at the same).
            return float(previous_sample(step.run(pixel + prediction, scheduler, pixel)).flatten()[0])

    still = run(0.0, 0.0)
    return (run(small, 0.0) - still) / small, (run(0.0, small) - still) / small


def attach(
    model: Any, affiner: Affiner, noise_target: NoiseTarget | None = None, uncond_half: int | None = None
) -> Attachment:
    """Attaches any affiner, a third party's too; see :class:`Attachment`.

    Args:
        model: A pipeline or a bare denoiser.
        affiner: The affiner.
        noise_target: Default: the affiner's own attribute of that name, else "all".
        uncond_half: Default: the affiner's own attribute of that name, else 0 (as most pipelines batch).
    """
    if noise_target is None:
        noise_target = getattr(affiner, "noise_target", "all")
    if uncond_half is None:
        uncond_half = getattr(affiner, "uncond_half", None) or 0
    return Attachment(model, affiner, noise_target or "all", uncond_half)
