"""Quantize a model and attach what saving and reloading needs, in one transaction."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from hfquant import ptq
from hfquant.calibration.provenance import data_provenance
from hfquant.calibration.self_made import SelfMade, SelfSpec
from hfquant.config import QuantRules
from hfquant.distributed import processes
from hfquant.integrations.checkpoint import stored_config
from hfquant.integrations.config import HfQuantConfig
from hfquant.integrations.facts import facts_of
from hfquant.layer_plan import LayerPlan
from hfquant.nn.experts import plans_of
from hfquant.nn.kinds import layers_in
from hfquant.nn.modules import quant_experts, quant_layers, quant_modules
from hfquant.planner import ModelFacts, Plan
from hfquant.run import Settings
from hfquant.search import search


def quantize_attached(
    model: nn.Module,
    loader: Any,
    config: HfQuantConfig,
    facts: ModelFacts,
    attach: Callable[[Any, HfQuantConfig], None],
    settings: Settings | None = None,
) -> Callable[[], None]:
    """Quantize ``model`` in place and attach its own config to it.

    This is one transaction: if anything fails or is interrupted, the model is restored.

    Args:
        model: a model of either library, or of neither.
        loader: batches for calibration; may be None if the config needs none.
        config: the user's config.
        facts: what is known about the model.
        attach: attaches to the model what saving and reloading needs.
        settings: further settings from the caller; default: those of the config.

    Returns:
        A function that undoes this.
    """
    if settings is None:
        settings = Settings(config.per_layer_mode, guard=config.guard, allow_empty=True)
    rules = _searched(model, loader, config, facts)
    restore = _snapshot(model)

    def finish(applied: ptq.Applied) -> None:
        own = own_config(config, applied.plan, facts, loader.spec if isinstance(loader, SelfMade) else None)
        own.provenance = data_provenance(loader) if config.needs_data else {}
        attach(model, own)
        model.quant_report = applied.report  # type: ignore[assignment]

    try:
        applied = ptq.quantize(model, loader, rules, settings, facts, finish)
    except BaseException:
        restore()
        raise

    def undo() -> None:
        applied.undo(model)
        restore()

    return undo


def _searched(model: nn.Module, loader: Any, config: HfQuantConfig, facts: ModelFacts) -> QuantRules:
    """Return the rules for quantizing layers: those found by a search if the config requests one.

    The model's own config keeps the search; its results are the plans of the layers.
    """
    rule = config.rules.search
    if rule is None or loader is None or quant_modules(model):
        return config.rules
    with processes() as group:
        with group.together():
            found = search(model, loader, rule.budget, rule.choices, config.rules, facts)
        # Each process saw its own data; use the first one's result for all.
        return QuantRules(group.gather(found.config)[0], config.rules.excluded)


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores the current attributes of a model and its configs."""
    config: Any = getattr(model, "config", None)
    before = [(o, dict(vars(o))) for o in (model, config, *inner_configs(config)) if hasattr(o, "__dict__")]

    def restore() -> None:
        for holder, attributes in before:
            vars(holder).clear()
            vars(holder).update(attributes)

    return restore


def inner_configs(config: Any) -> list[Any]:
    """Return the configs that a transformers config holds for parts of its model, at any depth, each once."""
    found = {id(config): config}
    waiting = [config] if hasattr(config, "sub_configs") else []
    while waiting:
        held = {id(value): value for value in vars(waiting.pop(0)).values() if hasattr(value, "sub_configs")}
        waiting += [value for key, value in held.items() if key not in found]
        found |= held
    return list(found.values())[1:]


def own_config(config: HfQuantConfig, plan: Plan, facts: ModelFacts, made: SelfSpec | None = None) -> HfQuantConfig:
    """Return a model's own copy of ``config``, with each layer's plan where it differs from the config's rule."""
    found = {n: p.differences(config.rules.resolve(*facts.aliases(n))) for n, p in plan.layers.items()}
    return config.for_model({n: difference for n, difference in found.items() if difference}, plan.skipped, made)


#: Held while a model is saved. A part and the whole may share a config, which is changed meanwhile.
_SAVING = threading.RLock()


@contextmanager
def attached(model: Any, attach: Callable[[Any, HfQuantConfig], None], given: Any = None) -> Iterator[None]:
    """Within this context, a part of a quantized model, or a model with a quantized part, has what saving needs.

    Only the model that is quantized carries a config. Saved as it is, codes of its parts would be taken for floats.
    Configs of parts get one as well, for classes that load a part from the folder of the whole (CLIP's towers).

    Args:
        model: any model of either library.
        attach: attaches a config to it.
        given: state dict to save instead of the model's own; None for that.

    Raises:
        ValueError: a layer shares the codes of one outside of ``model``.
    """
    with _SAVING, ExitStack() as stack:
        if quant_modules(model):
            if not _is_described(model):
                stack.callback(_snapshot(model))
                attach(model, described(model))
            for inner, config in part_configs(model):
                stack.callback(_snapshot(inner))  # a part that was quantized on its own has a config already
                inner.quantization_config = config
            stack.callback(setattr, model.hf_quantizer, "given", None)
            model.hf_quantizer.given = given
        yield


