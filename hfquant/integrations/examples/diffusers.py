"""Inputs of diffusers models, derived from parameter names, with exceptions for individual classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hfquant.integrations.examples.diffusers_exceptions import EXCEPTIONS
from hfquant.integrations.examples.diffusers_rules import CHANNELS, LAYOUTS, NEEDED_RULES, RULES, is_sequence
from hfquant.integrations.examples.sketch import BATCH, Sketch, UnknownInput, fixed

# Classes whose forward does not run on its own, and why.
REFUSED: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": "its forward without a cache needs compiled flex attention",
    "AutoencoderKLAllegro": "its forward only runs with tiling, on whole clips",
    "Cosmos3OmniTransformer": "it takes text, pictures and sound in one row, and where each token goes",
    "ControlNetXSAdapter": "it has no forward of its own",
    "RFD4ProteinaAutoencoder": "its inputs are a protein's residues and dozens of their features",
    "RFD4ProteinaTransformer": "its inputs are a protein's residues and dozens of their features",
    "WanAnimate2Transformer3DModel": "it only runs with a cache, which another forward fills",
    "MotionAdapter": "it has no forward of its own",
}


def candidates_of_diffusers(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield keyword arguments for ``model``, starting with the likeliest latent layout."""
    names = [c.__name__ for c in type(model).__mro__]
    if refused := next((REFUSED[n] for n in names if n in REFUSED), None):
        raise UnknownInput(refused)
    nets = getattr(model, "nets", None)
    if isinstance(nets, nn.ModuleList) and len(nets) and "controlnet_cond" in Sketch(model, {}).parameters:
        yield _of_several(model, nets)
        return
    exceptions = next((EXCEPTIONS[n] for n in names if n in EXCEPTIONS), {})
    first = exceptions.get("layout") or _layout(model)
    own = {name: value if callable(value) else fixed(value) for name, value in exceptions.items()}
    why = None
    found = False
    for layout in dict.fromkeys((first, *LAYOUTS)):
        try:
            made = Sketch(model, getattr(model, "config", {}), layout).fill(RULES | own, NEEDED_RULES)
        except UnknownInput as error:
            why = why or error
            continue
        found = True
        yield made
    if not found:
        raise why or UnknownInput("no layout")


def _of_several(model: nn.Module, nets: nn.ModuleList) -> dict[str, Any]:
    """Return inputs of a wrapper of several ControlNets: those of the first, as lists where each net gets its own."""
    accepted = Sketch(model, {}).parameters
    made = next(candidates_of_diffusers(nets[0]))
    made["conditioning_scale"] = 1.0
    if "controlnet_mode" in accepted:  # one number per sample here; the wrapper adds a dimension
        made["controlnet_mode"] = torch.zeros(BATCH, dtype=torch.long)
    for name in ("controlnet_cond", "controlnet_mode", "control_type", "control_type_idx", "conditioning_scale"):
        if name in made:
            made[name] = [made[name]] * len(nets)
    return {name: value for name, value in made.items() if name in accepted}


def _layout(model: nn.Module) -> str:
    """Return the likely latent layout of ``model``."""
    sketch = Sketch(model, getattr(model, "config", {}))
    accepted = set(sketch.parameters)
    if accepted & {"img_ids", "img_shapes"} or {"num_frames", "height", "width"} <= accepted:
        return "packed"
    name = type(model).__name__
    patch = sketch.field("patch_size")
    if "3D" in name or "Video" in name or sketch.field("patch_size_t") or (is_sequence(patch) and len(patch) == 3):
        return "video"
    channels = sketch.field(*CHANNELS)
    convolutions = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    fitting = [m for m in convolutions if m.in_channels == channels] or convolutions[:1]
    if fitting:
        return {1: "audio", 2: "image", 3: "video"}[len(fitting[0].kernel_size)]
    return "audio" if "1D" in name or "Audio" in name else "image"
