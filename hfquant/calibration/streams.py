"""Turn calibration data from any source into batches of model inputs.

Everything here is lazy and can be iterated repeatedly: each pass reopens its source and, for one seed, yields the same
batches. Memory holds one batch and one shuffle buffer, however long the source is.
"""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import nn

from hfquant.calibration import storage
from hfquant.calibration.batches import CalibrationData, CalibrationError
from hfquant.calibration.calibset import BaseCalibSet, load_calibrate_set
from hfquant.calibration.media_rows import media_batches, media_columns
from hfquant.calibration.model_inputs import (
    MAX_LENGTH,
    Reader,
    check_readable,
    from_texts,
    grouped,
    images_batch,
    is_chat,
    is_image,
    paragraphs,
    stacked,
    text_positions,
    unpadded,
    with_decoder_inputs,
)
from hfquant.calibration.sources import COLUMNS, are_rows, are_texts, is_source, of_datasets, openable
from hfquant.console import counted
from hfquant.hub_errors import hub_errors
from hfquant.schema import explained

logger = logging.getLogger(__name__)

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
#: Samples to read beyond those requested, for checking the quantized model.
CHECKS = 2

#: Keys of a stream that apply to a calibration set.
_SET_KEYS = {"dataset", "samples", "batch_size"}

_Positive = Annotated[int, Field(gt=0)]


def _check_dataset(value: Any) -> Any:
    if isinstance(value, (str, os.PathLike)) or of_datasets(value) or are_texts(value):
        return value
    raise ValueError("must be a hub id, a path, a datasets object or a list of strings")


