"""Quantized models in the formats of other programs. A format is one file and one line of :data:`FORMATS`."""

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

#: What turns a quantized model into tensors and a config of that format: ``convert(model, requantize)``.
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
    """Write a quantized model as a checkpoint that loads without hfquant. The model stays as it is.

    Codes, zero points and scales are those of the model; scales in two levels are written as floats. Fused experts are
    written as one linear an expert, as in the published checkpoints of their class. transformers dequantizes them while
    it loads them, so their inputs are floats there; a log line says so.

    Args:
        model: quantized by hfquant, of transformers ("compressed-tensors") or diffusers ("nunchaku-lite").
        dir: the folder to write; must not exist, or be empty.
        format: "compressed-tensors", as transformers reads it, or "nunchaku-lite", SVDQuant in INT4 as diffusers does.
        requantize: what to do with layers that the format cannot express (scales of their own for segments of the
            input, dual scale, smoothing that is not folded, a low-rank branch, short groups; experts with zero points,
            or not all of one scheme): False refuses them,
            True rounds their effective weights to nearest on a plain grid of the same bits, with activations scaled at
            run time. That loses what calibration gained there; how much is logged. To lose nothing, quantize with
            ``opt: {"fold": True}`` or without what the format lacks.
        max_shard_size: bytes of a file at most, as a number or like "5GB".

    Raises:
        ExportError: the model is not quantized, is of the wrong library, or has layers that the format cannot express;
            the message lists them.
        ValueError: there is no such format.
        TypeError: ``model`` is no module, but a pipeline for example.
        FileExistsError: ``dir`` is a file, or holds files already.
    """
    if format not in FORMATS:
        near = difflib.get_close_matches(str(format).lower().replace("_", "-"), FORMATS, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown export format {format!r}{hint}; there are {', '.join(FORMATS)}")
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
