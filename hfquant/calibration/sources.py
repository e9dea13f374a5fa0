"""Recognize what users pass as calibration data, and turn columns, series and rows into sources that can be opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from hfquant.calibration.batches import CalibrationError
from hfquant.calibration.media_rows import is_sound
from hfquant.calibration.model_inputs import is_chat

#: Columns read by default: the first of these that there is.
COLUMNS = ("text", "prompt", "caption", "messages", "input_ids", "image", "latent", "latents")


def is_source(data: Any) -> bool:
    """Return whether data still has to be turned into batches; a list of strings is recognized by :func:`are_texts`."""
    return isinstance(data, (Mapping, str, os.PathLike)) or of_datasets(data) or _is_series(data) or are_rows(data)


def of_datasets(value: Any) -> bool:
    """Return whether ``value`` is a dataset, a dict of splits or a column from the library ``datasets``."""
    known = hasattr(value, "features") or hasattr(value, "column_name") or isinstance(value, Mapping)
    return type(value).__module__.startswith("datasets.") and known


def _is_series(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "pandas" and type(value).__name__ == "Series"


def are_texts(value: Any) -> bool:
    """Return whether ``value`` is a list that begins with a string, apart from None."""
    return isinstance(value, (list, tuple)) and isinstance(next((v for v in value if v is not None), None), str)


def are_rows(value: Any) -> bool:
    """Return whether ``value`` is a list of dicts as a dataset yields them: of text, chats or sounds, not of tensors.

    Samples for a forward that takes a string among tokens are not rows.
    """
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], Mapping):
        return False
    held = list(value[0].values())
    if any(isinstance(v, (Tensor, np.ndarray)) for v in held):
        return False
    readable = "input_ids" not in value[0] and any(isinstance(v, str) or is_chat(v) or is_sound(v) for v in held)
    return readable or not {"text", "messages"}.isdisjoint(value[0])


def openable(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spec of a stream with a list of strings or a dataset in place of a column, series or list of rows.

    Lists, and what is read like one, are read whole and in order unless the spec says otherwise.

    Raises:
        CalibrationError: a column holds no text or something else, or a list something that is neither text nor None.
    """
    data: Any = spec.get("dataset")
    if of_datasets(data) and hasattr(data, "column_name"):
        if hasattr(data.source, "column_name") and not hasattr(data, "__len__"):
            raise CalibrationError(f"calibration data: {_of_column(data)} is streamed from within another column")
        if not hasattr(data, "__len__"):  # a stream may have no end
            return {"column": data.column_name, **spec, "dataset": data.source}
        if not isinstance(next((value for value in data if value is not None), ""), str):
            raise CalibrationError(f"calibration data: {_of_column(data)} does not hold text")
        data = list(data)
    elif _is_series(data):
        data = data.dropna().tolist()
    if isinstance(data, list) and not any(item is not None for item in data):
        raise CalibrationError("calibration data: there is no text in it")
    if are_rows(data):
        return {"samples": None, "seed": None, **spec, "dataset": _dataset(data)}
    if are_texts(data):
        return {"samples": None, "seed": None, **spec, "dataset": _texts(data)}
    return {**spec, "dataset": data} if "dataset" in spec else dict(spec)


def _of_column(column: Any) -> str:
    name = column.column_name
    return f"pass the dataset itself and name the column, {{'dataset': ..., 'column': {name!r}}}: the column {name!r}"


def _texts(items: Iterable[Any]) -> list[str]:
    texts = []
    for number, item in enumerate(items):
        if not isinstance(item, (str, type(None))):
            raise CalibrationError(f"calibration data: item {number} of the list is {type(item).__name__}, not text")
        if item is not None:
            texts.append(item)
    return texts


def _dataset(rows: Iterable[Mapping[str, Any]]) -> Any:
    import datasets

    try:
        return datasets.Dataset.from_list([dict(row) for row in rows])
    except (ValueError, TypeError, AttributeError, NotImplementedError, OverflowError) as error:
        raise CalibrationError(
            f"calibration data: the dicts in the list cannot be read as rows of one dataset ({error})"
        ) from None
