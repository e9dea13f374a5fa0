"""Recipes: what to quantize of a family of models, how, and on which data, as one YAML file each.

The files of the repository's `recipes/` are found by name; any other by its path.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import yaml

from hfquant.recipes.schema import Recipe, parsed
from hfquant.schema import ConfigError

__all__ = ["Recipe", "folder", "load", "names", "parsed"]


def folder() -> Path:
    """Return where the recipes lie: within an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    return package if any(package.glob("*.yaml")) else package.parent.parent / "recipes"


def names() -> list[str]:
    """Return the names of the recipes that come with hfquant."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def load(name: str | os.PathLike[str]) -> Recipe:
    """Return a recipe by its name, or from a YAML file.

    Raises:
        ConfigError: there is no such recipe, or the file is none; the message names the key.
        FileNotFoundError: a path that is not there.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = folder() / f"{name}.yaml"
        if not path.is_file():
            near = difflib.get_close_matches(str(name), names(), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}"
            raise ConfigError(f"unknown recipe {str(name)!r}; {hint}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    return parsed(content, path.name)
