"""Self-generated calibration data of diffusers pipelines: runs on built-in prompts, classes and images.

The inputs that a pipeline needs are derived from its call's parameters. This module imports nothing from diffusers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfquant.calibration import BaseCalibSet, BaseSampler, UniformSampler, generate_calibrate_set
from hfquant.calibration.batches import CalibrationError
from hfquant.calibration.provenance import provenance
from hfquant.calibration.recorder import find_layer
from hfquant.calibration.self_made import SelfMade, SelfSpec, generator, pink_noise
from hfquant.calibration.tensor_cache import folder
from hfquant.console import counted
from hfquant.denoisers import call_parameters, find_denoiser, models_of, modular_blocks
from hfquant.digests import digest_of

logger = logging.getLogger(__name__)

#: People, animals, places, things, drawings, lettering, in few words and many; and an empty prompt, as for guidance.
PROMPTS = (
    "a photograph of an old fisherman mending a net on a stone pier, morning light",
    "two cats asleep on a red sofa",
    "",
    "a city street at night in the rain, neon signs reflected in puddles, people with umbrellas, wide angle",
    "an oil painting of mountains above a lake",
    "a plate of pasta with basil, seen from above",
    'a wooden sign that says "open"',
    "a simple line drawing of a bicycle on white paper",
)
#: Maximum steps per run unless the caller sets them: timesteps are sampled evenly, so more steps add little.
STEPS = 20
#: Calls recorded from one more run, for checking the result.
CHECKS = 2
#: Arguments of pipelines' calls that are images, or lists of frames.
PICTURE_ARGUMENTS = ("image", "control_image", "mask_image", "original_image", "example_image", "reference_image")
VIDEO_ARGUMENTS = ("video", "conditioning_frames", "control_video", "pose_video", "face_video")
#: Frames of a video if the pipeline does not say: video autoencoders take 4 k + 1 or 8 k + 1.
FRAMES = 9
_CLASSES = ("class_labels", "class_label")


def own_calls(pipe: Any, count: int, seed: int, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return arguments for runs of a pipeline, in addition to those given for every run."""
    parameters, is_modular = call_parameters(pipe), modular_blocks(pipe) is not None
    calls: list[dict[str, Any]] = []
    for i in range(count):
        call: dict[str, Any] = {}
        if "prompt" in parameters:
            call["prompt"] = PROMPTS[i % len(PROMPTS)]
        for name in _CLASSES:
            if name in parameters:
                call[name] = [i % _classes(pipe)]
        if parameters.get("num_inference_steps") is not None:
            default = parameters["num_inference_steps"].default
            call["num_inference_steps"] = min(default, STEPS) if isinstance(default, int) else STEPS
        for name in PICTURE_ARGUMENTS:
            if _is_made(name, parameters, is_modular):
                nets = _nets(pipe, name, parameters)
                picture = _picture(pipe, given, generator(seed, i))
                call[name] = picture if nets is None else [picture] * nets
        for name in VIDEO_ARGUMENTS:
            if _is_made(name, parameters, is_modular):
                call[name] = _video(pipe, given, generator(seed, i), _frames(parameters, given))
        calls.append({name: value for name, value in call.items() if name not in given})
    return calls


def _is_made(name: str, parameters: Mapping[str, Parameter], is_modular: bool) -> bool:
    """Return whether calls have an argument that is an image or a video."""
    if name not in parameters or parameters[name].default is Parameter.empty:
        return name in parameters
    # With an image that it can do without, a modular pipeline runs other blocks, which may lack their models. A
    # pipeline that can choose the number of frames can do without a video.
    return not is_modular and (name != "video" or "num_frames" not in parameters)


def _nets(pipe: Any, name: str, parameters: Mapping[str, Parameter]) -> int | None:
    """Return how many images an argument lists, one for each of several ControlNets or adapters; None if it is one."""
    if name != ("control_image" if "control_image" in parameters else "image"):
        return None
    for part in ("controlnet", "adapter"):
        if isinstance(pipe.components.get(part), nn.Module) and part not in (models := models_of(pipe, part)):
            return len(models)
    return None


def _frames(parameters: Mapping[str, Parameter], given: Mapping[str, Any]) -> int:
    if "controlnet_frame_indices" in parameters:  # SparseControlNet: those that are given
        return len(given.get("controlnet_frame_indices", parameters["controlnet_frame_indices"].default))
    default = parameters["num_frames"].default if "num_frames" in parameters else None
    count = given.get("num_frames", default)
    return count if isinstance(count, int) else FRAMES


def _classes(pipe: Any) -> int:
    config: Any = find_denoiser(pipe).config
    names = ("num_embeds_ada_norm", "num_class_embeds", "num_classes")
    return next((n for name in names if (n := getattr(config, name, None))), 1)


