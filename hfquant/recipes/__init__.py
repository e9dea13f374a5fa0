"""Recipes: each is a YAML file that specifies what to quantize in a family of models, how, and with which data.

Files in the repository's `recipes/` are found by name, all others by path.
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
    """Return the folder of the recipes: inside an installed package, or next to it in a checkout."""
    package = Path(__file__).parent
    return package if any(package.glob("*.yaml")) else package.parent.parent / "recipes"


def names() -> list[str]:
    """Return the names of the recipes that come with hfquant."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def load(name: str | os.PathLike[str]) -> Recipe:
    """Return a recipe by its name, or from a YAML file.

    Raises:
        ConfigError: there is no such recipe, or the file is not a valid one; the message names the key.
        FileNotFoundError: the path does not exist.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = folder() / f"{name}.yaml"
        if not path.is_file():
            near = difflib.get_close_matches(str(name), names(), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"available: {', '.join(names())}"
            raise ConfigError(f"unknown recipe {str(name)!r}; {hint}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return parsed(content, path.name)
