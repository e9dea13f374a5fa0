"""Exceptions for diffusers' autoencoders, condition encoders, adapters and audio models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hfquant.integrations.examples.diffusers_rules import (
    PIXELS,
    SIDE,
    latents,
    mask,
    ones,
    sample,
    time,
    wide,
)
from hfquant.integrations.examples.sketch import BATCH, TOKENS, Sketch, ids


def _clip(s: Sketch, frames: int) -> Tensor:
    """Return an autoencoder's input clip with the given number of frames."""
    return sample(s)[:, :, :1].repeat(1, 1, frames, 1, 1)


def _neighbourhood(s: Sketch) -> Tensor:
    """Return latents wide enough for neighborhood attention at every stage."""
    kernels = s.need("decoder_stage_kernels")
    smallest = [max(kernel[axis] for kernel in kernels) for axis in range(3)]
    return torch.zeros(BATCH, s.need("latent_channels"), *smallest)


def _encodings(s: Sketch) -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros(BATCH, TOKENS, s.need("d_model")), torch.ones(BATCH, TOKENS))]


def _attended(s: Sketch, *places: int) -> Tensor | None:
    """Return what AudioLDM2's attentions at these places of a block read: generated audio features, or text.

    A block lists the width that each of its attentions reads, None for itself, or has one width.
    """
    block = s.need("cross_attention_dim")
    block = block[-1] if isinstance(block, (list, tuple)) else block
    widths = list(block) if isinstance(block, (list, tuple)) else [block]
    found = [width for width in (widths[place] for place in places if place < len(widths)) if width is not None]
    return torch.zeros(BATCH, TOKENS, found[0]) if found else None


CODEC_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "AceStepAudioTokenizer": {
        "hidden_states": lambda s: torch.zeros(
            BATCH, TOKENS, s.need("pool_window_size"), s.need("audio_acoustic_hidden_dim")
        )
    },
    "AceStepAudioTokenDetokenizer": {"hidden_states": wide("hidden_size")},
    "AceStepConditionEncoder": {
        "text_hidden_states": wide("text_hidden_dim"),
        "text_attention_mask": mask,
        "lyric_hidden_states": wide("text_hidden_dim"),
        "lyric_attention_mask": mask,
        "refer_audio_acoustic_hidden_states_packed": wide("timbre_hidden_dim"),
        "refer_audio_order_mask": lambda s: torch.arange(BATCH),
    },
    "AceStepTransformer1DModel": {
        "layout": "tokens",
        "hidden_states": wide("audio_acoustic_hidden_dim"),
        "context_latents": lambda s: torch.zeros(
            BATCH, TOKENS, s.need("in_channels") - s.need("audio_acoustic_hidden_dim")
        ),
        "encoder_hidden_states": wide("encoder_hidden_size", "hidden_size"),
        "timestep_r": time,
    },
    "AnimaTextConditioner": {
        "source_hidden_states": wide("source_dim"),
        "target_input_ids": lambda s: ids(s.need("target_vocab_size"), BATCH, TOKENS),
    },
    "AutoencoderKLHunyuanVideo15": {"sample": lambda s: sample(s)[:1]},  # its attention drops the batch dimension
    "AutoencoderKLMiniMaxH3": {"sample": lambda s: _clip(s, 2 * s.need("clip_length"))},
    "AutoencoderKLMochi": {"sample": lambda s: sample(s)[:, :3]},  # it adds Fourier features as channels
    "AutoencoderKLQwenImage21": {"layout": "video", "sample": lambda s: _clip(s, 1)},
    "AudioLDM2ProjectionModel": {
        "hidden_states": wide("text_encoder_dim"),
        "hidden_states_1": lambda s: torch.zeros(
            BATCH, s.field("max_seq_length", default=TOKENS), s.need("text_encoder_1_dim")
        ),
        "attention_mask": ones(BATCH, TOKENS, dtype=torch.long),
        "attention_mask_1": lambda s: torch.ones(BATCH, s.field("max_seq_length", default=TOKENS), dtype=torch.long),
    },
    "AudioLDM2UNet2DConditionModel": {
        "encoder_hidden_states": lambda s: _attended(s, 0, 1),
        "encoder_hidden_states_1": lambda s: _attended(s, 2, 3),
    },
    "CLIPImageProjection": {"x": wide("hidden_size", tokens=None)},
    "Cosmos3AVAEAudioTokenizer": {
        "sample": lambda s: torch.zeros(BATCH, 2 if s.need("stereo") else 1, 2 * math.prod(s.need("dec_strides")))
    },
    "Ideogram4PromptEnhancerHead": {"hidden_states": wide("hidden_size")},
    "Kandinsky6SRLatentUpscalerBank": {"layout": "video", "scale": lambda s: s.need("scales")[0]},
    "LTX2VideoDiffusionDecoderModel": {"z": _neighbourhood},
    "LongCatAudioDiTTransformer": {"layout": "tokens", "latent_cond": wide("latent_dim")},
    "MMAudioVAE": {"sample": lambda s: torch.zeros(BATCH, 8 * s.need("hop_length"))},
    "MMAudioVocoder": {"mel": lambda s: torch.zeros(BATCH, s.need("num_mels"), TOKENS)},
    "MiniMaxMusic3ConditionEncoder": {
        "hidden_states": lambda s: torch.zeros(
            BATCH, TOKENS, s.need("num_condition_layers") * s.need("condition_hidden_dim")
        )
    },
    "MiniMaxMusic3RVQDepthDecoder": {"inputs_embeds": wide("hidden_size")},
    "MiniMaxMusic3Transformer1DModel": {
        "layout": "audio",
        "encoder_hidden_states": lambda s: torch.zeros(BATCH, SIDE, s.need("condition_dim")),
    },
    "MiniMaxMusic3Vocoder": {"layout": "audio", "latents": lambda s: latents(s, s.need("latent_channels"))},
    "ReduxImageEncoder": {"x": wide("redux_dim")},
    "StableAudio3DiTModel": {
        "layout": "audio",
        "global_hidden_states": wide("global_cond_dim", tokens=None),
        "local_add_cond": lambda s: (
            torch.zeros(BATCH, s.need("local_add_cond_dim"), SIDE)
            if s.field("local_add_cond_dim") and s.need("patch_size") == 1
            else None
        ),
    },
    "StableAudio3DurationEmbedder": {"seconds": ones(BATCH)},
    "StableAudioDiTModel": {
        "layout": "audio",
        "global_hidden_states": wide("global_states_input_dim", tokens=1),
    },
    "StableAudioProjectionModel": {
        "text_hidden_states": wide("text_encoder_dim"),
        "start_seconds": ones(BATCH),
        "end_seconds": ones(BATCH),
    },
    "MultiAdapter": {
        "xs": lambda s: [
            torch.zeros(BATCH, a.config["in_channels"], PIXELS, PIXELS) for a in s.model.get_submodule("adapters")
        ]
    },
    "T2IAdapter": {"x": lambda s: torch.zeros(BATCH, s.need("in_channels"), PIXELS, PIXELS)},
    "T5FilmDecoder": {
        "encodings_and_masks": _encodings,
        "decoder_input_tokens": lambda s: torch.zeros(BATCH, s.need("targets_length"), s.need("input_dims")),
        "decoder_noise_time": ones(BATCH),
    },
    "UniDiffuserTextDecoder": {
        "input_ids": lambda s: ids(s.need("vocab_size"), BATCH, TOKENS),
        "prefix_embeds": lambda s: torch.zeros(BATCH, s.need("prefix_length"), s.need("prefix_inner_dim")),
    },
}
