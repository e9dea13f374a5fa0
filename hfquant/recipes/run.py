"""Quantize a model or a pipeline by a recipe, and save the result."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from hfquant.affiner import load_affiner
from hfquant.api import plan, quantize
from hfquant.calibration import calibration_batches
from hfquant.denoisers import is_pipeline
from hfquant.diffusion import quantize_pipeline
from hfquant.integrations.facts import facts_of
from hfquant.integrations.hub import load as load_model
from hfquant.integrations.sharing import save_pretrained
from hfquant.integrations.sharing.facts import models_of
from hfquant.integrations.skeleton import MODEL, Skeleton, subfolder
from hfquant.recipes.schema import ComponentRecipe, Recipe
from hfquant.report.sizes import PlannedSize, planned_size
from hfquant.report.stored import REPORT_FILE
from hfquant.schema import ConfigError

logger = logging.getLogger(__name__)


def check_fits(recipe: Recipe, found: Skeleton) -> None:
    """Check a recipe against a model's configs, before any weights are read.

    Raises:
        ConfigError: the recipe is for another class, names a missing component, or has a glob that matches nothing.
    """
    if found.kind != recipe.loads:
        raise ConfigError(f"{recipe.title!r} is a recipe for a {recipe.loads}, and this is a {found.kind}")
    for name, component in recipe.components.items():
        if name not in found.models:
            raise ConfigError(f"components.{name}: a {found.kind} has no such model; it has {', '.join(found.models)}")
        for glob in (*component.override, *component.skip):
            if not matches(found.models[name], glob):
                raise ConfigError(
                    f"components.{name}: {glob!r} matches no module of {type(found.models[name]).__name__}"
                )


def matches(model: nn.Module, glob: str) -> bool:
    """Return whether a glob matches a module of a model, or a parameter that holds fused experts."""
    experts = [f"{path}.{name}" for path, layout in facts_of(model).experts.items() for name in layout.projections]
    return any(fnmatchcase(name, glob) for name in (*dict(model.named_modules()), *experts))


def planned(recipe: Recipe, found: Skeleton, width: int = 2) -> dict[str, PlannedSize]:
    """Return the size of each component before and after quantization, without reading weights.

    Args:
        recipe: a recipe that fits the model.
        found: the model's configs.
        width: bytes per float in full precision.
    """
    models = {name: found.models[name] for name in recipe.components}
    plans = {name: plan(models[name], part.quant_config()) for name, part in recipe.components.items()}
    return {name: planned_size(models[name], plans[name], width) for name in models}


def quantize_by(
    loaded: Any,
    recipe: Recipe,
    source: str = "",
    *,
    resume_dir: str | os.PathLike[str] | None = None,
    verbose: bool = False,
) -> Any:
    """Quantize a model or pipeline in place by a recipe, and fit the recipe's affiner if it has one.

    Args:
        loaded: a transformers model or a diffusers pipeline.
        recipe: its recipe.
        source: folder or hub id that it was loaded from; a recipe with an affiner loads it again.
        resume_dir: folder that stores solved layers, as for :func:`~hfquant.quantize`.
        verbose: log each layer's decision and error.

    Returns:
        The fitted affiner; None if the recipe has none.

    Raises:
        ConfigError: the recipe does not fit.
        CalibrationError: the data cannot be used.
    """
    data = recipe.calibration
    if not is_pipeline(loaded):
        component = recipe.components[MODEL]
        quantize(
            loaded,
            None if data is None else data.data,
            component.quant_config(),
            verbose=verbose,
            resume_dir=resume_dir,
        )
        return None
    for names, component in _grouped(recipe):
        quantize_pipeline(
            loaded,
            data.data if data is not None and component.rules().needs_data else None,
            component.quant_config(),
            names,
            sampler=None if data is None else data.sampler.sampler(),
            resume_dir=resume_dir,
            verbose=verbose,
            **({} if data is None else data.call),
        )
    if recipe.affiner is None:
        return None
    assert data is not None
    assert data.data is not None
    real = load_model(source)
    config = {**recipe.affiner, "extra_args": {**data.call, **recipe.affiner.get("extra_args", {})}}
    return load_affiner(config, calibration_batches(data.data, batch_size=1), real.to(loaded.device), loaded)


def _grouped(recipe: Recipe) -> list[tuple[Sequence[str], ComponentRecipe]]:
    """Return groups of components with the same config, which share the pipeline's calibration runs."""
    groups: list[tuple[list[str], ComponentRecipe]] = []
    for name, component in recipe.components.items():
        config = component.quant_config()
        alike = next((names for names, other in groups if other.quant_config() == config), None)
        if alike is None:
            groups.append(([name], component))
        else:
            alike.append(name)
    return list(groups)


def save(loaded: Any, folder: Path, affiner: Any = None) -> None:
    """Save a quantized model or pipeline, the report of each quantized part next to its weights, and an affiner.

    Args:
        loaded: quantized model or pipeline.
        folder: folder to write to.
        affiner: affiner of a pipeline, which becomes its attribute of that name; None for none.
    """
    if affiner is not None:
        loaded.affiner = affiner
    save_pretrained(loaded, folder)
    for name, part in models_of(loaded).items():
        report = getattr(part, "quant_report", None)
        if report is not None:
            path = folder / subfolder(name) / REPORT_FILE
            path.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=True) + "\n", encoding="utf-8")
