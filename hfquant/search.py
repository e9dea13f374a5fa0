"""Automatic bits: a number format a layer under a budget, from measured effects.

What quantizing a layer does to the model's output is estimated to second order. With dW the change of its weight, A
the second moments of its input and g the mean square of the gradient of the output with respect to each of its outputs,
it is sum_o g_o (dW_o A dW_o^T): the Fisher information, taken as a product of what comes in and what goes out (Martens
and Grosse, arXiv 1503.05671), diagonal on the way out. The choice of formats under a budget is then a multiple-choice
knapsack, which a dynamic program solves exactly up to the rounding of sizes; its linear relaxation bounds what any
choice could reach. Several weightings are judged on held-out rows, at the model's own output.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hfquant.calibration.batches import CalibrationData, CalibrationError, evaluating, forward, samples
from hfquant.config import ConfigError, QuantRules, parse
from hfquant.formats import FORMATS
from hfquant.layer_plan import LayerPlan
from hfquant.memory import free_memory
from hfquant.nn.linear import QuantLinear
from hfquant.observe import observe
from hfquant.planner import ModelFacts, plan_layers
from hfquant.solver import solve
from hfquant.statistics import LayerStats, stats_bytes

logger = logging.getLogger(__name__)

#: Steps that a budget is cut into by the dynamic program.
_STEPS = 20_000


@dataclass(frozen=True)
class Choice:
    """What one layer could become: its size and the harm that it does.

    Attributes:
        name: of the number format.
        bytes: of the layer's tensors.
        error: estimated harm to the model's output.
        relative: error of the layer's own output, relative to its square.
    """

    name: str
    bytes: int
    error: float
    relative: float


@dataclass(frozen=True)
class BitSearch:
    """A choice of formats.

    Attributes:
        config: the config's dict, with an entry for each layer that differs from the default.
        chosen: format by layer.
        bits: stored bits a weight, scales included.
        bytes: of all layers.
        error: estimated harm to the output.
        bound: no choice within the budget has less of it.
        judged: divergence of the output on held-out rows by weighting, where several were compared.
    """

    config: dict[str, dict[str, Any]]
    chosen: dict[str, str]
    bits: float
    bytes: int
    error: float
    bound: float
    judged: dict[str, float]


def search(
    model: nn.Module,
    data: Any,
    budget: float,
    choices: Sequence[str] = ("int4", "int6", "int8"),
    base: str | Mapping[str, Any] = "w4a16-gptq",
    facts: ModelFacts | None = None,
    width: int = 2,
) -> BitSearch:
    """Choose a weight format for each layer; the model is left as it is.

    Args:
        model: in full precision.
        data: calibration batches; the last quarter of them judges.
        budget: at most 32: stored bits a weight, scales included; more: bytes of all quantized layers.
        choices: weight formats to choose from.
        base: config that says all else.
        facts: what a library knows of the model.
        width: bytes of a float of the model's dtype.

    Raises:
        ConfigError: unknown formats, or a base that they do not fit.
        ValueError: the budget is less than the smallest choice takes.
        CalibrationError: fewer than two samples.
    """
    if unknown := [name for name in choices if name not in FORMATS]:
        raise ConfigError(f"choices: unknown number format {unknown[0]!r}; there are {', '.join(FORMATS)}")
    if len(set(choices)) < 2:
        raise ConfigError(f"choices: expected at least two number formats, got {list(choices)}")
    raw = parse(dict(base) if isinstance(base, Mapping) else base).raw
    rules = {name: _with_type(raw, name) for name in dict.fromkeys(choices)}
    seen = [sample for batch in CalibrationData(data) for sample in samples(batch)]
    if len(seen) < 2:
        raise CalibrationError("searching for bits needs at least two samples: some to measure on, some to judge by")
    held = seen[-max(1, len(seen) // 4) :]
    seen = seen[: len(seen) - len(held)]
    facts = facts or ModelFacts()
    plans = {
        name: _linears(model, plan_layers(model, QuantRules(config), (), seen[0], facts).layers)
        for name, config in rules.items()
    }
    first = next(iter(plans.values()))
    sensitivity = _sensitivity(model, list(first), seen)
    table = _table(model, plans, seen, sensitivity, facts, width)
    weights = sum(plan.in_features * plan.out_features for plan in first.values())
    limit = math.floor(budget * weights / 8) if budget <= 32 else math.floor(budget)
    weightings: dict[str, Callable[[Choice], float]] = {
        "output": lambda c: c.error,
        "layer": lambda c: c.relative,
        "both": lambda c: math.sqrt(c.error * c.relative),
    }
    found = {how: _knapsack(table, limit, weigh) for how, weigh in weightings.items()}
    distinct = {tuple(chosen.values()): how for how, chosen in reversed(found.items())}
    judged: dict[str, float] = {}
    if len(distinct) > 1:
        judged = {how: _divergence(model, plans, found[how], held) for how in sorted(distinct.values())}
    best = min(judged, key=lambda how: judged[how]) if judged else "output"
    return _result(raw, table, found[best], limit, weights, judged)


def _linears(model: nn.Module, layers: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """Return the plans of linears alone: other kinds of layers keep the base's format."""
    return {name: plan for name, plan in layers.items() if isinstance(model.get_submodule(name), nn.Linear)}


