"""What transformers and diffusers know about a model but the core does not: what to skip, names, inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hfquant.calibration.batches import options_for
from hfquant.experts import ExpertsLayout
from hfquant.integrations.compat import keep_in_fp32
from hfquant.integrations.examples import example_inputs
from hfquant.integrations.experts import experts_of
from hfquant.nn.kinds import find_kind
from hfquant.planner import ModelFacts, matches


def facts_of(model: nn.Module) -> ModelFacts:
    """Return what is known about ``model``; nothing for a module of neither library.

    These stay in full precision unless requested: tied weights (including those tied only after loading), the model's
    ``_keep_in_fp32_modules`` and the routers of experts. Output heads do so unless they are included.
    """
    keep = keep_in_fp32(model)
    skips = {
        name: "in the model's _keep_in_fp32_modules"
        for name, module in model.named_modules()
        if find_kind(module) is not None and matches([name, f"{name}.weight"], keep)
    }
    experts = experts_of(model)
    for name in [f"{n}.{p}".lstrip(".") for n, layout in experts.items() for p in layout.projections]:
        if matches([name], keep):
            skips[name] = "in the model's _keep_in_fp32_modules"
    skips.update(dict.fromkeys(_routers(model, experts), "it routes to experts"))
    skips.update(dict.fromkeys(_rescaled(model), "the model changes its weight when it runs"))
    pairs = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    tied = {k.removesuffix(".weight"): v.removesuffix(".weight") for k, v in pairs if k.endswith(".weight")}
    heads = _heads(model)
    return ModelFacts(
        skipped=skips,
        tied=tied,
        optional=dict.fromkeys(heads, "output_heads"),
        prefix=getattr(model, "base_model_prefix", ""),
        example=lambda: example_inputs(model),
        options=lambda layers: options_for(model, layers),
        uncounted=frozenset(heads),
        experts=experts,
    )


def _routers(model: nn.Module, experts: Mapping[str, ExpertsLayout]) -> list[str]:
    """Return linears next to fused experts with one output per expert: they are small, and an error misroutes rows."""
    found = []
    for name, layout in experts.items():
        count = len(model.get_submodule(name).get_parameter(layout.projections[0]))
        parent = name.rpartition(".")[0]
        found += [
            f"{parent}.{n}".lstrip(".")
            for n, module in model.get_submodule(parent).named_modules()
            if isinstance(module, nn.Linear) and module.out_features == count
        ]
    return found


def _rescaled(model: nn.Module) -> list[str]:
    """Return linears whose weights RWKV divides in place, once, before its first inference.

    Dataflow does not show this if the model has already run.
    """
    names = ("attention.output", "feed_forward.value")
    blocks = [
        f"{name}.blocks.{i}".lstrip(".")
        for name, module in model.named_modules()
        if hasattr(module, "layers_are_rescaled")
        for i in range(len(module.blocks))
    ]
    return [f"{block}.{name}" for block in blocks for name in names]


def _heads(model: nn.Module) -> list[str]:
    """Return the names of output heads: the layer that returns logits of tokens, or the layers of a classifier.

    peft trains the latter along with any adapter for such a task, and codes cannot be trained.
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    classifies = type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification"))
    return [
        name
        for name, module in model.named_modules()
        if module is head or (classifies and name.partition(".")[0].endswith(("classifier", "score")))
    ]
