"""Tiny models for the common tasks of transformers, by class name."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": 16,
    "patch_size": 8,
}
TOWER_TEXT = {k: v for k, v in TEXT.items() if k != "num_hidden_layers"} | {"num_hidden_layers": 1}
T5 = {"vocab_size": 50, "d_model": 12, "d_kv": 6, "num_heads": 2, "d_ff": 20, "num_layers": 1}
T5 |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
BART = {"vocab_size": 50, "d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 20}
BART |= {"decoder_ffn_dim": 20, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0}
BART |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_TEXT = GQA | {"rope_parameters": MROPE}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
IMAGE = {"image_token_id": 40, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43}
DEPTH_PATCHES = VISION | {"model_type": "dinov2", "num_hidden_layers": 2, "image_size": 64, "patch_size": 16}
SPEECH = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
SPEECH |= {"conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (5, 8), "num_conv_pos_embeddings": 4}
SPEECH |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "feat_extract_norm": "layer"}
SOUNDS = {"model_type": "encodec", "num_filters": 4, "hidden_size": 8, "upsampling_ratios": [4, 2]}
SOUNDS |= {"codebook_size": 32, "codebook_dim": 8, "num_lstm_layers": 1}
# Tokens up to 32 are codes; the decoder embeds one more.
CODES = {"vocab_size": 32, "num_codebooks": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CODES |= {"ffn_dim": 20, "max_position_embeddings": 64, "pad_token_id": 32, "bos_token_id": 32}
DIA = GQA | {"num_hidden_layers": 1, "num_key_value_heads": 2}
SPEECHT5 = {k: v for k, v in BART.items() if k != "d_model"} | {
    k: v for k, v in SPEECH.items() if k != "num_hidden_layers"
}
SPEECHT5 |= {"num_mel_bins": 8, "speaker_embedding_dim": 6}
SPEECHT5 |= {
    f"speech_decoder_{net}_{what}": n for net in ("prenet", "postnet") for what, n in (("layers", 2), ("units", 8))
}
LXMERT = {k: v for k, v in TEXT.items() if k != "num_hidden_layers"} | {f"{part}_layers": 1 for part in "lxr"}
LXMERT |= {"visual_feat_dim": 10}
TIMES = {"patch_length": 8, "context_length": 32, "horizon_length": 8, "hidden_size": 16, "num_hidden_layers": 1}
TIMES |= {"num_attention_heads": 2, "head_dim": 8, "intermediate_size": 20}
CLIP_FRAMES = VISION | {
    "num_frames": 4,
    "mit_hidden_size": 16,
    "mit_num_attention_heads": 2,
    "mit_intermediate_size": 20,
}
HIERA = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1, "image_size": [64, 64]}
HIERA |= {"window_positional_embedding_background_size": [4, 4], "blocks_per_stage": [1, 1, 1, 1]}
HIERA |= {"embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 2, 2]}
HIERA |= {"window_size_per_stage": [4, 4, 4, 4], "global_attention_blocks": []}
MIMI = {"model_type": "mimi", "num_filters": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MIMI |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 8, "codebook_size": 16, "codebook_dim": 4}
MIMI |= {"vector_quantization_hidden_dimension": 4, "upsampling_ratios": [4, 2], "upsample_groups": 16}

# Class: the class of its config, and the config's values.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", GQA),
    "LlamaForSequenceClassification": ("LlamaConfig", GQA | {"num_labels": 3}),
    "Qwen3ForCausalLM": ("Qwen3Config", GQA),
    "Gemma2ForCausalLM": ("Gemma2Config", GQA),
    "MambaForCausalLM": ("MambaConfig", {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}),
    "BertForMaskedLM": ("BertConfig", TEXT),
    "BertForSequenceClassification": ("BertConfig", TEXT),
    "BertForTokenClassification": ("BertConfig", TEXT),
    "BertForQuestionAnswering": ("BertConfig", TEXT),
    "ModernBertModel": ("ModernBertConfig", TEXT | {"cls_token_id": 1, "sep_token_id": 2}),
    "LayoutLMModel": ("LayoutLMConfig", TEXT),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "T5EncoderModel": ("T5Config", T5),
    "UMT5EncoderModel": ("UMT5Config", T5),
    "BartForConditionalGeneration": ("BartConfig", BART),
    "BartForSequenceClassification": ("BartConfig", BART),
    "ViTForImageClassification": ("ViTConfig", VISION),
    "Dinov2Model": ("Dinov2Config", VISION),
    "SwinModel": (
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        {
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1] * 4,
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 8,
            "sr_ratios": [2, 2, 1, 1],
        },
    ),
    "ConvNextForImageClassification": ("ConvNextConfig", {"hidden_sizes": [8] * 4, "depths": [1] * 4}),
    "VideoMAEModel": ("VideoMAEConfig", VISION | {"num_frames": 4, "tubelet_size": 2}),
    "VivitModel": ("VivitConfig", VISION | {"num_frames": 4, "tubelet_size": [2, 8, 8]}),
    "CLIPModel": ("CLIPConfig", {"text_config": TOWER_TEXT, "vision_config": VISION, "projection_dim": 6}),
    "CLIPTextModelWithProjection": ("CLIPTextConfig", TOWER_TEXT | {"projection_dim": 6}),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", VISION | {"projection_dim": 6}),
    "SiglipModel": ("SiglipConfig", {"text_config": TOWER_TEXT, "vision_config": VISION}),
    "SiglipVisionModel": ("SiglipVisionConfig", VISION),
    "Siglip2VisionModel": ("Siglip2VisionConfig", VISION | {"num_patches": 4}),
    "Siglip2Model": ("Siglip2Config", {"text_config": TOWER_TEXT, "vision_config": VISION | {"num_patches": 4}}),
    "WhisperForConditionalGeneration": ("WhisperConfig", BART | {"num_mel_bins": 8, "max_source_positions": 10}),
    "WhisperForAudioClassification": ("WhisperConfig", BART | {"num_mel_bins": 8, "max_source_positions": 10}),
    "Speech2TextForConditionalGeneration": (
        "Speech2TextConfig",
        BART | {"input_feat_per_channel": 8, "conv_channels": 8, "max_source_positions": 100},
    ),
    "Wav2Vec2ForCTC": ("Wav2Vec2Config", SPEECH),
    "HubertModel": ("HubertConfig", SPEECH),
    "Wav2Vec2BertModel": ("Wav2Vec2BertConfig", SPEECH | {"feature_projection_input_dim": 8}),
    "ASTForAudioClassification": (
        "ASTConfig",
        {k: v for k, v in VISION.items() if k != "image_size"} | {"max_length": 32, "num_mel_bins": 16},
    ),
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {
            "text_config": GQA | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 6, "num_hidden_layers": 2},
            "image_token_index": 40,
        },
    ),
    "PaliGemmaForConditionalGeneration": (
        "PaliGemmaConfig",
        {
            "text_config": GQA | {"model_type": "gemma"},
            "vision_config": VISION | {"model_type": "siglip_vision_model", "projection_dim": 16},
            "image_token_index": 40,
            "projection_dim": 16,
        },
    ),
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config",
        {
            "text_config": GQA,
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "image_token_index": 40,
            "mm_tokens_per_image": 4,
        },
    ),
    "Qwen2VLForConditionalGeneration": (
        "Qwen2VLConfig",
        {"text_config": QWEN_TEXT, "vision_config": QWEN_VISION | {"embed_dim": 16, "hidden_size": 16}, **IMAGE},
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "Qwen2_5_VLConfig",
        {
            "text_config": QWEN_TEXT,
            "vision_config": QWEN_VISION
            | {
                "hidden_size": 16,
                "out_hidden_size": 16,
                "intermediate_size": 20,
                "fullatt_block_indexes": [0],
                "window_size": 16,
            },
            **IMAGE,
        },
    ),
    "Qwen3VLForConditionalGeneration": (
        "Qwen3VLConfig",
        {
            "text_config": QWEN_TEXT,
            "vision_config": QWEN_VISION
            | {
                "hidden_size": 16,
                "out_hidden_size": 16,
                "intermediate_size": 20,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **IMAGE,
        },
    ),
    "Idefics3ForConditionalGeneration": (
        "Idefics3Config",
        {
            "text_config": GQA | {"model_type": "llama"},
            "vision_config": VISION,
            "image_token_id": 40,
            "scale_factor": 2,
        },
    ),
    "ClapModel": (
        "ClapConfig",
        {
            "text_config": TOWER_TEXT,
            "audio_config": {
                "spec_size": 64,
                "num_mel_bins": 16,
                "patch_size": 4,
                "patch_stride": [4, 4],
                "patch_embeds_hidden_size": 8,
                "hidden_size": 16,
                "depths": [1, 1],
                "num_attention_heads": [2, 2],
                "window_size": 4,
            },
            "projection_dim": 6,
        },
    ),
    "Kosmos2ForConditionalGeneration": (
        "Kosmos2Config",
        {
            "text_config": {"vocab_size": 50, "embed_dim": 16, "layers": 1, "ffn_dim": 20, "attention_heads": 2},
            "vision_config": VISION,
            "latent_query_num": 3,
        },
    ),
    "IdeficsForVisionText2Text": (
        "IdeficsConfig",
        {k: v for k, v in TEXT.items() if k != "num_hidden_layers"}
        | {"num_hidden_layers": 1, "alpha_initializer": "ones", "vision_config": VISION | {"embed_dim": 16}},
    ),
    "DepthProModel": (
        "DepthProConfig",
        {f"{part}_model_config": DEPTH_PATCHES for part in ("image", "patch", "fov")}
        | {"patch_size": 64, "fusion_hidden_size": 8, "merge_padding_value": 0, "intermediate_hook_ids": [1, 0]}
        | {"intermediate_feature_dims": [8, 8], "scaled_images_feature_dims": [8, 8, 8]},
    ),
    "DecisionTransformerModel": (
        "DecisionTransformerConfig",
        {"state_dim": 5, "act_dim": 3, "hidden_size": 16, "n_layer": 1, "n_head": 2, "max_ep_len": 20},
    ),
    "MusicgenForConditionalGeneration": (
        "MusicgenConfig",
        {
            "text_encoder": T5 | {"model_type": "t5"},
            "audio_encoder": SOUNDS,
            "decoder": CODES | {"model_type": "musicgen_decoder"},
        },
    ),
    "MusicgenMelodyForConditionalGeneration": (
        "MusicgenMelodyConfig",
        {
            "text_encoder": T5 | {"model_type": "t5"},
            "audio_encoder": SOUNDS,
            "decoder": CODES | {"model_type": "musicgen_melody_decoder"},
            "chroma_length": 6,
        },
    ),
    "MusicgenMelodyForCausalLM": ("MusicgenMelodyDecoderConfig", CODES),
    "DiaForConditionalGeneration": (
        "DiaConfig",
        {
            "encoder_config": DIA,
            "decoder_config": DIA
            | {"vocab_size": 36, "num_channels": 3, "cross_num_attention_heads": 2, "cross_num_key_value_heads": 2}
            | {
                "cross_head_dim": 8,
                "cross_hidden_size": 16,
                "eos_token_id": 33,
                "pad_token_id": 34,
                "bos_token_id": 35,
            },
            "delay_pattern": [0, 1, 2],
        },
    ),
    "SpeechEncoderDecoderModel": (
        "SpeechEncoderDecoderConfig",
        {
            "encoder": SPEECH | {"model_type": "wav2vec2-bert", "feature_projection_input_dim": 8},
            "decoder": TEXT | {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
        },
    ),
    "SpeechT5ForTextToSpeech": ("SpeechT5Config", SPEECHT5),
    "SpeechT5ForSpeechToSpeech": ("SpeechT5Config", SPEECHT5),
    "XCLIPModel": (
        "XCLIPConfig",
        {"text_config": TOWER_TEXT, "vision_config": CLIP_FRAMES, "projection_dim": 16}
        | {"prompt_layers": 1, "prompt_num_attention_heads": 2},
    ),
    "XCLIPVisionModel": ("XCLIPVisionConfig", CLIP_FRAMES),
    "Pix2StructForConditionalGeneration": (
        "Pix2StructConfig",
        {
            "text_config": {"vocab_size": 50, "hidden_size": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2}
            | {"decoder_start_token_id": 0},
            "vision_config": {"hidden_size": 16, "patch_embed_hidden_size": 12, "d_ff": 20, "d_kv": 8, "seq_len": 8}
            | {"num_hidden_layers": 1, "num_attention_heads": 2},
        },
    ),
    "LxmertModel": ("LxmertConfig", LXMERT),
    "LxmertForQuestionAnswering": ("LxmertConfig", LXMERT | {"num_qa_labels": 5}),
    "TimesFmModel": ("TimesFmConfig", TIMES),
    "TimesFmModelForPrediction": ("TimesFmConfig", TIMES),
    "OneFormerForUniversalSegmentation": (
        "OneFormerConfig",
        {
            "backbone_config": {"model_type": "swin", "image_size": 32, "embed_dim": 8, "depths": [1] * 4}
            | {"num_heads": [1, 1, 2, 2], "window_size": 4, "out_features": [f"stage{i}" for i in range(1, 5)]},
        }
        | {"is_training": False, "task_seq_len": 6, "text_encoder_vocab_size": 50, "num_classes": 3, "num_queries": 5}
        | {"hidden_dim": 32, "conv_dim": 32, "mask_dim": 32, "encoder_feedforward_dim": 20, "dim_feedforward": 20}
        | {"num_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2},
    ),
    "Sam2Model": (
        "Sam2Config",
        {
            "vision_config": {"backbone_config": HIERA, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 16}
            | {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
            "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "mask_input_channels": 4},
            "mask_decoder_config": {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 20, "num_hidden_layers": 1}
            | {"iou_head_hidden_dim": 16},
        },
    ),
    "InstructBlipForConditionalGeneration": (
        "InstructBlipConfig",
        {
            "vision_config": VISION,
            "qformer_config": TOWER_TEXT | {"encoder_hidden_size": 16, "cross_attention_frequency": 1},
            "text_config": T5 | {"model_type": "t5"},
            "num_query_tokens": 3,
            "image_token_index": 40,
        },
    ),
    "VoxtralRealtimeForConditionalGeneration": (
        "VoxtralRealtimeConfig",
        {
            "audio_config": {k: v for k, v in GQA.items() if not k.endswith("token_id")} | {"num_mel_bins": 8},
            "text_config": GQA,
        },
    ),
    "KyutaiSpeechToTextForConditionalGeneration": (
        "KyutaiSpeechToTextConfig",
        {k: v for k, v in GQA.items() if k != "intermediate_size"}
        | {"num_hidden_layers": 1, "ffn_dim": 20, "num_codebooks": 3, "codebook_vocab_size": 20, "codec_config": MIMI}
        | {"audio_bos_token_id": 19, "audio_pad_token_id": 110, "pad_token_id": 3, "bos_token_id": 90},
    ),
}


def build(name: str, device: str = "meta") -> nn.Module:
    """Return a model of the class, in eval mode."""
    config, fields = MODELS[name]
    with torch.device(device):
        return getattr(transformers, name)(getattr(transformers, config)(**fields)).eval()
