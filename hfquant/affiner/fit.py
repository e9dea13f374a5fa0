"""Fitting: drive the real and the quantized model through the same latents and show the affiner both predictions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.affiner.affiner import BlockwiseAffiner
from hfquant.affiner.blocks import Call, fit_blocks, hook_blocks
from hfquant.affiner.config import AffinerConfig, StepperConfig, parse
from hfquant.affiner.hooks import NEEDS_CFG, Affiner, corrected, half, run_step
from hfquant.affiner.inputs import Samples, as_pipeline, call_batches, check_alike
from hfquant.affiner.judge import fresh_samples, gain, pays
from hfquant.affiner.runs import Event, PausedRun
from hfquant.calibration.batches import evaluating
from hfquant.calibration.samplers import fresh_call, seeded
from hfquant.config import ConfigError
from hfquant.console import progress_bar
from hfquant.denoisers import compute_dtype, find_denoiser, find_denoisers, has_frames_first, modules_of, refuse_cached

logger = logging.getLogger(__name__)


def load_affiner(
    config: Mapping[str, Any],
    dataset: Any = None,
    model_real: Any = None,
    model_quant: Any = None,
    latents: Tensor | None = None,
    shuffle: bool = True,
    thirdparty_affiner: Affiner | None = None,
) -> Any:
    """Train an affiner that aligns a quantized denoiser with the real one, or load a trained one.

    Args:
        config: See :class:`~hfquant.affiner.config.AffinerConfig`. A bare denoiser also needs `"scheduler"`, a
            diffusers scheduler. `{"pretrained": folder or repository id}` loads an affiner, from a subfolder of it if
            `"subfolder"` names one ("affiner" in a pipeline's folder or repository); the other arguments are then
            ignored.
        dataset: What to run: a `datasets.Dataset`, a list, a map-style dataset, or a stream (torch's or `datasets`'
            `IterableDataset`), which is read to its end unless `stepper.sample_size` limits it. A row is a prompt, a
            label, or a dict of arguments of the pipeline (for a bare denoiser: of its call).
        model_real: Full-precision pipeline or bare denoiser.
        model_quant: The quantized one, of the same kind.
        latents: Initial noise, `[N, ...]` in the shape of the pipeline's own `latents` argument, with N at least the
            number of samples; drawn from `stepper.seed` if None.
        shuffle: Draw the samples from the whole dataset (by `stepper.seed`) instead of its start; for a stream, through
            a buffer of 1,024 rows.
        thirdparty_affiner: Object to train in place of our affiner; see :class:`~hfquant.affiner.hooks.Affiner`. Of
            `config`, only the stepper's runs and extra_args apply.

    Returns:
        The trained :class:`BlockwiseAffiner`, or `thirdparty_affiner`. Both models are left unchanged.

    Raises:
        ConfigError: The config is invalid.
        TypeError: A model is neither a pipeline nor a module, or the two are of different kinds.
        ValueError: The dataset is empty, rows or latents do not fit, the models differ in shapes or schedulers, an
            affiner is attached to one of them, a cache is enabled on the real one, the layout of the latents is
            unknown, guidance is missing for the noise target, a step is enabled that does not exist, or a model
            predicts NaN or infinity.
    """
    scheduler = None
    if isinstance(config, Mapping):
        if "pretrained" in config:
            if odd := set(config) - {"pretrained", "subfolder"}:
                raise ConfigError(f'config: "pretrained" can only be combined with "subfolder", got {sorted(odd)}')
            return BlockwiseAffiner.from_pretrained(config["pretrained"], subfolder=config.get("subfolder", ""))
        config = dict(config)
        scheduler = config.pop("scheduler", None)
    checked = parse(config)
    affiner: Any = BlockwiseAffiner(checked) if thirdparty_affiner is None else thirdparty_affiner
    if thirdparty_affiner is not None:
        _check_thirdparty(affiner, checked)
    if isinstance(model_real, nn.Module) != isinstance(model_quant, nn.Module):
        raise TypeError("model_real and model_quant must both be pipelines or both be denoisers")
    real, quant = (as_pipeline(m, n, scheduler) for m, n in ((model_real, "model_real"), (model_quant, "model_quant")))
    check_alike(real, quant)
    for denoiser in find_denoisers(real):
        refuse_cached(denoiser, f"model_real's {type(denoiser).__name__}", "a reference")
    samples = call_batches(dataset, real, latents, shuffle, checked)
    _align(affiner, checked, real, quant, samples)
    return affiner


def _check_thirdparty(affiner: Any, config: AffinerConfig) -> None:
    if not all(hasattr(affiner, name) for name in ("observe", "solve", "correct")):
        raise TypeError(f"{type(affiner).__name__} lacks observe, solve or correct (see hfquant.affiner.Affiner)")
    stepper = config.stepper
    if config.blocks is not None or stepper.enable_latent_affine or stepper.enable_timesteps is not None:
        raise ConfigError(
            "config: blocks, enable_latent_affine and enable_timesteps do not apply to a thirdparty_affiner"
        )


def _align(affiner: Any, config: AffinerConfig, real: Any, quant: Any, samples: Samples) -> None:
    """Fit the maps of the blocks, if any, and of the steps, and judge them; leave both models unchanged."""
    fit = _Fit(affiner, config.stepper, real, quant)
    with ExitStack() as stack:
        stack.enter_context(seeded(config.stepper.seed))
        stack.enter_context(evaluating(*modules_of(real), *modules_of(quant), gradients=True))
        if config.blocks is not None:
            calls = _denoiser_calls(real, samples, config.blocks.timesteps)
            affiner.blocks = fit_blocks(find_denoiser(real), find_denoiser(quant), calls, config.blocks)
            stack.callback(hook_blocks(find_denoiser(quant), affiner.blocks))
        fit.run(samples)
    if config.type == "blockwise" and isinstance(affiner, BlockwiseAffiner):
        _judge(fit, affiner, fresh_samples(samples, config.stepper.seed + 1))


def _judge(fit: _Fit, affiner: BlockwiseAffiner, samples: Samples) -> None:
    """Reset all maps unless they bring the final latents of runs from other noise closer to the real model's."""
    gains = []
    models = (*modules_of(fit.real), *modules_of(fit.quant))
    with seeded(fit.stepper.seed, 1), evaluating(*models, gradients=True):
        for sample in progress_bar(samples, "judging the affiner"):
            real, plain = fit.last_latents(fit.real, sample), fit.last_latents(fit.quant, sample)
            with ExitStack() as stack:
                stack.callback(hook_blocks(find_denoiser(fit.quant), affiner.blocks))
                corrected = fit.last_latents(fit.quant, sample, use_affiner=True)
            gains.append(gain(real, plain, corrected))
    found = torch.cat(gains)
    if not pays(found):
        logger.warning(
            "the affiner does not help and will correct nothing: runs from other noise gain %.2f dB with it "
            "(standard error %.2f)",
            found.mean().item(),
            found.std().item() / len(found) ** 0.5 if len(found) > 1 else 0.0,
        )
        affiner.forget()


@dataclass
class _Batch:
    """The runs of both models on one batch, and the latents from which both continue."""

    real: PausedRun
    quant: PausedRun
    free: PausedRun | None  # the real model's own undisturbed run
    latents: Any = None  # a tensor after the first step

    def close(self) -> None:
        for run in filter(None, (self.real, self.quant, self.free)):
            run.close()


class _Fit:
    """The lockstep loop: both models predict, the affiner observes and solves, both continue from the same latents."""

    def __init__(self, affiner: Any, stepper: StepperConfig, real: Any, quant: Any) -> None:
        self.affiner, self.stepper, self.real, self.quant = affiner, stepper, real, quant
        self.latents: Affiner | None = getattr(affiner, "latents", None) if self.stepper.recurrent else None
        self.target, self.uncond_half = self.stepper.noise_target, 0

    def run(self, samples: Samples) -> None:
        if self.target != "all":
            self.uncond_half = self._find_uncond_half(samples[0])
            if hasattr(self.affiner, "uncond_half"):
                self.affiner.uncond_half = self.uncond_half
        seen: dict[float, None] = {}
        with progress_bar(desc="fitting the affiner", unit="call") as progress:
            for group in [samples] if self.stepper.recurrent else [[sample] for sample in samples]:
                batches = [self._batch(sample) for sample in group]
                try:
                    seen |= dict.fromkeys(self._lock_step(batches, progress, len(samples)))
                finally:
                    for batch in batches:
                        batch.close()
        if not self.stepper.recurrent:
            for timestep in seen:
                self.affiner.solve(timestep)

    def last_latents(self, pipeline: Any, sample: dict[str, Any], use_affiner: bool = False) -> Tensor:
        """Return the final latents of a run, on the CPU."""
        finish = {"finish": partial(run_step, self.affiner, self.target)} if use_affiner else {}
        run = PausedRun(pipeline, self._call(pipeline, sample), at_denoiser=self.target != "all", **finish)
        point, latents = "predicted" if self.target == "all" else "denoised", getattr(self.affiner, "latents", None)
        try:
            event = run.resume()
            while event is not None:
                value = event.value
                if use_affiner and event.kind == point:
                    value = corrected(self.affiner, event.timestep, value, self.target, self.uncond_half)
                if event.kind == "stepped":
                    value = latents.correct(event.timestep, value) if use_affiner and latents is not None else value
                    last = value
                event = run.resume(value)
        finally:
            run.close()
        return last.float().cpu()

    def _call(self, pipeline: Any, sample: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call, with tensors in the real denoiser's dtype converted to the pipeline's."""
        own, other = (compute_dtype(find_denoiser(p)) for p in (self.real, pipeline))
        call = fresh_call(sample)
        return {k: v.to(other) if isinstance(v, Tensor) and v.dtype == own else v for k, v in call.items()}

    def _batch(self, sample: dict[str, Any]) -> _Batch:
        behind = self.target != "all"
        finish = {"finish": partial(run_step, self.affiner, self.target)} if self.stepper.recurrent else {}
        batch = _Batch(
            PausedRun(self.real, fresh_call(sample), at_denoiser=behind),
            PausedRun(self.quant, self._call(self.quant, sample), at_denoiser=behind, **finish),
            None if self.latents is None else PausedRun(self.real, fresh_call(sample)),
        )
        torch.rand(())  # make the next batch's runs draw different noise
        return batch

    def _lock_step(self, batches: list[_Batch], progress: Any, count: int) -> Iterator[float]:
        """Drive the batches through their runs, yielding the timestep after each step."""
        while True:
            reals = [batch.real.resume(batch.latents) for batch in batches]
            frees = [batch.free.resume() and batch.free.resume() for batch in batches if batch.free is not None]
            quants = [batch.quant.resume(batch.latents) for batch in batches]
            if not any(reals) and not any(quants):
                return
            pairs = [_checked(r, q, i) for i, (r, q) in enumerate(zip(reals, quants, strict=True))]
            timestep = pairs[0][0].timestep
            if isinstance(self.affiner, BlockwiseAffiner):
                self.affiner.frames_first = has_frames_first(pairs[0][0].value, find_denoiser(self.real))
            for r, q in pairs:
                if r.timestep != timestep:
                    raise ValueError(
                        f"samples of one dataset must run the same timesteps; got {timestep}, {r.timestep}"
                    )
                self.affiner.observe(timestep, self._fitted_part(r), self._fitted_part(q))
            if self.stepper.recurrent:
                self.affiner.solve(timestep)
            for batch, (r, q) in zip(batches, pairs, strict=True):
                value = q.value
                if self.stepper.recurrent:
                    value = corrected(self.affiner, timestep, value, self.target, self.uncond_half)
                ahead, behind = _advance(batch.real, r.value), _advance(batch.quant, value)
                stepped = behind.timestep  # the scheduler's time, which may have another unit than the denoiser's
                batch.latents = behind.value if self.stepper.recurrent else ahead.value
                if progress.total is None and batch.quant.timesteps:
                    self._check_enabled(batch.quant.timesteps)
                    progress.total = len(batch.quant.timesteps) * count
                progress.update()
            if self.latents is not None:
                for batch, free in zip(batches, frees, strict=True):
                    if free is not None:
                        self.latents.observe(stepped, free.value, batch.latents)
                self.latents.solve(stepped)
                for batch in batches:
                    batch.latents = self.latents.correct(stepped, batch.latents)
            yield timestep

    def _check_enabled(self, timesteps: list[float]) -> None:
        number, last = max(self.stepper.enable_timesteps or (0,)), len(set(timesteps)) - 1
        if number > last:
            raise ValueError(f"stepper.enable_timesteps has step {number}, but the last step of these runs is {last}")

    def _fitted_part(self, event: Event) -> Tensor:
        """Return the part of an event's tensor to fit: one half of the guidance batch, without a learned variance."""
        value, channels = event.value, None
        if event.sample is not None:
            channels = event.sample.shape[1]
        else:
            value = value[half(value, self.target, self.uncond_half)]
            inputs = getattr(getattr(find_denoiser(self.real), "config", None), "in_channels", None)
            channels = inputs if inputs and value.shape[1] == 2 * inputs else None
        return value[:, :channels] if value.dim() == 4 else value

    def _find_uncond_half(self, sample: dict[str, Any]) -> int:
        """Return which half of the guidance batch is unconditional, inferred from how the pipeline combines the two.

        Guidance is `u + w (c - u)`, which many pipelines rescale sample by sample. Written as
        `s (first + v (second - first))`, v = w > 1 if the first half is the unconditional one, and v = 1 - w < 0 if it
        is the second.
        """
        run = PausedRun(self.real, fresh_call(sample), at_denoiser=True)
        try:
            behind = run.resume()
            guided = run.resume() if behind is not None else None
        finally:
            run.close()
        if behind is None or guided is None or guided.sample is None:
            raise ValueError(f"{type(self.real).__name__} never called its denoiser")
        if guided.kind != "predicted" or len(behind.value) != 2 * len(guided.sample):
            raise ValueError(NEEDS_CFG.format(len(behind.value), len(guided.sample)))
        channels = guided.value.shape[1]
        halves = torch.stack([x[0, :channels].double().flatten() for x in behind.value.chunk(2)], 1)
        shares = torch.linalg.lstsq(halves, guided.value[0].double().flatten()[:, None]).solution.flatten()
        v = float(shares[1] / shares.sum())
        if not (v > 1 or v < 0):
            raise ValueError(
                f"cannot tell the unconditional half: the guided prediction is first + {v:.3f} (second - first); "
                "a guidance_scale above 1 is needed"
            )
        return 0 if v > 1 else 1


def _advance(run: PausedRun, value: Tensor) -> Event:
    """Continue with a prediction until the latents after the step."""
    event = run.resume(value)
    while event is not None and event.kind == "predicted":
        event = run.resume()
    if event is None or event.kind != "stepped":
        raise ValueError(
            'noise_target "uncond" and "text" need one denoiser call per step; this pipeline makes several'
        )
    return event


def _checked(real: Event | None, quant: Event | None, number: int) -> tuple[Event, Event]:
    """Check both events: they must be at the same point, finite, and equal in shape and initial latents."""
    if real is None or quant is None or real.kind != quant.kind or real.timestep != quant.timestep:
        at = ["the end" if e is None else f"timestep {e.timestep:g}" for e in (real, quant)]
        raise ValueError(
            f"the pipelines run different timesteps: the real one is at {at[0]}, the quantized one at {at[1]}"
        )
    if real.value.shape != quant.value.shape:
        shapes = list(real.value.shape), list(quant.value.shape)
        raise ValueError(f"the models differ: the real one predicts {shapes[0]}, the quantized one {shapes[1]}")
    for name, event in (("real", real), ("quantized", quant)):
        if not bool(event.value.isfinite().all()):
            raise ValueError(
                f"the {name} model predicts NaN or infinity at timestep {event.timestep:g}, batch {number}"
            )
    if real.sample is not None and quant.sample is not None:
        one, other = real.sample.float(), quant.sample.to(real.sample.device).float()
        if one.shape != other.shape or not torch.allclose(one, other, rtol=0.02, atol=0.02):
            raise ValueError(
                "the pipelines start from different latents, so their predictions cannot be compared: pass latents"
            )
    return real, quant


def _denoiser_calls(pipeline: Any, samples: Samples, count: int) -> list[Call]:
    """Return arguments of the real denoiser's calls at `count` evenly spread steps of each run, on the CPU."""
    from accelerate.utils import send_to_device

    calls: list[Call] = []
    held: list[Call] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        held.append(send_to_device((args, kwargs), "cpu"))

    for sample in progress_bar(samples, "recording denoiser calls"):
        held.clear()
        run = PausedRun(pipeline, fresh_call(sample))
        handle = find_denoiser(pipeline).register_forward_pre_hook(keep, with_kwargs=True)
        try:
            while run.resume() is not None:
                pass
        finally:
            handle.remove()
            run.close()
        picked = torch.linspace(0, len(held) - 1, min(count, len(held))).round().int().tolist()
        calls += [held[i] for i in picked]
    return calls
