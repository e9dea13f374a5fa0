"""Rules for the inputs of diffusers models: the parameter name tells what it is, config fields tell its width."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfquant.integrations.examples.sketch import BATCH, TOKENS, Rule, Sketch, UnknownInput, ids

PIXELS = 64  # along each side of an image
SIDE = 4  # patches along each side of an image
FRAMES = 2  # patches along the time axis

LAYOUTS = ("image", "video", "packed", "tokens", "audio", "frames first", "channels last")

CHANNELS = ("in_channels", "in_visual_dim", "in_dim", "io_channels", "latent_dim")
TEXT_WIDTHS = (
    "encoder_hid_dim",
    "caption_channels",
    "caption_channel",
    "text_embed_dim",
    "text_in_dim",
    "joint_attention_dim",
    "text_dim",
    "cap_feat_dim",
    "context_in_dim",
    "in_text_dim",
    "llm_features_dim",
    "text_hidden_dim",
    "dit_text_dim",
    "cross_attention_input_dim",
    "cond_token_dim",
    "encoder_hidden_size",
    "condition_dim",
    "cross_attention_dim",
)
POOLED_WIDTHS = ("pooled_projection_dim", "in_text_dim2", "text_emb_dim")
AXES = ("axes_dims_rope", "axes_dim_rope", "rope_axes_dim", "axes_dims")


def is_sequence(value: Any) -> bool:
    """Return whether a config field holds a list."""
    return isinstance(value, (list, tuple))


def patches(s: Sketch) -> tuple[int, int, int]:
    """Return the patch size in frames, rows and columns."""
    size = s.field("patch_size", default=1)
    if not is_sequence(size):
        return s.field("patch_size_t", default=1), size, size
    rows, columns = size[-2:] if len(size) > 1 else (size[0], size[0])
    return (size[0] if len(size) == 3 else s.field("patch_size_t", default=1)), rows, columns


def side(s: Sketch) -> int:
    """Return the number of patches along each side of an image: enough for a U-Net's resolution levels."""
    channels = s.field("block_out_channels", "down_block_out_channels", "channels")
    return max(SIDE, 2 ** len(channels)) if is_sequence(channels) else SIDE


def latents(s: Sketch, channels: int | None = None) -> Tensor:
    """Return zeros in the shape of the denoised latents."""
    channels = s.need(*CHANNELS) if channels is None else channels
    frames, rows, columns = patches(s)
    n = side(s)
    match s.layout:
        case "packed":
            return torch.zeros(BATCH, SIDE * SIDE, channels)
        case "tokens":
            return torch.zeros(BATCH, TOKENS, channels)
        case "audio":
            return torch.zeros(BATCH, channels, n * rows)
        case "video":
            return torch.zeros(BATCH, channels, FRAMES * frames, n * rows, n * columns)
        case "frames first":
            return torch.zeros(BATCH, FRAMES * frames, channels, n * rows, n * columns)
        case "channels last":
            return torch.zeros(BATCH, FRAMES * frames, n * rows, n * columns, channels)
        case _:
            return torch.zeros(BATCH, channels, n * rows, n * columns)


def sample(s: Sketch) -> Tensor:
    """Return zeros in the shape of a U-Net's latents or of an autoencoder's input: pixels or a waveform."""
    if not hasattr(s.model, "encode") or not hasattr(s.model, "decode"):
        return latents(s, s.need("in_channels") - 4 if s.field("addition_embed_type") == "image_hint" else None)
    channels = s.field(
        "in_channels",
        "input_channels",
        "num_channels",
        "audio_channels",
        "encoder_in_channels",
        default=1 if s.layout == "audio" else 3,
    )
    if s.layout == "audio":
        strides = s.field(
            "downsampling_ratios", "encoder_rates", "enc_strides", "encoder_strides", "strides", default=(2**10,)
        )
        return torch.zeros(BATCH, channels, 2 * s.field("patch_size", default=1) * math.prod(strides))
    levels = s.field(
        "block_out_channels", "encoder_block_out_channels", "down_block_out_channels", "ch_mult", "dim_mult", default=()
    )
    pixels = max(2 ** len(levels), s.field("spatial_compression_ratio", default=1)) * patches(s)[1]
    # Temporal compression can lose half a frame per level; the first frame is encoded on its own.
    frames = (1 + 2 * s.field("temporal_compression_ratio", default=4),) if s.layout == "video" else ()
    return torch.zeros(BATCH, channels, *frames, max(2 * pixels, 16), max(2 * pixels, 16))


