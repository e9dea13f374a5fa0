"""Convert rows with sounds, or with images next to text, to model inputs, with the processor saved with a model."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from inspect import signature
from itertools import islice
from typing import Any

import numpy as np
from torch import nn

from hfquant.calibration.batches import CalibrationError
from hfquant.calibration.model_inputs import Reader, images_batch, is_chat, is_image, with_decoder_inputs

#: Arguments of a forward that are sounds.
SOUNDS = {"input_features", "input_values"}
#: Keys of a part of a chat that may hold its image.
_IMAGE_KEYS = ("image", "url", "path", "base64")
_LOOKED_AT = 4
_TEXTS = ("text", "prompt", "caption")


def arguments_of(model: Any) -> set[str]:
    """Return the names of the arguments of a model's forward; empty without a torch module."""
    return set(signature(model.forward).parameters) if isinstance(model, nn.Module) else set()


def media_columns(data: Iterable[Mapping[str, Any]], column: Any, model: Any) -> list[str]:
    """Return the columns that only a model's processor can read, together; none if the model reads another column.

    Args:
        data: rows of a dataset, of which the first few are looked at.
        column: what the user chose.
        model: what reads the rows.
    """
    arguments = arguments_of(model)
    if isinstance(column, dict) or not arguments & {*SOUNDS, "pixel_values"}:
        return []
    # Some rows of a table may have no image.
    rows = [row.items() for row in islice(data, _LOOKED_AT)]
    held = {name: value for row in rows for name, value in row if column in (None, name) and value is not None}
    sounds = [name for name, value in held.items() if is_sound(value)] if arguments & SOUNDS else []
    images = [name for name, value in held.items() if _images(value)] if "pixel_values" in arguments else []
    chats = [name for name, value in held.items() if is_chat(value)]
    words = next((name for name in _TEXTS if isinstance(held.get(name), str)), None)
    if "input_ids" not in arguments:
        return (sounds or images)[:1] if sounds or words or chats else []
    if chats and (images or sounds or media_parts(held[chats[0]])):
        return [chats[0], *images, *sounds]
    return [words, *images, *sounds] if words and (images or sounds) else []


def media_batches(rows: Iterable[Mapping[str, Any]], columns: list[str], reader: Reader) -> Iterator[dict[str, Any]]:
    """Yield the inputs of each row, which no padding enters, in a batch of its own.

    Args:
        rows: those of a dataset; rows without a value in the first column are left out.
        columns: see :func:`media_columns`.
        reader: its model reads them.

    Raises:
        CalibrationError: names the columns and what to do.
    """
    first, others = columns[0], columns[1:]
    for row in rows:
        value = row[first]
        if value is None:
            continue
        if any(is_sound(row[name]) for name in others):
            raise _unread(columns, "text next to sounds is not read from rows", reader)
        images = [image for name in others for image in _images(row[name])]
        try:
            if is_sound(value):
                inputs = _heard(value, first, reader)
            elif is_image(value):
                inputs = images_batch([value], reader)
            elif is_chat(value):
                inputs = _chat_inputs(value, images, columns, reader)
            else:
                processor = _complete(columns, reader)
                inputs = processor(images=images or None, text=[value], return_tensors="pt")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            if isinstance(error, CalibrationError):
                raise
            raise _unread(columns, f"the processor cannot read them: {_line(error)}", reader) from error
        inputs = dict(inputs)
        token = getattr(reader.processor, "image_token_id", None)
        if "pixel_values" in inputs and isinstance(token, int) and not (inputs["input_ids"] == token).any():
            mark = getattr(reader.processor, "image_token", None)
            raise _unread(columns, f"the text does not say where the image goes, with {mark!r}", reader)
        yield with_decoder_inputs(inputs, reader.model)


def is_sound(value: Any) -> bool:
    """Return whether ``value`` is a sound as ``datasets`` gives it: its samples and their rate, decoded or not."""
    if isinstance(value, Mapping):
        return {"array", "sampling_rate"} <= value.keys()
    return type(value).__name__ == "AudioDecoder"


def media_parts(chat: list[Any]) -> list[Mapping[str, Any]]:
    """Return the parts of a chat that are not text."""
    contents = [turn.get("content") for turn in chat]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if isinstance(part, Mapping) and part.get("type") not in (None, "text")]


def _images(value: Any) -> list[Any]:
    """Return the images of a column that holds one or a list of them; none of any other."""
    values = value if isinstance(value, list) else [value]
    return list(values) if values and all(map(is_image, values)) else []


def _decoded(image: Any) -> Any:
    """Return an image; those within a chat are stored as files in a table."""
    if not isinstance(image, Mapping):
        return image
    from PIL import Image

    return Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"])


def _heard(sound: Any, column: str, reader: Reader) -> Any:
    extractor = getattr(reader.processor, "feature_extractor", reader.processor)
    if extractor is None:
        raise CalibrationError(
            f"column {column!r} holds sounds, which need a feature extractor; none was given or found with the model: "
            "pass one as {'dataset': ..., 'processor': processor}, or give batches of model inputs"
        )
    rate, wanted = sound["sampling_rate"], getattr(extractor, "sampling_rate", None)
    if wanted is not None and rate != wanted:
        raise CalibrationError(
            f"column {column!r} holds sounds of {rate} Hz, but the feature extractor reads {wanted} Hz: resample them, "
            f"as dataset.cast_column({column!r}, datasets.Audio({wanted})) does"
        )
    wave = np.asarray(sound["array"], dtype=np.float32)
    return extractor(wave, sampling_rate=rate, return_tensors="pt")


def _chat_inputs(chat: list[Any], images: list[Any], columns: list[str], reader: Reader) -> Any:
    """Return the inputs of a chat, whose image parts may leave their images to a column of the row, in order."""
    kinds = {part["type"] for part in media_parts(chat)} - {"image"}
    if kinds:
        raise _unread(columns, f"chats with parts of type {min(kinds)!r} are not read from rows", reader)
    left = iter(images)

    def filled(part: Mapping[str, Any]) -> dict[str, Any]:
        # In a table every part has all keys, most of them None.
        part = {key: value for key, value in part.items() if value is not None}
        if part.get("type") != "image":
            return part
        image = next((part[key] for key in _IMAGE_KEYS if key in part), None)
        if image is None and (image := next(left, None)) is None:
            raise _unread(columns, "a chat has more parts of type 'image' than images", reader)
        return {"type": "image", "image": _decoded(image)}

    turns = []
    for turn in chat:
        content = turn["content"]
        turns.append({**turn, "content": [*map(filled, content)] if isinstance(content, list) else content})
    if next(left, None) is not None:
        raise _unread(columns, "a chat has fewer parts of type 'image' than images", reader)
    processor = _complete(columns, reader)
    return processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")


def _complete(columns: list[str], reader: Reader) -> Any:
    if getattr(reader.processor, "tokenizer", None) is None:
        raise _unread(columns, "images next to text need the model's whole processor", reader)
    return reader.processor


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _unread(columns: list[str], why: str, reader: Reader) -> CalibrationError:
    named = " and ".join(map(repr, columns))
    return CalibrationError(
        f"calibration data, {'columns' if len(columns) > 1 else 'column'} {named}: {why}. Give batches of "
        f"{type(reader.model).__name__}'s inputs, made by its processor, or choose a column of text alone with "
        "{'dataset': ..., 'column': ...}"
    )
