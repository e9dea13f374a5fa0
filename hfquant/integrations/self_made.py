"""Self-generated calibration data of transformers models: text that they write, filled masks, audio codes, noise.

A model's kind is determined by its capabilities and its forward's parameters, never by its name. Inputs other than text
have the shapes of :mod:`hfquant.integrations.examples`, filled with noise.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor, nn

from hfquant.calibration.batches import CalibrationError, device_of, evaluating, forward, options_for
from hfquant.calibration.model_inputs import codes_of
from hfquant.calibration.self_made import (
    HELD_OUT,
    SelfMade,
    SelfSpec,
    draw,
    fill_masks,
    generator,
    pink_noise,
    random_ids,
)
from hfquant.calibration.tensor_cache import kept
from hfquant.console import counted
from hfquant.digests import update, update_with_weights
from hfquant.distributed import processes
from hfquant.integrations.examples import example_inputs
from hfquant.integrations.words import Words, vocabulary

logger = logging.getLogger(__name__)

WINDOWS, WINDOW, BATCH = 32, 512, 4
#: Images, sounds and other inputs filled with noise.
NOISE = 16
#: Maximum number of tokens that a decoder writes in response to its encoder's input.
ANSWER = 128
#: End-of-text token that never occurs, so that nothing ends a window.
_NO_TOKEN = 1 << 30
_SPECIAL = ("_token_id", "_token_index", "_patch_id")
_TEXT = {"input_ids", "decoder_input_ids", "attention_mask", "token_type_ids"}


class Processors(NamedTuple):
    """Saved processors that turn text, images and audio into a model's inputs; None for each that is missing."""

    tokenizer: Any = None
    images: Any = None
    sounds: Any = None


def self_made(model: Any, spec: SelfSpec, processors: Processors, asked: bool) -> SelfMade:
    """Make a transformers model generate its own calibration data.

    Under `accelerate launch`, the first process generates it for all.

    Args:
        model: the model in full precision.
        spec: what to generate.
        processors: the processors saved with the model.
        asked: True if the user requested it, False if the user gave no data.

    Raises:
        CalibrationError: the inputs of the model's forward cannot be determined, or it fails on them.
    """
    shapes = example_inputs(model)
    with processes() as group:
        made = None
        with group.together():
            if group.main:
                try:
                    with evaluating(model):
                        made = _made(model, shapes, spec, processors, asked)
                except CalibrationError:
                    raise
                except Exception as error:  # whatever the model's own code raises
                    raise _cannot(model, f"{type(error).__name__}: {error}") from error
        found = group.gather(made)[0]
    assert found is not None
    return found


def _made(model: Any, shapes: dict[str, Any] | None, spec: SelfSpec, processors: Processors, asked: bool) -> SelfMade:
    if type(model).forward is nn.Module.forward:  # Qwen2.5-Omni: its generate calls those of its parts
        parts = [name for name, part in model.named_children() if type(part).forward is not nn.Module.forward]
        raise CalibrationError(
            f"{type(model).__name__} has no forward, so no data can calibrate it: use a config that needs no data, or "
            f"quantize its parts ({', '.join(parts)}) with hfquant.quantize"
        )
    if shapes is not None and "input_ids" in shapes and shapes.keys() <= _TEXT:
        short = SelfMade([shapes], [], spec)
        if why := _tried(model, "text", lambda: short)[1]:
            raise _cannot(model, why)
        return _text(model, spec, processors, asked)
    noise, why = None, "the inputs of its forward are unknown"
    if shapes is not None:
        noise, why = _tried(model, "noise", lambda: _noise(model, shapes, spec, processors))
    if not _can_write(model) or _has_encoder(model) or (shapes is not None and "input_ids" not in shapes):
        if noise is None:
            raise _cannot(model, why)
        _say(model, f"{counted(noise.spec.samples or 0, 'sample')} of noise", "", asked)
        return noise
    # A language model with image or audio inputs: calibrate on its own text and on noise.
    text, fault = _tried(model, "text", lambda: _text(model, spec, processors, asked))
    if text is not None and noise is not None:
        return SelfMade([*text.batches, *noise.batches], [*text.held_out, *noise.held_out], text.spec)
    one = text or noise
    if one is None:
        raise _cannot(model, f"{why}; {fault}")
    logger.warning(
        "%s: %s, so it is calibrated on %s alone; layers that this does not reach are quantized without data",
        *(type(model).__name__, why or fault, "text" if text else "noise"),
    )
    return one