class StreamSpec(BaseModel):
    """A calibration stream as written by the user: `{"dataset": ..., ...}`.

    Attributes:
        dataset: hub id, local file or folder, a `datasets` object, or a list of strings or rows (all read, in order,
            unless `samples` and `seed` say otherwise). Or the path of a calibration set (read whole, in order, unless
            `samples` says how many; only `batch_size` applies otherwise).
        name: configuration of a hub dataset.
        split: which split to read; by default "train", or the only one of a `DatasetDict`.
        column: column to read, or {argument of the model: column}. By default the first known name: text, prompt,
            caption, messages, input_ids, image, latent (with a tokenizer, messages comes right after text). Chats
            (lists of role and content) are rendered with the tokenizer's template. Of input_ids alone, those that a
            column attention_mask marks as padding are left out.
        samples: number of sequences (text) or rows (anything else) to read; None for all.
        seqlen: tokens per sequence, capped by the tokenizer's limit.
        seed: seed of the shuffle; None keeps the order of the source.
        batch_size: samples per batch.
        buffer_size: rows in the shuffle buffer of a stream.
        pack: join texts with the end-of-text token and split them at `seqlen`, instead of one text per sequence. By
            default if the tokenizer has such a token and no start token of its own (BERT's [CLS]).
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, strict=True)

    dataset: Annotated[Any, BeforeValidator(_check_dataset)]
    name: str | None = None
    split: str | None = None
    column: str | dict[str, str] | None = None
    samples: _Positive | None = 128
    seqlen: _Positive = 512
    seed: Annotated[int, Field(ge=0)] | None = 0
    batch_size: _Positive | None = None
    buffer_size: _Positive = 1000
    pack: bool | None = None


class Batches(Iterable[Any]):
    """Batches of model inputs that can be iterated any number of times.

    Args:
        make: opens the source.
        empty: error detail for a source that yields no batch.
        provenance: what the source is, as JSON.
        after: opens the source after the requested samples.
    """

    def __init__(
        self,
        make: Callable[[], Iterator[Any]],
        empty: str,
        provenance: Mapping[str, Any],
        after: Callable[[], Iterator[Any]] = lambda: iter(()),
    ) -> None:
        self._make = make
        self._empty = empty
        self.provenance = provenance
        self._after = after

    @property
    def held_out(self) -> list[Any]:
        """A few samples that are not part of the batches; empty if the source has no more."""
        return list(islice(self._after(), CHECKS))

    def __iter__(self) -> Iterator[Any]:
        empty = True
        for batch in self._make():
            empty = False
            yield batch
        if empty:
            raise CalibrationError(f"the calibration data is empty: {self._empty}")


def calibration_batches(
    calibration: Any,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    model: Any = None,
    batch_size: int | None = None,
) -> Iterable[Any]:
    """Turn the calibration data that a user passes into batches of model inputs.

    Args:
        calibration: one of

            - a dict, see :class:`StreamSpec`: `{"dataset": "wikitext.parquet", "column": "text", "samples": 128}`; it
              may also hold the `tokenizer` or `processor`;
            - a `datasets` object, a path or a hub id, treated as `{"dataset": ...}`;
            - a list of strings, a column of a dataset or a pandas Series that holds text; None is skipped;
            - a list of dicts of strings, as rows of a dataset (for a torch module as `model` only);
            - a calibration set or its path; in a dict, with `samples` to take only its first ones;
            - a DataLoader or any other re-iterable collection of model inputs, returned unchanged.
        tokenizer: turns text into tokens; by default the processor's. Without one, text is returned as lists of
            prompts.
        processor: image processor; without one, images are returned as {"image": [...]}.
        model: its position limit caps the sequence length; a torch module accepts neither untokenized text nor
            unprocessed images; an encoder-decoder reads tokens in both its halves.
        batch_size: samples per batch unless `calibration` sets it; 1 by default.

    Returns:
        An iterable. Text with a tokenizer: {"input_ids", "attention_mask"} int64 `[batch, length]` without padding.
        Text without one: lists of strings. Images: {"pixel_values"}. Latents and numbers: a tensor `[batch, ...]`.
        Several columns: a dict of these. A calibration set: lists of samples.

    Raises:
        CalibrationError: an invalid dict (the message names the key), a path without a finished set, a generator,
            something that is not calibration data or, when iterated, no data.
        FileNotFoundError: a local source that does not exist.
    """
    size = batch_size or 1
    if isinstance(calibration, (str, os.PathLike)) and holds_set(calibration):
        calibration = {"dataset": calibration}
    if isinstance(calibration, Mapping) and names_set(calibration):
        return _of_set(parse_spec(calibration), size)
    if isinstance(calibration, BaseCalibSet):
        return calibration.get_dataloader(batch_size=size)
    # Dicts of strings may be calls of a pipeline, but a torch module takes none.
    calls = are_rows(calibration) and not isinstance(model, nn.Module)
    is_spec = isinstance(calibration, Mapping) and not of_datasets(calibration)
    if is_spec or are_texts(calibration) or (is_source(calibration) and not calls):
        given = openable(calibration if is_spec else {"dataset": calibration})
        tokenizer, processor = given.pop("tokenizer", tokenizer), given.pop("processor", processor)
        tokenizer = tokenizer or getattr(processor, "tokenizer", None)
        limit = _length_limit(tokenizer, model)
        reader = Reader(tokenizer, processor, limit, model if isinstance(model, nn.Module) else None)
        spec = parse_spec(given)
        source = "there is no text in the list" if are_texts(spec.dataset) else f"{spec.dataset} gives no rows"
        provenance, rest = _provenance(spec), partial(_after, spec, reader)
        return Batches(lambda: _from_spec(spec, reader, spec.batch_size or size), source, provenance, rest)
    if isinstance(calibration, Sequence) and calibration and all(is_image(image) for image in calibration):
        images = {"dataset": counted(len(calibration), "image")}
        reader = Reader(None, processor)
        return Batches(lambda: (images_batch(g, reader) for g in grouped(calibration, size)), "no images", images)
    CalibrationData(calibration)  # validates it
    if isinstance(calibration, Sequence) and not calibration:
        raise CalibrationError("calibration data: the list is empty")
    return calibration


def parse_spec(spec: Mapping[str, Any]) -> StreamSpec:
    """Validate a stream as written by the user.

    Raises:
        CalibrationError: the message names the key.
    """
    others = [key for key, value in spec.items() if key not in _SET_KEYS and value is not None]
    if others and names_set(spec):
        raise CalibrationError(
            f"calibration: {spec['dataset']} is a calibration set, ready to use, so {' and '.join(map(repr, others))} "
            "cannot apply to it; allowed are 'samples' and 'batch_size'"
        )
    try:
        return StreamSpec.model_validate(spec)
    except ValidationError as error:
        raise CalibrationError(explained(error, StreamSpec, "calibration", ("tokenizer", "processor"))) from None


def _provenance(spec: StreamSpec) -> dict[str, Any]:
    """Describe a stream for a model card: only the name of a local path, for an object whatever it knows of itself."""
    source = spec.dataset
    if are_texts(source):
        name = counted(len(source), "text")
    elif of_datasets(source):
        info = getattr(source, "info", None)
        name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None) or type(source).__name__
    else:
        name = Path(source).name if Path(source).exists() else str(source)
    return {"dataset": name, **spec.model_dump(exclude={"dataset", "batch_size", "buffer_size"}, exclude_none=True)}


def _length_limit(tokenizer: Any, model: Any) -> int:
    positions = text_positions(model) if isinstance(model, nn.Module) and hasattr(model, "config") else None
    limits = (getattr(tokenizer, "model_max_length", None), positions)
    return min([MAX_LENGTH, *(int(limit) for limit in limits if isinstance(limit, (int, float)) and limit > 0)])


def _of_set(spec: StreamSpec, size: int) -> Iterable[Any]:
    stored = load_calibrate_set(spec.dataset)
    if stored is None:
        raise CalibrationError(
            f"{spec.dataset} holds no finished calibration set: call generate_calibrate_set again to finish it"
        )
    wanted = spec.samples if spec.samples and "samples" in spec.model_fields_set else len(stored)
    return stored.get_dataloader(spec.batch_size or size, sampler=range(min(wanted, len(stored))))


def names_set(spec: Mapping[str, Any]) -> bool:
    """Return whether the `dataset` of a stream is the path of a calibration set."""
    dataset = spec.get("dataset")
    return isinstance(dataset, (str, os.PathLike)) and holds_set(dataset)


def holds_set(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a calibration set at ``path``, finished or not."""
    path = Path(path)
    return path.is_dir() and ((path / storage.INDEX).exists() or any(path.glob("shard-*-of-*")))


