"""Turn ``HfQuantConfig(calibration=...)``, or no data at all, into batches of model inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor

from hfquant.calibration.batches import CalibrationError
from hfquant.calibration.media_rows import SOUNDS, arguments_of
from hfquant.calibration.model_inputs import MissingReaderError, with_decoder_inputs
from hfquant.calibration.self_made import SelfSpec
from hfquant.calibration.sources import are_texts, is_source
from hfquant.calibration.streams import Batches, calibration_batches, holds_set, names_set
from hfquant.integrations.sharing.origin import file_of, places, runs_remote_code

#: Files that name the code of what reads data.
_READER_FILES = {"tokenizer": "tokenizer_config.json", "processor": "preprocessor_config.json"}


def transformers_batches(model: Any, calibration: Any, file: str | None = None) -> Any:
    """Return batches for a transformers model, with the given tokenizer or the one saved with the model.

    Args:
        model: a loaded model; ``name_or_path`` is where to look for a tokenizer or image processor.
        calibration: anything that :func:`~hfquant.calibration.calibration_batches` accepts, a request for
            self-generated data (:class:`~hfquant.calibration.self_made.SelfSpec`), or None for the default request.
        file: a file that the model's weights were read from; the tokenizer next to it goes first. None if unknown.

    Raises:
        CalibrationError: the model cannot generate its own data.
    """
    spec = SelfSpec() if calibration is None else SelfSpec.of(calibration)
    if spec is not None:
        from hfquant.integrations.self_made import Processors, self_made

        processors = Processors(*_saved_with(model, file), _extractor_of(model, file))
        return self_made(model, spec, processors, asked=calibration is not None)
    tokenizer = processor = None
    given = isinstance(calibration, Mapping) and (calibration.get("tokenizer") or calibration.get("processor"))
    if is_raw(calibration) and not given:
        tokenizer, processor = _saved_with(model, file)
        processor = _whole_of(model, file) or processor
    batches = calibration_batches(calibration, tokenizer=tokenizer, processor=processor, model=model)
    if not isinstance(batches, Batches):
        started = [_started(batch, model) for batch in batches] if isinstance(batches, list) else []
        return started if any(new is not old for new, old in zip(started, batches, strict=False)) else batches
    read = partial(_read, batches, model, file)
    return Batches(read, "", batches.provenance, lambda: (_started(b, model) for b in batches.held_out))


def _started(batch: Any, model: Any) -> Any:
    """Return a batch for a model that hears or sees and then writes with its decoder's start token, others as given."""
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_ids" or not isinstance(batch, (Mapping, Tensor)):
        return batch
    inputs = {main: batch} if isinstance(batch, Tensor) else dict(batch)
    started = with_decoder_inputs(inputs, model)
    return batch if started is inputs else started


def _read(batches: Batches, model: Any, file: str | None) -> Iterator[Any]:
    """Yield batches; if one needs a tokenizer or processor whose code may not run, say so.

    Raises:
        CalibrationError: names the option.
    """
    try:
        for batch in batches:
            yield _started(batch, model)
    except MissingReaderError as error:
        name = None if runs_remote_code(model) else _with_remote_code(model, file, _READER_FILES[error.argument])
        if name is None:
            raise
        raise CalibrationError(
            f"calibration data: {error.what}, and that of {name} has code of its own, which would run on this machine: "
            f"read it, and if you trust it, pass --trust-remote-code to a command, or in Python "
            f"{{'dataset': ..., {error.argument!r}: {error.argument}}}"
        ) from error


def _with_remote_code(model: Any, file: str | None, reader_file: str) -> str | None:
    """Return the folder or hub id that has a reader with code of its own; None if there is none."""
    for name, options in places(model, file):
        path = file_of(name, reader_file, **options)
        with suppress(OSError, ValueError):  # a file that cannot be read
            if path is not None and "auto_map" in json.loads(path.read_text(encoding="utf-8")):
                return name
    return None


