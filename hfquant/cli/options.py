"""Options shared by several commands, and how they combine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hfquant.integrations.skeleton import Skeleton
    from hfquant.recipes import Recipe


def usable_device(name: str) -> str:
    """Return the device if this machine has it, so that a wrong one is refused before anything is loaded.

    Raises:
        BadParameter: there is no such device.
    """
    import torch

    try:
        torch.empty(1, device=torch.device(name))
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise typer.BadParameter(f"{name!r} cannot be used: {why}", param_hint="--device") from None
    return name


def _usable_if_given(name: str | None) -> str | None:
    return None if name is None else usable_device(name)


Debug = Annotated[bool, typer.Option("--debug", envvar="HFQUANT_DEBUG", help="Show tracebacks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dtype = Annotated[str | None, typer.Option(help="Dtype to load the model in, such as bfloat16.")]
Device = Annotated[
    str | None, typer.Option(callback=_usable_if_given, help="Device to run the model on, such as cuda.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with a model, if you trust it.")
]
Model = Annotated[str, typer.Argument(help="Folder or hub id of a transformers model or a diffusers pipeline.")]
QuantizedFolder = Annotated[Path, typer.Argument(help="Folder of a quantized model or pipeline.")]
NewFolder = Annotated[Path, typer.Option(help="Folder to write; must be empty or not exist yet.")]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", help="Name of a recipe (`hfquant recipe list`), or a YAML file.")
]
Preset = Annotated[str | None, typer.Option("--preset", help="Name of a preset, such as w4a16-gptq.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="JSON file with a config, or with a preset's name in quotes.")
]
Components = Annotated[
    list[str] | None,
    typer.Option("--component", help="Pipeline component to quantize; repeatable; default: the denoisers."),
]
Skip = Annotated[
    list[str] | None, typer.Option("--skip", help="Glob of layers to leave in full precision; repeatable.")
]
Column = Annotated[
    list[str] | None,
    typer.Option(help="Column to read; repeat ARGUMENT=COLUMN for several; default: text, prompt or similar."),
]
DatasetName = Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")]
Split = Annotated[str | None, typer.Option(help="Split of the dataset; default: train, or the only split.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens per sequence; default: 512.")]
WindowLength = Annotated[int, typer.Option(help="Tokens per window.")]
ComparisonData = Annotated[
    str | None,
    typer.Option(help="Text or dataset to compare language models on; default: Python's language reference."),
]
Prompts = Annotated[list[str] | None, typer.Option(help="Prompt for a pipeline; repeatable.")]
CallArguments = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Argument of the pipeline call, as JSON or a string; for images and frames, a file or JSON list of files.",
    ),
]


def pairs(option: str, values: Sequence[str]) -> dict[str, str]:
    """Parse KEY=VALUE words into a dict."""
    split = [value.partition("=") for value in values]
    for value, (key, equals, _) in zip(values, split, strict=True):
        if not (key and equals):
            raise typer.BadParameter(f"{value!r} is not KEY=VALUE", param_hint=option)
    return {key: value for key, _, value in split}


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def columns(values: Sequence[str]) -> str | dict[str, str] | None:
    """Return the value of `--column`: one column, or a column for each of several arguments."""
    if len(values) == 1 and "=" not in values[0]:
        return values[0]
    return pairs("--column", values) or None


def parsed(value: str) -> Any:
    """Parse a value as JSON; return the string itself if it is not JSON."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def call_arguments(values: Sequence[str]) -> dict[str, Any]:
    """Return the values of `--arg`, arguments of a pipeline's call: JSON, strings, and images read from files."""
    from hfquant.integrations.self_made_runs import PICTURE_ARGUMENTS, VIDEO_ARGUMENTS

    found = {key: parsed(value) for key, value in pairs("--arg", values).items()}
    files = (*PICTURE_ARGUMENTS, *VIDEO_ARGUMENTS)
    return {key: _pictures(key, value) if key in files else value for key, value in found.items()}


def _pictures(name: str, value: Any) -> Any:
    """Read the file of an image, or each of a list of files; leave anything else as it is."""
    from PIL import Image

    if isinstance(value, list):
        return [_pictures(name, file) for file in value]
    if not isinstance(value, str):
        return value
    try:
        return Image.open(value).convert("RGB")
    except OSError as error:
        hint = '; a list of files is JSON, such as ["a.png", "b.png"]' if value.startswith("[") else ""
        raise typer.BadParameter(f"{name}: cannot read {value!r} as an image{hint}", param_hint="--arg") from error


def check_no_set(option: str, source: str | None) -> None:
    """Raise CalibrationError if a source of data to read is a calibration set.

    Args:
        option: name of the option that names the source.
        source: its value.
    """
    from hfquant.calibration.batches import CalibrationError
    from hfquant.calibration.streams import holds_set

    if source is not None and holds_set(source):
        raise CalibrationError(
            f"{option}: {source} is a calibration set, which `hfquant quantize` and `hfquant distill` read with "
            "--calibration; pass a dataset or a file here"
        )