def text(s: Sketch, width: int | None = None, tokens: int = TOKENS) -> Tensor:
    """Return zeros in the shape of a text encoder's output."""
    if width is None:
        found = s.need("crossattn_proj_in_channels") if s.field("use_crossattn_projection") else s.need(*TEXT_WIDTHS)
        width = found[0] if is_sequence(found) else found
    return torch.zeros(BATCH, tokens, width)


def pooled(s: Sketch) -> Tensor:
    """Return zeros in the shape of a pooled text embedding."""
    return torch.zeros(BATCH, s.need(*POOLED_WIDTHS))


def time(s: Sketch) -> Tensor:
    """Return one timestep per sample."""
    return torch.ones(BATCH)


def guidance(s: Sketch) -> Tensor | None:
    """Return one guidance scale per sample, for a model that takes it."""
    return torch.ones(BATCH) if s.field("guidance_embeds", "guidance_embed") else None


def positions(count: int) -> Rule:
    """Return a rule for the rotary positions of ``count`` tokens, shared by the batch."""
    return lambda s: torch.zeros(count, len(s.need(*AXES)))


def mask(s: Sketch) -> Tensor:
    """Return the mask of a text without padding."""
    return torch.ones(BATCH, TOKENS, dtype=torch.bool)


def grid(*size: int) -> Rule:
    """Return a rule for one patch grid per sample."""
    return lambda s: [[tuple(size)]] * BATCH


def pair(s: Sketch) -> Tensor:
    """Return two numbers per sample: a size or a corner."""
    return torch.ones(BATCH, 2)


def class_labels(s: Sketch) -> Tensor | None:
    """Return the class labels of a U-Net or DiT."""
    match s.field("class_embed_type"):
        case "projection" | "simple_projection":
            return torch.zeros(BATCH, s.need("projection_class_embeddings_input_dim"))
        case "identity":
            wide = s.field("time_embedding_dim") or 4 * s.need("block_out_channels")[0]
            return torch.zeros(BATCH, wide)
        case "timestep":
            return torch.ones(BATCH, dtype=torch.long)
    known = s.field("num_class_embeds") or s.field("norm_type") == "ada_norm_zero"
    return torch.zeros(BATCH, dtype=torch.long) if known else None


def added_conditions(s: Sketch) -> dict[str, Any] | None:
    """Return the dict of added conditions of U-Nets (SDXL, Kandinsky, ...) and PixArt."""
    if hasattr(s.model, "adaln_single"):
        used = getattr(s.model, "use_additional_conditions", False)
        sizes = {"resolution": torch.ones(BATCH, 2), "aspect_ratio": torch.ones(BATCH, 1)}
        return sizes if used else {"resolution": None, "aspect_ratio": None}
    made: dict[str, Any] = {}
    match s.field("addition_embed_type"):
        case "text_time":  # SDXL: pooled text, and six sizes embedded by addition_time_embed_dim each
            width = s.need("projection_class_embeddings_input_dim") - 6 * s.need("addition_time_embed_dim")
            made = {"text_embeds": torch.zeros(BATCH, width), "time_ids": torch.zeros(BATCH, 6)}
        case "text_image":
            width = s.need("cross_attention_dim")
            made = {"text_embeds": torch.zeros(BATCH, width), "image_embeds": torch.zeros(BATCH, width)}
        case "image":
            made = {"image_embeds": torch.zeros(BATCH, s.need("encoder_hid_dim"))}
        case "image_hint":  # a hint is concatenated to the latents, which have that many fewer channels
            hint = torch.zeros(BATCH, 3, 8 * side(s), 8 * side(s))
            made = {"image_embeds": torch.zeros(BATCH, s.need("encoder_hid_dim")), "hint": hint}
    match s.field("encoder_hid_dim_type"):
        case "text_image_proj":
            made["image_embeds"] = torch.zeros(BATCH, s.need("cross_attention_dim"))
        case "image_proj":
            made["image_embeds"] = torch.zeros(BATCH, s.need("encoder_hid_dim"))
    if getattr(s.config, "encoder_hid_dim_type", None) == "ip_image_proj":  # load_ip_adapter only sets the attribute
        adapters: Any = s.model.encoder_hid_proj
        made["image_embeds"] = [pictures(layer) for layer in adapters.image_projection_layers]
    return made or None


