"""`hfquant calibrate`: record a calibration set."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfquant.cli import options
from hfquant.cli.errors import command
from hfquant.cli.output import check_folder

if TYPE_CHECKING:
    from hfquant.calibration import BaseCalibSet, BaseSampler


class SamplerName(str, Enum):
    """Values of `--sampler`."""

    UNIFORM = "uniform"
    NORMAL = "normal"
    BASE = "base"
    LANGUAGE = "language"


_SAMPLER_OPTIONS = {
    SamplerName.UNIFORM: ("timesteps",),
    SamplerName.NORMAL: ("timesteps", "mean", "std"),
    SamplerName.BASE: ("timesteps",),
    SamplerName.LANGUAGE: (),
}


def calibrate(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a diffusers pipeline or a transformers model.")],
    source: Annotated[
        str,
        typer.Option(
            help="Data: a hub dataset, a local parquet, json, csv or text file, or a folder; self: the model makes it."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the calibration set; an unfinished set is resumed.")],
    sampler: Annotated[
        SamplerName | None, typer.Option(help="Default: uniform for a pipeline, language for a model.")
    ] = None,
    timesteps: Annotated[int | None, typer.Option(help="Steps to keep from each run; default: 10.")] = None,
    mean: Annotated[
        float | None, typer.Option(help="Normal sampler: mean diffusion time, 0 = image, 1 = noise.")
    ] = None,
    std: Annotated[float | None, typer.Option(help="Normal sampler: standard deviation of the time.")] = None,
    layer: Annotated[
        str | None, typer.Option(help="Layer to record; default: a pipeline's denoiser, or the whole model.")
    ] = None,
    name: options.DatasetName = None,
    split: options.Split = None,
    column: options.Column = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Sequences of text, or rows, to read (default: 128); with self, windows (32) or pipeline runs (8)."
        ),
    ] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows per call of the model.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed for the order of the data, the noise and the choice of steps.")] = 0,
    chunk_size: Annotated[int, typer.Option(help="Samples per stored chunk.")] = 400,
    compress: Annotated[bool, typer.Option(help="Compress chunks with zstd.")] = True,
    steps: Annotated[int | None, typer.Option(help="The pipeline's num_inference_steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="The pipeline's guidance_scale.")] = None,
    arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Any other argument of the call, as JSON or a string.")
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    debug: options.Debug = False,
) -> None:
    """Record what a layer sees while the model runs over a dataset, as a calibration set on disk.

    Repeat the same command to resume an interrupted run.
    """
    if sampler is not None:
        _check_sampler(sampler, timesteps=timesteps, mean=mean, std=std)
    call = options.call_arguments(arg or ())
    if steps is not None:
        call["num_inference_steps"] = steps
    if guidance_scale is not None:
        call["guidance_scale"] = guidance_scale
    made_itself = source == "self"
    if made_itself and (unread := options.given({"name": name, "split": split, "column": column or None})):
        raise typer.BadParameter("does not apply to --source self", param_hint=f"--{next(iter(unread))}")
    spec = {
        "dataset": source,
        "name": name,
        "split": split,
        "column": options.columns(column or ()),
        "samples": 128 if samples is None else samples,
        "seqlen": seqlen,
        "batch_size": batch_size,
        "seed": seed,
    }
    if made_itself:
        spec = {"source": source, "seed": seed, **options.given({"samples": samples, "seqlen": seqlen})}
    with command(debug, trust_remote_code, log=True):
        check_folder(out)
        from hfquant.calibration import calibration_batches, generate_calibrate_set, storage
        from hfquant.calibration.self_made import SelfSpec
        from hfquant.denoisers import denoiser_name, is_pipeline
        from hfquant.distributed import is_main
        from hfquant.integrations.data import transformers_batches
        from hfquant.integrations.hub import load
        from hfquant.integrations.self_made_runs import PROMPTS, own_calls

        options.check_no_set("--source", source)
        storage.check_unmixed(out)
        loaded = load(model, dtype, device)
        pipeline = is_pipeline(loaded)
        kind = sampler or (SamplerName.UNIFORM if pipeline else SamplerName.LANGUAGE)
        if sampler is None:
            _check_sampler(kind, timesteps=timesteps, mean=mean, std=std)
        target = layer if layer is not None else denoiser_name(loaded) if pipeline else ""
        wish = SelfSpec.of(spec)
        if wish is not None and pipeline:
            batches: Any = own_calls(loaded, wish.samples or len(PROMPTS), seed, call)
        else:
            batches = calibration_batches(spec) if pipeline else transformers_batches(loaded, spec)
        made = generate_calibrate_set(
            loaded,
            _sampler(kind, seed, timesteps=timesteps, mean=mean, std=std),
            batches,
            target,
            out,
            chunk_size,
            compress,
            **call,
        )
        if is_main():
            _print_summary(out, made)


def _check_sampler(kind: SamplerName, **settings: Any) -> None:
    for option in options.given(settings):
        if option not in _SAMPLER_OPTIONS[kind]:
            raise typer.BadParameter(f"the {kind.value} sampler has no such option", param_hint=f"--{option}")


def _sampler(kind: SamplerName, seed: int, **settings: Any) -> BaseSampler:
    from hfquant import calibration

    classes = {
        SamplerName.UNIFORM: calibration.UniformSampler,
        SamplerName.NORMAL: calibration.NormalSampler,
        SamplerName.BASE: calibration.BaseSampler,
        SamplerName.LANGUAGE: calibration.LanguageModelSampler,
    }
    return classes[kind](seed=seed, **options.given(settings))


def _print_summary(out: Path, made: BaseCalibSet) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    from hfquant.calibration.storage import ChunkFile, read_index

    chunks = [chunk for chunk in made.chunks if isinstance(chunk, ChunkFile)]
    table = Table(show_header=False, box=None)
    table.add_row("calibration set", str(out))
    table.add_row("layer", str(made.provenance["layer"]) or "the whole model")
    table.add_row("samples", f"{len(made)}")
    table.add_row("chunks", f"{len(chunks)}")
    table.add_row("size on disk", decimal(sum(chunk.entry.size for chunk in chunks)))
    tensors: dict[str, dict[str, None]] = {}
    # With several processes, each writes its own folder.
    for folder in dict.fromkeys(chunk.path.parent for chunk in chunks):
        index = read_index(folder)
        for layout in index.layouts if index else ():
            for path, (dtype, shape) in layout.items():
                tensors.setdefault(path, {})[f"{dtype}{shape}"] = None
    for path, kinds in tensors.items():
        first, *others = kinds
        table.add_row(path, f"{first} and {len(others)} other shapes" if others else first)
    Console(markup=False, highlight=False, soft_wrap=True).print(table)