def _tried(model: Any, what: str, make: Callable[[], SelfMade]) -> tuple[SelfMade | None, str]:
    """Return the data that ``make`` makes, or None and why it cannot be made or the model's forward fails on it."""
    try:
        made = make()
        forward(model, made.batches[0], options_for(model, ()))
    except Exception as error:  # noqa: BLE001 (whatever the model's own code raises)
        return None, f"it fails on {what} with {type(error).__name__}: {error}"
    return made, ""


def _cannot(model: Any, why: str) -> CalibrationError:
    name = type(model).__name__
    return CalibrationError(f"{name} needs calibration data and cannot make its own: {why}; pass batches of its inputs")


# ------------------------------------------------------------------------------------------------------------- text


def _text(model: Any, spec: SelfSpec, processors: Processors, asked: bool) -> SelfMade:
    words = Words(model, processors.tokenizer)
    spec = spec.settled(spec.samples or WINDOWS, min(spec.seqlen or WINDOW, words.limit))
    assert spec.samples is not None
    assert spec.seqlen is not None
    length = spec.seqlen
    # Hold out windows of the same seed and of another, to check what the others decide.
    rows = [(spec.seed, i) for i in range(spec.samples + HELD_OUT)] + [(spec.seed + 1, i) for i in range(HELD_OUT)]
    generators = [generator(*row) for row in rows]
    prompts = [words.prompt(i, g) for (_, i), g in zip(rows, generators, strict=True)]
    codes, both = codes_of(model), _has_encoder(model)
    # Audio codes are random: to write them, each class needs a `generate` of its own, which returns sounds.
    writes = _can_write(model) and codes is None
    digest = xxhash.xxh3_128()
    update_with_weights(digest, model)
    versions = {name: importlib.metadata.version(name) for name in ("hfquant", "torch", "transformers")}
    recipe = (type(model).__name__, str(model.dtype), rows, prompts, spec.seqlen, words.ordinary, words.frame)
    update(digest, (recipe, words.mask or -1, versions))

    def make() -> dict[str, Tensor]:
        if writes and not both:
            return {"input_ids": _written(model, prompts, length, generators, words)}
        if codes and not both:
            return {"input_ids": codes.random(generators, length)}
        made = {"input_ids": words.framed(_read(model, words, length, generators))}
        if both and writes:
            starts, most = [[words.start]] * len(rows), min(ANSWER, length)
            made["decoder_input_ids"] = _written(model, starts, most, generators, words, made["input_ids"])
        elif codes:
            made["decoder_input_ids"] = codes.random(generators, min(ANSWER, length))
        elif both:
            made["decoder_input_ids"] = random_ids(words.ordinary, min(ANSWER, length), generators)
        return made

    cost = _cost(model, len(rows), min(ANSWER, length) if both else length) if writes else ""
    _say(model, f"{spec.samples} windows of {length} tokens", cost, asked)
    # The digest does not cover offloaded weights, so it could be that of another model.
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    made = make() if offloaded else kept(digest.hexdigest(), make)
    batches = list(_split({k: v[: spec.samples] for k, v in made.items()}))
    return SelfMade(batches, list(_split({k: v[spec.samples :] for k, v in made.items()})), spec)


def _can_write(model: Any) -> bool:
    """Return whether a model predicts the next token of a text."""
    from transformers import GenerationMixin

    return isinstance(model, GenerationMixin) and bool(model.can_generate())


