"""Fitting: the real and the quantized model are led through the same latents, and the affiner sees both predictions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfquant.affiner.affiner import AffineMaps, BlockwiseAffiner
from hfquant.affiner.blocks import Call, fit_blocks, hook_blocks
from hfquant.affiner.config import AffinerConfig, parse
from hfquant.affiner.hooks import (
    NEEDS_CFG,
    Affiner,
    corrected_half,
    find_denoiser,
    float_dtype,
    half,
    run_step,
)
from hfquant.affiner.inputs import Samples, as_pipeline, call_batches, check_alike, seeded_call
from hfquant.affiner.runs import DenoisingLoop, Event, Run
from hfquant.calibration.samplers import seeded
from hfquant.config import ConfigError

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
    """Trains an affiner that aligns a quantized denoiser with the real one, or loads a trained one.

    Args:
        config: See :class:`~hfquant.affiner.config.AffinerConfig`. A bare denoiser also needs `"scheduler"`, a
            diffusers scheduler. `{"pretrained": folder or repository id}` loads; the other arguments are not used then.
        dataset: What to run: a `datasets.Dataset`, a list or any map-style dataset. A row is a prompt, a label, or a
            dict of arguments of the pipeline (of a bare denoiser: of its call).
        model_real: Full-precision pipeline, or bare denoiser.
        model_quant: The quantized one, of the same kind.
        latents: Initial noise, `[N, ...]` of the shape that the pipeline's own `latents` argument has, at least one for
            each sample; drawn from `stepper.seed` when None.
        shuffle: Draw the samples from all over the dataset (by `stepper.seed`) instead of its start.
        thirdparty_affiner: Trained in place of ours; see :class:`~hfquant.affiner.hooks.Affiner`. Of `config` the
            stepper's runs and extra_args count.

    Returns:
        The trained :class:`BlockwiseAffiner`, or `thirdparty_affiner`. Both models are left as they were.

    Raises:
        ConfigError: The config is invalid.
        TypeError: A model is no pipeline and no module, or the two are not of one kind.
        ValueError: The dataset is empty, rows or latents do not fit, the models differ in shapes or schedulers, an
            affiner is attached to one, the latents are of a layout that is not known, guidance is missing for the noise
            target, a step is enabled that there is not, or a model predicts NaN or infinity.
    """
    if not isinstance(config, (Mapping, AffinerConfig)):
        raise TypeError(f"an affiner's config is a dict, got {type(config).__name__}")
    if isinstance(config, Mapping) and "pretrained" in config:
        if odd := set(config) - {"pretrained", "subfolder"}:
            raise ConfigError(f'config: "pretrained" goes with "subfolder" alone, got {sorted(odd)}')
        return BlockwiseAffiner.from_pretrained(config["pretrained"], subfolder=config.get("subfolder", ""))
    plain = {k: v for k, v in config.items() if k != "scheduler"} if isinstance(config, Mapping) else config
    checked = parse(plain)
    scheduler = config.get("scheduler") if isinstance(config, Mapping) else None
    if isinstance(model_real, nn.Module) != isinstance(model_quant, nn.Module):
        raise TypeError("model_real and model_quant must both be pipelines or both be denoisers")
    real, quant = (as_pipeline(m, n, scheduler) for m, n in ((model_real, "model_real"), (model_quant, "model_quant")))
    check_alike(real, quant)
    samples = call_batches(dataset, real, latents, shuffle, checked)
    affiner: Any = BlockwiseAffiner(checked) if thirdparty_affiner is None else thirdparty_affiner
    if not isinstance(affiner, Affiner):
        raise TypeError(f"{type(affiner).__name__} lacks observe, solve or correct (see hfquant.affiner.Affiner)")
    stepper = checked.stepper
    if thirdparty_affiner is not None and (
        checked.blocks is not None or stepper.enable_latent_affine or stepper.enable_timesteps is not None
    ):
        raise ConfigError("config: blocks, enable_latent_affine and enable_timesteps are for our own affiner alone")
    with ExitStack() as stack:
        stack.enter_context(seeded(checked.stepper.seed))
        for model in {id(m): m for m in (real, quant)}.values():
            stack.enter_context(_eval_mode(find_denoiser(model)))
        turn = stack.enter_context(_turns(real, quant, checked.stepper.offload))
        if checked.blocks is not None and isinstance(affiner, BlockwiseAffiner):
            calls = _denoiser_calls(real, samples, checked.blocks.timesteps, turn)
            affiner.blocks = fit_blocks(find_denoiser(real), find_denoiser(quant), calls, checked.blocks)
            stack.callback(hook_blocks(find_denoiser(quant), affiner.blocks))
        _Fit(affiner, checked, real, quant, turn).run(samples)
    return affiner


Turn = Callable[[str], None]


class _Lane:
    """One batch: the runs of both models on it, and the latents that both go on from."""

    def __init__(self, real: Run, quant: Run, free: Run | None) -> None:
        self.real, self.quant, self.free = real, quant, free
        self.latents: Any = None  # a tensor from the first step on

    def close(self) -> None:
        for run in (self.real, self.quant, self.free):
            if run is not None:
                run.close()


class _Fit:
    """The lock step: both models predict, the affiner observes and solves, both go on from the same latents."""

    def __init__(self, affiner: Any, config: AffinerConfig, real: Any, quant: Any, turn: Turn) -> None:
        self.affiner, self.config, self.stepper = affiner, config, config.stepper
        self.real, self.quant, self.turn = real, quant, turn
        self.ours = isinstance(affiner, BlockwiseAffiner)
        self.latents: AffineMaps | None = affiner.latents if self.ours else None
        self.uncond_half = 0

    def run(self, samples: Samples) -> None:
        if self.stepper.noise_target != "all":
            self.uncond_half = self._find_uncond_half(samples[0])
            if hasattr(self.affiner, "uncond_half"):
                self.affiner.uncond_half = self.uncond_half
        together = self.stepper.recurrent or self.stepper.offload is not None
        seen: list[float] = []
        with tqdm(desc="fitting the affiner", unit="call") as progress:
            for group in [samples] if together else [[sample] for sample in samples]:
                lanes = [self._lane(sample) for sample in group]
                try:
                    for timestep in self._lock_step(lanes, progress, len(samples)):
                        seen += [] if timestep in seen else [timestep]
                finally:
                    for lane in lanes:
                        lane.close()
        if not self.stepper.recurrent:
            for timestep in seen:
                self.affiner.solve(timestep)

    def _lane(self, sample: dict[str, Any]) -> _Lane:
        at_denoiser = self.stepper.noise_target != "all"
        finish = partial(run_step, self.affiner) if self.stepper.recurrent else None
        return _Lane(
            Run(self.real, seeded_call(sample), at_denoiser=at_denoiser),
            Run(self.quant, self._converted(seeded_call(sample)), at_denoiser=at_denoiser, finish=finish),
            None if self.latents is None else Run(self.real, seeded_call(sample)),
        )

    def _converted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments for the quantized model, where it computes in another dtype than the real one."""
        own, other = (float_dtype(find_denoiser(pipeline)) for pipeline in (self.real, self.quant))
        return {k: v.to(other) if isinstance(v, Tensor) and v.dtype == own else v for k, v in arguments.items()}

    def _lock_step(self, lanes: list[_Lane], progress: Any, count: int) -> Iterator[float]:
        """Leads the lanes through their runs, yielding the timestep after each step."""
        while True:
            self.turn("real")
            reals = [lane.real.resume(lane.latents) for lane in lanes]
            frees = [_free_step(lane.free) for lane in lanes]
            self.turn("quant")
            quants = [lane.quant.resume(lane.latents) for lane in lanes]
            if not any(reals) and not any(quants):
                return
            pairs = [_checked(r, q, i) for i, (r, q) in enumerate(zip(reals, quants, strict=True))]
            timestep = pairs[0][0].timestep
            if self.ours:
                _check_layout(pairs[0][0].value, find_denoiser(self.real))
            for r, q in pairs:
                if r.timestep != timestep:
                    raise ValueError(
                        f"samples of one dataset must run the same timesteps; got {timestep}, {r.timestep}"
                    )
                self.affiner.observe(timestep, self._target(r), self._target(q))
            if self.stepper.recurrent:
                self.affiner.solve(timestep)
            for lane, (r, q) in zip(lanes, pairs, strict=True):
                ahead = _advance(lane.real, r.value)
                corrected = _advance(lane.quant, self._corrected(q))
                lane.latents = corrected.value if self.stepper.recurrent else ahead.value
                if progress.total is None and lane.quant.timesteps:
                    self._check_enabled(lane.quant.timesteps)
                    progress.total = len(lane.quant.timesteps) * count
                progress.update()
            if self.latents is not None:
                self._align_latents(lanes, frees)
            yield timestep

    def _align_latents(self, lanes: list[_Lane], frees: list[Event | None]) -> None:
        assert self.latents is not None
        pairs = [(lane, free) for lane, free in zip(lanes, frees, strict=True) if free is not None]
        timestep = pairs[0][1].timestep
        for lane, free in pairs:
            self.latents.observe(timestep, free.value, lane.latents)
        self.latents.solve(timestep)
        for lane, _ in pairs:
            lane.latents = self.latents.apply(timestep, lane.latents)

    def _check_enabled(self, timesteps: list[float]) -> None:
        number, last = max(self.stepper.enable_timesteps or (0,)), len(set(timesteps)) - 1
        if number > last:
            raise ValueError(f"stepper.enable_timesteps has step {number}, but the last step of these runs is {last}")

    def _target(self, event: Event) -> Tensor:
        """The part of an event's tensor that is fitted: one half of the guidance batch, without a learned variance."""
        value = event.value
        if event.sample is not None:
            return value[:, : event.sample.shape[1]] if value.dim() == 4 else value
        channels = getattr(getattr(find_denoiser(self.real), "config", None), "in_channels", None)
        value = value[half(value, self.stepper.noise_target, self.uncond_half)]
        return value[:, :channels] if value.dim() == 4 and value.shape[1] == 2 * (channels or 0) else value

    def _corrected(self, event: Event) -> Tensor:
        """What the quantized run goes on with."""
        if not self.stepper.recurrent:
            return event.value
        if self.stepper.noise_target == "all":
            return self.affiner.correct(event.timestep, event.value)
        where = half(event.value, self.stepper.noise_target, self.uncond_half)
        return corrected_half(event.value, where, lambda x: self.affiner.correct(event.timestep, x))

    def _find_uncond_half(self, sample: dict[str, Any]) -> int:
        """Which half of the guidance batch is unconditional, read off what the pipeline makes of the two.

        Guidance is `u + w (c - u)`, by many pipelines rescaled sample by sample. Written as
        `s (first + v (second - first))`, v = w > 1 where the first half is the unconditional one, and v = 1 - w < 0
        where it is the second.
        """
        self.turn("real")
        run = Run(self.real, seeded_call(sample), at_denoiser=True)
        try:
            behind = run.resume()
            guided = run.resume() if behind is not None else None
            if behind is None or guided is None or guided.sample is None:
                raise ValueError(f"{type(self.real).__name__} never called its denoiser")
            if guided.kind != "predicted" or len(behind.value) != 2 * len(guided.sample):
                raise ValueError(NEEDS_CFG.format(len(behind.value), len(guided.sample)))
            channels = guided.value.shape[1]
            halves = torch.stack([x[0, :channels].double().flatten() for x in behind.value.chunk(2)], 1)
            shares = torch.linalg.lstsq(halves, guided.value[0].double().flatten()[:, None]).solution.flatten()
            v = float(shares[1] / shares.sum())
        finally:
            run.close()
        if not (v > 1 or v < 0):
            raise ValueError(
                f"cannot tell the unconditional half: the guided prediction goes as first + {v:.3f} (second - first); "
                "a guidance_scale above 1 is needed"
            )
        return 0 if v > 1 else 1


