"""From ``HfQuantConfig(calibration=...)`` to batches of model inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfquant.calibration.batches import CalibrationError
from hfquant.calibration.streams import calibration_batches


def transformers_batches(model: Any, calibration: Any) -> Any:
    """Batches for a transformers model; text is tokenized by the given tokenizer or the one saved with the model.

    Args:
        model: just loaded; ``name_or_path`` is where a tokenizer or image processor is looked for.
        calibration: what :func:`~hfquant.calibration.calibration_batches` takes; a dict may also name a ``tokenizer``
            or ``processor`` object, and its ``dataset`` may be a list of strings.

    Raises:
        CalibrationError: the data is text and no tokenizer is at hand.
    """
    tokenizer = processor = None
    if isinstance(calibration, Mapping):
        calibration = dict(calibration)
        tokenizer, processor = calibration.pop("tokenizer", None), calibration.pop("processor", None)
        source = calibration.get("dataset")
        if isinstance(source, list) and set(calibration) == {"dataset"}:
            calibration = source
    if tokenizer is None and processor is None and _is_raw(calibration):
        tokenizer, processor = _saved_with(model)
        if tokenizer is None and processor is None:
            raise CalibrationError(
                f"calibration data: {model.name_or_path!r} has neither tokenizer nor image processor; pass one as "
                "calibration={'dataset': ..., 'tokenizer': tokenizer}, or give batches of model inputs"
            )
    return calibration_batches(calibration, tokenizer=tokenizer, processor=processor, model=model)


def diffusers_batches(calibration: Any) -> Any:
    """Batches for a denoiser: recorded inputs or a calibration set, never a dataset.

    Raises:
        CalibrationError: the data are prompts or a dataset, which only the whole pipeline can turn into inputs.
    """
    if _is_raw(calibration):
        raise CalibrationError(
            "a pipeline's component cannot turn a dataset or prompts into its own inputs: use "
            "hfquant.quantize_pipeline(pipe, data, config), or record them with hfquant.generate_calibrate_set"
        )
    return calibration_batches(calibration)


def _is_raw(calibration: Any) -> bool:
    """Whether the data has to be tokenized or otherwise processed: a dataset, a dict naming one, a list of strings."""
    if isinstance(calibration, Mapping) or type(calibration).__module__.partition(".")[0] == "datasets":
        return True
    return isinstance(calibration, (list, tuple)) and bool(calibration) and isinstance(calibration[0], str)


def _saved_with(model: Any) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoTokenizer

    found = []
    for loader in (AutoTokenizer, AutoImageProcessor):
        try:
            found.append(loader.from_pretrained(model.name_or_path))
        except (OSError, ValueError, KeyError, TypeError, ImportError):  # the ways transformers says there is none
            found.append(None)
    return found[0], found[1]


def check_data(config: Any) -> None:
    """Raise CalibrationError where a config needs calibration data and carries none."""
    if config.needs_data and config.calibration is None:
        raise CalibrationError(
            "this config needs calibration data (static activations, smoothing, a low-rank branch or GPTQ): pass "
            "HfQuantConfig(..., calibration=[...]), or choose one without, such as 'w8a8-dynamic'"
        )