def _from_spec(spec: StreamSpec, reader: Reader, size: int) -> Iterator[Any]:
    if are_texts(spec.dataset):
        texts = [spec.dataset[i] for i in _spread(len(spec.dataset), spec.seed)]
        yield from from_texts(texts, spec, reader, "", size)
        return
    data, is_lines = _open(spec)
    names = list(data.features or next(iter(data), {}))
    if together := media_columns(data, spec.column, reader.model):
        yield from islice(media_batches(_rows(data.select_columns(together), spec), together, reader), spec.samples)
        return
    columns = spec.column if isinstance(spec.column, dict) else {"": spec.column or _default_column(names, reader)}
    for column in columns.values():
        if column not in names:
            raise CalibrationError(f"{spec.dataset} has no column {column!r}; it has {names}")
    masks = ["attention_mask"] if columns.get("") == "input_ids" and "attention_mask" in names else []
    data = data.select_columns(list(dict.fromkeys([*columns.values(), *masks])))
    if isinstance(spec.column, dict):
        for group in grouped(islice(_rows(data, spec), spec.samples), size):
            inputs = {argument: stacked(name, [row[name] for row in group]) for argument, name in columns.items()}
            yield with_decoder_inputs(inputs, reader.model)
        return

    column = columns[""]
    if is_lines and reader.tokenizer is not None:
        # Lines of a text file only make sense in order, so join them first and shuffle afterwards.
        values: Iterator[Any] = paragraphs(row[column] for row in data)
        if spec.seed is not None:
            values = _shuffled(values, spec.buffer_size, spec.seed)
    else:
        # Skip nulls, and empty lines in a file of prompts.
        values = (unpadded(row, column) for row in _rows(data, spec))
        values = (value for value in values if value is not None and not (is_lines and not value.strip()))
    first = next(values, None)
    if first is None:
        return
    check_readable(column, first, names, reader)
    values = chain([first], values)
    if isinstance(first, str) or column == "input_ids" or is_chat(first):
        yield from from_texts(values, spec, reader, column, size)
    else:
        groups = grouped(islice(values, spec.samples), size)
        yield from (images_batch(g, reader) if is_image(first) else stacked(column, g) for g in groups)