def _with_type(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    default = raw.get("default", {})
    weight = {**default.get("weight_quant", {}), "type": name}
    if not FORMATS[name].is_integer:
        weight = {key: value for key, value in weight.items() if key not in ("symmetric", "clip")}
    return {**raw, "default": {**default, "weight_quant": weight}}


def _sensitivity(model: nn.Module, names: Sequence[str], data: Sequence[Any]) -> dict[str, Tensor]:
    """Return the mean square of the output's gradient for each output of each layer, [out] float32.

    Of a language model the output is the log-likelihood of a token that it samples itself, of all else a random
    projection. A layer whose gradient cannot be had counts alike for all its outputs.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()

            def add(gradient: Tensor) -> None:
                rows = gradient.detach().float().reshape(-1, gradient.shape[-1])
                sums[name] = sums.get(name, 0) + rows.square().sum(0)
                counts[name] = counts.get(name, 0) + len(rows)

            output.register_hook(add)
            return output

        return after

    modules = {name: model.get_submodule(name) for name in names}
    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    generator = torch.Generator().manual_seed(0)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            for sample in data:
                _scalar(forward(model, sample), generator).backward()
    except RuntimeError as error:
        logger.warning("the model's output has no gradient (%s): each layer's own error decides", error)
        return {}
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_()
    return {name: total / counts[name] for name, total in sums.items()}


def _scalar(output: Any, generator: torch.Generator) -> Tensor:
    """Return a number whose gradient's covariance is the Fisher information of the output."""
    logits = getattr(output, "logits", None)
    values = _tensor(output)
    if isinstance(logits, Tensor):
        flat = logits.float().reshape(-1, logits.shape[-1])
        drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator).to(flat.device)
        return -nn.functional.cross_entropy(flat, drawn.squeeze(1), reduction="sum")
    direction = torch.randn(values.shape, generator=generator).to(values)
    return (values * direction).sum()


def _tensor(output: Any) -> Tensor:
    """Return the main tensor of a model's output."""
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, Mapping) else list(output) if output is not None else []
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if isinstance(value, (list, tuple, Mapping)) and value:
            return _tensor(value)
    raise ValueError(f"a {type(output).__name__} holds no tensor to search bits by")


def _table(
    model: nn.Module,
    plans: Mapping[str, Mapping[str, LayerPlan]],
    data: Sequence[Any],
    sensitivity: Mapping[str, Tensor],
    facts: ModelFacts,
    width: int,
) -> dict[str, list[Choice]]:
    """Return the choices of each layer, measured in as few passes over the data as memory allows."""
    names = list(next(iter(plans.values())))
    table: dict[str, list[Choice]] = {}
    budget, group, size = free_memory() // 4, [], 0
    for i, name in enumerate(names):
        takes = stats_bytes(model.get_submodule(name).in_features, ("hessian",))  # type: ignore[arg-type]
        group.append(name)
        size += takes
        if size > budget or i == len(names) - 1:
            layers = {n: model.get_submodule(n) for n in group}
            options = facts.options(layers.values())
            stats = observe(model, layers, data, dict.fromkeys(group, ("hessian",)), options=options)
            for n in group:
                if n in stats:
                    table[n] = [
                        _choice(kind, layers[n], found[n], stats[n], sensitivity.get(n), width)
                        for kind, found in plans.items()
                    ]
            group, size = [], 0
    return table


@torch.no_grad()
def _choice(
    kind: str, layer: nn.Module, plan: LayerPlan, stats: LayerStats, sensitivity: Tensor | None, width: int
) -> Choice:
    weight = layer.weight.detach().float()  # type: ignore[operator]
    change = _rounded(plan, weight, stats) - weight
    moments = stats.hessian
    errors = ((change @ moments) * change).sum(1)
    output = ((weight @ moments) * weight).sum().clamp(min=torch.finfo(torch.float32).tiny)
    relative = (errors.sum() / output).item()
    error = relative if sensitivity is None else (sensitivity.to(errors) * errors).sum().item() * stats.count
    size = sum(
        math.prod(spec.shape) * (width if spec.dtype is None else spec.dtype.itemsize)
        for spec in plan.tensors().values()
    )
    return Choice(kind, size, max(error, 0.0), max(relative, 0.0))


def _rounded(plan: LayerPlan, weight: Tensor, stats: LayerStats | None) -> Tensor:
    """Return the weight [out, in] rounded to nearest on the plan's grid."""
    plain = plan.plain()
    solved = solve("", weight, plain, stats)
    return QuantLinear.from_tensors(solved.plan, solved.tensors, None).dequantize()


