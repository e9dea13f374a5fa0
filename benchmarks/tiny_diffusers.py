"""Every model class that diffusers exports, with a config of few layers.

Most have the defaults of their ``__init__`` with less depth: on the meta device width costs nothing. Classes whose
forward depends on values are narrow as well, and are built with weights. :func:`small` builds the others with weights
too, with few heads if they have any.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import diffusers
import diffusers.models
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from benchmarks.tiny import built

DEPTHS = {"layers_per_block": 1} | dict.fromkeys(
    (
        "num_layers",
        "num_single_layers",
        "num_hidden_layers",
        "num_visual_blocks",
        "num_text_blocks",
        "dit_depth",
        "depth",
        "n_layers",
        "n_refiner_layers",
        "num_refiner_layers",
        "num_mmdit_layers",
        "num_single_dit_layers",
        "mmdit_layers",
        "num_layerwise_text_blocks",
        "num_refiner_text_blocks",
        "transformer_num_layers",
        "decoder_num_layers",
        "encoder_num_hidden_layers",
        "decoder_num_hidden_layers",
    ),
    2,
)

HUNYUAN_DIT = {"in_channels": 4, "patch_size": 2, "hidden_size": 16 * 88}
UNION = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 30,
    "block_out_channels": (320, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 10,
}
HEADS = {"num_attention_heads": 2, "num_layers": 1}
HUNYUAN_VIDEO = {**HEADS, "attention_head_dim": 10, "num_refiner_layers": 1, "rope_axes_dim": (2, 4, 4)}

# Arguments that the defaults lack, or set to values with which the model cannot run.
CONFIGS: dict[str, dict[str, Any]] = {
    "AudioLDM2ProjectionModel": {"text_encoder_dim": 10, "text_encoder_1_dim": 12, "langauge_model_dim": 8},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 8,
        "block_out_channels": (64, 64, 128, 128),
        "layers_per_block": 1,
        "spatial_compression_ratio": 8,
        "sample_size": 64,
    },
    "ControlNetUnionModel": UNION,
    "DreamLiteTransformer2DModel": {"in_channels": 32, "cross_attention_dim": 10},
    "EasyAnimateTransformer3DModel": {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "text_embed_dim_t5": 12,
    },
    "HunyuanDiT2DControlNetModel": HUNYUAN_DIT | {"transformer_num_layers": 4},
    "HunyuanDiT2DModel": HUNYUAN_DIT | {"num_layers": 4},
    "Kandinsky3UNet": {"layers_per_block": 2},
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "patch_size": 2,
        "cross_attention_dim": 16 * 88,
        "caption_channels": 10,
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "RFD4ProteinaAutoencoder": {"atom37_mask": [[True] * 37] * 2, "allowed_residue_types": [[True] * 2] * 2},
    "StableAudioProjectionModel": {"text_encoder_dim": 10, "conditioning_dim": 8, "min_value": 0, "max_value": 10},
    "StableCascadeUNet": {"down_num_layers_per_block": (1, 2), "up_num_layers_per_block": (2, 1)},
    "Transformer2DModel": {"in_channels": 32, "cross_attention_dim": 10},
    "TransformerTemporalModel": {"in_channels": 32},
    "UNet1DModel": {"extra_in_channels": 64},
    "UniDiffuserModel": {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 8,
        "patch_size": 2,
        "use_patch_pos_embed": True,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
    },
    "UniDiffuserTextDecoder": {"prefix_length": 4, "prefix_inner_dim": 10, "prefix_hidden_dim": 6, "n_layer": 2},
    "WanAnimateTransformer3DModel": {"inject_face_latents_blocks": 1},
    "WanVACETransformer3DModel": {"vace_layers": [0, 1]},
}

# Classes that can be traced only on real tensors, because their forward or __init__ depends on values.
WITH_WEIGHTS: dict[str, dict[str, Any]] = {
    "AceStepConditionEncoder": {
        "hidden_size": 16,
        "intermediate_size": 20,
        "text_hidden_dim": 10,
        "timbre_hidden_dim": 6,
        "num_lyric_encoder_hidden_layers": 1,
        "num_timbre_encoder_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    },
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": (32, 32),
        "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
        "encoder_layers_per_block": 1,
        "decoder_block_out_channels": (32, 32),
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "decoder_layers_per_block": 1,
    },
    "MMAudioVAE": {"hidden_channels": 32, "latent_channels": 4},  # has a table on the CPU, whatever the default device
    "GlmImageTransformer2DModel": HEADS
    | {
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_embed_dim": 10,
        "time_embed_dim": 12,
        "condition_dim": 8,
        "prior_vq_quantizer_codebook_size": 20,
    },
    "HiDreamImageTransformer2DModel": HEADS
    | {
        "patch_size": 2,
        "in_channels": 4,
        "num_single_layers": 1,
        "attention_head_dim": 24,
        "caption_channels": [8, 6],
        "text_emb_dim": 10,
        "axes_dims_rope": (8, 8, 8),
        "llama_layers": [0, 1],
    },
    "HunyuanVideo15Transformer3DModel": HUNYUAN_VIDEO
    | {"in_channels": 5, "out_channels": 4, "text_embed_dim": 10, "text_embed_2_dim": 12, "image_embed_dim": 14},
    "HunyuanVideoFramepackTransformer3DModel": HUNYUAN_VIDEO
    | {
        "in_channels": 4,
        "out_channels": 4,
        "num_single_layers": 1,
        "text_embed_dim": 10,
        "pooled_projection_dim": 8,
        "has_image_proj": True,
        "image_proj_dim": 14,
        "has_clean_x_embedder": True,
    },
    "Lumina2Transformer2DModel": {
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 2,
        "axes_dim_rope": (4, 4, 4),
        "axes_lens": (64, 64, 64),
        "cap_feat_dim": 10,
    },
    "MochiTransformer3DModel": HEADS
    | {
        "attention_head_dim": 8,
        "in_channels": 4,
        "pooled_projection_dim": 16,
        "text_embed_dim": 16,
        "time_embed_dim": 4,
        "max_sequence_length": 16,
    },
    "OmniGenTransformer2DModel": {
        "in_channels": 4,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
        "num_layers": 1,
        "pad_token_id": 0,
        "vocab_size": 50,
        "time_step_dim": 8,
        "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4, "type": "su"},
    },
    "QwenImage21Transformer2DModel": HEADS
    | {
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "context_in_dim": 10,
        "axes_dims_rope": (4, 6, 6),
    },
}


def _controlnet() -> nn.Module:
    blocks = {"block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    return diffusers.ControlNetModel(**blocks, cross_attention_dim=10)


def _z_image_controlnet() -> nn.Module:
    places = {"control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 16}
    return diffusers.ZImageControlNetModel.from_transformer(
        diffusers.ZImageControlNetModel(**places, n_refiner_layers=1),
        diffusers.ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1),
    )


# Classes that are composed of others.
MADE: dict[str, Callable[[], nn.Module]] = {
    "FluxMultiControlNetModel": lambda: diffusers.FluxMultiControlNetModel(
        [diffusers.FluxControlNetModel(num_layers=1, num_single_layers=1, num_mode=2)]
    ),
    "HunyuanDiT2DMultiControlNetModel": lambda: diffusers.HunyuanDiT2DMultiControlNetModel(
        [build("HunyuanDiT2DControlNetModel") for _ in range(2)]
    ),
    "MultiAdapter": lambda: diffusers.MultiAdapter([diffusers.T2IAdapter(), diffusers.T2IAdapter()]),
    "MultiControlNetModel": lambda: diffusers.MultiControlNetModel([_controlnet(), _controlnet()]),
    "MultiControlNetUnionModel": lambda: diffusers.models.MultiControlNetUnionModel(
        [diffusers.ControlNetUnionModel(**UNION) for _ in range(2)]
    ),
    "QwenImageMultiControlNetModel": lambda: diffusers.QwenImageMultiControlNetModel(
        [diffusers.QwenImageControlNetModel(num_layers=1)]
    ),
    "SD3MultiControlNetModel": lambda: diffusers.SD3MultiControlNetModel(
        [diffusers.SD3ControlNetModel(num_layers=1) for _ in range(2)]
    ),
    "ZImageControlNetModel": _z_image_controlnet,
}


def exported() -> dict[str, type[nn.Module]]:
    """Return all model classes of diffusers and diffusers.models, by name."""
    named = {name: getattr(module, name) for module in (diffusers.models, diffusers) for name in dir(module)}
    return {
        name: value
        for name, value in sorted(named.items())
        if inspect.isclass(value) and issubclass(value, ModelMixin) and value is not ModelMixin
    }


#: Arguments for the channels of the first block; other blocks have multiples of it.
CHANNELS = (
    "base_dim",
    "decoder_base_dim",
    "base_channels",
    "model_channels",
    "decoder_channels",
    "encoder_hidden_size",
)
#: Arguments for the number of heads, and arguments that must be multiples of it.
HEADS_ARGUMENTS = ("num_attention_heads", "n_heads", "num_heads")
WIDTHS = ("hidden_size", "dim", "inner_dim", "model_dim", "embed_dim", "d_model", "num_key_value_heads", "num_kv_heads")
WIDTHS += ("intermediate_size", "ffn_dim", "mlp_dim", "n_kv_heads", "cross_attention_dim")


def build(name: str, device: str = "meta", **sizes: Any) -> nn.Module:
    """Return a model of the class with few layers, on ``device`` unless it needs weights to run."""
    if name in WITH_WEIGHTS:
        return exported()[name](**WITH_WEIGHTS[name]).eval()
    with torch.device(device):
        if name in MADE:
            return MADE[name]()
        model = exported()[name]
        known = inspect.signature(model.__init__).parameters.items()
        few = {k: min(DEPTHS[k], p.default) for k, p in known if k in DEPTHS and isinstance(p.default, int)}
        return model(**few | CONFIGS.get(name, {}) | sizes)


def small(name: str, most: int) -> Iterator[nn.Module]:
    """Yield models of a class with random weights, narrow ones first (:func:`benchmarks.tiny.built`)."""
    return built((partial(build, name, **sizes) for sizes in (*_narrow(name), {})), most)


def _narrow(name: str) -> Iterator[dict[str, Any]]:
    """Yield arguments of a class for fewer channels, and for two heads, alone and with all widths that scale with them.

    Channels of blocks keep their ratios and start at 32, the number of groups of group norms.
    """
    if name in WITH_WEIGHTS or name in MADE:
        return
    known = inspect.signature(exported()[name].__init__).parameters.items()
    sizes = {k: p.default for k, p in known} | CONFIGS.get(name, {})
    channels: dict[str, Any] = {}
    for key, value in sizes.items():
        if key.endswith("block_out_channels") and isinstance(value, tuple | list):
            channels[key] = tuple(32 * c // min(value) for c in value)
        elif key in CHANNELS and isinstance(value, int):
            channels[key] = min(32, value)
    if channels:
        yield channels
    heads = next((h for h in HEADS_ARGUMENTS if isinstance(sizes.get(h), int) and sizes[h] > 2), None)
    if heads is None:
        return
    widths = {k: max(2 * sizes[k] // sizes[heads], 1) for k in WIDTHS if isinstance(sizes.get(k), int)}
    yield {heads: 2}
    for chosen in (widths, {k: v for k, v in widths.items() if k != "cross_attention_dim"}):
        if chosen:
            yield {heads: 2, **chosen}
