"""Export quantized models to the formats of other programs. A new format takes a file and a line of :data:`FORMATS`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from hfquant.exporters import compressed_tensors, nunchaku
from hfquant.exporters.checkpoint import Converted, ExportError, write
from hfquant.nn.modules import quant_modules

__all__ = ["FORMATS", "Converted", "ExportError", "export"]

#: Converts a quantized model to the tensors and config of that format: ``convert(model, requantize)``.
FORMATS: dict[str, Callable[[nn.Module, bool], Converted]] = {
    "compressed-tensors": compressed_tensors.convert,
    "nunchaku-lite": nunchaku.convert,
}


def export(
    model: nn.Module,
    dir: str | os.PathLike[str],
    format: str = "compressed-tensors",
    *,
    requantize: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a quantized model as a checkpoint that loads without hfquant. The model is not modified.

    Codes, zero points and scales are those of the model; two-level scales are written as floats. Fused experts are
    written as one linear per expert, as in published checkpoints of their class. transformers dequantizes them on load,
    so their inputs are floats there; a log line says so. The tokenizer or processor that a transformers model came with
    is written as well.

    Args:
        model: a model quantized by hfquant, from transformers ("compressed-tensors") or diffusers ("nunchaku-lite").
        dir: the folder to write; must not exist, or be empty.
        format: "compressed-tensors", as read by transformers, or "nunchaku-lite", INT4 SVDQuant as read by diffusers.
        requantize: what to do with layers that the format cannot express (per-segment input scales, dual scale,
            unfolded smoothing, a low-rank branch, short groups; experts with zero points or with different schemes).
            False rejects them. True rounds their effective weights to nearest (RTN) on a plain grid with the same bit
            width, with dynamic activation scales. This loses the benefit of calibration in these layers; the loss is
            logged. To avoid it, quantize with ``opt: {"fold": True}`` or without the features that the format lacks.
        max_shard_size: maximum size of a file, in bytes or like "5GB".

    Raises:
        ExportError: the model is not quantized, belongs to the wrong library, or has layers that the format cannot
            express; the message lists them.
        ValueError: unknown format.
        TypeError: ``model`` is not a module (but a pipeline, for example).
        FileExistsError: ``dir`` is a file or a non-empty folder.
    """
    if format not in FORMATS:
        near = difflib.get_close_matches(str(format).lower().replace("_", "-"), FORMATS, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown export format {format!r}{hint}; available: {', '.join(FORMATS)}")
    folder = Path(dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder: export to a new one")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}; of a pipeline pass a component: "
            "hfquant.export(pipe.transformer, ...)"
        )
    if not quant_modules(model):
        raise ExportError(f"{type(model).__name__} has no quantized linear: quantize it with hfquant first")
    write(model, FORMATS[format](model, requantize), folder, max_shard_size)