def _knapsack(table: Mapping[str, Sequence[Choice]], limit: int, weigh: Callable[[Choice], float]) -> dict[str, str]:
    """Return one choice a layer of the least sum within the limit: a dynamic program over sizes rounded up.

    Raises:
        ValueError: even the smallest choices take more.
    """
    least = sum(min(choice.bytes for choice in choices) for choices in table.values())
    if least > limit:
        raise ValueError(f"budget: {limit} bytes; the smallest choice of each layer takes {least} bytes in all")
    # Only what is above the smallest choice is to be shared out.
    spare = limit - least
    unit = max(spare // _STEPS, 1)
    steps = spare // unit
    best = np.zeros(steps + 1)
    taken: list[np.ndarray] = []
    for choices in table.values():
        base = min(choice.bytes for choice in choices)
        rows = np.full((len(choices), steps + 1), np.inf)
        for i, choice in enumerate(choices):
            extra = -(-(choice.bytes - base) // unit)
            if extra <= steps:
                rows[i, extra:] = best[: steps + 1 - extra] + weigh(choice)
        taken.append(rows.argmin(0))
        best = rows.min(0)
    chosen: dict[str, str] = {}
    left = steps
    for (name, choices), row in zip(reversed(list(table.items())), reversed(taken), strict=True):
        choice = choices[int(row[left])]
        chosen[name] = choice.name
        left -= -(-(choice.bytes - min(c.bytes for c in choices)) // unit)
    return {name: chosen[name] for name in table}


def relaxed(table: Mapping[str, Sequence[Choice]], limit: int) -> float:
    """Return the least sum of errors where layers may be split between choices: a bound for every real choice."""
    total, steps = 0.0, []
    spare = float(limit)
    for choices in table.values():
        hull: list[Choice] = []
        for choice in sorted(choices, key=lambda c: (c.bytes, c.error)):
            if hull and choice.error >= hull[-1].error:
                continue
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], choice):
                hull.pop()
            hull.append(choice)
        total += hull[0].error
        spare -= hull[0].bytes
        steps += [(_slope(a, b), b.bytes - a.bytes) for a, b in pairwise(hull)]
    for gain, size in sorted(steps, reverse=True):
        part = min(1.0, max(spare, 0.0) / size)
        total -= part * gain * size
        spare -= part * size
    return total


def _slope(a: Choice, b: Choice) -> float:
    return (a.error - b.error) / max(b.bytes - a.bytes, 1)


@torch.no_grad()
def _divergence(
    model: nn.Module, plans: Mapping[str, Mapping[str, LayerPlan]], chosen: Mapping[str, str], data: Sequence[Any]
) -> float:
    """Return how far the output on held-out rows moves when the weights are rounded as chosen."""
    before = [_logits(forward(model, sample)) for sample in data]
    originals = {name: model.get_submodule(name).weight.data for name in chosen}
    try:
        for name, kind in chosen.items():
            module: Any = model.get_submodule(name)
            rounded = _rounded(plans[kind][name], module.weight.detach().float(), None)
            module.weight.data = rounded.to(module.weight.dtype)
        total = count = 0.0
        for sample, p in zip(data, before, strict=True):
            q = _logits(forward(model, sample))
            if getattr(getattr(model, "config", None), "vocab_size", None) == p.shape[-1]:
                log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
                total += nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
                count += p[..., 0].numel()
            else:
                total, count = total + (q - p).square().sum().item(), count + p.square().sum().item()
        return total / max(count, 1e-30)
    finally:
        for name, weight in originals.items():
            model.get_submodule(name).weight.data = weight


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    return (logits if isinstance(logits, Tensor) else _tensor(output)).float()


def _result(
    raw: Mapping[str, Any],
    table: Mapping[str, Sequence[Choice]],
    chosen: Mapping[str, str],
    limit: int,
    weights: int,
    judged: dict[str, float],
) -> BitSearch:
    picked = {name: next(c for c in table[name] if c.name == kind) for name, kind in chosen.items()}
    kinds = list(chosen.values())
    default = max(dict.fromkeys(kinds), key=kinds.count)
    config = _with_type(raw, default)
    full = {name: _with_type(raw, name)["default"]["weight_quant"] for name in dict.fromkeys(kinds)}
    config |= {name: {"weight_quant": full[kind]} for name, kind in chosen.items() if kind != default}
    size = sum(choice.bytes for choice in picked.values())
    found = BitSearch(
        config,
        dict(chosen),
        8 * size / weights,
        size,
        sum(choice.error for choice in picked.values()),
        relaxed(table, limit),
        judged,
    )
    logger.info(
        "bits: %s; %.2f bits a weight, estimated harm %.3g, at least %.3g within the budget",
        ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(sorted(kinds))),
        found.bits,
        found.error,
        found.bound,
    )
    return found