def _advance(run: Run, value: Tensor) -> Event:
    """Goes on with a prediction up to the latents after the step."""
    event = run.resume(value)
    while event is not None and event.kind == "predicted":
        event = run.resume()
    if event is None or event.kind != "stepped":
        raise ValueError('noise_target "uncond" and "text" need one denoiser call a step; this pipeline makes several')
    return event


def _free_step(run: Run | None) -> Event | None:
    """One step of the real model's own run, untouched."""
    return None if run is None or run.resume() is None else run.resume()


def _checked(real: Event | None, quant: Event | None, number: int) -> tuple[Event, Event]:
    """Both events, if they are of the same point and sound."""
    if real is None or quant is None or real.kind != quant.kind or real.timestep != quant.timestep:
        at = ["the end" if e is None else f"timestep {e.timestep:g}" for e in (real, quant)]
        raise ValueError(f"the pipelines do not run alike: the real one is at {at[0]}, the quantized one at {at[1]}")
    if real.value.shape != quant.value.shape:
        raise ValueError(
            f"the models differ: the real one predicts {list(real.value.shape)}, the quantized one "
            f"{list(quant.value.shape)}"
        )
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


def _check_layout(values: Tensor, denoiser: nn.Module) -> None:
    """Refuses latents whose channels are not where :func:`~hfquant.affiner.maps.to_grid` looks for them."""
    config = getattr(denoiser, "config", None)
    channels = {getattr(config, key, None) for key in ("in_channels", "out_channels")}
    match values.dim():
        case 5 if values.shape[2] in channels:
            raise ValueError(
                f"video latents must be [B, C, T, H, W]; {list(values.shape)} looks like [B, T, C, H, W] with "
                f"C={values.shape[2]}, which an affiner does not correct (if T is equal to C by chance, take another T)"
            )
        case 3 if values.shape[1] in channels and values.shape[2] not in channels:
            raise ValueError(
                f"latents of three dimensions must be packed tokens [B, L, C]; {list(values.shape)} looks like "
                f"[B, C, L] with C={values.shape[1]}, which an affiner does not correct"
            )


