"""`hfquant quantize`: write a quantized model or pipeline to a folder."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hfquant.cli import options
from hfquant.cli.errors import command
from hfquant.cli.output import beside, check_empty, print_json, print_table, staged
from hfquant.console import size


def quantize(
    model: options.Model,
    out: options.NewFolder,
    recipe: options.RecipeName = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    bits: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=32,
            help="Budget in stored bits per weight: use the data to choose each layer's format within it.",
        ),
    ] = None,
    component: options.Components = None,
    skip: options.Skip = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Data: a hub dataset, a local parquet, json, csv or text file, or a folder; for a transformers model, "
            "also a calibration set (`hfquant calibrate`). Default: the recipe's, else the model makes its own."
        ),
    ] = None,
    column: options.Column = None,
    name: options.DatasetName = None,
    split: options.Split = None,
    samples: Annotated[
        int | None, typer.Option(help="Sequences of text, or rows, to read; default: 128, or all of a set.")
    ] = None,
    seqlen: options.SequenceLength = None,
    seed: Annotated[int | None, typer.Option(help="Seed for the order of the data; default: 0.")] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Argument of the pipeline call, such as num_inference_steps=20."),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Push the result to this hub repository.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print each layer's decision and error.")] = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Quantize a model or the denoisers of a pipeline, and save the result.

    Without --recipe, --preset and --config, the preset is w8a8-dynamic, or w4-auto with --bits. Solved layers are kept
    beside --out until it is written: repeat the same command to resume after an interruption.
    """
    call = options.call_arguments(arg or ())
    reading = options.given(
        {
            "column": options.columns(column or ()),
            "name": name,
            "split": split,
            "samples": samples,
            "seqlen": seqlen,
            "seed": seed,
        }
    )
    if calibration is None and reading:
        raise typer.BadParameter(
            "says how to read --calibration, which is missing", param_hint=f"--{next(iter(reading))}"
        )
    if private and push is None:
        raise typer.BadParameter("is for the repository of --push, which is missing", param_hint="--private")
    stream = None if calibration is None else {"dataset": calibration, **reading}
    with command(debug, trust_remote_code, log=True):
        check_empty(out)
        from hfquant.integrations.hub import load
        from hfquant.integrations.skeleton import skeleton
        from hfquant.recipes.run import check_fits, quantize_by, save

        found = skeleton(model)
        if call and not found.is_pipeline:
            raise typer.BadParameter(f"is for pipelines, and this is a {found.kind}", param_hint="--arg")
        wanted = options.chosen_recipe(
            found, component or found.denoisers, recipe, preset, config, skip or (), stream, call, bits
        )
        check_fits(wanted, found)
        options.check_float(model, found, wanted.components)
        start = time.perf_counter()
        resume = beside(out, "resume")
        try:
            loaded = load(model, dtype, device)
            affiner = quantize_by(loaded, wanted, model, resume_dir=resume, verbose=verbose)
            with staged(out) as folder:
                save(loaded, folder, affiner)
        except KeyboardInterrupt:
            typer.echo(f"Interrupted: nothing was written to {out}. Run the same command again to resume.", err=True)
            raise typer.Exit(130) from None
        shutil.rmtree(resume, ignore_errors=True)
        summary = _summary(out, time.perf_counter() - start)
        if push is not None:
            _push(loaded, push, private, out)
            summary["pushed to"] = push
    if as_json:
        print_json(summary)
    else:
        print_table(("quantized", ""), [(key, _shown(key, value)) for key, value in summary.items()])


def _push(loaded: Any, repo: str, private: bool, out: Path) -> None:
    from hfquant.integrations.sharing import push_to_hub

    try:
        push_to_hub(loaded, repo, private=private)
    except Exception as error:  # whatever it is, the work of hours is not lost
        with_affiner = getattr(loaded, "affiner", None) is not None
        how = " with hfquant.affiner.load_pipeline" if with_affiner else ""
        raise OSError(
            f"--push: {error or type(error).__name__}. The result is saved in {out}: to push it later, load it "
            f"from there{how} and call hfquant.push_to_hub(model, {repo!r}{', private=True' if private else ''})"
        ) from error


def _summary(out: Path, seconds: float) -> dict[str, Any]:
    from hfquant.report.stored import read_folder

    models = read_folder(out)[1]
    return {
        "folder": str(out),
        "layers": sum(len(model.layers) for model in models.values()),
        "bytes": sum(model.bytes for model in models.values()),
        "bytes in full precision": sum(model.full_bytes for model in models.values()),
        "bits per weight": {name: round(model.bits, 2) for name, model in models.items()},
        "seconds": round(seconds, 1),
    }


def _shown(key: str, value: Any) -> str:
    if key.startswith("bytes"):
        return size(value)
    return ", ".join(f"{name} {bits}" for name, bits in value.items()) if isinstance(value, dict) else str(value)
