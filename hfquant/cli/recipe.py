"""`hfquant recipe`: list, show, check and import recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfquant.cli import options
from hfquant.cli.errors import command
from hfquant.cli.output import print_json, print_table
from hfquant.console import size

recipe = typer.Typer(no_args_is_help=True, help="List, show, check and import recipes.")


@recipe.command("list")
def list_recipes(as_json: options.AsJson = False, debug: options.Debug = False) -> None:
    """List the recipes that ship with hfquant."""
    with command(debug):
        from hfquant import recipes

        found = {name: recipes.load(name) for name in recipes.names()}
    if as_json:
        print_json({name: {"title": r.title, "models": list(r.models), "loads": r.loads} for name, r in found.items()})
    else:
        print_table(("recipe", "what", "for"), [(name, r.title, r.models[0]) for name, r in found.items()])


@recipe.command("show")
def show(name: Annotated[str, typer.Argument(help="Name of a recipe.")], debug: options.Debug = False) -> None:
    """Print a recipe's YAML, as a starting point for your own."""
    with command(debug):
        from hfquant import recipes

        recipes.load(name)
        typer.echo((recipes.folder() / f"{name}.yaml").read_text(encoding="utf-8"), nl=False)


@recipe.command("check")
def check(
    name: Annotated[str, typer.Argument(help="Name of a recipe, or a YAML file.")],
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id of a model to check it against; only configs are read.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    debug: options.Debug = False,
) -> None:
    """Check a recipe and, given a model, whether it fits: class, components, every glob, and the resulting sizes."""
    with command(debug, trust_remote_code):
        from hfquant import recipes

        found = recipes.load(name)
        typer.echo(f"{found.title}: valid recipe")
        if model is None:
            return
        from hfquant.integrations.skeleton import skeleton
        from hfquant.recipes.run import check_fits, planned

        models = skeleton(model)
        check_fits(found, models)
        for component, sizes in planned(found, models).items():
            typer.echo(f"{component}: {size(sizes.after)} of {size(sizes.before)}, {sizes.share:.1%} quantized")


@recipe.command("import")
def import_recipe(
    file: Annotated[Path, typer.Argument(help="YAML file of the SegQuant reference implementation.")],
    out: Annotated[Path, typer.Option(help="Folder for the recipes, one per experiment in the file.")],
    experiment: Annotated[
        list[str] | None, typer.Option(help="Experiment to convert; repeatable; default: all.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="sd3, flux or sdxl; default: by the folder that the file is in.")
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Convert a YAML file of the SegQuant reference implementation, and list what cannot be converted."""
    with command(debug):
        from hfquant.recipes import segquant
        from hfquant.schema import ConfigError

        found = segquant.experiments(file)
        if unknown := [name for name in experiment or () if name not in found]:
            raise ConfigError(f"{file} has no experiment {unknown[0]!r}; it has {', '.join(found)}")
        family = model or segquant.family_of(file)
        if family is None:
            raise ConfigError(f"{file}: say what it is for with --model ({', '.join(segquant.FAMILIES)})")
        made = {name: segquant.convert(name, found[name], family) for name in experiment or found}
        targets = {name: out / f"{family}-{name}.yaml" for name in made}
        if there := [path for path in targets.values() if path.exists()]:
            raise FileExistsError(f"{there[0]} exists")
        out.mkdir(parents=True, exist_ok=True)
        for name, converted in made.items():
            targets[name].write_text(converted.text(), encoding="utf-8")
            typer.echo(f"wrote {targets[name]}")
            for line in converted.left:
                typer.echo(f"- not carried over: {line}", err=True)


@recipe.command("schema")
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from hfquant.recipes.schema import Recipe

    print_json(Recipe.model_json_schema())
