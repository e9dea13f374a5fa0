"""Inputs of diffusers classes that use parameter names of their own: by class and parameter, a value or its maker.

The key ``layout`` sets the latent layout if it cannot be inferred. None leaves an optional parameter out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfquant.integrations.examples.diffusers_codecs import CODEC_EXCEPTIONS
from hfquant.integrations.examples.diffusers_rules import (
    FRAMES,
    PIXELS,
    SIDE,
    control_image,
    field_latents,
    latents,
    mask,
    ones,
    patches,
    side,
    text,
    time,
    wide,
    zeros,
)
from hfquant.integrations.examples.sketch import BATCH, TOKENS, Rule, Sketch, ids

GRID = SIDE * SIDE
VIDEO = FRAMES * GRID  # patches of a video


def _history(frames: int) -> Rule:
    """Return a rule for earlier frames, which FramePack takes at several resolutions."""
    return lambda s: latents(s)[:, :, :1].repeat(1, 1, frames, 1, 1) if s.field("has_clean_x_embedder") else None


def _sparse_control(s: Sketch) -> Tensor:
    """Return the condition for some frames of a clip: latents or pixels."""
    scale = 1 if s.field("use_simplified_condition_embedding") else 8
    return torch.zeros(BATCH, s.need("conditioning_channels"), FRAMES, scale * side(s), scale * side(s))


def _hunyuan_rope(s: Sketch) -> tuple[Tensor, Tensor]:
    return torch.ones(GRID, s.need("attention_head_dim")), torch.zeros(GRID, s.need("attention_head_dim"))


def _cogvideo_rope(s: Sketch) -> tuple[Tensor, Tensor] | None:
    if not s.field("use_rotary_positional_embeddings"):
        return None
    frames, _, _ = patches(s)
    tokens = GRID * max(FRAMES * frames // s.field("patch_size_t", default=1), 1)
    return torch.ones(tokens, s.need("attention_head_dim")), torch.zeros(tokens, s.need("attention_head_dim"))


def _cogvideo_latents(s: Sketch) -> Tensor:
    """Return a clip of the size that learned position embeddings are stored for, if the model has these."""
    clip = latents(s)
    if not s.field("use_learned_positional_embeddings"):
        return clip
    frames = (s.need("sample_frames") - 1) // s.need("temporal_compression_ratio") + 1
    return torch.zeros(BATCH, frames, s.need("in_channels"), s.need("sample_height"), s.need("sample_width"))


_HUNYUAN_DIT: dict[str, Any] = {
    "encoder_hidden_states": lambda s: text(s, s.need("cross_attention_dim"), s.need("text_len")),
    "text_embedding_mask": lambda s: torch.ones(BATCH, s.need("text_len")),
    "encoder_hidden_states_t5": lambda s: text(s, s.need("cross_attention_dim_t5"), s.need("text_len_t5")),
    "text_embedding_mask_t5": lambda s: torch.ones(BATCH, s.need("text_len_t5")),
    "image_meta_size": ones(BATCH, 6),
    "style": zeros(BATCH, dtype=torch.long),
    "image_rotary_emb": _hunyuan_rope,
    "controlnet_cond": latents,
}
_COGVIDEO: dict[str, Any] = {
    "layout": "frames first",
    "hidden_states": _cogvideo_latents,
    "encoder_hidden_states": lambda s: text(
        s, s.need("text_embed_dim"), s.field("max_text_seq_length", default=TOKENS)
    ),
    "image_rotary_emb": _cogvideo_rope,
    "ofs": lambda s: torch.ones(1) if s.field("ofs_embed_dim") else None,
}
_KANDINSKY: dict[str, Any] = {
    "layout": "channels last",
    "hidden_states": lambda s: latents(
        s, 2 * s.need("in_visual_dim") + 1 if s.field("visual_cond", default=True) else s.need("in_visual_dim")
    ),
}


def _positions(*sizes: int) -> tuple[Tensor, ...]:
    return tuple(torch.arange(n) for n in sizes)


def _pictures(s: Sketch, channels: int | None = None) -> list[Tensor]:
    """Return Z-Image's latents: a list of samples; the forward receives their patch sizes."""
    shape = (s.need("all_f_patch_size")[0], *[SIDE * s.need("all_patch_size")[0]] * 2)
    return [torch.zeros(channels or s.need("in_channels"), *shape) for _ in range(BATCH)]


