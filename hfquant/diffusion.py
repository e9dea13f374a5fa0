"""What is known of denoisers, in one place, and a whole diffusion pipeline quantized in one call.

Everything here works on any object that looks like a diffusers pipeline; diffusers itself is not imported.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hfquant.calibration import BaseSampler

#: Names of the pipeline components that run at each step. Wan's second transformer takes the less noisy steps.
DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet", "prior", "decoder")
#: Names that the forwards of denoisers give to the timestep.
TIME_ARGUMENTS = ("timestep", "timesteps", "t", "timestep_ratio", "r")


def is_pipeline(model: Any) -> bool:
    """Return whether `model` is a pipeline: something callable made of named components, and no module itself."""
    return (
        not isinstance(model, nn.Module) and callable(model) and isinstance(getattr(model, "components", None), Mapping)
    )


def denoiser_names(pipe: Any) -> list[str]:
    """Return the names of the components that a pipeline runs at each step, the main one first.

    Raises:
        ValueError: No module goes by one of the names in `DENOISERS`.
    """
    if names := [name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)]:
        return names
    known = _modules(pipe) if is_pipeline(pipe) else []
    hint = f"; name one of its modules: {', '.join(known)}" if known else ""
    raise ValueError(f"{type(pipe).__name__} has none of the denoisers {', '.join(DENOISERS)}{hint}")


def denoiser_name(pipe: Any) -> str:
    """Return the name of the main denoiser of a pipeline; see :func:`denoiser_names`."""
    return denoiser_names(pipe)[0]


def find_denoiser(model: Any) -> nn.Module:
    """Return the main denoiser of a pipeline; a module is its own."""
    return find_denoisers(model)[0]


def find_denoisers(model: Any) -> list[nn.Module]:
    """Return all denoisers of a pipeline, the main one first; a module is its own.

    Raises:
        ValueError: The pipeline has none.
    """
    return [model] if isinstance(model, nn.Module) else [getattr(model, name) for name in denoiser_names(model)]


def time_reader(denoiser: nn.Module) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Any] | None:
    """Return a function that picks the timestep from a call's `(args, kwargs)`; None where the module takes none.

    The function returns None for a call without a timestep.
    """
    plain = getattr(denoiser, "_orig_mod", denoiser)  # torch.compile hides the signature
    parameters = list(inspect.signature(plain.forward).parameters)
    name = next((name for name in TIME_ARGUMENTS if name in parameters), None)
    if name is None:
        return None
    position = parameters.index(name)

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return kwargs[name] if name in kwargs else args[position] if position < len(args) else None

    return read


def output_tensor(output: Any) -> Tensor:
    """Return the prediction in what a denoiser returned: a tensor, or the first entry of a tuple or output object."""
    return output if isinstance(output, Tensor) else output[0]


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """Return the same output with another prediction; the first entry stands for it, as in :func:`output_tensor`."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    changed = copy.copy(output)
    changed[next(iter(output.keys()))] = tensor
    return changed


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter that is loaded, the CPU without one."""
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's first parameter in a common float type; codes of quantized layers do not count."""
    common = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return next((p.dtype for p in module.parameters() if p.dtype in common), torch.get_default_dtype())


@torch.no_grad()
def run_denoiser(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the prediction of one call, its arguments brought to the denoiser's device."""
    from accelerate.utils import send_to_device

    args, kwargs = send_to_device((args, dict(kwargs)), device_of(denoiser))
    return output_tensor(denoiser(*args, **kwargs))


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Put a module, or all modules of a pipeline, into eval mode; afterwards each is in the mode it was in."""
    parts = [getattr(model, name) for name in _modules(model)] if is_pipeline(model) else find_denoisers(model)
    training = {module for part in parts for module in part.modules() if module.training}
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def to_grid(latents: Tensor) -> Tensor:
    """Return latents of any layout as `[B, C, H, W]`.

    Video `[B, C, T, H, W]`: frames become samples. Packed tokens `[B, L, C]`: a square of side sqrt(L) if L is a square
    number, else a column of L pixels.

    Raises:
        ValueError: Another number of dimensions.
    """
    match latents.dim():
        case 4:
            return latents
        case 5:
            return latents.transpose(1, 2).flatten(0, 1)
        case 3:
            side = math.isqrt(latents.shape[1])
            size = (side, side) if side * side == latents.shape[1] else (latents.shape[1], 1)
            return latents.transpose(1, 2).unflatten(2, size)
    raise ValueError(f"latents have 3, 4 or 5 dimensions, got shape {list(latents.shape)}")


def from_grid(grid: Tensor, like: Tensor) -> Tensor:
    """Return a grid in the layout of the latents that :func:`to_grid` was called with."""
    match like.dim():
        case 5:
            return grid.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
        case 3:
            return grid.flatten(2).transpose(1, 2)
    return grid


def check_layout(latents: Tensor, denoiser: nn.Module) -> None:
    """Check that latents have their channels where :func:`to_grid` looks for them, by what the denoiser's config says.

    Raises:
        ValueError: They look like `[B, T, C, H, W]` or `[B, C, L]`.
    """
    config = getattr(denoiser, "config", None)
    channels = {getattr(config, key, None) for key in ("in_channels", "out_channels")}
    shape = list(latents.shape)
    if len(shape) == 5 and shape[2] in channels:
        raise ValueError(
            f"video latents must be [B, C, T, H, W]; {shape} looks like [B, T, C, H, W] with C={shape[2]}, which is "
            "not supported (if T is equal to C by chance, take another T)"
        )
    if len(shape) == 3 and shape[1] in channels and shape[2] not in channels:
        raise ValueError(
            f"latents of three dimensions must be packed tokens [B, L, C]; {shape} looks like [B, C, L] with "
            f"C={shape[1]}, which is not supported"
        )


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
        pipe: A diffusers pipeline.
        data: Prompts or call arguments: a list of strings, a `datasets` object, a dict naming one (see
            :func:`~hfquant.calibration.calibration_batches`), or batches for the pipeline's call. May be None where
            the config needs no data.
        config: As for :func:`~hfquant.quantize`, the same for all components.
        components: Names of the modules to quantize; default: the denoisers.
        sampler: Which timesteps to keep; default: :class:`~hfquant.UniformSampler`.
        dump_path: Folder to keep the recorded inputs in, a subfolder a component; default: in memory.
        batch_size: Recorded calls a calibration batch.
        **kwargs: Arguments of the pipeline's call (`num_inference_steps`, `guidance_scale`, ...).

    Returns:
        `pipe`. If anything fails, all components are as they were.

    Raises:
        ValueError: A component that the pipeline does not have.
    """
    from hfquant import HfQuantConfig
    from hfquant.calibration import UniformSampler, calibration_batches, generate_calibrate_set
    from hfquant.integrations import quantize_model

    config = HfQuantConfig.of(config)
    names = list(components) if components is not None else denoiser_names(pipe)
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
    undone: list[Callable[[], None]] = []
    try:
        for name, loader in loaders.items():
            undone.append(quantize_model(pipe.components[name], loader, config))
    except BaseException:
        for undo in reversed(undone):
            undo()
        raise
    return pipe


def _modules(pipe: Any) -> list[str]:
    return [name for name, part in pipe.components.items() if isinstance(part, nn.Module)]
