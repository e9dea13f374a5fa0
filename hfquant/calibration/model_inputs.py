"""Convert dataset values to model inputs: texts and chats to tokens, images to pixels, numbers to tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from inspect import signature
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hfquant.calibration.batches import CalibrationError
from hfquant.calibration.self_made import generator, random_ids
from hfquant.console import counted

if TYPE_CHECKING:
    from hfquant.calibration.streams import StreamSpec

logger = logging.getLogger(__name__)

MAX_LENGTH = 1 << 20  # tokenizers without a limit report 1e30
_PARAGRAPH_CHARS = 1 << 16
_KINDS = {"input_features": "sounds", "input_values": "sounds", "pixel_values": "images"}
_COLUMN_OF = {"sounds": "audio", "images": "image"}
#: Steps of audio codes that a decoder reads along with a text.
CODES = 128


class MissingReaderError(CalibrationError):
    """Data that cannot be read without a tokenizer or processor, which is ``argument``."""

    def __init__(self, what: str, argument: str) -> None:
        super().__init__(
            f"calibration data: {what}; none was given or found with the model: pass one as "
            f"{{'dataset': ..., {argument!r}: {argument}}}, or give batches of model inputs"
        )
        self.what, self.argument = what, argument


class Reader(NamedTuple):
    """The tokenizer or processor that converts raw rows to model inputs, its limit, and the torch module to run."""

    tokenizer: Any = None
    processor: Any = None
    limit: int = MAX_LENGTH
    model: Any = None


def is_image(value: Any) -> bool:
    """Return whether ``value`` is a PIL image."""
    return type(value).__module__.startswith("PIL.")


def from_texts(values: Iterable[Any], spec: StreamSpec, reader: Reader, column: str, size: int) -> Iterator[Any]:
    """Convert texts, chats or token ids to token batches; without a tokenizer, texts become lists of prompts."""
    if (codes := codes_of(reader.model)) and codes.argument == "input_ids":
        raise CalibrationError(
            f"calibration data: {type(reader.model).__name__} reads audio codes, not text or tokens; give batches of "
            f"its inputs, with 'input_ids' {codes.shape}"
        )
    tokenizer, texts = reader.tokenizer, iter(values)
    first = next(texts)
    texts = chain([first], texts)
    if kind := _other_than_text(reader.model):
        raise CalibrationError(
            f"calibration data: {type(reader.model).__name__} reads {kind}, not text; give rows with them, such as "
            f"{{{_COLUMN_OF[kind]!r}: ...}}, or batches of its inputs, {reader.model.main_input_name!r}"
        )
    if isinstance(first, str) and tokenizer is None:
        if reader.model is not None:
            raise MissingReaderError("text needs a tokenizer", "tokenizer")
        yield from grouped(islice(texts, spec.samples), size)
        return
    chats = is_chat(first)
    if chats:
        texts = _rendered(texts, tokenizer, column)
    seqlen = min(spec.seqlen, reader.limit)
    eos = getattr(tokenizer, "eos_token_id", None)
    pack = spec.pack
    if pack is None:
        pack = tokenizer is None or (eos is not None and getattr(tokenizer, "cls_token_id", None) is None)
    if pack:
        sequences = _packed(_token_ids(texts, tokenizer, None, special=False), eos, seqlen)
    else:
        sequences = (ids for ids in _token_ids(texts, tokenizer, seqlen, special=not chats) if ids)
    yield from _token_batches(_counted(sequences, spec.samples), size, reader.model)


def _other_than_text(model: Any) -> str:
    """Return what a model reads, in words, if text is no part of it; else ""."""
    if not isinstance(model, nn.Module) or "input_ids" in signature(model.forward).parameters:
        return ""
    return _KINDS.get(getattr(model, "main_input_name", ""), "")


def check_readable(column: str, value: Any, names: Sequence[str], reader: Reader) -> None:
    """Raise if a column holds single numbers and the model reads something else: text, tokens or images.

    Raises:
        CalibrationError: names the columns.
    """
    single = isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0
    if single and (reader.tokenizer is not None or hasattr(reader.model, "main_input_name")):
        wanted = getattr(reader.model, "main_input_name", "input_ids")
        raise CalibrationError(
            f"column {column!r} holds numbers, not {'text' if wanted == 'input_ids' else wanted}; choose another with "
            f"{{'dataset': ..., 'column': ...}} if there is one: the columns are {list(names)}"
        )


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Join lines up to the next empty line, or up to `_PARAGRAPH_CHARS` characters."""
    held: list[str] = []
    length = 0
    for line in lines:
        line = line.rstrip("\n")
        if line.strip():
            held.append(line)
            length += len(line) + 1
        if held and (not line.strip() or length > _PARAGRAPH_CHARS):
            yield "\n".join(held)
            held, length = [], 0
    if held:
        yield "\n".join(held)