def _embedded(s: Sketch, name: str) -> int:
    """Return the number of channels per patch of the first of several embedding linears."""
    patch = s.need("all_f_patch_size")[0] * s.need("all_patch_size")[0] ** 2
    first: Any = next(s.model.get_submodule(name).children())
    return int(first.in_features) // patch


def _class_conditions(s: Sketch) -> Any:
    """Return the timesteps that an AdaLayerNorm of Transformer2DModel looks up."""
    return torch.ones((), dtype=torch.long) if s.field("num_embeds_ada_norm") else None


def _transformer_2d(s: Sketch) -> Tensor:
    if s.field("num_vector_embeds"):
        return ids(s.need("num_vector_embeds"), BATCH, s.need("sample_size") ** 2)
    return latents(s)


_TRANSFORMER_2D: dict[str, Any] = {
    "layout": "image",
    "hidden_states": _transformer_2d,
    "encoder_hidden_states": wide("caption_channels", "cross_attention_dim"),
    "timestep": lambda s: torch.ones(BATCH, dtype=torch.long) if s.field("num_embeds_ada_norm") else None,
    "class_labels": lambda s: torch.zeros(BATCH, dtype=torch.long) if s.field("norm_type") == "ada_norm_zero" else None,
}


def _text_layers(s: Sketch) -> list[Tensor]:
    """Return Bria FIBO's text features, one tensor per block."""
    count = s.need("num_layers") + s.need("num_single_layers")
    return [torch.zeros(BATCH, TOKENS, s.need("text_encoder_dim")) for _ in range(count)]


def _llama_layers(s: Sketch) -> Tensor:
    """Return HiDream's language model features, one tensor for each layer that is used."""
    return torch.zeros(len(s.need("llama_layers")), BATCH, TOKENS, s.need("caption_channels")[1])


