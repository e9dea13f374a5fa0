"""Rules for the inputs of transformers models: the parameter name tells what it is, config fields tell its sizes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hfquant.calibration.model_inputs import Codes, codes_of, text_config
from hfquant.integrations.examples.sketch import BATCH, TOKENS, Rule, Sketch, UnknownInput, ids

TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "decoder", "thinker_config")
VISION_CONFIGS = ("vision_config", "vision_encoder_config", "encoder", "backbone_config")
AUDIO_CONFIGS = ("audio_config", "audio_encoder_config", "encoder_config", "speech_encoder", "encoder")
#: Inputs that go with any main input: of documents, voices, objects in images, and episodes of reinforcement learning.
BESIDE: tuple[str, ...] = ("bbox", "speaker_embeddings", "visual_feats", "visual_pos")
BESIDE += ("states", "actions", "rewards", "returns_to_go", "timesteps")
#: Objects found in an image, and rows and columns of its patches.
OBJECTS, SIDE = 4, 4


def within(s: Sketch, names: tuple[str, ...]) -> Sketch:
    """Return a sketch of a part's config, or of the whole model if the parts have none of their own."""
    found = s.field(*names)
    return s if found is None or isinstance(found, (str, dict, list)) else Sketch(s.model, found)


def text_part(s: Sketch) -> Sketch:
    """Return a sketch of the config of a model's text part, or of the whole model."""
    if codes_of(s.model):
        return Sketch(s.model, text_config(s.model))
    part = within(s, TEXT_CONFIGS)
    return within(part, TEXT_CONFIGS)  # for example a thinker's text


def _text_ids(s: Sketch) -> Tensor:
    """Return token ids; each row ends with its only end-of-text token, which some classifiers look for."""
    # CANINE reads the code points of characters, and hashes each into one of these.
    vocabulary = s.field("vocab_size", "num_hash_buckets", default=text_part(s).field("vocab_size"))
    if vocabulary is None:
        raise UnknownInput("its config has no vocab_size")
    codes = codes_of(s.model)
    if codes and codes.argument == "input_ids":
        return _code_ids(codes)
    made = ids(vocabulary, BATCH, TOKENS)
    end = s.field("eos_token_id", default=text_part(s).field("eos_token_id"))
    if isinstance(end, int) and 0 <= end < vocabulary:
        made = torch.where(made == end, (end + 1) % vocabulary, made)
        made[:, -1] = end
    return made


def _decoder_ids(s: Sketch) -> Tensor | None:
    if not (s.field("is_encoder_decoder") or within(s, ("text_config",)).field("is_encoder_decoder")):
        return None
    if codes := codes_of(s.model):
        return _code_ids(codes)
    vocabulary = s.field("decoder_vocab_size", "vocab_size") or within(s, ("decoder", "text_config")).need("vocab_size")
    return ids(vocabulary, BATCH, TOKENS)


def _code_ids(codes: Codes) -> Tensor:
    return codes.arranged(ids(codes.vocab_size, BATCH, codes.books, TOKENS))


def _size(vision: Sketch) -> tuple[int, int]:
    if ratios := vision.field("scaled_images_ratios"):  # DepthPro: scaled by the least, an image is one patch
        side = math.ceil(vision.need("patch_size") / min(ratios))
        return side, side
    backbone = within(vision, ("backbone_config",))
    known = (part.field("image_size", "input_size", "crop_size") for part in (vision, backbone))
    size = next(filter(None, known), 224)  # convolutional backbones accept any size
    if isinstance(size, dict):
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else (size[-2], size[-1])


def pixels(s: Sketch) -> Tensor:
    """Return black images of the size that position embeddings are stored for; clips for a video model."""
    vision = within(s, VISION_CONFIGS)
    channels = vision.field("num_channels", "in_channels", "in_chans", default=3)
    if "Siglip2" in type(vision.config).__name__:  # patches, with masks of existing ones
        return torch.zeros(BATCH, vision.need("num_patches"), channels * vision.need("patch_size") ** 2)
    frames, whole = vision.field("num_frames", "frames_per_clip"), vision.config is s.config
    if whole and s.field("mit_hidden_size") is not None:  # X-CLIP's tower reads the frames of all clips in one row
        return torch.zeros(BATCH * frames, channels, *_size(vision))
    clip = frames is not None and (not whole or s.field("tubelet_size", "num_frames") is not None)
    return torch.zeros(BATCH, *((frames,) if clip else ()), channels, *_size(vision))


