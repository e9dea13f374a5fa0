"""Samplers run a pipeline or a model and choose the denoising steps that become calibration samples.

The inputs of a diffusion model's denoiser change with the timestep, so calibration must cover several timesteps of each
run. The choice of timesteps matters: evenly spread (Q-Diffusion, arXiv 2302.04304), normally distributed (PTQ4DM, arXiv
2211.15736), or the last ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.calibration.batches import applicable, evaluating, options_for, placed, samples
from hfquant.calibration.recorder import Recording, Target, find_layer, record
from hfquant.calibration.self_made import generator, seed_of
from hfquant.denoisers import call_parameters, is_pipeline, modular_blocks, modules_of, time_reader


class BaseSampler:
    """Keep the last `timesteps` steps of each run, those nearest the clean image.

    Subclasses override :meth:`select`. For a model without a pipeline, and for pipeline components that take no
    timestep (a text encoder, the VAE), every call is kept.

    Args:
        timesteps: steps to keep of each run; a run with fewer steps is kept whole, as are all runs if None.
        seed: determines both the noise of the runs and the choice of steps; batch i always runs with the same noise.
    """

    def __init__(self, timesteps: int | None = 10, *, seed: int = 0) -> None:
        if timesteps is not None and (type(timesteps) is not int or timesteps < 1):
            raise ValueError(f"timesteps must be a positive integer or None, got {timesteps!r}")
        if type(seed) is not int or seed < 0:
            raise ValueError(f"seed must be a non-negative integer, got {seed!r}")
        self.timesteps = timesteps
        self.seed = seed

    def select(self, steps: int, count: int, generator: torch.Generator) -> list[int]:
        """Choose the steps to keep.

        Args:
            steps: Number of steps of the run; step 0 starts from noise. A step is a sequence of calls with one
                timestep.
            count: Number of steps to choose, less than `steps`.
            generator: Source of randomness, new for each run.

        Returns:
            `count` distinct numbers from 0 to `steps - 1`.
        """
        return list(range(steps - count, steps))

    def sample(
        self,
        model: Any,
        batch: Any,
        calib_layer: nn.Module | str,
        call_kwargs: Mapping[str, Any] | None = None,
        *,
        index: int = 0,
        steps: int | None = None,
    ) -> tuple[Recording, int | None]:
        """Run the model on one batch and record the calls of `calib_layer` in the chosen steps.

        Args:
            model: A diffusers pipeline or any torch module. It is run in eval mode without gradients; the modes of its
                modules, its hooks and the global random state are restored afterwards.
            batch: Keyword arguments as a mapping, positional arguments as a tuple, a list of these or of tensors (run
                one after the other), or the single positional argument: a tensor, a prompt, a list of prompts.
            calib_layer: Layer to record, or its name.
            call_kwargs: Additional keyword arguments for each call; the batch's own take precedence.
            index: Number of the batch, which determines its noise.
            steps: Expected number of steps per run; by default the scheduler's. If a run has a different number, it is
                repeated.

        Returns:
            The recording, and the number of steps per run (None if there is no timestep).
        """
        target = find_layer(model, calib_layer)
        recording = Recording()
        for i, (args, kwargs) in enumerate(calls_of(model, batch)):
            kwargs = {**(call_kwargs or {}), **kwargs}
            run, steps = self._record_run(model, target, args, kwargs, (self.seed, index, i), steps)
            for j in range(len(run)):
                recording.take(run, j)
        return recording, steps

    def run(self, model: Any, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call the model once."""
        if isinstance(model, nn.Module):
            args, kwargs = placed(model, args, kwargs)
        model(*args, **kwargs)

    def _record_run(
        self,
        model: Any,
        target: Target,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        entropy: tuple[int, ...],
        steps: int | None,
    ) -> tuple[Recording, int | None]:
        read_time = time_reader(target.component) if is_pipeline(model) else None
        for _ in range(3):
            recording, clock = Recording(), _Clock(read_time, partial(self._plan, model, entropy, steps))
            with (
                record(target, recording, clock.keeps),
                clock.watch(target.component),
                inference(model),
                seeded(*entropy),
            ):
                self.run(model, target, args, kwargs)
            if clock.step + 1 == clock.steps:
                return recording, clock.steps or None
            steps = clock.step + 1
        raise RuntimeError(f"the number of denoising steps changes from run to run of one batch (now {steps})")

    def _plan(self, model: Any, entropy: tuple[int, ...], steps: int | None) -> tuple[int, Sequence[int]]:
        """Return the expected number of steps of the run that is starting, and which of them to keep."""
        steps = steps or _scheduled_steps(model)
        count = steps if self.timesteps is None else min(self.timesteps, steps)
        if count == steps:
            return steps, range(steps)
        return steps, self.select(steps, count, generator(*entropy))


class UniformSampler(BaseSampler):
    """Keep steps at a fixed interval over the whole run, with a random start (Q-Diffusion, section 3.3)."""

    def select(self, steps: int, count: int, generator: torch.Generator) -> list[int]:
        """See :meth:`BaseSampler.select`."""
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        return [int((k + offset) * steps / count) for k in range(count)]


