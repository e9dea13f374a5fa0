"""Quantize a model and attach what saving and reloading needs, in one transaction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hfquant import ptq
from hfquant.calibration.provenance import data_provenance
from hfquant.calibration.self_made import SelfMade, SelfSpec
from hfquant.config import QuantRules
from hfquant.distributed import processes
from hfquant.integrations.config import HfQuantConfig
from hfquant.nn.modules import quant_modules
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
        not_convert = config.modules_to_not_convert or ()
        settings = Settings(not_convert, config.per_layer_mode, guard=config.guard, or_nothing=True)
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
            not_convert = config.modules_to_not_convert or ()
            found = search(model, loader, rule.budget, rule.choices, config.rules, facts, not_convert)
        # Each process saw its own data; use the first one's result for all.
        return QuantRules(group.gather(found.config)[0])


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores the current attributes of a model and its configs."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    before = [(o, dict(vars(o))) for o in (model, config, text) if hasattr(o, "__dict__")]

    def restore() -> None:
        for holder, attributes in before:
            vars(holder).clear()
            vars(holder).update(attributes)

    return restore


def own_config(config: HfQuantConfig, plan: Plan, facts: ModelFacts, made: SelfSpec | None = None) -> HfQuantConfig:
    """Return a model's own copy of ``config``, with each layer's plan where it differs from the config's rule."""
    found = {n: p.differences(config.rules.resolve(*facts.aliases(n))) for n, p in plan.layers.items()}
    return config.for_model({n: difference for n, difference in found.items() if difference}, plan.skipped, made)