def _denoiser_calls(pipeline: Any, samples: Samples, count: int, turn: Turn) -> list[Call]:
    """Arguments of the real denoiser's calls at `count` evenly spread steps of each run, on the CPU."""
    from accelerate.utils import send_to_device

    turn("real")
    calls: list[Call] = []
    for sample in tqdm(samples, desc="recording denoiser calls"):
        held: list[Call] = []

        def keep(_: nn.Module, args: Any, kwargs: Any, held: list[Call] = held) -> None:
            held.append(send_to_device((args, kwargs), "cpu"))

        run = Run(pipeline, seeded_call(sample))
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


@contextmanager
def _eval_mode(denoiser: nn.Module) -> Iterator[None]:
    training = [module for module in denoiser.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _turns(real: Any, quant: Any, device: str | None) -> Iterator[Turn]:
    """A function that brings one of the models to `device` and sends the other to the CPU; nothing for None."""
    if device is None:
        yield lambda _: None
        return
    models = {
        name: model.transformer if isinstance(model, DenoisingLoop) else model
        for name, model in (("real", real), ("quant", quant))
    }
    homes = {name: next(find_denoiser(model).parameters()).device for name, model in models.items()}
    here = ""

    def turn(name: str) -> None:
        nonlocal here
        if name != here:
            models["quant" if name == "real" else "real"].to("cpu")
            models[name].to(device)
            here = name

    try:
        yield turn
    finally:
        for name, model in models.items():
            model.to(homes[name])