def _flattened_patches(s: Sketch) -> Tensor:
    """Return black patches, each behind its row and column; all zeros would be padding."""
    axis = torch.arange(1.0, SIDE + 1)
    places = torch.cartesian_prod(axis, axis)
    patches = torch.zeros(len(places), within(s, VISION_CONFIGS).need("patch_embed_hidden_size"))
    return torch.cat([places, patches], 1).expand(BATCH, -1, -1).clone()


def _objects(size: str) -> Rule:
    """Return a rule for one vector per object in an image, of the size in this config field."""
    return lambda s: torch.zeros(BATCH, OBJECTS, s.need(size))


def _qformer_ids(s: Sketch) -> Tensor:
    """Return token ids for a querying transformer (InstructBLIP)."""
    return ids(within(s, ("qformer_config",)).need("vocab_size"), BATCH, TOKENS)


def _features(s: Sketch) -> Tensor:
    """Return log-mel features: channels first and full length for Whisper, else a few frames."""
    audio = within(s, AUDIO_CONFIGS)
    bins = audio.field("num_mel_bins", "input_feat_per_channel", "feature_size", "mel_bins")
    if audio.field("spec_size") is not None:  # CLAP: a spectrogram image
        return torch.zeros(BATCH, 1, audio.need("spec_size"), bins or 64)
    if per_token := s.field("audio_length_per_tok"):  # Voxtral Realtime
        return torch.zeros(BATCH, audio.need("num_mel_bins"), TOKENS * per_token)
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


def _encoder_input(s: Sketch) -> Tensor:
    """Return the main input of an encoder, for a model that reads any (SpeechEncoderDecoderModel)."""
    encoder = getattr(s.model, "encoder", None)
    rule = RULES.get(getattr(encoder, "main_input_name", ""))
    if encoder is None or rule is None:
        raise UnknownInput("its encoder has no main input that a rule makes")
    made: Tensor = rule(Sketch(encoder, encoder.config))
    return made


def _spectrogram(s: Sketch) -> Tensor:
    """Return the frames of a spectrogram that a decoder has written so far (SpeechT5)."""
    return torch.zeros(BATCH, TOKENS, s.need("num_mel_bins"))


def _clips(s: Sketch) -> Tensor:
    """Return black clips, [batch, frames, channels, height, width]."""
    made = pixels(s)
    if made.dim() != 4:
        return made
    return made[:, None].repeat(1, within(s, VISION_CONFIGS).field("num_frames", default=2), 1, 1, 1)


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
    side = int(within(s, VISION_CONFIGS).need("num_patches") ** 0.5)
    return torch.tensor([[side, side]] * BATCH)


RULES: dict[str, Rule] = {
    "input_ids": _text_ids,
    "decoder_input_ids": _decoder_ids,
    "pixel_values": pixels,
    "pixel_values_videos": _clips,
    "input_features": _features,
    "input_values": _waveform,
    "inputs": _encoder_input,
    "flattened_patches": _flattened_patches,
    "decoder_input_values": _spectrogram,
    "speaker_embeddings": lambda s: torch.zeros(BATCH, s.need("speaker_embedding_dim")),
    "visual_feats": _objects("visual_feat_dim"),
    "visual_pos": _objects("visual_pos_dim"),
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
    "past_values_padding": lambda s: torch.zeros_like(_past(s), dtype=torch.long),
    "freq": lambda s: torch.zeros(BATCH, 1, dtype=torch.long),
    "task_inputs": lambda s: ids(s.need("text_encoder_vocab_size"), BATCH, s.need("task_seq_len")),
    "past_observed_mask": lambda s: torch.ones_like(_past(s)),
    "bool_masked_pos": lambda s: None,
}
