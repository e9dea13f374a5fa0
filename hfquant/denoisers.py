"""Facts about denoisers and the pipelines that run them, in one place.

Everything here works on any object that looks like a diffusers pipeline; diffusers itself is not imported.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

#: Names of the pipeline components that run at each step. Wan's second transformer handles the less noisy steps.
DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet", "prior", "decoder", "prior_prior")
#: The denoisers of combined pipelines that run in a loop of their own, with a scheduler of their own, before the main
#: loop.
_FIRST_LOOP = ("prior_prior",)
#: Attributes of components that only hold other models: several ControlNets, several T2I adapters.
_HELD = ("nets", "adapters")
#: Fields of pipelines' outputs that hold what was made, with what it is in words.
OUTPUTS = {
    **{"images": "images", "image": "images", "frames": "frames", "video": "frames", "videos": "frames"},
    "audios": "audio",
    **{"prediction": "predictions"},  # of depth or normals
    **{"image_embeds": "image embeddings", "image_embeddings": "image embeddings", "prompt_embeds": "text embeddings"},
}
#: Names of the timestep argument of denoisers' forward methods.
TIME_ARGUMENTS = ("timestep", "timesteps", "t", "timestep_ratio", "r")


def is_pipeline(model: Any) -> bool:
    """Return whether `model` is a pipeline: a callable with named components that is not itself a module."""
    return (
        not isinstance(model, nn.Module) and callable(model) and isinstance(getattr(model, "components", None), Mapping)
    )


def refuse_cached(model: Any, name: str, purpose: str) -> None:
    """Raise ValueError if a cache of diffusers is enabled on a denoiser, which skips layers or reuses their outputs.

    Args:
        model: The denoiser.
        name: What the message calls it.
        purpose: What it cannot be for this reason, as in "calibrated".
    """
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(
            f"{name}: its cache skips layers or reuses their outputs, so it cannot be {purpose}: call disable_cache() "
            "on it first, and enable_cache again afterwards"
        )


def modular_blocks(model: Any) -> Any:
    """Return the blocks of a modular pipeline (diffusers' ModularPipeline); None for anything else."""
    blocks = getattr(model, "blocks", None) if is_pipeline(model) else None
    return blocks if hasattr(blocks, "inputs") else None


def call_parameters(pipe: Any) -> dict[str, Parameter]:
    """Return the parameters of a pipeline's call by name; the first is what a lone argument is passed as.

    The call of a modular pipeline is `(state, output, **inputs)`: the inputs of its blocks come first, starting with
    the prompt if it has one. Those that it requires have no default.
    """
    own = dict(list(inspect.signature(type(pipe).__call__).parameters.items())[1:])  # without self
    blocks = modular_blocks(pipe)
    if blocks is None:
        return own
    inputs: dict[str, Parameter] = {}
    for item in sorted(blocks.inputs, key=lambda item: item.name != "prompt"):
        default = Parameter.empty if item.required and item.default is None else item.default
        for name in (item.name, item.kwargs_type):  # some are passed together, as a dict under the latter name
            if name is not None:
                inputs.setdefault(name, Parameter(name, Parameter.KEYWORD_ONLY, default=default))
    return inputs | {name: parameter for name, parameter in own.items() if parameter.kind is not Parameter.VAR_KEYWORD}


def denoiser_names(pipe: Any) -> list[str]:
    """Return the names of the components that a pipeline runs at each step of a loop, the main one first.

    Raises:
        ValueError: The pipeline has no module named in `DENOISERS`.
    """
    if names := [name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)]:
        return names
    known = module_names(pipe) if is_pipeline(pipe) else []
    hint = f"; name one of its modules: {', '.join(known)}" if known else ""
    raise ValueError(f"{type(pipe).__name__} has none of the denoisers {', '.join(DENOISERS)}{hint}")


def models_of(pipe: Any, name: str) -> dict[str, nn.Module]:
    """Return the component of that name, or the models it consists of (several ControlNets), by dotted name."""
    return models_in(pipe.components[name], name)


