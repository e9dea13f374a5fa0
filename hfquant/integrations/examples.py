"""Example inputs for models that come without: what a forward needs, derived from the config alone.

Pattern detection reads shapes, so the inputs are as small as the architecture allows and hold nothing meaningful. They
are real tensors (a few kilobytes) so that a forward which branches on numbers runs too.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2  # not 1: a batch of one cannot be told from a broadcast dimension
TOKENS = 8


def example_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Keyword arguments with which ``model`` can run forward.

    Known are transformers models whose main input is text, pixels or audio features (encoder-decoders and dual encoders
    too) and the denoisers of diffusers' common image and video pipelines.

    Args:
        model: any module; parameters may be on the meta device.

    Returns:
        Small tensors on the model's device (CPU for meta), floating ones in the model's dtype, or None where the
        inputs cannot be known from the config.
    """
    config = getattr(model, "config", None)
    libraries = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    if config is None or not libraries & {"transformers", "diffusers"}:
        return None
    try:
        made = _of_transformers(model, config) if "transformers" in libraries else _of_diffusers(model, config)
    except (AttributeError, KeyError, TypeError):  # a config without the fields its class should have
        return None
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    device = "cpu" if weight.is_meta else weight.device

    def place(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: place(v) for k, v in value.items()}
        if not isinstance(value, Tensor):
            return value
        return value.to(device, weight.dtype if value.is_floating_point() and weight.itemsize > 1 else value.dtype)

    return None if made is None else place(made)


def _ids(vocabulary: int, *shape: int) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(shape) % max(vocabulary, 1)


def _of_transformers(model: nn.Module, config: Any) -> dict[str, Any] | None:
    text = getattr(config, "text_config", None) or config
    vision = getattr(config, "vision_config", None) or config
    accepted = inspect.signature(model.forward).parameters

    def pixels() -> Tensor:
        size = getattr(vision, "image_size", 224)  # convolutional backbones take any size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return torch.zeros(BATCH, getattr(vision, "num_channels", 3), height, width)

    made: dict[str, Any]
    match getattr(model, "main_input_name", "input_ids"):
        case "input_ids":
            made = {"input_ids": _ids(text.vocab_size, BATCH, TOKENS)}
            if hasattr(model, "logit_scale") and "pixel_values" in accepted:  # CLIP and kin eat both
                made["pixel_values"] = pixels()
        case "pixel_values":
            made = {"pixel_values": pixels()}
        case "input_features":
            made = {"input_features": torch.zeros(BATCH, config.num_mel_bins, 2 * config.max_source_positions)}
        case "input_values":
            made = {"input_values": torch.zeros(BATCH, 4000)}
        case _:
            return None
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        vocabulary = getattr(config, "vocab_size", None) or config.decoder.vocab_size
        made["decoder_input_ids"] = _ids(vocabulary, BATCH, TOKENS)
    return made


