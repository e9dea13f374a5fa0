"""Inputs of transformers models, derived from the parameter names of their forward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from hfquant.calibration.model_inputs import Codes, codes_of, text_config
from hfquant.integrations.examples.sketch import BATCH, TOKENS, Rule, Sketch, UnknownInput, fixed, ids

TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "decoder", "thinker_config")
VISION_CONFIGS = ("vision_config", "vision_encoder_config", "encoder", "backbone_config")
AUDIO_CONFIGS = ("audio_config", "audio_encoder_config", "encoder_config", "speech_encoder", "encoder")
IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id")
#: Mask of the places in a text that image features go to, for models without an image token (KOSMOS).
IMAGE_PLACES = "image_embeds_position_mask"
#: Inputs of models that read an episode of reinforcement learning.
EPISODE = ("states", "actions", "rewards", "returns_to_go", "timesteps")


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
    rules = _main_rules(model)
    s = Sketch(model, model.config)
    if "input_ids" not in s.parameters:
        return rules | {n: RULES[n] for n in ("bbox", *EPISODE)}
    rules["bbox"] = RULES["bbox"]
    two_towers = hasattr(model, "logit_scale") or (
        hasattr(model, "text_model")
        and (hasattr(model, "vision_model") or hasattr(model, "audio_model"))
        and _reads_apart(s)
    )
    if "pixel_values" in s.parameters and _has(s, VISION_CONFIGS):
        both = {"input_ids": _text_ids, "pixel_values": pixels}
        if two_towers:
            return rules | both | _patch_masks(s)
        main = getattr(model, "main_input_name", "")
        return rules | (both if main == "pixel_values" and _reads_apart(s) else _with_pictures(s))
    if two_towers:
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
    return {"pixel_attention_mask": _patch_mask, "spatial_shapes": _shapes}


def _with_pictures(s: Sketch) -> dict[str, Rule]:
    """Return the rules for a vision-language model's text with images in it, or none if these are unknown."""
    if "image_attention_mask" in s.parameters:  # IDEFICS: each token attends to images, which have a dimension
        seen = torch.ones(BATCH, TOKENS, 1, dtype=torch.long)
        return {
            "input_ids": _text_ids,
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
    vocabulary = _text(s).need("vocab_size")
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
    vision = _within(s, VISION_CONFIGS)
    size, patch = vision.field("image_size"), vision.field("patch_size")
    if not isinstance(size, int) or not isinstance(patch, int):
        return None
    known = s.field("num_query_tokens", "latent_query_num")
    return {"pixel_values": pixels(s)}, known or (size // patch) ** 2  # a guess


def _layouts(s: Sketch) -> Iterator[dict[str, Any]]:
    """Yield what a vision tower may take: patches of all images in one row, images, or images in tiles."""
    vision = _within(s, VISION_CONFIGS)
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
        more["qformer_input_ids"] = _qformer_ids(s)
    if "high_res_pixel_values" in s.parameters:
        more["high_res_pixel_values"] = pixels(_within(s, ("high_res_vision_config",)))
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


def _within(s: Sketch, names: tuple[str, ...]) -> Sketch:
    """Return a sketch of a part's config, or of the whole model if the parts have none of their own."""
    found = s.field(*names)
    return s if found is None or isinstance(found, (str, dict, list)) else Sketch(s.model, found)


def _has(s: Sketch, names: tuple[str, ...]) -> bool:
    return s.field(*names) is not None


def _text(s: Sketch) -> Sketch:
    if codes_of(s.model):
        return Sketch(s.model, text_config(s.model))
    part = _within(s, TEXT_CONFIGS)
    return _within(part, TEXT_CONFIGS)  # for example a thinker's text


def _text_ids(s: Sketch) -> Tensor:
    """Return token ids; each row ends with its only end-of-text token, which some classifiers look for."""
    # CANINE reads the code points of characters, and hashes each into one of these.
    vocabulary = s.field("vocab_size", "num_hash_buckets", default=_text(s).field("vocab_size"))
    if vocabulary is None:
        raise UnknownInput("its config has no vocab_size")
    codes = codes_of(s.model)
    if codes and codes.argument == "input_ids":
        return _code_ids(codes)
    made = ids(vocabulary, BATCH, TOKENS)
    end = s.field("eos_token_id", default=_text(s).field("eos_token_id"))
    if isinstance(end, int) and 0 <= end < vocabulary:
        made = torch.where(made == end, (end + 1) % vocabulary, made)
        made[:, -1] = end
    return made


def _decoder_ids(s: Sketch) -> Tensor | None:
    if not s.field("is_encoder_decoder"):
        return None
    if codes := codes_of(s.model):
        return _code_ids(codes)
    vocabulary = s.field("decoder_vocab_size", "vocab_size") or _within(s, ("decoder", "text_config")).need(
        "vocab_size"
    )
    return ids(vocabulary, BATCH, TOKENS)


def _code_ids(codes: Codes) -> Tensor:
    return codes.arranged(ids(codes.config.vocab_size, BATCH, codes.books, TOKENS))


def _size(vision: Sketch) -> tuple[int, int]:
    if ratios := vision.field("scaled_images_ratios"):  # DepthPro: scaled by the least, an image is one patch
        side = math.ceil(vision.need("patch_size") / min(ratios))
        return side, side
    size = vision.field("image_size", "input_size", "crop_size", default=224)  # convolutional backbones accept any size
    if isinstance(size, dict):
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else (size[-2], size[-1])


def pixels(s: Sketch) -> Tensor:
    """Return black images of the size that position embeddings are stored for; clips for a video model."""
    vision = _within(s, VISION_CONFIGS)
    channels = vision.field("num_channels", "in_channels", "in_chans", default=3)
    if "Siglip2" in type(vision.config).__name__:  # patches, with masks of existing ones
        return torch.zeros(BATCH, vision.need("num_patches"), channels * vision.need("patch_size") ** 2)
    frames = vision.field("num_frames", "frames_per_clip")
    clip = frames is not None and s.field("tubelet_size", "num_frames") is not None
    return torch.zeros(BATCH, *((frames,) if clip else ()), channels, *_size(vision))


def _qformer_ids(s: Sketch) -> Tensor:
    """Return token ids for a querying transformer (InstructBLIP)."""
    return ids(_within(s, ("qformer_config",)).need("vocab_size"), BATCH, TOKENS)


def _features(s: Sketch) -> Tensor:
    """Return log-mel features: channels first and full length for Whisper, else a few frames."""
    audio = _within(s, AUDIO_CONFIGS)
    bins = audio.field("num_mel_bins", "input_feat_per_channel", "feature_size", "mel_bins")
    if audio.field("spec_size") is not None:  # CLAP: a spectrogram image
        return torch.zeros(BATCH, 1, audio.need("spec_size"), bins or 64)
    if bins is None:
        bins = audio.need("feature_projection_input_dim", "input_channels")
    if width := audio.field("feature_projection_input_dim"):
        return torch.zeros(BATCH, 64, width)
    if audio.field("max_source_positions") and "input_feat_per_channel" not in _fields(audio):
        return torch.zeros(BATCH, bins, 2 * audio.need("max_source_positions"))
    return torch.zeros(BATCH, 64, bins)


def _fields(s: Sketch) -> set[str]:
    return set(s.config.to_dict()) if hasattr(s.config, "to_dict") else set()


def _waveform(s: Sketch) -> Tensor:
    """Return a short silence, or the inputs that spectrogram transformers and codecs take instead."""
    if (length := s.field("max_length")) and s.field("num_mel_bins") and s.field("patch_size"):
        return torch.zeros(BATCH, length, s.need("num_mel_bins"))
    channels = s.field("audio_channels")
    if hasattr(s.model, "encode") and hasattr(s.model, "decode"):
        return torch.zeros(BATCH, channels or 1, 4000)
    return torch.zeros(BATCH, 4000)


def _clips(s: Sketch) -> Tensor:
    """Return black clips, [batch, frames, channels, height, width]."""
    made = pixels(s)
    if made.dim() != 4:
        return made
    return made[:, None].repeat(1, _within(s, VISION_CONFIGS).field("num_frames", default=2), 1, 1, 1)


def _boxes(s: Sketch) -> Tensor:
    """Return boxes of words: indices, or with an encoder and a decoder (UDOP) shares of a page."""
    return torch.zeros(BATCH, TOKENS, 4, dtype=torch.float32 if s.field("is_encoder_decoder") else torch.long)


def _episode(size: str | None = None) -> Rule:
    """Return a rule for one vector per step of an episode, of the size in this config field, or for one number."""
    return lambda s: torch.zeros(BATCH, TOKENS, 1 if size is None else s.need(size))


def _steps(s: Sketch) -> Tensor:
    return ids(s.need("max_ep_len"), TOKENS).expand(BATCH, -1).clone()


def _past(s: Sketch) -> Tensor:
    """Return a series long enough for all lags of a time series model."""
    lags = s.field("lags_sequence", default=[0])
    shape = (BATCH, s.need("context_length") + max(lags))
    channels = s.field("num_input_channels", "input_size", default=1)
    return torch.zeros(*shape, channels) if channels != 1 or s.field("num_input_channels") else torch.zeros(shape)


def _time_features(s: Sketch) -> Tensor:
    return torch.zeros(BATCH, _past(s).shape[1], s.need("num_time_features"))


def _patch_mask(s: Sketch) -> Tensor:
    return torch.ones(pixels(s).shape[:2], dtype=torch.long)


def _shapes(s: Sketch) -> Tensor:
    side = int(_within(s, VISION_CONFIGS).need("num_patches") ** 0.5)
    return torch.tensor([[side, side]] * BATCH)


RULES: dict[str, Rule] = {
    "input_ids": _text_ids,
    "decoder_input_ids": _decoder_ids,
    "pixel_values": pixels,
    "pixel_values_videos": _clips,
    "input_features": _features,
    "input_values": _waveform,
    "bbox": _boxes,
    "past_values": _past,
    "states": _episode("state_dim"),
    "actions": _episode("act_dim"),
    "rewards": _episode(),
    "returns_to_go": _episode(),
    "timesteps": _steps,
}

NEEDED_RULES: dict[str, Rule] = RULES | {
    "attention_mask": lambda s: torch.ones(BATCH, TOKENS, dtype=torch.long),
    "qformer_input_ids": _qformer_ids,
    "pixel_attention_mask": _patch_mask,
    "spatial_shapes": _shapes,
    "past_time_features": _time_features,
    "past_observed_mask": lambda s: torch.ones_like(_past(s)),
    "bool_masked_pos": lambda s: None,
}