def check_float(model: str, skeleton: Skeleton, components: Iterable[str]) -> None:
    """Raise ValueError if one of the components to quantize is already quantized with hfquant.

    Args:
        model: folder or hub id, for the message.
        skeleton: what it holds.
        components: names of components; unknown ones are ignored.
    """
    from hfquant.integrations.compat import is_of
    from hfquant.integrations.config import METHOD

    for name in components:
        config = getattr(skeleton.models.get(name), "config", None)
        if is_of(METHOD, getattr(config, "quantization_config", None)):
            kind = type(skeleton.models[name]).__name__
            raise ValueError(f"{model}: {kind} is already quantized; pass the model in full precision")


def _read_config(file: Path) -> Any:
    """Read a config from a JSON file."""
    from hfquant.schema import ConfigError

    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # some Windows programs begin a file with a BOM
    except ValueError as error:  # JSON or UTF-8
        raise ConfigError(f"--config: {file} is not valid JSON: {error}") from None
    if not isinstance(content, (dict, str)):
        raise ConfigError(
            f'--config: {file} must hold a JSON object, such as {{"default": ...}}, or a preset\'s name in quotes, '
            f"not {content!r:.80}"
        )
    return content


def _named(skeleton: Skeleton, models: Sequence[str]) -> list[str]:
    return [type(skeleton.models[name]).__name__ for name in models]


def _models(skeleton: Skeleton, component: str) -> list[str]:
    """Return a component's models: itself, or those it consists of (several ControlNets)."""
    held = [name for name in skeleton.models if name.startswith(f"{component}.")]
    return [component] if component in skeleton.models else held or [component]


def chosen_recipe(
    skeleton: Skeleton,
    components: Sequence[str],
    recipe: str | None,
    preset: str | None,
    config: Path | None,
    skip: Sequence[str],
    calibration: Mapping[str, Any] | None = None,
    call: Mapping[str, Any] | None = None,
    bits: float | None = None,
) -> Recipe:
    """Return the named recipe, or one built from the other options.

    Args:
        skeleton: the model or pipeline.
        components: the components to quantize, if no recipe is named.
        recipe, preset, config, skip: as given on the command line.
        calibration: fields of a calibration stream; replaces the recipe's data.
        call: arguments of a pipeline's call, added to the recipe's.
        bits: budget of stored bits per weight, for each component to choose its formats.

    Raises:
        ConfigError: more than one of recipe, preset and config is given, the one given is invalid, or no component is
            given and the pipeline has no known denoiser.
        FileNotFoundError: no such file.
    """
    from hfquant import recipes
    from hfquant.config import parse
    from hfquant.denoisers import DENOISERS
    from hfquant.recipes.run import matches
    from hfquant.schema import ConfigError

    if len([given for given in (recipe, preset, config) if given is not None]) > 1:
        raise ConfigError("--recipe, --preset and --config exclude each other")
    if recipe is not None:
        found = recipes.load(recipe)
        content = found.model_dump(mode="python", exclude_unset=True)
        for component in content["components"].values():
            component.pop("expected", None)
    elif not components:
        raise ConfigError(
            f"{skeleton.kind} has no component that is known to be a denoiser ({', '.join(DENOISERS)}): choose from "
            f"its models with --component: {', '.join(skeleton.models)}"
        )
    else:
        settings: Any = preset or ("w8a8-dynamic" if bits is None else "w4-auto")
        if config is not None:
            settings = _read_config(config)
        content = {
            "title": "from the command line",
            "models": [skeleton.kind],
            "loads": skeleton.kind,
            "components": {model: {"config": settings} for name in components for model in _models(skeleton, name)},
        }
    for glob in skip:
        # Of several components, a glob often means one.
        models = [name for name in content["components"] if name in skeleton.models]
        meant = [name for name in models if matches(skeleton.models[name], glob)]
        if models and not meant:
            raise ConfigError(f"--skip: {glob!r} matches no module of {', '.join(_named(skeleton, models))}")
        for name in meant:
            component = content["components"][name]
            component["skip"] = {**component.get("skip", {}), glob: "by --skip"}
    if bits is not None:
        for component in content["components"].values():
            rules = parse(component["config"]).raw
            component["config"] = {**rules, "search": {**rules.get("search", {}), "budget": bits}}
    if calibration is not None or call:
        data = content.get("calibration") or {}
        content["calibration"] = {
            **data,
            **({} if calibration is None else {"data": dict(calibration)}),
            "call": {**data.get("call", {}), **(call or {})},
        }
    return recipes.parsed(content, recipe or "options")