def _picture(pipe: Any, given: Mapping[str, Any], source: torch.Generator) -> Any:
    from PIL import Image

    size = getattr(find_denoiser(pipe).config, "sample_size", None)
    size = 8 if size is None else size if isinstance(size, int) else size[-1]
    side = int(getattr(pipe, "vae_scale_factor", 1) * size)
    height, width = (int(given.get(name) or side) for name in ("height", "width"))
    levels = (128 + 64 * pink_noise((3, height, width), 2, source)).clamp(0, 255).byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def _video(pipe: Any, given: Mapping[str, Any], source: torch.Generator, count: int) -> list[Any]:
    """Return frames of a picture that moves by a pixel per frame."""
    from PIL import ImageChops

    picture = _picture(pipe, given, source)
    return [ImageChops.offset(picture, i, 0) for i in range(count)]


def self_made_runs(
    pipe: Any,
    spec: SelfSpec,
    names: Sequence[str],
    sampler: BaseSampler | None,
    dump_path: str | os.PathLike[str] | None,
    batch_size: int,
    arguments: Mapping[str, Any],
    asked: bool,
) -> dict[str, SelfMade]:
    """Run a pipeline on generated inputs and return the recorded inputs of some of its components.

    Args:
        pipe: the pipeline in full precision.
        spec: what to generate; `samples` is the number of runs.
        names: names of the components, or of models within them (dotted).
        sampler: chooses the timesteps to keep; default: :class:`~hfquant.UniformSampler` with the spec's seed.
        dump_path: folder for the recorded inputs; default: a folder below the Hugging Face cache's home.
        batch_size: recorded calls per batch.
        arguments: arguments of every run.
        asked: True if the user requested it, False if the user gave no data.

    Raises:
        CalibrationError: the pipeline cannot run on the generated inputs.
    """
    spec = spec.settled(spec.samples or len(PROMPTS))
    assert spec.samples is not None
    given = arguments = dict(arguments)
    if "vae" in pipe.components and "vae" not in names and "output_type" in call_parameters(pipe):
        arguments = {"output_type": "latent", **given}  # the decoder is not recorded
    calls = own_calls(pipe, spec.samples + 1, spec.seed, arguments)
    _say(pipe, calls[:-1], names, arguments, asked)

    def made_for(name: str) -> SelfMade:
        chosen = sampler or UniformSampler(seed=spec.seed)
        seen = _recorded(pipe, chosen, calls[:-1], name, dump_path, arguments)
        other = generate_calibrate_set(pipe, UniformSampler(CHECKS, seed=spec.seed + 1), calls[-1:], name, **arguments)
        checks = [other[i] for i in range(min(CHECKS, len(other)))]
        return SelfMade(seen.get_dataloader(batch_size=batch_size), checks, spec)

    made = {}
    for name in names:
        try:
            try:
                made[name] = made_for(name)
            except Exception:
                if arguments == given:
                    raise
                arguments = given  # some pipelines return no latents (Marigold's) and refuse to run
                made[name] = made_for(name)
        except CalibrationError:
            raise  # no other data would help: nothing of the run can be recorded
        except Exception as error:
            raise CalibrationError(
                f"{type(pipe).__name__} cannot run on built-in inputs ({type(error).__name__}: {error}): pass "
                "prompts, call arguments or a dataset as data"
            ) from error
    return made


def _recorded(
    pipe: Any,
    sampler: BaseSampler,
    calls: Sequence[Mapping[str, Any]],
    name: str,
    dump_path: str | os.PathLike[str] | None,
    arguments: Mapping[str, Any],
) -> BaseCalibSet:
    """Record to a folder that the same pipeline, calls and versions find again, or in memory if it is not usable."""
    if dump_path is not None:
        return generate_calibrate_set(pipe, sampler, calls, name, Path(dump_path) / name, **arguments)
    origin = provenance(pipe, find_layer(pipe, name), sampler, arguments, (0, 1))
    blocks = modular_blocks(pipe)
    place = folder() / digest_of(origin, list(calls), *([] if blocks is None else [_class_names(blocks)]))
    try:
        return generate_calibrate_set(pipe, sampler, calls, name, place, **arguments)
    except (OSError, RuntimeError) as error:  # a read-only home, a full disk, or another process is writing
        if os.access(place, os.W_OK) and "another process" not in str(error):
            raise
        logger.info("recorded inputs could not be cached: %s", error)
        return generate_calibrate_set(pipe, sampler, calls, name, **arguments)


def _class_names(blocks: Any) -> list[Any]:
    """Return the class of a modular pipeline's blocks and, nested, those of the blocks that they consist of."""
    return [type(blocks).__qualname__, *map(_class_names, blocks.sub_blocks.values())]


def _say(
    pipe: Any, calls: Sequence[Mapping[str, Any]], names: Sequence[str], arguments: Mapping[str, Any], asked: bool
) -> None:
    why = "data='self'" if asked else "no calibration data was given"
    yours = "" if asked else "; to use your own, pass prompts, call arguments or a dataset"
    steps = arguments.get("num_inference_steps", calls[0].get("num_inference_steps"))
    runs = counted(len(calls), "run") + (f" of {counted(steps, 'step')}" if steps else "")
    level = logging.INFO if asked else logging.WARNING
    logger.log(
        level,
        "%s: %s, so %s calibrated on %s that the pipeline generates for each component, plus one to check the result, "
        "unless cached%s",
        type(pipe).__name__,
        why,
        " and ".join(names) + (" is" if len(names) == 1 else " are"),
        runs,
        yours,
    )