def _after(spec: StreamSpec, reader: Reader) -> Iterator[Any]:
    """Yield what a source holds beyond the samples of a spec, one sample per batch."""
    if spec.samples is not None:
        everything = spec.model_copy(update={"samples": None})
        yield from islice(_from_spec(everything, reader, 1), spec.samples, None)


def _open(spec: StreamSpec) -> tuple[Any, bool]:
    """Return the dataset, and whether its rows are the lines of text files."""
    import datasets

    source = spec.dataset
    if of_datasets(source):
        return _split(source, spec), False
    path = Path(source)
    options: dict[str, Any] = {"split": spec.split or "train", "streaming": True}
    if path.is_file():
        builder = _BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise CalibrationError(
                f"{path}: unknown kind of file; known are {sorted(_BUILDERS)}, and folders of images"
            )
        if builder == "text":
            options["chunksize"] = 1 << 20  # the default of 10 MB, decoded, would dominate calibration's memory
        return datasets.load_dataset(builder, data_files=str(path), **options), builder == "text"
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _split(datasets.load_from_disk(str(path)), spec), False
        # Which files count is up to `datasets`: a folder of tables can hold a LICENSE.txt, one of texts subfolders.
        found = datasets.load_dataset(str(path), spec.name, **options)
        return found, found.info.builder_name == "text"
    is_path = isinstance(source, os.PathLike) or path.is_absolute() or str(source).startswith(".")
    if is_path or path.suffix.lower() in _BUILDERS:
        raise FileNotFoundError(f"calibration.dataset: {source} does not exist")
    with hub_errors(str(source), "dataset"):
        return datasets.load_dataset(str(source), spec.name, **options), False


def _split(data: Any, spec: StreamSpec) -> Any:
    if not isinstance(data, Mapping):
        return data
    wanted = spec.split or ("train" if len(data) != 1 else next(iter(data)))
    if wanted not in data:
        raise CalibrationError(f"calibration.split: choose one of {list(data)}, there is no {wanted!r}")
    return data[wanted]


def _default_column(names: list[str], reader: Reader) -> str:
    order = COLUMNS if reader.tokenizer is None else ("text", "messages", *COLUMNS)
    found = next((name for name in order if name in names), names[0] if len(names) == 1 else None)
    if found is None:
        raise CalibrationError(f"calibration.column: choose one of {names}")
    return found


def _rows(data: Any, spec: StreamSpec) -> Iterator[Mapping[str, Any]]:
    if hasattr(data, "__len__"):
        return (data[i] for i in _spread(len(data), spec.seed))
    if spec.seed is None:
        return iter(data)
    # The buffer of `datasets` holds rows before images are decoded; one of our own would hold pixels. Releases that
    # read ten shards at a time need ten times the memory, and sleep for seconds when they close local Parquet files.
    options = {"max_buffer_input_shards": 1} if "max_buffer_input_shards" in signature(data.shuffle).parameters else {}
    return iter(data.shuffle(seed=spec.seed, buffer_size=spec.buffer_size, **options))


def _spread(count: int, seed: int | None) -> Iterator[int]:
    """Yield every number below `count` once, without a table; consecutive ones spread evenly (golden-ratio stride)."""
    if seed is None or count < 3:
        yield from range(count)
        return
    stride = next(s for s in range(round(count * 0.6180339887498949), 2 * count) if math.gcd(s, count) == 1)
    start = random.Random(seed).randrange(count)
    for i in range(count):
        yield (start + i * stride) % count


def _shuffled(items: Iterable[Any], size: int, seed: int) -> Iterator[Any]:
    """Shuffle with a bounded buffer: each new item replaces a random one, which is yielded."""
    draw = random.Random(seed)
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        slot = draw.randrange(size)
        yield buffer[slot]
        buffer[slot] = item
    draw.shuffle(buffer)
    yield from buffer
