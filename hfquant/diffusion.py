"""A whole diffusion pipeline in one call: record what its parts see while it runs, then quantize them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hfquant.calibration import BaseSampler, UniformSampler, calibration_batches, generate_calibrate_set
from hfquant.integrations.config import HfQuantConfig
from hfquant.ptq import quantize

_DENOISERS = ("transformer", "unet", "prior", "decoder")


def quantize_pipeline(
    pipe: Any,
    data: Any,
    config: Any = None,
    components: Sequence[str] | None = None,
    *,
    sampler: BaseSampler | None = None,
    dump_path: str | os.PathLike[str] | None = None,
    batch_size: int = 1,
    **kwargs: Any,
) -> Any:
    """Quantize parts of a diffusion pipeline in place, on inputs recorded while it runs in full precision.

    Args:
        pipe: a diffusers pipeline.
        data: prompts or call arguments: a list of strings, a ``datasets`` object, a dict naming one (see
            :func:`~hfquant.calibration.calibration_batches`), or batches for the pipeline's call. May be None where
            the config needs no data.
        config: as for :func:`~hfquant.quantize`, the same for all components.
        components: names of the modules to quantize; default: the denoiser.
        sampler: which timesteps to keep; default: :class:`~hfquant.UniformSampler`.
        dump_path: folder to keep the recorded inputs in, a subfolder a component; default: in memory.
        batch_size: recorded calls a calibration batch.
        **kwargs: arguments of the pipeline's call (``num_inference_steps``, ``guidance_scale``, ...).

    Returns:
        ``pipe``. All inputs are recorded before anything is quantized, so bad data leaves it as it was.

    Raises:
        ValueError: a component that the pipeline does not have.
    """
    config = HfQuantConfig.of(config)
    names = list(components) if components is not None else [denoiser(pipe)]
    known = _modules(pipe)
    if not names or (unknown := [name for name in names if name not in known]):
        raise ValueError(f"components: {names and unknown} is not a module of {type(pipe).__name__}; it has {known}")
    loaders: dict[str, Any] = dict.fromkeys(names)
    if config.needs_data:
        batches = calibration_batches(data, batch_size=1)
        for name in names:
            folder = None if dump_path is None else Path(dump_path) / name
            seen = generate_calibrate_set(pipe, sampler or UniformSampler(), batches, name, folder, **kwargs)
            loaders[name] = seen.get_dataloader(batch_size=batch_size)
    for name, loader in loaders.items():
        quantize(pipe.components[name], loader, config)
    return pipe


def denoiser(pipe: Any) -> str:
    """Name of the component that a diffusers pipeline runs at each step.

    Raises:
        ValueError: none goes by a usual name.
    """
    modules = _modules(pipe)
    for name in _DENOISERS:
        if name in modules:
            return name
    raise ValueError(f"{type(pipe).__name__} has no {' or '.join(_DENOISERS)}; name one of its modules: {modules}")


def _modules(pipe: Any) -> list[str]:
    return [name for name, part in pipe.components.items() if isinstance(part, nn.Module)]