def _of_diffusers(model: nn.Module, config: Any) -> dict[str, Any] | None:
    time = torch.ones(BATCH)

    def image(patch: int = 1, *frames: int) -> Tensor:
        return torch.zeros(BATCH, config["in_channels"], *frames, 4 * patch, 4 * patch)

    def text(width: int, tokens: int = TOKENS) -> Tensor:
        return torch.zeros(BATCH, tokens, width)

    match type(model).__name__:
        case "UNet2DModel":
            made = {"sample": _unet_sample(config), "timestep": time}
            if config["class_embed_type"] == "identity":
                made["class_labels"] = torch.zeros(BATCH, 4 * config["block_out_channels"][0])
            elif config["class_embed_type"] or config["num_class_embeds"]:
                made["class_labels"] = torch.ones(BATCH, dtype=torch.long)
            return made
        case "UNet2DConditionModel":
            return _unet_condition(config, time)
        case "DiTTransformer2DModel":
            labels = torch.zeros(BATCH, dtype=torch.long)
            return {"hidden_states": image(config["patch_size"]), "timestep": time, "class_labels": labels}
        case "PixArtTransformer2DModel":
            sizes = {"resolution": torch.ones(BATCH, 2), "aspect_ratio": torch.ones(BATCH, 1)}
            return {
                "hidden_states": image(config["patch_size"]),
                "encoder_hidden_states": text(config["caption_channels"]),
                "timestep": time,
                "added_cond_kwargs": sizes
                if model.use_additional_conditions
                else {"resolution": None, "aspect_ratio": None},
            }
        case "SanaTransformer2DModel":
            made = {
                "hidden_states": image(config["patch_size"]),
                "encoder_hidden_states": text(config["caption_channels"]),
                "timestep": time,
            }
            return made | ({"guidance": time} if config["guidance_embeds"] else {})
        case "SD3Transformer2DModel":
            return {
                "hidden_states": image(config["patch_size"]),
                "encoder_hidden_states": text(config["joint_attention_dim"]),
                "pooled_projections": torch.zeros(BATCH, config["pooled_projection_dim"]),
                "timestep": time,
            }
        case "FluxTransformer2DModel" | "ChromaTransformer2DModel" as name:
            axes = len(config["axes_dims_rope"])
            made = {
                "hidden_states": torch.zeros(BATCH, 16, config["in_channels"]),
                "encoder_hidden_states": text(config["joint_attention_dim"]),
                "timestep": time,
                "img_ids": torch.zeros(16, axes),
                "txt_ids": torch.zeros(TOKENS, axes),
            }
            if name.startswith("Flux"):
                made["pooled_projections"] = torch.zeros(BATCH, config["pooled_projection_dim"])
            return made | ({"guidance": time} if config.get("guidance_embeds") else {})
        case "AuraFlowTransformer2DModel":
            wide = text(config["joint_attention_dim"])
            return {"hidden_states": image(config["patch_size"]), "encoder_hidden_states": wide, "timestep": time}
        case "WanTransformer3DModel":
            made = {
                "hidden_states": image(config["patch_size"][1], config["patch_size"][0]),
                "encoder_hidden_states": text(config["text_dim"]),
                "timestep": time,
            }
            if config["image_dim"]:
                made["encoder_hidden_states_image"] = text(config["image_dim"], config["pos_embed_seq_len"] or 257)
            return made
        case _:
            return None


def _unet_sample(config: Any) -> Tensor:
    side = 2 ** max(3, len(config["block_out_channels"]))
    return torch.zeros(BATCH, config["in_channels"], side, side)


def _unet_condition(config: Any, time: Tensor) -> dict[str, Any] | None:
    width = config["encoder_hid_dim"] or config["cross_attention_dim"]
    if config["encoder_hid_dim_type"] not in (None, "text_proj") or not isinstance(width, int):
        return None
    made: dict[str, Any] = {
        "sample": _unet_sample(config),
        "timestep": time,
        "encoder_hidden_states": torch.zeros(BATCH, TOKENS, width),
    }
    match config["class_embed_type"]:
        case None | "timestep":
            if config["num_class_embeds"] or config["class_embed_type"]:
                made["class_labels"] = torch.ones(BATCH, dtype=torch.long)
        case "projection" | "simple_projection":
            made["class_labels"] = torch.zeros(BATCH, config["projection_class_embeddings_input_dim"])
        case "identity":
            made["class_labels"] = torch.zeros(
                BATCH, config["time_embedding_dim"] or 4 * config["block_out_channels"][0]
            )
    match config["addition_embed_type"]:
        case None | "text":
            pass
        case "text_time":  # SDXL: pooled text, and six sizes embedded by addition_time_embed_dim each
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            made["added_cond_kwargs"] = {"text_embeds": torch.zeros(BATCH, pooled), "time_ids": torch.zeros(BATCH, 6)}
        case _:
            return None
    return made