def pictures(projection: Any) -> Tensor:
    """Return the embeddings of one image per sample for an IP-Adapter of the first kind."""
    if not hasattr(projection, "image_embeds"):
        raise UnknownInput(f"the pictures of an IP-Adapter's {type(projection).__name__}")
    return torch.zeros(BATCH, 1, projection.image_embeds.in_features)


def time_condition(s: Sketch) -> Tensor | None:
    """Return the guidance scale embedding of distilled U-Nets."""
    width = s.field("time_cond_proj_dim")
    return torch.zeros(BATCH, width) if width else None


def control_image(s: Sketch) -> Tensor:
    """Return the condition of a ControlNet: an image for U-Nets, latents for transformers."""
    levels = s.field("conditioning_embedding_out_channels", "ctrl_conditioning_embedding_out_channels")
    if levels:
        scale = 2 ** (len(levels) - 1)
        channels = s.field("conditioning_channels", "ctrl_conditioning_channels", default=3)
        return torch.zeros(BATCH, channels, scale * side(s), scale * side(s))
    return latents(s)


def image_tokens(s: Sketch) -> Tensor | None:
    """Return an image encoder's output, for video models that start from an image."""
    width = s.field("image_dim", "image_embed_dim", "image_proj_dim")
    return torch.zeros(BATCH, s.field("pos_embed_seq_len", default=TOKENS), width) if width else None


def wide(*names: str, tokens: int | None = TOKENS) -> Callable[[Sketch], Tensor | None]:
    """Return a rule for features as wide as a config field says: ``tokens`` tokens, or one vector per sample.

    The rule omits the parameter if the config has none of ``names``.
    """

    def rule(s: Sketch) -> Tensor | None:
        width = s.field(*names)
        if width is None:
            return None
        return torch.zeros(BATCH, width) if tokens is None else torch.zeros(BATCH, tokens, width)

    return rule


def zeros(*shape: int, dtype: torch.dtype | None = None) -> Callable[[Sketch], Tensor]:
    """Return a rule for zeros of a fixed shape, in which one sample has shape ``shape[1:]``."""
    return lambda s: torch.zeros(shape, dtype=dtype)


def ones(*shape: int, dtype: torch.dtype | None = None) -> Callable[[Sketch], Tensor]:
    """Return a rule for ones of a fixed shape."""
    return lambda s: torch.ones(shape, dtype=dtype)


def field_latents(*names: str) -> Callable[[Sketch], Tensor]:
    """Return a rule for latents whose channel count is given by a config field."""
    return lambda s: latents(s, s.need(*names))


RULES: dict[str, Rule] = {
    "hidden_states": latents,
    "sample": sample,
    "latents": latents,
    "x": latents,
    "timestep": time,
    "timesteps": time,
    "t": time,
    "encoder_hidden_states": text,
    "pooled_projections": pooled,
    "pooled_embeds": pooled,
    "guidance": guidance,
    "img_ids": positions(SIDE * SIDE),
    "txt_ids": positions(TOKENS),
    "img_shapes": grid(1, SIDE, SIDE),
    "txt_seq_lens": lambda s: [TOKENS] * BATCH,
    "class_labels": class_labels,
    "added_cond_kwargs": added_conditions,
    "timestep_cond": time_condition,
    "controlnet_cond": control_image,
    "controlnet_mode": lambda s: torch.zeros(BATCH, 1, dtype=torch.long) if s.field("num_mode") else None,
    "encoder_hidden_states_image": image_tokens,
    "image_embeds": image_tokens,
    "timestep_r": lambda s: time(s) if s.field("use_meanflow") else None,
    "encoder_hidden_states_mask": mask,
    "encoder_hidden_states_2": lambda s: text(s, s.need("text_embed_2_dim")),
    "encoder_attention_mask_2": lambda s: mask(s) if s.field("text_embed_2_dim") else None,
    "num_frames": lambda s: 1,
    "height": lambda s: SIDE,
    "width": lambda s: SIDE,
}

# For parameters that are passed only if the forward has no default for them.
NEEDED_RULES: dict[str, Rule] = {
    "encoder_attention_mask": mask,
    "encoder_mask": mask,
    "attention_mask": mask,
    "original_size": pair,
    "target_size": pair,
    "crop_coords": pair,
    "r_timestep": time,
    "conditioning_scale": lambda s: 1.0,
    "input_ids": lambda s: ids(s.need("vocab_size"), BATCH, TOKENS),
}
