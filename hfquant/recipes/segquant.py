"""Convert the YAML files of the SegQuant reference implementation (named experiments, each a config) to recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hfquant.config import parse
from hfquant.schema import ConfigError

#: The reference's models by the folder of their files: hub id, pipeline class, name of the denoiser.
FAMILIES = {
    "sd3": ("stabilityai/stable-diffusion-3-medium-diffusers", "StableDiffusion3Pipeline", "transformer"),
    "flux": ("black-forest-labs/FLUX.1-dev", "FluxPipeline", "transformer"),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", "StableDiffusionXLPipeline", "unet"),
}
#: Options for how the reference runs, which do not affect its result.
_RUNNING = ("verbose", "cpu_storage", "precision")
_SECTIONS = ("opt", "calib", "input_quant", "weight_quant")


class SegQuantRecipe(NamedTuple):
    """One experiment as a recipe.

    Attributes:
        recipe: content of the recipe.
        left: what could not be carried over, one line each.
    """

    recipe: dict[str, Any]
    left: list[str]

    def text(self) -> str:
        """Return the recipe as YAML."""
        return yaml.safe_dump(self.recipe, sort_keys=False, width=120)


def experiments(file: Path) -> dict[str, dict[str, Any]]:
    """Return the configs in a file by experiment name.

    Raises:
        ConfigError: the file is not YAML, or contains no configs.
        FileNotFoundError: there is no such file.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    found = content if isinstance(content, Mapping) else {}
    configs = {
        str(name): dict(config)
        for name, config in found.items()
        if isinstance(config, Mapping) and isinstance(config.get("default"), Mapping)
    }
    if not configs:
        raise ConfigError(f'{file} has no experiments: expected names, each with a "default" entry and any globs')
    return configs


def family_of(file: Path) -> str | None:
    """Return which of the reference's models a file is for, judging by its parent folders."""
    return next((part for part in reversed(file.absolute().parts[:-1]) if part in FAMILIES), None)


def convert(name: str, config: Mapping[str, Any], family: str) -> SegQuantRecipe:
    """Convert one experiment.

    Args:
        name: name of the experiment.
        config: its entries, "default" and globs.
        family: key of :data:`FAMILIES`.

    Raises:
        ConfigError: the family is unknown, or the remaining entries are not a valid config.
    """
    if family not in FAMILIES:
        raise ConfigError(f"unknown model {family!r}; the reference has {', '.join(FAMILIES)}")
    left: list[str] = []
    affiners: list[str] = []
    entries = {key: _entry(key, entry, left, affiners) for key, entry in config.items()}
    parse(entries)
    model, loads, component = FAMILIES[family]
    recipe: dict[str, Any] = {
        "title": f"SegQuant's {name}",
        "models": [model],
        "loads": loads,
        "components": {component: {"config": entries}},
        "calibration": {
            "data": {"dataset": "nateraw/parti-prompts", "column": "Prompt", "samples": 32, "seed": 0},
            "sampler": {"type": "uniform", "timesteps": 10},
        },
    }
    left.append("the COCO images and prompts that the reference calibrates on: calibration.data names other prompts")
    if affiners:
        recipe["affiner"] = {"type": affiners[0] if affiners[0] in ("ptqd", "tac") else "blockwise"}
    return SegQuantRecipe(recipe, left)


def _entry(key: str, entry: Any, left: list[str], affiners: list[str]) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{key}: expected a mapping, got {entry!r}")
    made: dict[str, Any] = {}
    for field, value in entry.items():
        if field == "affine":
            affiners.append(str(value))
        elif field in _SECTIONS and isinstance(value, Mapping):
            made[field] = _section(f"{key}.{field}", field, value, left)
        else:
            made[field] = value
    return made


def _section(where: str, name: str, section: Mapping[str, Any], left: list[str]) -> dict[str, Any]:
    found = dict(section)
    left += [
        f"{where}.{option}={found.pop(option)!r}: affects how the reference runs, not its result"
        for option in _RUNNING
        if option in found
    ]
    if name == "opt" and found.get("type") == "givens":
        left.append(f"{where}: Givens rotations are replaced by {where}.sub_optimizer_type")
        inner = dict(found.get("sub_optimizer_kwargs") or {})
        inner.pop("verbose", None)
        found = {"type": found.get("sub_optimizer_type", "smooth"), **inner}
    search = found.get("search_alpha_config")
    if isinstance(search, Mapping) and "alpha" in search:
        left.append(f"{where}.search_alpha_config.alpha: the search has bounds and a step, not an alpha")
        found["search_alpha_config"] = {k: v for k, v in search.items() if k != "alpha"}
    if name == "input_quant" and found.get("axis") == -1 and not found.get("dynamic"):
        left.append(f"{where}.axis=-1 without dynamic: per-token scales are dynamic here")
        found["dynamic"] = True
    return found
