"""The kinds of object that can be saved and pushed: how each is saved, and the facts for its card."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfquant.calibration import BaseCalibSet
from hfquant.calibration.provenance import shareable
from hfquant.integrations import library
from hfquant.integrations.sharing import facts
from hfquant.integrations.sharing.facts import Facts
from hfquant.integrations.sharing.origin import save_code, save_extra_files, save_processor
from hfquant.nn.modules import quant_modules


@dataclass(frozen=True)
class Kind:
    """One kind of object.

    Attributes:
        noun: its name in text.
        save: writes it to a folder, with the options of its own method.
        facts: returns the facts for its card.
        repo_type: "model" or "dataset".
        leftovers: patterns of repository files that an earlier push of another size may have left.
        method: its own method to save itself.
    """

    noun: str
    save: Callable[[Any, Path, dict[str, Any]], None]
    facts: Callable[[Any], Facts]
    repo_type: str = "model"
    leftovers: tuple[str, ...] = ()
    method: str = "save_pretrained"


def kind_of(thing: Any) -> Kind:
    """Return the kind of ``thing``.

    Raises:
        TypeError: it is not a kind that can be shared.
        ValueError: it is a model or pipeline in which nothing is quantized, or one with adapters.
    """
    if isinstance(thing, BaseCalibSet):
        return CALIBRATION_SET
    # Objects of a module exist only once the module is imported, so this check imports nothing.
    if _is(thing, "hfquant.affiner.affiner", "BlockwiseAffiner"):
        return AFFINER
    pipeline = _is(thing, "diffusers.pipelines.pipeline_utils", "DiffusionPipeline")
    if not pipeline and library(thing) is None:
        raise TypeError(
            f"expected a model of transformers or diffusers, a pipeline, an affiner or a calibration set, got "
            f"{type(thing).__name__}"
        )
    models = facts.models_of(thing)
    if not any(quant_modules(model) for model in models.values()):
        raise ValueError(f"{type(thing).__name__} has no quantized layer: call its own save_pretrained or push_to_hub")
    if any(getattr(model, "_hf_peft_config_loaded", False) for model in models.values()):
        # transformers then saves the adapters alone, and diffusers saves the model under the names of peft's layers.
        raise ValueError(
            f"{type(thing).__name__} has adapters, which are saved on their own: share the model before it gets them, "
            "or after they are merged (fused) and unloaded"
        )
    return PIPELINE if pipeline else MODEL


def _is(thing: Any, module: str, name: str) -> bool:
    return module in sys.modules and isinstance(thing, getattr(sys.modules[module], name))


def _save(thing: Any, folder: Path, options: dict[str, Any]) -> None:
    thing.save_pretrained(folder, **options)


def _save_model(model: Any, folder: Path, options: dict[str, Any]) -> None:
    model.save_pretrained(folder, **options)
    if library(model) == "transformers":
        save_processor(model, folder)
        save_extra_files(model, folder)


def _save_pipeline(pipeline: Any, folder: Path, options: dict[str, Any]) -> None:
    pipeline.save_pretrained(folder, **options)
    save_code(pipeline, folder)
    if (affiner := facts.affiner_of(pipeline)) is not None:
        from hfquant.affiner.affiner import SUBFOLDER

        affiner.save_pretrained(folder / SUBFOLDER)


def _save_set(calibration_set: BaseCalibSet, folder: Path, options: dict[str, Any]) -> None:
    shared = BaseCalibSet(calibration_set.chunks, provenance=shareable(calibration_set.provenance))
    shared.save(folder, **options)


MODEL = Kind("model", _save_model, facts.of_models)
PIPELINE = Kind("pipeline", _save_pipeline, facts.of_models)
AFFINER = Kind("affiner", _save, facts.of_affiner)
_CHUNKS = "chunk-[0-9]*.safetensors*", "shard-[0-9]*/*"
CALIBRATION_SET = Kind("calibration set", _save_set, facts.of_set, "dataset", _CHUNKS, "save")
