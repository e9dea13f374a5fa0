"""Small random models of the classes that recipes target: the published configs with other sizes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

PUBLISHED = Path(__file__).parent.parent / "published"

_FLUX = {"attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1, "in_channels": 8}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "vocab_size": 60,
    "decoder_start_token_id": 0,
}

#: Differences from the published config, by class.
TINY: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {
        **_FLUX,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": [4, 6, 6],
    },
    "Flux2Transformer2DModel": {
        **_FLUX,
        "joint_attention_dim": 24,
        "axes_dims_rope": [4, 4, 4, 4],
        "timestep_guidance_channels": 16,
    },
    "SD3Transformer2DModel": {
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
        "joint_attention_dim": 24,
        "num_attention_heads": 2,
        "num_layers": 2,
        "pooled_projection_dim": 20,
        "sample_size": 8,
        "pos_embed_max_size": 16,
        "in_channels": 4,
        "out_channels": 4,
    },
    "UNet2DConditionModel": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [2, 4, 4],
        "cross_attention_dim": 24,
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, 1, 2],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
        "sample_size": 8,
    },
    "PixArtTransformer2DModel": {
        "sample_size": 8,
        "num_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "cross_attention_dim": 24,
        "caption_channels": 20,
    },
    "SanaTransformer2DModel": {
        "attention_head_dim": 8,
        "caption_channels": 24,
        "cross_attention_dim": 32,
        "cross_attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "num_layers": 2,
        "sample_size": 8,
    },
    "QwenImageTransformer2DModel": {
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
        "in_channels": 16,
        "joint_attention_dim": 24,
        "num_attention_heads": 2,
        "num_layers": 2,
        "out_channels": 4,
    },
    "WanTransformer3DModel": {
        "attention_head_dim": 12,
        "ffn_dim": 40,
        "freq_dim": 16,
        "num_attention_heads": 2,
        "num_layers": 2,
        "text_dim": 24,
        "in_channels": 4,
        "out_channels": 4,
        "rope_max_seq_len": 32,
    },
    "ZImageTransformer2DModel": {
        "axes_dims": [4, 6, 6],
        "axes_lens": [64, 32, 32],
        "cap_feat_dim": 24,
        "dim": 32,
        "in_channels": 4,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 2,
        "n_refiner_layers": 1,
    },
    "LlamaForCausalLM": _GQA,
    "Qwen3ForCausalLM": _GQA,
    "Gemma2Model": {**_GQA, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "Gemma3ForConditionalGeneration": {
        "text_config": {**_GQA, "sliding_window": 8},
        "vision_config": {**_VISION, "image_size": 16, "patch_size": 4},
        "mm_tokens_per_image": 4,
        "image_token_index": 40,
        "boi_token_index": 41,
        "eoi_token_index": 42,
    },
    "Mistral3ForConditionalGeneration": {
        "text_config": _GQA,
        "vision_config": {**_VISION, "head_dim": 8, "image_size": 32},
        "image_token_index": 40,
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {**_GQA, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        "image_token_id": 40,
        "video_token_id": 41,
        "vision_start_token_id": 42,
        "vision_end_token_id": 43,
    },
    "MixtralForCausalLM": {**_GQA, "num_local_experts": 4},
    "Qwen3MoeForCausalLM": {**_GQA, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "BertForMaskedLM": _TEXT,
    "BertModel": _TEXT,
    "T5ForConditionalGeneration": _T5,
    "T5EncoderModel": _T5,
    "UMT5EncoderModel": _T5,
    "CLIPTextModel": _TEXT,
    "CLIPTextModelWithProjection": {**_TEXT, "projection_dim": 20},
    "WhisperForConditionalGeneration": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_mel_bins": 8,
        "vocab_size": 60,
        "max_source_positions": 16,
        "max_target_positions": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "SiglipModel": {"text_config": _TEXT, "vision_config": _VISION},
    "ViTForImageClassification": _VISION,
}


def published_config(model: str, component: str) -> dict[str, Any]:
    """Return the published config of a component; a model that is not part of a pipeline is called "model"."""
    folder = PUBLISHED / model.rpartition("/")[2]
    file = folder / "config.json" if component == "model" else folder / component / "config.json"
    return json.loads(file.read_text(encoding="utf-8"))


def tiny_model(model: str, component: str) -> nn.Module:
    """Return a small random model of a published component's class."""
    config = published_config(model, component)
    torch.manual_seed(0)
    if name := config.pop("_class_name", None):
        kind = getattr(diffusers, name)
        return kind.from_config(_shrunk(config, TINY[name])).eval()
    name = config.pop("architectures")[0]
    config_class = type(transformers.AutoConfig.for_model(config["model_type"]))
    small = config_class(**_shrunk(config, TINY[name]))
    return getattr(transformers, name)(small).eval()


def _shrunk(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(config)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _shrunk(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
