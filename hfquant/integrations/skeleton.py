"""Models on the meta device, built from their configs alone, for planning a dry run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfquant.denoisers import DENOISERS, models_in
from hfquant.hub_errors import hub_errors
from hfquant.integrations.hub import MODEL_FILE, PIPELINE_FILE, is_pipeline_name, model_class, transformers_config
from hfquant.remote_code import remote_code, remote_code_allowed, remote_code_errors

#: Name of the single component of anything that is not a pipeline.
MODEL = "model"


@dataclass(frozen=True)
class Skeleton:
    """The content of a folder or hub repository, without weights.

    Attributes:
        kind: class of the pipeline or of the model.
        models: component name -> model in eval mode on the meta device; a single model is called "model", and several
            ControlNets of one component "controlnet.nets.0", "controlnet.nets.1", ...
    """

    kind: str
    models: dict[str, nn.Module]

    @property
    def is_pipeline(self) -> bool:
        """Whether it is a pipeline."""
        return list(self.models) != [MODEL]

    @property
    def denoisers(self) -> list[str]:
        """Names of the components that run at every step; a single model is quantized as a whole."""
        return [name for name in DENOISERS if name in self.models] if self.is_pipeline else [MODEL]


def skeleton(name: str) -> Skeleton:
    """Read a folder or a hub repository; fetch only configs, and code that comes with it if that is allowed to run.

    Args:
        name: local folder or hub id. If it has a model_index.json, it is a pipeline.

    Raises:
        FileNotFoundError: no such folder, or one without a pipeline or a model.
        ValueError: a class that the libraries lack, or code that is not allowed to run (:mod:`hfquant.remote_code`).
        OSError: the hub cannot provide it; the message says why (:mod:`hfquant.hub_errors`).
    """
    with hub_errors(name), remote_code_errors(name):
        return _skeleton(name)


def _skeleton(name: str) -> Skeleton:
    if not is_pipeline_name(name):
        model = _transformers_model(name, "")
        return Skeleton(type(model).__name__, {MODEL: model})
    with open(_file(name, PIPELINE_FILE), encoding="utf-8") as file:
        index = json.load(file)
    found: dict[str, nn.Module] = {}
    for component, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            continue  # not a component, or a disabled one
        library, class_name = entry
        if library == "transformers":
            if _is_transformers_model(class_name):
                with remote_code(False):  # diffusers loads it by this class
                    found[component] = _transformers_model(name, component)
        elif (kind := _diffusers_class(name, component, library, class_name)) is not None:
            found |= _diffusers_models(name, component, kind)
    if not found:
        raise ValueError(f"{name} has no model among its components {', '.join(index)}.")
    kind = index.get("_class_name")  # of a class that comes with the pipeline: its file and its name
    return Skeleton(str(kind[-1] if isinstance(kind, list) else kind), found)


def _is_transformers_model(class_name: str) -> bool:
    """Return whether a class of transformers is a model (not a tokenizer or a processor)."""
    import transformers

    kind = getattr(transformers, class_name, None)
    return isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)


def _diffusers_class(name: str, component: str, library: str, class_name: str) -> Any:
    """Return a class of models of diffusers, or None for anything else (a scheduler, a class of another library).

    Args:
        name: folder or hub id of the pipeline.
        component: name of the component.
        library: "diffusers", the module of a pipeline in which the class is defined, such as "audioldm2", or the file
            in the component's folder that defines it.
        class_name: name of the class.
    """
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

    module = diffusers if library == "diffusers" else getattr(diffusers.pipelines, library, None)
    kind = getattr(module, class_name, None)
    if module is None and _has_file(name, f"{component}/{library}.py"):
        folder = str(Path(_file(name, f"{component}/{library}.py")).parent)
        kind = get_class_from_dynamic_module(
            folder, f"{library}.py", class_name=class_name, trust_remote_code=remote_code_allowed()
        )
    return kind if isinstance(kind, type) and issubclass(kind, ModelMixin) else None


def _transformers_model(name: str, subfolder: str) -> nn.Module:
    config = transformers_config(name, subfolder=subfolder)
    kind = model_class(config)
    with torch.device("meta"):
        if hasattr(kind, "_from_config"):
            return kind._from_config(config).eval()
        return kind.from_config(config, trust_remote_code=remote_code_allowed()).eval()


def _diffusers_models(name: str, component: str, kind: Any) -> dict[str, nn.Module]:
    """Return the model of a component, or all that it holds (several ControlNets), by name."""
    if hasattr(kind, "from_config"):
        return {component: _diffusers_model(name, component, kind)}
    # The class has no config of its own: it only holds models, each of which is stored in a folder.
    folders = (subfolder(f"{component}.{number}") for number in count())
    models = [_diffusers_model(name, folder) for folder in takewhile(partial(_has_model, name), folders)]
    return models_in(kind(models), component) if models else {}


def _diffusers_model(name: str, folder: str, kind: Any = None) -> nn.Module:
    import diffusers

    with open(_file(name, f"{folder}/{MODEL_FILE}"), encoding="utf-8") as file:
        config = json.load(file)
    kind = kind or getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        return kind.from_config(config).eval()


def subfolder(name: str) -> str:
    """Return the folder of a pipeline in which a model is stored: "controlnet.nets.1" is in controlnet_1."""
    component, *path = name.split(".")
    return f"{component}_{path[-1]}" if path and path[-1] != "0" else component


def _has_model(name: str, folder: str) -> bool:
    return _has_file(name, f"{folder}/{MODEL_FILE}")


def _has_file(name: str, path: str) -> bool:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(_file(name, path)).is_file()
    except EntryNotFoundError:
        return False


def _file(name: str, path: str) -> str:
    if Path(name).is_dir():
        return str(Path(name) / path)
    from huggingface_hub import hf_hub_download

    return hf_hub_download(name, path)