def _slots(s: Sketch) -> Tensor:
    """Return Qwen-Image 2.1's mask: text, then one slot for every four patches of the image."""
    return torch.arange(TOKENS + GRID // 4).expand(BATCH, -1) >= TOKENS


def _effnet(s: Sketch) -> Tensor | None:
    channels = s.field("effnet_in_channels")
    return torch.zeros(BATCH, channels, SIDE, SIDE) if channels else None


def _rope_of_heads(s: Sketch) -> tuple[Tensor, Tensor]:
    """Return LTX-2's rotary embedding: cosines and sines, per head if they are split."""
    heads, width = s.need("num_attention_heads"), s.need("attention_head_dim")
    split = s.field("rope_type", default="interleaved") == "split"
    ones = torch.ones(BATCH, heads, VIDEO, width // 2) if split else torch.ones(BATCH, VIDEO, heads * width)
    return ones, torch.zeros_like(ones)


def _motion_faces(s: Sketch) -> Tensor:
    size = s.need("motion_encoder_size")
    return torch.zeros(BATCH, 3, 1 + 4 * (FRAMES - 2), size, size)  # without the reference frame


def _lumina_rope(s: Sketch) -> Tensor:
    return torch.ones(16, 16, s.need("hidden_size") // s.need("num_attention_heads") // 2, dtype=torch.complex64)


def _unions(s: Sketch) -> Tensor:
    return torch.zeros(BATCH, s.need("num_control_type"))


def _micro(s: Sketch) -> Tensor:
    return torch.ones(BATCH, s.need("micro_cond_embed_dim") // s.need("micro_cond_encode_dim"))


_H3_AUDIO = 4  # audio tokens
_H3_LENGTH = TOKENS + VIDEO + _H3_AUDIO

EXCEPTIONS: dict[str, dict[str, Any]] = {
    **CODEC_EXCEPTIONS,
    "AnyFlowTransformer3DModel": {
        "layout": "frames first",
        "timestep": ones(BATCH, FRAMES),
        "r_timestep": ones(BATCH, FRAMES),
    },
    "BriaFibo2Transformer2DModel": {
        "encoder_hidden_states": lambda s: torch.zeros(
            BATCH, 1 + len(s.need("injection_layer_ids")), TOKENS, s.need("cap_feat_dim")
        )
    },
    "BriaFiboTransformer2DModel": {"text_encoder_layers": _text_layers},
    "CogVideoXTransformer3DModel": _COGVIDEO,
    "ConsisIDTransformer3DModel": _COGVIDEO,
    "ControlNetUnionModel": {
        "controlnet_cond": lambda s: [control_image(s)],
        "control_type": _unions,
        "control_type_idx": [0],
    },
    "CosmosControlNetModel": {
        "layout": "video",
        "controls_latents": field_latents("latent_channels"),
        "latents": lambda s: latents(s, s.need("latent_channels") - 2),
        "condition_mask": lambda s: latents(s, 1),
        "padding_mask": zeros(1, 1, PIXELS, PIXELS),
    },
    "CosmosTransformer3DModel": {"padding_mask": zeros(1, 1, PIXELS, PIXELS)},
    "EasyAnimateTransformer3DModel": {"encoder_hidden_states_t5": wide("text_embed_dim_t5")},
    "ErnieImageTransformer2DModel": {
        "text_bth": wide("text_in_dim"),
        "text_lens": lambda s: torch.full((BATCH,), TOKENS),
    },
    "GlmImageTransformer2DModel": {
        "prior_token_id": lambda s: ids(s.need("prior_vq_quantizer_codebook_size"), BATCH, GRID),
        "prior_token_drop": zeros(BATCH, GRID, dtype=torch.bool),
    },
    "HiDreamImageTransformer2DModel": {
        "layout": "image",
        "encoder_hidden_states_t5": lambda s: torch.zeros(BATCH, TOKENS, s.need("caption_channels")[0]),
        "encoder_hidden_states_llama3": _llama_layers,
        "img_ids": None,
    },
    "HunyuanDiT2DModel": _HUNYUAN_DIT,
    "HunyuanDiT2DControlNetModel": _HUNYUAN_DIT,
    "HunyuanVideoFramepackTransformer3DModel": {
        "indices_latents": lambda s: torch.arange(FRAMES),
        "latents_clean": _history(FRAMES),
        "indices_latents_clean": lambda s: torch.arange(FRAMES),
        "latents_history_2x": _history(2),
        "indices_latents_history_2x": lambda s: torch.arange(2),
        "latents_history_4x": _history(4),
        "indices_latents_history_4x": lambda s: torch.arange(4),
    },
    "I2VGenXLUNet": {
        "layout": "video",
        "fps": ones(BATCH),
        "image_latents": latents,
        "image_embeddings": wide("cross_attention_dim", tokens=None),
    },
    "Ideogram4Transformer2DModel": {
        "layout": "tokens",
        "position_ids": zeros(BATCH, TOKENS, 3, dtype=torch.long),
        "segment_ids": ones(BATCH, TOKENS, dtype=torch.long),
        "indicator": ones(BATCH, TOKENS, dtype=torch.long),
    },
    "JoyImageEditPlusTransformer3DModel": {
        "hidden_states": lambda s: torch.zeros(BATCH, GRID, s.need("in_channels"), *s.need("patch_size")),
        "shape_list": lambda s: [[(1, SIDE, SIDE)]] * BATCH,
    },
    "Kandinsky3UNet": {"encoder_attention_mask": mask},
    "Kandinsky5Transformer3DModel": _KANDINSKY
    | {
        "visual_rope_pos": lambda s: _positions(FRAMES, SIDE, SIDE),
        "text_rope_pos": lambda s: torch.arange(TOKENS),
    },
    "Kandinsky6Transformer3DModel": _KANDINSKY
    | {
        "visual_rope_pos": lambda s: _positions(FRAMES, SIDE, SIDE),
        "audio_hidden_states": wide("in_audio_dim"),
    },
    "Kandinsky6SRTransformer3DModel": {  # attention in blocks of 8 x 8 patches
        "hidden_states": lambda s: torch.zeros(BATCH, FRAMES, 8, 8, 2 * s.need("in_visual_dim") + 1),
    },
    "Krea2Transformer2DModel": {
        "layout": "packed",
        "encoder_hidden_states": lambda s: torch.zeros(
            BATCH, TOKENS, s.need("num_text_layers"), s.need("text_hidden_dim")
        ),
        "position_ids": zeros(TOKENS + GRID, 3, dtype=torch.long),
    },
    "LTX2VideoTransformer3DModel": {
        "audio_hidden_states": wide("audio_in_channels"),
        "audio_encoder_hidden_states": wide("caption_channels"),
        "audio_num_frames": TOKENS,
        "sigma": time,
    },
    "LatteTransformer3DModel": {  # its temporal position embedding is as long as the clip
        "hidden_states": lambda s: latents(s)[:, :, :1].repeat(1, 1, s.need("video_length"), 1, 1),
    },
    "LuminaNextDiT2DModel": {"image_rotary_emb": _lumina_rope, "cross_attention_kwargs": lambda s: {}},
    "MiniMaxH3Transformer3DModel": {
        "hidden_states": lambda s: torch.zeros(1, VIDEO, 4 * s.need("in_channels")),
        "audio_hidden_states": lambda s: torch.zeros(1, _H3_AUDIO, s.need("audio_in_channels")),
        "encoder_hidden_states": lambda s: torch.zeros(1, TOKENS, s.need("text_dim")),
        "timestep": ones(1),
        "timestep_indices": zeros(_H3_LENGTH, dtype=torch.long),
        "token_tags": zeros(_H3_LENGTH, dtype=torch.long),
        "position_ids": zeros(_H3_LENGTH, 3),
        "text_indices": lambda s: torch.arange(TOKENS),
        "video_indices": lambda s: torch.arange(TOKENS, TOKENS + VIDEO),
        "audio_indices": lambda s: torch.arange(TOKENS + VIDEO, _H3_LENGTH),
    },
    "OmniGenTransformer2DModel": {
        "input_img_latents": lambda s: [],
        "input_image_sizes": lambda s: {},
        "attention_mask": lambda s: torch.ones(BATCH, TOKENS + 1 + GRID, TOKENS + 1 + GRID),
        "position_ids": lambda s: torch.arange(TOKENS + 1 + GRID).expand(BATCH, -1),
    },
    "PriorTransformer": {
        "hidden_states": wide("embedding_dim", tokens=None),
        "proj_embedding": wide("embedding_proj_dim", "embedding_dim", tokens=None),
        "encoder_hidden_states": lambda s: (
            torch.zeros(BATCH, s.need("num_embeddings"), s.need("embedding_dim"))
            if s.field("encoder_hid_proj_type")
            else None
        ),
    },
    "QwenImage21Transformer2DModel": {"img_mask": _slots},
    "QwenImageTransformer2DModel": {
        "additional_t_cond": lambda s: zeros(BATCH, dtype=torch.long)(s) if s.field("use_additional_t_cond") else None
    },
    "SanaWMLTX2RefinerTransformer3DModel": {
        "layout": "tokens",
        "hidden_states": lambda s: torch.zeros(BATCH, VIDEO, s.need("in_channels")),
        "video_rotary_emb": _rope_of_heads,
    },
    "SanaWMTransformer3DModel": {
        "encoder_hidden_states": lambda s: torch.zeros(BATCH, 1, TOKENS, s.need("caption_channels")),
        "timestep": ones(BATCH, 1, FRAMES),
        "mask": mask,
    },
    "SparseControlNetModel": {
        "layout": "video",
        "controlnet_cond": _sparse_control,
        "encoder_hidden_states": lambda s: torch.zeros(BATCH * FRAMES, TOKENS, s.need("cross_attention_dim")),
        "conditioning_mask": lambda s: _sparse_control(s)[:, :1] if s.field("concat_conditioning_mask") else None,
    },
    "StableCascadeUNet": {
        "layout": "image",
        "timestep_ratio": time,
        "clip_text_pooled": wide("clip_text_pooled_in_channels", tokens=1),
        "clip_text": wide("clip_text_in_channels"),
        "clip_img": wide("clip_image_in_channels", tokens=1),
        "effnet": _effnet,
    },
    "Transformer2DModel": _TRANSFORMER_2D,
    "DreamLiteTransformer2DModel": _TRANSFORMER_2D,
    "TransformerTemporalModel": {
        "layout": "image",
        "hidden_states": lambda s: torch.zeros(BATCH * FRAMES, s.need("in_channels"), SIDE, SIDE),
        "num_frames": FRAMES,
        "encoder_hidden_states": lambda s: None,
        "timestep": _class_conditions,
    },
    "UNet1DModel": {
        "sample": lambda s: torch.zeros(BATCH, s.need("in_channels"), 16 * 2 ** len(s.need("block_out_channels")))
    },
    "UNet3DConditionModel": {"layout": "video"},
    "UNetMotionModel": {
        "layout": "video",
        "encoder_hidden_states": lambda s: torch.zeros(BATCH * FRAMES, TOKENS, s.need("cross_attention_dim")),
    },
    "UNetControlNetXSModel": {"sample": lambda s: latents(s, s.field("in_channels", default=4))},
    "UNetSpatioTemporalConditionModel": {
        "layout": "frames first",
        "encoder_hidden_states": wide("cross_attention_dim", tokens=1),
        "added_time_ids": lambda s: torch.ones(
            BATCH, s.need("projection_class_embeddings_input_dim") // s.need("addition_time_embed_dim")
        ),
    },
    "UVit2DModel": {
        "input_ids": lambda s: ids(s.need("vocab_size"), BATCH, side(s), side(s)),
        "encoder_hidden_states": wide("encoder_hidden_size"),
        "pooled_text_emb": wide("cond_embed_dim", tokens=None),
        "micro_conds": _micro,
    },
    "UniDiffuserModel": {
        "latent_image_embeds": lambda s: torch.zeros(
            BATCH, s.need("in_channels"), s.need("sample_size"), s.need("sample_size")
        ),
        "image_embeds": wide("clip_img_dim", tokens=1),
        "prompt_embeds": lambda s: torch.zeros(BATCH, s.need("num_text_tokens"), s.need("text_dim")),
        "timestep_img": time,
        "timestep_text": time,
    },
    "WanAnimateTransformer3DModel": {
        "pose_hidden_states": lambda s: latents(s, s.need("latent_channels"))[:, :, 1:],
        "face_pixel_values": _motion_faces,
    },
    "WanVACETransformer3DModel": {
        "control_hidden_states": field_latents("vace_in_channels"),
        "control_hidden_states_scale": lambda s: torch.ones(len(s.need("vace_layers"))),
    },
    "ZImageControlNetModel": {
        "x": lambda s: _pictures(s, _embedded(s, "all_x_embedder")),
        "cap_feats": lambda s: [torch.zeros(TOKENS, s.model.get_submodule("cap_embedder.1").in_features)] * BATCH,
        "control_context": lambda s: _pictures(s, s.need("control_in_dim")),
        "patch_size": lambda s: s.need("all_patch_size")[0],
        "f_patch_size": lambda s: s.need("all_f_patch_size")[0],
    },
    "ZImageTransformer2DModel": {
        "x": _pictures,
        "cap_feats": lambda s: [torch.zeros(TOKENS, s.need("cap_feat_dim")) for _ in range(BATCH)],
        "patch_size": lambda s: s.need("all_patch_size")[0],
        "f_patch_size": lambda s: s.need("all_f_patch_size")[0],
    },
}