def unpadded(row: Mapping[str, Any], column: str) -> Any:
    """Return a row's value; if the row has an attention mask of its tokens as well, those that it keeps."""
    value, mask = row[column], row.get("attention_mask")
    if value is None or mask is None or isinstance(value, str):
        return value
    flags = np.asarray(mask)
    if flags.shape != (len(value),):  # not one for each token: a mask over pairs of them, say
        return value
    return [token for token, kept in zip(value, flags.tolist(), strict=True) if kept]


def is_chat(value: Any) -> bool:
    """Return whether ``value`` is a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _rendered(chats: Iterable[Any], tokenizer: Any, column: str) -> Iterator[str]:
    """Yield chats as text, including the special tokens of the tokenizer's template."""
    for chat in chats:
        if any(not {"role", "content"} <= turn.keys() for turn in chat):
            raise CalibrationError(
                f"column {column!r} holds lists of dicts with keys {list(chat[0])}, which are not chats: every "
                "message needs 'role' and 'content'"
            )
        if not getattr(tokenizer, "chat_template", None):
            lack = "there is no tokenizer" if tokenizer is None else "the tokenizer has no chat template"
            raise CalibrationError(
                f"column {column!r} holds chats, but {lack}; render them to text, or "
                "pass a tokenizer with a chat template"
            )
        yield tokenizer.apply_chat_template(chat, tokenize=False)


def _token_ids(values: Iterable[Any], tokenizer: Any, seqlen: int | None, *, special: bool) -> Iterator[list[int]]:
    """Yield the tokens of each text, in full or truncated to ``seqlen``, with or without special tokens."""
    cut = {} if seqlen is None else {"truncation": True, "max_length": seqlen}
    for value in values:
        try:
            if isinstance(value, str):  # verbose=False: a text over the model's limit is fine here
                ids = tokenizer(value, add_special_tokens=special, verbose=False, **cut)["input_ids"]
            else:
                ids = [int(token) for token in value][:seqlen]
        except (TypeError, ValueError) as error:
            raise CalibrationError(
                f"calibration data: {value!a:.80} cannot be tokenized: {_broken(value) or error}"
            ) from error
        yield ids


def _broken(value: Any) -> str:
    """Return why a text cannot be encoded, for which tokenizers have no clear words; "" if it can, or is no text."""
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        return f"it has half a surrogate pair at position {error.start}"
    return ""


def _packed(documents: Iterable[list[int]], eos: int | None, seqlen: int) -> Iterator[list[int]]:
    """Join documents, each followed by an end-of-text token, and split at `seqlen`; the remainder comes last."""
    held: list[int] = []
    for document in documents:
        if not document:
            continue
        held += document
        if eos is not None:
            held.append(eos)
        start = 0
        while len(held) - start >= seqlen:
            yield held[start : start + seqlen]
            start += seqlen
        del held[:start]
    if held:
        yield held


def _counted(items: Iterable[Any], samples: int | None) -> Iterator[Any]:
    count = 0
    for item in islice(items, samples):
        count += 1
        yield item
    if samples is not None and count < samples:
        logger.warning(
            "the calibration data yields only %s, but %d were requested", counted(count, "sequence"), samples
        )


