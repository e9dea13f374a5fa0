"""Inputs of transformers models: which of their forward's parameters go together, and texts with images in them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn

from hfquant.integrations.examples.sketch import BATCH, TOKENS, Rule, Sketch, UnknownInput, fixed
from hfquant.integrations.examples.transformers_rules import (
    BESIDE,
    NEEDED_RULES,
    RULES,
    VISION_CONFIGS,
    pixels,
    text_part,
    within,
)

IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id")
#: Mask of the places in a text that image features go to, for models without an image token (KOSMOS).
IMAGE_PLACES = "image_embeds_position_mask"


def candidates_of_transformers(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield keyword arguments for ``model``: first for all of its inputs, then for its main input alone."""
    why: UnknownInput | None = None
    made: list[dict[str, Any]] = []
    for rules in (_all_rules(model), _main_rules(model)):
        try:
            made.append(Sketch(model, model.config).fill(rules, NEEDED_RULES))
        except UnknownInput as error:
            why = why or error
    made = [m for m in made if m]
    if not made:
        raise why or UnknownInput("no rule makes any parameter of its forward")
    yield made[0]
    if made[1:] and made[1].keys() != made[0].keys():
        yield made[1]


def _main_rules(model: nn.Module) -> dict[str, Rule]:
    """Return the rules for a model's main input and for its decoder's."""
    main = getattr(model, "main_input_name", "input_ids")
    return {n: rule for n, rule in RULES.items() if n == main or n.startswith("decoder_")}


def _all_rules(model: nn.Module) -> dict[str, Rule]:
    """Return the rules for a model's inputs in one forward: text, plus images or audio."""
    rules = _main_rules(model) | {name: RULES[name] for name in BESIDE}
    s = Sketch(model, model.config)
    if "input_ids" not in s.parameters:
        return rules
    two_towers = hasattr(model, "logit_scale") or (
        hasattr(model, "text_model")
        and (hasattr(model, "vision_model") or hasattr(model, "audio_model"))
        and _reads_apart(s)
    )
    if "pixel_values" in s.parameters and _has(s, VISION_CONFIGS):
        both = {name: RULES[name] for name in ("input_ids", "pixel_values")}
        if two_towers:
            return rules | both | _patch_masks(s)
        main = getattr(model, "main_input_name", "")
        return rules | (both if main == "pixel_values" and _reads_apart(s) else _with_pictures(s))
    # Each token goes with a stretch of audio (Voxtral Realtime).
    if two_towers or "encoder_inputs_embeds" in s.parameters:
        return rules | {n: r for n, r in RULES.items() if n in ("input_features", "input_values", "input_ids")}
    if "pixel_values" in s.parameters and s.field("image_size") and s.field("patch_size") and _reads_apart(s):
        return rules | {"pixel_values": pixels}  # ViLT
    return rules


def _reads_apart(s: Sketch) -> bool:
    """Return whether images go neither into a text, at its image tokens or marked places, nor into an encoder alone."""
    return _token(s) is None and IMAGE_PLACES not in s.parameters and not s.field("is_encoder_decoder")


def _patch_masks(s: Sketch) -> dict[str, Rule]:
    """Return the rules for the masks of existing patches, for a vision tower that takes patches."""
    if "spatial_shapes" not in s.parameters:
        return {}
    return {name: NEEDED_RULES[name] for name in ("pixel_attention_mask", "spatial_shapes")}


def _with_pictures(s: Sketch) -> dict[str, Rule]:
    """Return the rules for a vision-language model's text with images in it, or none if these are unknown."""
    if "image_attention_mask" in s.parameters:  # IDEFICS: each token attends to images, which have a dimension
        seen = torch.ones(BATCH, TOKENS, 1, dtype=torch.long)
        return {
            "input_ids": RULES["input_ids"],
            "pixel_values": lambda s: pixels(s)[:, None],
            "image_attention_mask": fixed(seen),
        }
    token = _token(s)
    if token is None and IMAGE_PLACES in s.parameters:
        token = 0
    if token is None or (made := _pictures(s)) is None:
        return {}
    pictures, count = made
    text = [t for t in range(TOKENS + 1) if t != token][:TOKENS]
    row = torch.tensor([*text[:4], *[token] * count, *text[4:]])
    vocabulary = text_part(s).need("vocab_size")
    if token >= vocabulary:
        return {}
    row = torch.where(row == token, row, row % vocabulary)
    input_ids = row.expand(BATCH, -1).clone()
    made_all = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pictures}
    places = input_ids == token
    marks = {"mm_token_type_ids": places.int(), "token_type_ids": places.long(), IMAGE_PLACES: places}
    made_all |= {name: mark for name, mark in marks.items() if name in s.parameters}
    return {name: fixed(value) for name, value in made_all.items()}