class NormalSampler(BaseSampler):
    """Keep steps drawn from a normal distribution over the diffusion time: DNTC of PTQ4DM (section 4.3).

    Args:
        mean: mean of the diffusion time as a fraction of the run, 0 = clean image, 1 = noise. PTQ4DM asks for at most
            0.5, since inputs near the clean image matter more.
        timesteps: steps to keep of each run, without repetition.
        std: standard deviation, in the same unit.
        seed: see :class:`BaseSampler`.
    """

    def __init__(self, mean: float = 0.4, timesteps: int | None = 10, *, std: float = 0.4, seed: int = 0) -> None:
        super().__init__(timesteps, seed=seed)
        if not 0 <= mean <= 1:
            raise ValueError(f"mean is a fraction of the diffusion time, from 0 to 1; got {mean!r}")
        if not std > 0:
            raise ValueError(f"std must be positive, got {std!r}")
        self.mean = float(mean)
        self.std = float(std)

    def select(self, steps: int, count: int, generator: torch.Generator) -> list[int]:
        """See :meth:`BaseSampler.select`."""
        time = torch.linspace(1, 0, steps, dtype=torch.float64)
        # Log weights plus Gumbel noise: the `count` largest are a draw without replacement, and none underflows.
        uniform = torch.rand(steps, generator=generator, dtype=torch.float64).clamp_min(1e-300)
        keys = -(((time - self.mean) / self.std) ** 2) / 2 - (-uniform.log()).log()
        return keys.topk(count).indices.tolist()


class LanguageModelSampler(BaseSampler):
    """Run a transformers model over token batches and keep every call.

    A batch is a mapping (input_ids, attention_mask, ...) or a tensor of token ids `[batch, length]`, int64. The model
    runs without a key-value cache, and logits that are not recorded are not computed.

    Args:
        seed: seed for any randomness in the model.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(None, seed=seed)

    def run(self, model: Any, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call the model once."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"LanguageModelSampler runs a transformers model, got {type(model).__name__}")
        options = options_for(model, target.layer.modules())
        kwargs = {**applicable(options, kwargs), **kwargs}
        super().run(model, target, args, kwargs)


class _Clock:
    """Count the denoising steps of one run by the timesteps that the denoiser receives.

    Args:
        read_time: extracts the timestep from a call's arguments; None for a component that takes none.
        plan: called at the first step; returns the expected number of steps, and the steps to keep.
    """

    def __init__(
        self,
        read_time: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None,
        plan: Callable[[], tuple[int, Sequence[int]]],
    ) -> None:
        self.read_time = read_time
        self.plan = plan
        self.step, self.steps = -1, 0
        self.time: float | None = None
        self.kept: Sequence[int] = ()

    def keeps(self) -> bool:
        """Return whether calls are being recorded now."""
        return self.read_time is None or self.step in self.kept

    @contextmanager
    def watch(self, component: nn.Module) -> Iterator[None]:
        if self.read_time is None:
            yield
            return
        handle = component.register_forward_pre_hook(self._tick, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def _tick(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.read_time is not None
        time = self.read_time(args, kwargs)
        if time is None:
            return
        # Some models take one timestep per token; the largest is that of the run.
        now = float(time.max()) if isinstance(time, Tensor) else float(time)
        if self.step < 0:
            self.steps, self.kept = self.plan()
        if now != self.time:
            self.step, self.time = self.step + 1, now


def _scheduled_steps(pipeline: Any) -> int:
    """Return the scheduler's number of distinct timesteps: an estimate, since image-to-image skips some of them."""
    timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
    return 1 if timesteps is None else len(torch.unique_consecutive(torch.as_tensor(timesteps)))


def calls_of(model: Any, batch: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the calls (args, kwargs) of a pipeline or module that a batch represents.

    Raises:
        TypeError: The batch has several positional arguments, and the pipeline, a modular one, takes none.
    """
    if isinstance(batch, list) and any(isinstance(item, (Mapping, tuple, list, Tensor)) for item in batch):
        return [call for sample in samples(batch) for call in calls_of(model, sample)]
    if isinstance(batch, Mapping):
        return [((), dict(batch))]
    args = batch if isinstance(batch, tuple) else (batch,)
    if modular_blocks(model) is None:
        return [(args, {})]
    if len(args) != 1:
        raise TypeError(
            f"{type(model).__name__} takes its arguments by name: pass a dict of them as a batch, got a tuple of "
            f"{len(args)}"
        )
    return [((), {next(iter(call_parameters(model))): args[0]})]


def fresh_call(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of one call with cloned generators, so each call draws the same and spares the originals."""

    def fresh(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Generator):
            return [one.clone_state() for one in value]
        return value.clone_state() if isinstance(value, torch.Generator) else value

    return {name: fresh(value) for name, value in sample.items()}


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed torch's global generators from `entropy` for the duration of the context; restore their state afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_of(*entropy))
        yield


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Run in eval mode, without gradients or per-run progress bars; restore everything afterwards."""
    bar = getattr(model, "_progress_bar_config", {})
    configure = getattr(model, "set_progress_bar_config", lambda **_: None)
    with evaluating(*modules_of(model)):
        try:
            configure(**{**bar, "disable": True})
            yield
        finally:
            configure(**bar)
