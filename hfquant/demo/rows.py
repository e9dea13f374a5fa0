"""The rows of the demo: presets with and without data, built from the embedded pipeline and saved to folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig
from torch import nn

from hfquant import PRESETS, BlockwiseAffiner, HfQuantConfig, load_affiner, quantize
from hfquant.demo import DigitsPipeline, load_digits_pipeline
from hfquant.recipes.run import save

FULL_PRECISION = "full precision"
AFFINER = "+affiner"
CALIBRATION_SEED = 1

DEFAULT_ROWS = (
    *("w8a8-dynamic", "w8a8-smooth"),
    *("w4a8-dynamic", f"w4a8-dynamic{AFFINER}", "w4a8-gptq"),
    *("w4a4-dynamic", f"w4a4-dynamic{AFFINER}", "w4a4-gptq"),
)


def is_known(row: str) -> bool:
    """Return whether a row has a config, by its name or the part before `+affiner`."""
    return row.removesuffix(AFFINER) in PRESETS


def data_of(row: str) -> str:
    """Return how a row uses data: "none", "calibrated" or "affiner"."""
    if row.endswith(AFFINER):
        return "affiner"
    return "calibrated" if row in PRESETS and HfQuantConfig(PRESETS[row]).needs_data else "none"


def folder_of(row: str, out: Path) -> Path:
    """Return the folder that a row is saved to."""
    return out / row.replace(" ", "-")


def write_row(row: str, out: Path, steps: int) -> None:
    """Quantize the embedded pipeline as the row specifies and save it.

    Args:
        row: `FULL_PRECISION`, a preset's name, or a preset's name followed by `+affiner`.
        out: parent folder of all rows.
        steps: number of denoising steps that the affiner corrects.
    """
    if row == FULL_PRECISION:
        load_digits_pipeline().save_pretrained(folder_of(row, out))
        return
    pipe, affiner = load_quantized(row.removesuffix(AFFINER)), None
    if row.endswith(AFFINER):
        full = load_digits_pipeline()
        for one in (pipe, full):
            one.set_progress_bar_config(disable=True)
        config = {
            "stepper": {"max_timestep": steps, "batch_size": 20, "seed": CALIBRATION_SEED},
            "solver": {"blocksize": 1},
        }
        affiner = load_affiner(config, [{"class_labels": [digit]} for digit in range(10)] * 2, full, pipe)
    save(pipe, folder_of(row, out), affiner)


def read_row(row: str, out: Path) -> DigitsPipeline:
    """Load a row from its folder and attach its affiner if it has one."""
    folder = folder_of(row, out)
    pipe = DigitsPipeline.from_pretrained(folder)
    if row.endswith(AFFINER):
        BlockwiseAffiner.from_pretrained(folder / "affiner").attach(pipe)
    return pipe


def load_quantized(name: str) -> DigitsPipeline:
    """Return the embedded pipeline with a quantized denoiser, quantized after loading only if the config needs data."""
    config = HfQuantConfig(PRESETS[name])
    if not config.needs_data:
        return load_digits_pipeline(
            quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": config})
        )
    pipe = load_digits_pipeline()
    quantize(pipe.transformer, record_inputs(pipe), config)
    return pipe


def record_inputs(pipe: DigitsPipeline, steps: int = 8) -> list[dict[str, Any]]:
    """Return the denoiser's inputs while it generates each digit twice, one dict of keyword arguments per step.

    The noise differs from the noise on which rows are judged.
    """
    batches: list[dict[str, Any]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches.append(kwargs)

    handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    try:
        generator = torch.Generator().manual_seed(CALIBRATION_SEED)
        pipe(list(range(10)) * 2, num_inference_steps=steps, generator=generator, output_type="pt")
    finally:
        handle.remove()
    return batches