def _is_described(model: Any) -> bool:
    """Return whether a model has a config that describes its layers: a part may have been (de)quantized since.

    Layers of a model with adapters have other names, under which they are not saved.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    if not isinstance(config, HfQuantConfig) or getattr(model, "peft_config", None):
        return quantizer is not None
    plans, facts, kinds = _plans_in(model), facts_of(model), layers_in(model)
    for name in (*plans, *_left_in(model, plans)):
        found = stored_config(config, facts.aliases(name))
        if found is not None and name in kinds:
            found = kinds[name].fitted(found)
        if found != (plans[name].config if name in plans else None):
            return False
    return True


def described(model: nn.Module) -> HfQuantConfig:
    """Return a config that describes the quantized layers of ``model`` as they are.

    Raises:
        ValueError: a layer shares the codes of one outside of ``model``.
    """
    plans = _plans_in(model)
    return _describing(plans, _left_in(model, plans))


def part_configs(model: nn.Module) -> list[tuple[Any, HfQuantConfig]]:
    """Return the inner configs of parts with quantized layers, each with a config that describes the part alone.

    Layers of the part have the names that they have in it, and in the whole as well: classes that hold a part and what
    follows it (a tower and its projection) use either. Those of no part keep theirs.
    """
    inner = {id(config): config for config in inner_configs(_config(model))}
    # A part is the outermost module that has a config.
    parts = {name: found for name, m in model.named_modules() if (found := inner.pop(id(_config(m)), None)) is not None}
    plans = _plans_in(model) if parts else {}
    left = _left_in(model, plans) if parts else []
    found = []
    for part, config in parts.items():
        start, starts = f"{part}.", tuple(f"{other}." for other in parts)
        names = {n: n for n in (*plans, *left) if n.startswith(start) or not n.startswith(starts)}
        # A checkpoint has the codes of tied layers only once, under the name of their owner.
        own = {n: plan for n, plan in plans.items() if n in names and (not plan.tied or plan.tied in names)}
        if any(name.startswith(start) for name in own):
            # If a layer's name in the part is that of another one in the whole, it means the one in the part.
            names |= {n.removeprefix(start): n for n in names if n.startswith(start)}
            inside = {n: replace(own[n], tied=own[n].tied.removeprefix(start)) for n in own}
            used = {name: (inside if name != n else own)[n] for name, n in names.items() if n in own}
            found.append((config, _describing(used, [name for name, n in names.items() if n not in own])))
    return found


def drop_other_names(config: HfQuantConfig, model: nn.Module) -> None:
    """Drop entries that repeat one under the name that a layer has in another class.

    :func:`part_configs` names layers as in the part and as in the whole. No other entry than one of a layer that the
    model lacks can be mistaken for such a repetition.
    """
    names = {name for name, _ in model.named_modules()}
    for entries in (config.layers, config.skipped):
        own = names & entries.keys()
        shorter = {ending for name in own for ending in _endings(name)}
        for other in [name for name in entries if name not in own]:
            if other in shorter or not own.isdisjoint(_endings(other)):
                del entries[other]


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _config(module: Any) -> Any:
    return getattr(module, "config", None)


def _plans_in(model: nn.Module) -> dict[str, LayerPlan]:
    """Return the plans of a model's quantized layers and expert parameters, by name."""
    plans = {name: layer.plan for name, layer in quant_layers(model).items()} | plans_of(quant_experts(model))
    return plans | {name: replace(plans[name], tied=owner) for name, owner in _owners(model).items()}


def _left_in(model: nn.Module, plans: Mapping[str, LayerPlan]) -> list[str]:
    """Return the names of the layers and expert parameters that could be quantized but are in float."""
    layouts = {name: m.layout for name, m in quant_experts(model).items()}
    layouts |= facts_of(model).experts
    experts = [f"{name}.{p}".lstrip(".") for name, layout in layouts.items() for p in layout.projections]
    return [name for name in (*layers_in(model), *experts) if name not in plans]


def _describing(plans: dict[str, LayerPlan], left: Sequence[str]) -> HfQuantConfig:
    """Return a config for layers with these plans, and others left in float. Its one rule holds for any name."""
    usual = Counter(json.dumps(plan.config.model_dump(mode="json")) for plan in plans.values()).most_common(1)[0][0]
    skipped = dict.fromkeys(left, "not quantized")
    return own_config(HfQuantConfig({"default": json.loads(usual)}), Plan(plans, skipped), ModelFacts())


def _owners(model: nn.Module) -> dict[str, str]:
    """Return the name of each tied layer -> that of the layer whose codes it shares."""
    layers = quant_layers(model)
    owners = {id(layer.weight): name for name, layer in layers.items() if not layer.plan.tied}
    found = {}
    for name, layer in layers.items():
        if not layer.plan.tied:
            continue
        owner, known = owners.get(id(layer.weight)), layers.get(layer.plan.tied)
        if owner is None and known is not None and (layer.weight.is_meta or known.weight.is_meta):
            owner = layer.plan.tied  # one of them is on disk
        if owner is None:
            raise ValueError(
                f"layer {name!r} shares the codes of a layer outside of this {type(model).__name__}: save the whole "
                "model"
            )
        found[name] = owner
    return found
