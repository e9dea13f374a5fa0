"""Every model type of transformers, shrunk and with random weights.

The sizes in a config are reduced by the names of its fields, as far as its class accepts. Some classes accept only a
smaller depth and vocabulary, or no change at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

from benchmarks.tiny import built

#: Largest value of an int in a config, by the first pattern that matches its name.
DEPTHS: dict[str, int] = {
    r"feat_extract_layers$": 100,  # as many as there are convolutions
    r"vocab_size(_per_layer_input)?$": 256,
    r"(num_.*layers|n_layers?|depth|n_layer|encoder_layers|decoder_layers|num_blocks|^layers)$": 2,
    r"(max_position_embeddings|n_positions|max_source_positions|max_target_positions)": 128,
}
SIZES: dict[str, int] = DEPTHS | {
    r"mamba_(d_head|head_dim)$": 32,
    r"(attn|expert)_layer_period$": 2,
    r"(attn|expert)_layer_offset$": 1,
    r"n_groups$": 2,
    r"tokens_per_image$": 4,
    r"(key_value_heads|kv_heads)$": 2,
    r"(heads?|n_head)$": 4,
    r"(head_dim|rotary_dim|d_kv|d_head|attention_head_size|kv_channels)$": 16,
    r"(intermediate|ffn|d_ff|inner_dim|n_inner|mlp_dim|feed_forward_size)": 128,
    r"(hidden_size|d_model|n_embd|dim|embedding_size|width)$": 64,
    r"(num_experts|n_routed_experts|num_local_experts)$": 4,
    r"(experts_per_tok|top_k|topk|moe_k|num_experts_per_token)$": 2,
    r"(n_group|topk_group)$": 2,
    r"image_size$": 32,
    r"patch_size$": 8,
    r"rank$": 16,
}
#: The same with all heads alike, as latent attention needs it, and as wide as they are, for rotations of fixed parts.
FULL_HEADS = {pattern: size for pattern, size in SIZES.items() if "head" not in pattern} | {
    r"heads?$|n_head$": 4,
    r"rotary_dim$": 16,
}
#: Tasks in order of preference; the first that a model type has is used.
TASKS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION", "CTC")
#: Lists in a config that have one entry per layer.
PER_LAYER = ("layer_types", "mlp_layer_types")
#: Model types that rotate parts of each head by time, height and width, as wide as in their published sizes by default.
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "glm4v", "glm_ocr", "glm_image", "paddleocr_vl")
_QWEN4 = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16},
    **{"indexer_compress_ratio": 4, "head_dim": 16, "ngram_vocab_size_base": 1000, "eos_token_id": 0},
}
#: Arguments that a config's class requires.
WANTED: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "depth_pro": {"intermediate_hook_ids": [1, 0]},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "informer": {"prediction_length": 4},
    "qwen4_exp": {"text_config": {"model_type": "qwen4_exp_text", **_QWEN4}},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True},
    "time_series_transformer": {"prediction_length": 4},
    "wav2vec2-conformer": {"vocab_size": 32},
}


def types() -> dict[str, list[str]]:
    """Return the model types that have a class, with the names of their classes, those of :data:`TASKS` first."""
    tables = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in TASKS]
    found: dict[str, list[str]] = {}
    for table in (*tables, modeling_auto.MODEL_MAPPING_NAMES):
        for kind, name in table.items():
            found.setdefault(kind, []).append(name if isinstance(name, str) else name[0])
    return {kind: found[kind] for kind in CONFIG_MAPPING if kind in found}


def small(kind: str, most: int) -> Iterator[nn.Module]:
    """Yield models of a type: its first class from small to large, then the next (:func:`benchmarks.tiny.built`)."""
    return built((partial(_built, *made) for made in product(types()[kind], _configs(kind))), most)


def _built(name: str, config: Callable[[], PreTrainedConfig], device: str) -> nn.Module:
    if not hasattr(transformers, name):
        raise ValueError(f"transformers has no {name}")
    made = config()
    with torch.device(device):
        model: nn.Module = getattr(transformers, name)(made)
    return model


def _configs(kind: str) -> list[Callable[[], PreTrainedConfig]]:
    """Return config makers: all sizes or only depths, passed to the class or set afterwards; then the full config."""
    cls, wanted = CONFIG_MAPPING[kind], WANTED.get(kind, {})
    whole = partial(cls, **wanted)

    def given(sizes: Mapping[str, int]) -> PreTrainedConfig:
        return fitted(cls(**cuts(whole(), sizes) | wanted), whole())

    def changed(sizes: Mapping[str, int]) -> PreTrainedConfig:
        return fitted(cut(whole(), sizes), whole())

    return [*(partial(how, sizes) for sizes in (SIZES, FULL_HEADS, DEPTHS) for how in (given, changed)), whole]


def cuts(config: PreTrainedConfig, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return arguments for a smaller config."""
    found: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found[key] = {"model_type": value.model_type, **cuts(value, sizes)}
        elif (smaller := _smaller(key, value, sizes)) is not None:
            found[key] = smaller
    return found


def cut(config: PreTrainedConfig, sizes: Mapping[str, int]) -> PreTrainedConfig:
    """Shrink a config in place."""
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            cut(value, sizes)
        elif (smaller := _smaller(key, value, sizes)) is not None:
            setattr(config, key, smaller)
    return config


def fitted(config: PreTrainedConfig, whole: PreTrainedConfig) -> PreTrainedConfig:
    """Make lists in a shrunk config fit its sizes, in place: layer kinds, parts of rotations, shapes of images."""
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and hasattr(whole, key):
            fitted(value, getattr(whole, key))
    count = getattr(config, "num_hidden_layers", 0)
    for key in PER_LAYER:
        if isinstance(kinds := vars(whole).get(key), list) and count:
            different = list(dict.fromkeys(kinds))[:count]  # as many kinds as possible
            setattr(config, key, kinds if count >= len(kinds) else [*kinds[: count - len(different)], *different])
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and ("mrope_section" in rope or config.model_type.startswith(MROPE)):
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        half = int(width * rope.get("partial_rotary_factor", 1)) // 2
        rope["mrope_section"] = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    if isinstance(getattr(config, "image_grid_pinpoints", None), list):
        size = config.vision_config.image_size
        config.image_grid_pinpoints = [[size, size], [size, 2 * size]]
    return config


def _smaller(key: str, value: Any, sizes: Mapping[str, int]) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if key.endswith(("token_id", "token_index")):
        return 3 + sum(key.encode()) % 200 if value >= 250 else None
    size = next((size for pattern, size in sizes.items() if re.search(pattern, key)), value)
    return size if size < value else None
