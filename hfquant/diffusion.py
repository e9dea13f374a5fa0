"""Quantize a whole diffusion pipeline in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hfquant.calibration import BaseSampler, UniformSampler, calibration_batches, generate_calibrate_set
from hfquant.calibration.self_made import SelfSpec
from hfquant.denoisers import denoiser_names, models_of, module_names, refuse_cached
from hfquant.integrations import quantize_model
from hfquant.integrations.config import HfQuantConfig
from hfquant.integrations.image_check import compare, picture
from hfquant.integrations.self_made_runs import own_calls, self_made_runs
from hfquant.run import Settings


def quantize_pipeline(
    pipe: Any,
    data: Any,
    config: Any = None,
    components: Sequence[str] | None = None,
    *,
    sampler: BaseSampler | None = None,
    dump_path: str | os.PathLike[str] | None = None,
    batch_size: int = 1,
    resume_dir: str | os.PathLike[str] | None = None,
    verbose: bool = False,
    **kwargs: Any,
) -> Any:
    """Quantize parts of a diffusion pipeline in place, calibrated on inputs recorded from full-precision runs.

    Args:
        pipe: A diffusers pipeline.
        data: Prompts or call arguments: a list of strings, a `datasets` object, a dict naming one (see
            :func:`~hfquant.calibration.calibration_batches`), or batches for the pipeline's call. None uses the
            config's `calibration`. If that is also None and the config needs data, or if either is "self", the pipeline
            runs on prompts, classes or images of its own.
        config: As for :func:`~hfquant.quantize`, the same for all components.
        components: Names of the modules to quantize; default: the denoisers. Other modules that run at each step, such
            as a ControlNet, can be recorded and quantized the same way, all of several or one ("controlnet.nets.0").
        sampler: Which timesteps to keep; default: :class:`~hfquant.UniformSampler`.
        dump_path: Folder for the recorded inputs, one subfolder per component; default: inside `resume_dir` if given,
            else memory, or the Hugging Face cache if the pipeline runs on prompts of its own.
        batch_size: Number of recorded calls per calibration batch.
        resume_dir: Folder that stores recorded inputs and solved layers, so that an interrupted run can resume.
        verbose: Log each layer's decision and error.
        **kwargs: Arguments of the pipeline's call (`num_inference_steps`, `guidance_scale`, ...).

    Returns:
        `pipe`. If anything fails, all components are left unchanged.

    If data is used and the config's `guard` is on, one image is generated before and after quantization, from equal
    noise. The log reports how close the two are, and warns if the second is far off, black, or has NaN.

    Raises:
        TypeError: `components` is a string.
        ValueError: The pipeline does not have a component named in `components`, or the config needs data and one of
            them is an autoencoder or has a cache enabled.
        CalibrationError: The pipeline cannot run on the given data, or on the data generated for it.
    """
    config = HfQuantConfig.of(config)
    if isinstance(components, str):
        raise TypeError(f"components: expected a list of names, got the string {components!r}")
    names = list(components) if components is not None else denoiser_names(pipe)
    known = module_names(pipe)
    parts = {name: models_of(pipe, name) for name in known}
    parts |= {full_name: {full_name: model} for held in list(parts.values()) for full_name, model in held.items()}
    if not names or (unknown := [name for name in names if name not in parts]):
        raise ValueError(f"components: {names and unknown} is not a module of {type(pipe).__name__}; it has {known}")
    models = {full_name: model for name in names for full_name, model in parts[name].items()}
    loaders: dict[str, Any] = dict.fromkeys(models)
    image = None
    if config.needs_data:
        if halves := [name for name, model in models.items() if hasattr(model, "encode") and hasattr(model, "decode")]:
            raise ValueError(
                f"{halves[0]}: pipelines call its encode and decode, whose inputs are not recorded: quantize it with a "
                "config that needs no data"
            )
        for name, model in models.items():
            refuse_cached(model, f"pipe.{name}", "calibrated")
        data = config.calibration if data is None else data
        spec = SelfSpec() if data is None else SelfSpec.of(data)
        kept = dump_path or (resume_dir and Path(resume_dir) / "inputs") or None
        if spec is not None:
            loaders |= self_made_runs(pipe, spec, list(models), sampler, kept, batch_size, kwargs, data is not None)
            first: Any = own_calls(pipe, 1, spec.seed, kwargs)[0]
        else:
            batches = calibration_batches(data, batch_size=1)
            for name in models:
                folder = None if kept is None else Path(kept) / name
                seen = generate_calibrate_set(pipe, sampler or UniformSampler(), batches, name, folder, **kwargs)
                loaders[name] = seen.get_dataloader(batch_size=batch_size)
            first = next(iter(batches))
        if config.guard:
            image = picture(pipe, first, kwargs)
    undone: list[Callable[[], None]] = []
    try:
        for name, loader in loaders.items():
            resume = None if resume_dir is None else Path(resume_dir) / name
            settings = Settings(config.per_layer_mode, verbose, resume_dir=resume, guard=config.guard)
            undone.append(quantize_model(models[name], loader, config, settings))
        if image is not None:
            compare(type(pipe).__name__, image, picture(pipe, first, kwargs))
    except BaseException:
        for undo in reversed(undone):
            undo()
        raise
    return pipe