def _pictures(s: Sketch) -> tuple[dict[str, Any], int] | None:
    """Return the inputs of a vision tower, one image per sample, and the number of text tokens per image."""
    for pictures in _layouts(s):
        if count := _features_per_image(s.model, pictures):
            return pictures, count
    vision = within(s, VISION_CONFIGS)
    size, patch = vision.field("image_size"), vision.field("patch_size")
    if not isinstance(size, int) or not isinstance(patch, int):
        return None
    known = s.field("num_query_tokens", "latent_query_num")
    return {"pixel_values": pixels(s)}, known or (size // patch) ** 2  # a guess


def _layouts(s: Sketch) -> Iterator[dict[str, Any]]:
    """Yield what a vision tower may take: patches of all images in one row, images, or images in tiles."""
    vision = within(s, VISION_CONFIGS)
    if "image_grid_thw" in s.parameters:  # Qwen-VL and its kin
        merge = vision.field("spatial_merge_size", default=s.field("spatial_merge_size", default=2))
        side, patch = 2 * merge, vision.need("patch_size")
        frames = vision.field("temporal_patch_size", default=1)
        channels = vision.field("in_channels", "in_chans", "num_channels", default=3)
        grid: dict[str, Any] = {"image_grid_thw": torch.tensor([[1, side, side]] * BATCH)}
        if "image_merge_sizes" in s.parameters:
            grid["image_merge_sizes"] = torch.tensor([merge] * BATCH)
        count = BATCH * side * side
        yield {"pixel_values": torch.zeros(count, channels * frames * patch * patch), **grid}
        yield {"pixel_values": torch.zeros(count, channels, patch, patch), **grid}
        return
    if "image_position_ids" in s.parameters:  # Gemma 4: patches of each image, and where they are
        axis = torch.arange(2 * vision.field("pooling_kernel_size", default=1))
        places = torch.cartesian_prod(axis, axis).expand(BATCH, -1, -1).clone()
        patches = torch.zeros(*places.shape[:2], 3 * vision.need("patch_size") ** 2)
        yield {"pixel_values": patches, "image_position_ids": places}
    image, more = pixels(s), {name: rule(s) for name, rule in _patch_masks(s).items()}
    if "qformer_input_ids" in s.parameters:
        more["qformer_input_ids"] = NEEDED_RULES["qformer_input_ids"](s)
    if "high_res_pixel_values" in s.parameters:
        more["high_res_pixel_values"] = pixels(within(s, ("high_res_vision_config",)))
    yield {"pixel_values": image, **more}
    if "image_sizes" in s.parameters:
        more["image_sizes"] = torch.tensor([image.shape[-2:]] * BATCH)
        yield {"pixel_values": image, **more}
    tile = 1 + image[:, None]  # some classes take all-zero tiles for padding
    for tiles in (1, 2, 3):
        yield {"pixel_values": tile.repeat(1, tiles, 1, 1, 1), **more}
    if "pixel_attention_mask" in s.parameters:  # of tiles, in Granite Docling
        yield {"pixel_values": tile, "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool), **more}


class _VisionTower(nn.Module):
    """The part of a vision-language model that makes features of images; counts them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.count = model, 0

    def forward(self, **inputs: Any) -> None:
        made = self.model.get_image_features(**inputs)  # type: ignore[operator]
        made = getattr(made, "pooler_output", made)
        self.count = sum(t.numel() // t.shape[-1] for t in (made if isinstance(made, list | tuple) else [made]))


def _features_per_image(model: nn.Module, pictures: dict[str, Any]) -> int | None:
    """Return how many features a model makes of each image; None if it has no such method or does not take these."""
    from hfquant.dataflow.twin import PatternError, run_twin  # here, because tracing offers example inputs

    model = model if hasattr(model, "get_image_features") else getattr(model, "base_model", model)
    method: Any = getattr(model, "get_image_features", None)
    if method is None:
        return None
    known = inspect.signature(method).parameters
    all_known = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    given = {name: value for name, value in pictures.items() if all_known or name in known}
    for fake in (True, False):  # how many there are may depend on the values of grids and sizes
        try:
            run, _ = run_twin(_VisionTower(model), given, nullcontext, fakes=(fake,))
        except PatternError:
            continue
        count = cast(_VisionTower, run.enter_result).count
        return None if count % BATCH else count // BATCH
    return None


def _token(s: Sketch) -> int | None:
    token = s.field(*IMAGE_TOKENS)
    return token if isinstance(token, int) else None


def _has(s: Sketch, names: tuple[str, ...]) -> bool:
    return s.field(*names) is not None
