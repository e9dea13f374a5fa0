"""`hfquant distill`: train a quantized model's scales, norms and biases to match the float model."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hfquant.cli import options
from hfquant.cli.errors import command
from hfquant.cli.output import check_empty, print_json, print_table, staged

logger = logging.getLogger(__name__)


def distill(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the quantized model or pipeline.")],
    teacher: Annotated[str, typer.Argument(help="Folder or hub id of the same in full precision.")],
    out: options.NewFolder,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="A calibration set, or a dataset or text for a transformers model; default: the model writes its own. "
            "A pipeline needs a set recorded from its denoiser (`hfquant calibrate`)."
        ),
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help="Column to read; default: text, prompt or similar.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Sequences or rows to read, a quarter of them held out; default: 128, or all of a set."),
    ] = None,
    seqlen: options.SequenceLength = None,
    component: Annotated[
        str | None, typer.Option(help="Component of a pipeline to train; default: its denoiser.")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=0, help="Optimizer steps, one sample each; 0 trains the rounding only.")
    ] = 100,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate, relative to each vector's RMS.")] = 1e-3,
    rounding_steps: Annotated[
        int, typer.Option(min=0, help="Steps that train the rounding of the weights first, one sample each.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the order of the data.")] = 0,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Train a quantized model to match the full-precision model, and save the result.

    Scales, norms and biases are trained, after the rounding of the weights with --rounding-steps. Size and speed do not
    change. Samples held out of the training decide whether the result is kept.
    """
    if not (steps or rounding_steps):
        raise typer.BadParameter("with 0 steps, --rounding-steps must say how many to take", param_hint="--steps")
    with command(debug, trust_remote_code, log=True):
        check_empty(out)
        from hfquant import api
        from hfquant.calibration.streams import calibration_batches, holds_set
        from hfquant.denoisers import denoiser_name, is_pipeline
        from hfquant.integrations.hub import load
        from hfquant.recipes.run import save

        data: Any = None
        recorded = calibration is not None and holds_set(calibration)
        if calibration is not None:
            reading = {"column": options.columns(column or ()), "samples": samples, "seqlen": seqlen}
            data = {"dataset": calibration, **options.given(reading)}
            data = calibration_batches(data) if recorded else {**data, "seed": seed}
        loaded, float_model = load(model, None, device), load(teacher, None, device)
        if is_pipeline(loaded) != is_pipeline(float_model):
            raise ValueError(f"{model} and {teacher}: one is a pipeline, the other is not")
        student, original = loaded, float_model
        if is_pipeline(loaded):
            if not recorded:
                raise ValueError("--calibration: a pipeline needs a calibration set; record one with hfquant calibrate")
            name = component or denoiser_name(loaded)
            student, original = (_component(pipe, name) for pipe in (loaded, float_model))
        if (Path(model) / "affiner").is_dir():
            logger.warning("%s: not copied, because it corrects the model before distillation", Path(model) / "affiner")
        start = time.perf_counter()
        found = api.distill(student, original, data, steps, learning_rate, seed, rounding_steps)
        with staged(out) as folder:
            save(loaded, folder)
    content = {
        "folder": str(out),
        "before": found.before,
        "after": found.after,
        "kept": found.kept,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if as_json:
        print_json(content)
    else:
        print_table(("distilled", ""), [(key, _shown(value)) for key, value in content.items()])


def _component(pipe: Any, name: str) -> Any:
    from hfquant.denoisers import module_names

    if name not in module_names(pipe):
        raise ValueError(f"--component {name}: {type(pipe).__name__} has {', '.join(module_names(pipe))}")
    return getattr(pipe, name)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