def _has_encoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _split(made: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    count = len(next(iter(made.values())))
    for start in range(0, count, BATCH):
        yield {name: tensor[start : start + BATCH] for name, tensor in made.items()}


def _read(model: Any, words: Words, length: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Return texts for an encoder: random tokens; a model that fills masks writes every other text itself."""
    ids = random_ids(words.ordinary, length, generators)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if words.mask is None or head is None or _can_write(model):
        return ids
    masked = torch.ones(length, dtype=torch.bool)
    masked[: len(words.frame[0])] = masked[length - len(words.frame[1]) :] = False
    half = words.framed(ids[::2].masked_fill(masked, words.mask))

    def predict(filled: Tensor) -> Tensor:
        logits = model(input_ids=filled.to(device_of(model))).logits
        return _only(logits, words.ordinary)

    ids[::2] = fill_masks(half, masked, predict, generators[::2])
    return ids


def _only(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return logits that rule out all but the given tokens."""
    allowed = torch.full((logits.shape[-1],), -torch.inf, device=logits.device)
    allowed[tokens.to(logits.device)] = 0
    return logits.float() + allowed


def _written(
    model: Any,
    prompts: Sequence[list[int]],
    length: int,
    generators: Sequence[torch.Generator],
    words: Words,
    read: Tensor | None = None,
) -> Tensor:
    """Make a model continue prompts of different lengths in one batch, [rows, length] int64.

    A text may end within a window; the model then starts the next, as in packed training data.

    Args:
        model: a model that generates.
        prompts: prompt of each row, at least one token.
        length: tokens per row.
        generators: one per row.
        words: tokens of the model.
        read: the encoder's input (the main input), for a model with an encoder.
    """
    from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList

    first = torch.tensor([prompt[:1] for prompt in prompts], device=device_of(model))

    def choose(ids: Tensor, scores: Tensor) -> Tensor:
        at = ids.shape[1]
        # Each row draws at every position, even where its prompt sets the token, so no row depends on the others'
        # prompts.
        drawn = draw(scores, generators).tolist()
        chosen = [prompt[at] if at < len(prompt) else token for prompt, token in zip(prompts, drawn, strict=True)]
        forced = torch.full_like(scores, -torch.inf)
        forced[torch.arange(len(chosen)), torch.tensor(chosen)] = 0
        return forced

    settings = GenerationConfig(
        **{"do_sample": False, "num_beams": 1, "max_new_tokens": length - 1, "use_cache": True},
        **{"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0},
        **{"eos_token_id": _NO_TOKEN, "pad_token_id": 0},
        **{"num_return_sequences": 1, "return_dict_in_generate": False, "disable_compile": True},
    )
    inputs: dict[str, Any] = {"inputs": first, "attention_mask": torch.ones_like(first)}
    if read is not None:
        inputs = {"inputs": read.to(device_of(model)), "decoder_input_ids": first}
    # Some classes have their own `generate`, for longer audio, say.
    try:
        made = GenerationMixin.generate(
            model, **inputs, generation_config=settings, logits_processor=LogitsProcessorList([choose])
        )
    except Exception as error:  # noqa: BLE001 (each architecture generates in its own way)
        name = type(model).__name__
        logger.warning(
            "%s cannot generate text (%s: %s): using random tokens instead", name, type(error).__name__, error
        )
        return random_ids(words.ordinary, length, generators)
    return made[:, :length].cpu()


def _cost(model: Any, rows: int, steps: int) -> str:
    """Return an estimate of the generation time, from the time of one step."""
    ids = torch.zeros(rows, 1, dtype=torch.long)
    start = time.perf_counter()
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if _has_encoder(model) else {})
    forward(model, inputs, options_for(model, ()))
    return f", about {steps * (time.perf_counter() - start):.0f} s to generate unless cached"


def _say(model: Any, what: str, cost: str, asked: bool) -> None:
    why = "calibration='self'" if asked else "no calibration data was given"
    yours = "" if asked else "; to use your own, pass HfQuantConfig(..., calibration=...) or a loader"
    level = logging.INFO if asked else logging.WARNING
    name = type(model).__name__
    logger.log(level, "%s: %s, so it is calibrated on %s that it generates%s%s", name, why, what, cost, yours)


# ------------------------------------------------------------------------------------------------------------ noise


def _noise(model: nn.Module, shapes: dict[str, Any], spec: SelfSpec, processors: Processors) -> SelfMade:
    rows = max(len(v) for v in shapes.values() if isinstance(v, Tensor) and v.dim())
    spec = spec.settled(spec.samples or NOISE)
    assert spec.samples is not None
    count = -(-spec.samples // rows)
    batches = [_filled(model, shapes, processors, generator(spec.seed, i)) for i in range(count + 1)]
    other = _filled(model, shapes, processors, generator(spec.seed + 1, 0))
    return SelfMade(batches[:count], [batches[count], other], spec)


def _filled(model: Any, shapes: dict[str, Any], processors: Processors, source: torch.Generator) -> dict[str, Any]:
    """Return example inputs with noise for values: images, audio and tokens."""
    made = dict(shapes)
    for name, value in shapes.items():
        if not isinstance(value, Tensor):
            continue
        if name.startswith("pixel_values"):
            made[name] = _pictures(value, processors.images, source)
        elif name == "input_features":
            made[name] = _features(value, processors.sounds, source)
        elif name == "flattened_patches":  # each behind its row and column
            made[name] = torch.cat([value[..., :2], _pictures(value[..., 2:], processors.images, source)], -1)
        elif value.is_floating_point() and value.dim() > 1 and value.numel():
            long = [size for size in value.shape if size > 1]  # one number per step has its noise along the steps
            made[name] = pink_noise(long, 1, source).reshape(value.shape).to(value) if long else value
        elif name in ("input_ids", "decoder_input_ids"):
            made[name] = _tokens(model, value, source)
    if "decoder_input_ids" in made and _can_write(model):
        main = made[model.main_input_name]
        words, rows = Words(model, processors.tokenizer), len(made["decoder_input_ids"])
        length = min(ANSWER, getattr(model.config, "max_target_positions", ANSWER))
        made["decoder_input_ids"] = _written(model, [[words.start]] * rows, length, [source] * rows, words, main)
    return made


def _pictures(like: Tensor, processor: Any, source: torch.Generator) -> Tensor:
    """Return images as a processor would: values around 0.5, shifted and scaled by its statistics."""
    if like.dim() < 4:  # a row of patches
        return torch.randn(like.shape, generator=source).to(like)
    levels = (0.5 + 0.25 * pink_noise(like.shape, 2, source)).clamp(0, 1)
    processor = getattr(processor, "image_processor", processor)
    mean, std = (getattr(processor, f"image_{name}", None) for name in ("mean", "std"))
    channels = like.shape[-3]
    if getattr(processor, "do_normalize", processor is None):
        values = [v if isinstance(v, (list, tuple)) and len(v) == channels else [0.5] * channels for v in (mean, std)]
        shift, scale = (torch.tensor(v, dtype=torch.float32).view(channels, 1, 1) for v in values)
        levels = (levels - shift) / scale
    return levels.to(like)


def _features(like: Tensor, extractor: Any, source: torch.Generator) -> Tensor:
    """Return the extractor's features of pink-noise audio, or else noise along time in their range."""
    rate = getattr(extractor, "sampling_rate", None)
    if rate:
        sounds = 0.1 * pink_noise((len(like), 10 * rate), 1, source)
        made = extractor(list(sounds.numpy()), sampling_rate=rate, return_tensors="pt").get("input_features")
        if made is not None and made.shape[1:] == like.shape[1:]:
            return made.to(like)
    return (0.5 * pink_noise(like.shape, 1, source)).to(like)


def _tokens(model: Any, like: Tensor, source: torch.Generator) -> Tensor:
    """Return random tokens; tokens that represent images or end a text are left unchanged."""
    fields = model.config.to_dict().items()
    special = torch.tensor([v for k, v in fields if k.endswith(_SPECIAL) and isinstance(v, int)], dtype=like.dtype)
    random = torch.randint(vocabulary(model), like.shape, generator=source).to(like)
    fixed = torch.isin(like, special.to(like.device)) | torch.isin(random, special.to(like.device))
    return torch.where(fixed, like, random)