def models_in(component: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return a component by its name, or the models it consists of by dotted name."""
    for held in _HELD:
        several = getattr(component, held, None)
        if isinstance(several, nn.ModuleList):
            return {f"{name}.{held}.{i}": model for i, model in enumerate(several)}
    return {name: component}


def denoiser_name(pipe: Any) -> str:
    """Return the name of the main denoiser of a pipeline; see :func:`denoiser_names`."""
    return denoiser_names(pipe)[0]


def find_denoiser(model: Any) -> nn.Module:
    """Return the main denoiser of a pipeline; a module is returned as is."""
    return find_denoisers(model)[0]


def find_denoisers(model: Any) -> list[nn.Module]:
    """Return the denoisers in a pipeline's main loop, the main one first; a module is its own only denoiser.

    Raises:
        ValueError: The pipeline has none.
    """
    if isinstance(model, nn.Module):
        return [model]
    main, *others = denoiser_names(model)
    return [getattr(model, name) for name in (main, *(other for other in others if other not in _FIRST_LOOP))]


def uncompiled(denoiser: nn.Module) -> nn.Module:
    """Return the denoiser itself for what ``torch.compile`` made of it."""
    return getattr(denoiser, "_orig_mod", denoiser)


def time_reader(denoiser: nn.Module) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Any] | None:
    """Return a function that reads the timestep from a call's `(args, kwargs)`; None if the module takes none.

    The function returns None for a call without a timestep.
    """
    parameters = list(inspect.signature(uncompiled(denoiser).forward).parameters)
    name = next((name for name in TIME_ARGUMENTS if name in parameters), None)
    if name is None:
        return None
    position = parameters.index(name)

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return kwargs[name] if name in kwargs else args[position] if position < len(args) else None

    return read


def output_tensor(output: Any) -> Tensor:
    """Return the prediction in a denoiser's output: a tensor, or the first entry of a tuple or output object."""
    return output if isinstance(output, Tensor) else output[0]


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """Return the output with another prediction, which is its first entry, as in :func:`output_tensor`."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    changed = copy.copy(output)
    changed[next(iter(output.keys()))] = tensor
    return changed


def call_making(pipe: Any, *args: Any, **kwargs: Any) -> tuple[str, Any]:
    """Call a pipeline and return what it has made, in the words of `OUTPUTS`, and its value.

    If that is unknown, the first is "" and the second the whole output. What a modular pipeline makes is the first
    output of its last block.
    """
    blocks = modular_blocks(pipe)
    if blocks is None:
        output = pipe(*args, **kwargs)
        found = ((words, getattr(output, field, None)) for field, words in OUTPUTS.items())
        return next((item for item in found if item[1] is not None), ("", output))
    last = next(reversed(blocks.sub_blocks.values()), blocks)
    name = next((output.name for output in last.outputs), None)
    # Without a name, it returns everything that its blocks pass on.
    return OUTPUTS.get(name or "", ""), pipe(*args, **{**kwargs, "output": name})


def weights_device(module: nn.Module) -> torch.device:
    """Return the device of a module's first loaded parameter, or the CPU if there is none.

    Where accelerate offloads weights, this is not the device that the module runs on.
    """
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's first parameter in a common float type; codes of quantized layers do not count."""
    common = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return next((p.dtype for p in module.parameters() if p.dtype in common), torch.get_default_dtype())


@torch.no_grad()
def run_denoiser(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the prediction of one call, with its arguments moved to the denoiser's device."""
    from accelerate.utils import send_to_device

    args, kwargs = send_to_device((args, dict(kwargs)), weights_device(denoiser))
    return output_tensor(denoiser(*args, **kwargs))


def to_grid(latents: Tensor, frames_first: bool = False) -> Tensor:
    """Return latents of any layout as `[B, C, H, W]`.

    Video `[B, C, T, H, W]`, or `[B, T, C, H, W]` if `frames_first`: frames become samples. Packed tokens
    `[B, L, C]`: a square of side sqrt(L) if L is a square number, else a column of L pixels.

    Raises:
        ValueError: The latents have another number of dimensions.
    """
    match latents.dim():
        case 4:
            return latents
        case 5:
            return (latents if frames_first else latents.transpose(1, 2)).flatten(0, 1)
        case 3:
            side = math.isqrt(latents.shape[1])
            size = (side, side) if side * side == latents.shape[1] else (latents.shape[1], 1)
            return latents.transpose(1, 2).unflatten(2, size)
    raise ValueError(f"latents have 3, 4 or 5 dimensions, got shape {list(latents.shape)}")


def from_grid(grid: Tensor, like: Tensor, frames_first: bool = False) -> Tensor:
    """Return a grid in the layout of `like`, the latents that :func:`to_grid` was called with."""
    match like.dim():
        case 5:
            frames = grid.unflatten(0, (like.shape[0], -1))
            return frames if frames_first else frames.transpose(1, 2)
        case 3:
            return grid.flatten(2).transpose(1, 2)
    return grid


def has_frames_first(latents: Tensor, denoiser: nn.Module) -> bool:
    """Return whether latents are `[B, T, C, H, W]`, judging by the channels in the denoiser's config.

    Raises:
        ValueError: Channels and frames cannot be told apart by the config, or latents look like `[B, C, L]`.
    """
    config = getattr(denoiser, "config", None)
    channels = {getattr(config, key, None) for key in ("in_channels", "out_channels")}
    shape = list(latents.shape)
    if len(shape) == 5 and shape[1] in channels and shape[2] in channels:
        raise ValueError(
            f"video latents of shape {shape} may be [B, C, T, H, W] or [B, T, C, H, W]: take another number of frames"
        )
    if len(shape) == 3 and shape[1] in channels and shape[2] not in channels:
        raise ValueError(
            f"latents of three dimensions must be packed tokens [B, L, C]; {shape} looks like [B, C, L] with "
            f"C={shape[1]}, which is not supported"
        )
    return len(shape) == 5 and shape[2] in channels


def module_names(pipe: Any) -> list[str]:
    """Return the names of a pipeline's components that are modules."""
    return [name for name, part in pipe.components.items() if isinstance(part, nn.Module)]


def modules_of(model: Any) -> list[nn.Module]:
    """Return a pipeline's components that are modules; of anything else, what :func:`find_denoisers` returns."""
    return [model.components[name] for name in module_names(model)] if is_pipeline(model) else find_denoisers(model)