def _token_batches(sequences: Iterable[list[int]], size: int, model: Any) -> Iterator[Any]:
    """Batch without padding: sequences of equal length form one tensor; mixed lengths form a list of tensors."""
    for group in grouped(sequences, size):
        lengths = dict.fromkeys(map(len, group))
        tensors = [torch.tensor([ids for ids in group if len(ids) == length]) for length in lengths]
        batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tensors]
        inputs = [with_decoder_inputs(batch, model) for batch in batches]
        yield inputs[0] if len(inputs) == 1 else inputs


def with_decoder_inputs(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return a model's inputs; for an encoder-decoder, let its decoder read the same tokens, behind its start token.

    Some classes, such as BART, do so themselves. Others, such as T5, cannot run on the encoder's inputs alone. Next to
    sounds or images the decoder reads its start token, unless it is given more. A decoder of audio codes reads random
    ones, always the same ones with the same text.
    """
    config = getattr(model, "config", None)
    halves = [getattr(getattr(config, half, None), "vocab_size", None) for half in ("encoder", "decoder")]
    takes = signature(model.forward).parameters if getattr(config, "is_encoder_decoder", False) else {}
    given = inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds", "labels"}
    if "decoder_input_ids" not in takes or given:
        return inputs
    starts = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos"))
    start = next((token for token in starts if isinstance(token, int)), 0)
    if "input_ids" not in inputs:
        main = inputs.get(getattr(model, "main_input_name", ""))
        if not isinstance(main, Tensor) or model.main_input_name not in _KINDS or codes_of(model):
            return inputs
        # Of the tokens to write for a sound or an image, only the one that comes first is known.
        return {**inputs, "decoder_input_ids": torch.full((len(main), 1), start, device=main.device)}
    if codes := codes_of(model):
        generators = [generator(*row) for row in inputs["input_ids"].tolist()]
        return {**inputs, "decoder_input_ids": codes.random(generators)}
    if halves[0] != halves[1]:
        raise CalibrationError("calibration data: the decoder has another vocabulary; give decoder_input_ids as well")
    added = {"decoder_input_ids": _shifted(inputs["input_ids"], start)}
    if "attention_mask" in inputs and "decoder_attention_mask" in takes:
        added["decoder_attention_mask"] = _shifted(inputs["attention_mask"], 1)
    return {**inputs, **added}


def _shifted(rows: Tensor, first: int) -> Tensor:
    """Return rows [batch, length] with ``first`` in front, at the same length."""
    return torch.cat([torch.full_like(rows[:, :1], first), rows[:, :-1]], 1)


class Codes(NamedTuple):
    """The audio codes that a decoder reads: in each step, one of each codebook (MusicGen, Dia).

    Attributes:
        argument: the forward's argument for them.
        books: number of codebooks; a text token in front of the codes counts as one (Kyutai's speech-to-text).
        config: the decoder's config.
        last: whether the codebooks are the last dimension, [samples, length, books], not [samples, books, length].
    """

    argument: str
    books: int
    config: Any
    last: bool = False

    @property
    def vocab_size(self) -> int:
        """Number of different codes."""
        return int(getattr(self.config, "codebook_vocab_size", None) or self.config.vocab_size)

    @property
    def shape(self) -> str:
        """Shape of the argument, in words."""
        return f"[batch, length, {self.books}]" if self.last else f"[batch, {self.books}, length]"

    def arranged(self, ids: Tensor) -> Tensor:
        """Return ids [samples, books, length] as the decoder reads them.

        MusicGen's processor joins the first two dimensions; its decoder also takes them apart, as samples must be.
        """
        return ids.transpose(1, 2).contiguous() if self.last else ids

    def random(self, generators: Sequence[torch.Generator], length: int = CODES) -> Tensor:
        """Return random codes behind start tokens, as the decoder reads them, int64.

        Args:
            generators: one per sample.
            length: steps; cut to the decoder's positions.
        """
        length = min(length, getattr(self.config, "max_position_embeddings", None) or length)
        starts, ends = ("decoder_start", "audio_bos", "bos"), ("eos", "pad")
        special = [getattr(self.config, f"{name}_token_id", None) for name in (*starts, *ends)]
        ordinary = torch.tensor([i for i in range(self.vocab_size) if i not in special])
        made = random_ids(ordinary, self.books * length, generators).unflatten(1, (self.books, length))
        made[..., 0] = next((token for token in special[: len(starts)] if isinstance(token, int)), 0)
        return self.arranged(made)


def codes_of(model: Any) -> Codes | None:
    """Return the audio codes that a model's decoder, or the model itself, reads; None if it reads one id per step."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        decoder = getattr(config, "decoder", None) or getattr(config, "decoder_config", None)
        if books := getattr(decoder, "num_codebooks", None):
            return Codes("decoder_input_ids", books, decoder)
        books = getattr(decoder, "num_channels", None)
        return Codes("decoder_input_ids", books, decoder, last=True) if books else None
    books, tables = getattr(config, "num_codebooks", None), None
    if books and hasattr(model, "get_input_embeddings"):
        with suppress(NotImplementedError):  # of a codec
            tables = model.get_input_embeddings()
    if books and getattr(config, "codebook_vocab_size", None):
        return Codes("input_ids", books + 1, config, last=True)
    # Others with codebooks read text with them, or have one table for all (Moshi, CSM, Higgs).
    return Codes("input_ids", books, config) if isinstance(tables, nn.ModuleList) and len(tables) == books else None


def images_batch(images: list[Any], reader: Reader) -> Any:
    """Return images as the processor's {"pixel_values": ...}, or as {"image": [...]} if there is no processor."""
    processor = reader.processor
    if processor is None:
        if reader.model is not None:
            raise MissingReaderError("images need a processor", "processor")
        return {"image": images}
    processor = getattr(processor, "image_processor", processor)
    return dict(processor(images=[image.convert("RGB") for image in images], return_tensors="pt"))


def stacked(column: str, values: list[Any]) -> Any:
    """Stack numbers and arrays of one shape into a tensor `[batch, ...]`, float64 as float32; keep other lists."""
    if isinstance(values[0], (str, Mapping)) or is_image(values[0]):
        return values
    try:
        tensor = torch.stack([v if isinstance(v, Tensor) else torch.from_numpy(np.asarray(v)) for v in values])
    except (ValueError, TypeError, RuntimeError) as error:
        raise CalibrationError(
            f"column {column!r}: the rows cannot be stacked ({error}); give them the same shape, or set batch_size=1"
        ) from None
    return tensor.float() if tensor.dtype is torch.float64 else tensor


def grouped(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of ``size`` items; the last may be shorter."""
    items = iter(items)
    while group := list(islice(items, size)):
        yield group


def text_config(model: Any) -> Any:
    """Return the config of a model's text part: the whole for most; the encoder's, if the decoder reads audio codes."""
    parts = [getattr(model.config, name, None) for name in ("text_encoder", "encoder_config")]
    if codes_of(model) and any(parts):
        return parts[0] or parts[1]
    try:
        return model.config.get_text_config()
    except (AttributeError, ValueError):
        return model.config


def text_positions(model: Any) -> int | None:
    """Return the most tokens that a model's table of positions allows, None if its config sets no limit.

    RoBERTa and its kin count positions from after the padding token, so the first rows of their tables are not used.
    """
    most: int | None = getattr(text_config(model), "max_position_embeddings", None)
    # Not every table is an nn.Embedding: I-BERT has a class of its own.
    found = (getattr(module, "padding_idx", None) for n, module in model.named_modules() if "position_embed" in n)
    unused = max((index + 1 for index in found if index is not None), default=0)
    return most if most is None else most - unused
