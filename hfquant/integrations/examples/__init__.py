"""Example inputs for models that come without any: what a forward needs, derived from its signature and the config.

Watching one forward (:func:`hfquant.dataflow.trace.trace`) only needs shapes, so the inputs are as small as the
architecture allows and hold no meaningful values. They are real tensors (a few kilobytes), so that a forward that
branches on values also runs.

A forward's parameter is recognized by its name, and its sizes by the names of config fields. A short table of
exceptions covers classes that use names of their own.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hfquant.integrations.examples.diffusers import candidates_of_diffusers
from hfquant.integrations.examples.sketch import UnknownInput
from hfquant.integrations.examples.transformers import candidates_of_transformers

__all__ = ["example_inputs"]

logger = logging.getLogger(__name__)


def example_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Return keyword arguments that ``model`` can run forward with.

    The models of diffusers and transformers are known. Other classes derived from their base classes get inputs
    according to their parameter names, if their forward runs with them.

    Args:
        model: any module; parameters may be on the meta device. No weight values are read.

    Returns:
        Small tensors on the model's device (CPU for meta), floating-point ones in the model's dtype; a batch of two if
        the architecture allows. None if the inputs cannot be determined; a debug log line says why.
    """
    name = type(model).__name__
    libraries = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    if not libraries & {"transformers", "diffusers"}:
        logger.debug("%s: no example inputs: not a model of transformers or diffusers", name)
        return None
    try:
        of_diffusers = "diffusers" in libraries
        candidates = candidates_of_diffusers(model) if of_diffusers else candidates_of_transformers(model)
        made = (_placed(model, candidate) for candidate in candidates)
        known = type(model).__module__.partition(".")[0] in ("transformers", "diffusers")
        # A language model that looks for image tokens reads values, so on the meta device it runs on text alone.
        if known and (of_diffusers or not any(p.is_meta for p in model.parameters())):
            return next(made)
        return _first_that_runs(model, list(made), known)
    except UnknownInput as error:
        logger.debug("%s: no example inputs: %s", name, error)
    except Exception as error:  # noqa: BLE001 (a config with missing or senseless fields)
        logger.debug("%s: no example inputs: %s: %s", name, type(error).__name__, error)
    return None


def _first_that_runs(model: nn.Module, made: list[dict[str, Any]], known: bool) -> dict[str, Any]:
    """Return the first inputs that the forward runs with; if none, a ``known`` class needs values, which meta lacks."""
    from hfquant.dataflow.trace import PatternError, trace  # here, because trace offers example_inputs

    if known and len(made) == 1:
        return made[0]
    why = ""
    for inputs in made:
        try:
            trace(model, inputs, patterns=())
            return inputs
        except PatternError as error:
            why = str(error)
    if known:
        return made[0]
    raise UnknownInput(why)


def _placed(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return ``inputs`` on the model's device, floats in the dtype of its first float parameter unless 8-bit."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    device = "cpu" if weight.is_meta else weight.device

    def place(value: Tensor) -> Tensor:
        wide = value.is_floating_point() and weight.itemsize > 1
        return value.to(device, weight.dtype if wide else value.dtype)

    placed: dict[str, Any] = tree_map_only(Tensor, place, inputs)
    return placed