def diffusers_batches(calibration: Any) -> Any:
    """Return batches for a denoiser: recorded inputs or a calibration set, never a dataset.

    Raises:
        CalibrationError: the data consists of prompts or a dataset, which only the whole pipeline can turn into inputs,
            or is to be self-generated.
    """
    if calibration is None or SelfSpec.of(calibration) is not None:
        raise _cannot_make_its_own()
    recorded = isinstance(calibration, Mapping) and names_set(calibration)
    if is_raw(calibration) and not recorded:
        raise CalibrationError(
            "a pipeline's component cannot turn a dataset or prompts into its own inputs: use "
            "hfquant.quantize_pipeline(pipe, data, config), or record them with hfquant.generate_calibrate_set"
        )
    return calibration_batches(calibration)


def is_raw(calibration: Any) -> bool:
    """Return whether the data still needs tokenizing or other processing: a dataset, or a list of strings or rows."""
    if isinstance(calibration, (str, os.PathLike)):
        return not holds_set(calibration)
    return is_source(calibration) or are_texts(calibration)


def tokenizer_of(model: Any) -> Any:
    """Return the tokenizer saved with a transformers model; None if there is none."""
    return _saved_with(model)[0]


def _saved_with(model: Any, file: str | None = None) -> tuple[Any, Any]:
    """Return the tokenizer and the image processor saved with a model; None for each that is missing."""
    from transformers import AutoImageProcessor, AutoTokenizer

    return _saved(AutoTokenizer, model, file, _has_words), _saved(AutoImageProcessor, model, file)


def _whole_of(model: Any, file: str | None) -> Any:
    """Return what reads sounds, or images next to text, of what is saved with a model; None if it reads neither."""
    from transformers import AutoFeatureExtractor, AutoProcessor

    arguments = arguments_of(model)
    if {"input_ids", "pixel_values"} <= arguments or ("input_ids" in arguments and arguments & SOUNDS):
        return _saved(AutoProcessor, model, file, lambda found: _has_words(getattr(found, "tokenizer", None)))
    return _saved(AutoFeatureExtractor, model, file) if arguments & SOUNDS else None


def _saved(loader: Any, model: Any, file: str | None, usable: Callable[[Any], bool] = lambda found: True) -> Any:
    for name, options in places(model, file):
        with suppress(OSError, ValueError, KeyError, TypeError, ImportError):  # transformers' ways of saying no
            # Left open, transformers would ask whether to run the code in the folder.
            found = loader.from_pretrained(name, trust_remote_code=runs_remote_code(model), **options)
            if usable(found):
                return found
    return None


def _has_words(tokenizer: Any) -> bool:
    """Return whether a tokenizer has more than special tokens.

    For a folder without a tokenizer, transformers creates an empty one of the model's kind, which maps all text to
    unknown tokens.
    """
    try:
        tokenizer("a")
        return len(tokenizer) > len(set(tokenizer.all_special_ids))
    except Exception:  # noqa: BLE001 (tokenizers raises Exception itself)
        return False


def _extractor_of(model: Any, file: str | None) -> Any:
    from transformers import AutoFeatureExtractor

    hears = getattr(model, "main_input_name", "") == "input_features"
    return _saved(AutoFeatureExtractor, model, file) if hears else None


def check_component_data(config: Any) -> None:
    """Raise CalibrationError if a pipeline's component needs calibration data but was given none."""
    if config.needs_data and (config.calibration is None or SelfSpec.of(config.calibration) is not None):
        raise _cannot_make_its_own()


def _cannot_make_its_own() -> CalibrationError:
    return CalibrationError(
        "this config needs calibration data (static activations, smoothing, a low-rank branch or GPTQ), and a "
        "pipeline's component cannot make its own: call hfquant.quantize_pipeline(pipe, None, config), which runs the "
        "pipeline on prompts of its own, or pass inputs recorded with hfquant.generate_calibrate_set, or choose a "
        "config without, such as 'w8a8-dynamic'"
    )
