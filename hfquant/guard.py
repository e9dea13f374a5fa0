"""The guard: after quantizing with data, one forward on rows kept out of it, each layer beside its float one.

A layer is off where its output has NaN or Inf that the float layer's has not, or where its error is

- more than half of the output, and
- more than :data:`TIMES` what its number formats promise (their error on a bell curve), and
- more than :data:`TIMES` the median error of its peers, the other layers of the same formats.

The error of a layer is relative, in L2: over all rows, or of the median row where that is larger, so that neither a few
huge rows nor the many small ones beside them hide the others. Input and output are those of the quantized model, so
each layer answers for itself alone. One whose output is lost answers in float for the rest of the forward.

A layer that is off goes down :data:`~hfquant.remedies.LADDER` until it is within bounds on the same rows.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn

from hfquant.calibration.batches import CalibrationData, evaluating, forward, samples
from hfquant.calibration.self_made import SelfMade
from hfquant.calibration.streams import Batches
from hfquant.config import InputQuant, LayerConfig, WeightQuant
from hfquant.distributed import Processes
from hfquant.folding import Folding
from hfquant.formats.promise import bell_error
from hfquant.layer_plan import LayerPlan
from hfquant.nn.kinds import kind_of
from hfquant.nn.linear import QuantLinear
from hfquant.planner import Plan
from hfquant.remedies import LADDER, likely_cause
from hfquant.report.layers import LayerReport, QuantReport
from hfquant.solver import solve

logger = logging.getLogger(__name__)

#: How far beyond its promise and its peers a layer's error is off.
TIMES = 4.0
#: Share of a layer's output below which an error is never off: a static scale on text of another kind comes near it.
LEAST = 0.5
#: Rows of a suspicious layer's input that are kept to choose a remedy by: the worst, and others drawn evenly.
ROWS = 128

Exact = Callable[[str], tuple[Tensor, Tensor | None]]
"""Gives the float weight [out, in] and bias [out] of a layer."""


@dataclass(frozen=True)
class Seen:
    """What a layer did in the forward.

    Attributes:
        error: of its output, see above; infinite for NaN or Inf.
        rows: of its input [rows, in] float32, where the error is suspicious; else none.
    """

    error: float
    rows: Tensor


@dataclass(frozen=True)
class Mended:
    """What becomes of a layer that was off.

    Attributes:
        error: before.
        cause: likely, in words.
        remedy: the rung of the ladder, in words.
        remaining: the error on the same rows with the remedy.
        plan: of the layer in its place; None where it stays in full precision.
        tensors: of that layer.
    """

    error: float
    cause: str
    remedy: str
    remaining: float
    plan: LayerPlan | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        error = "NaN or Inf" if self.error == torch.inf else f"error {self.error:.2g}"
        return f"{error} ({self.cause}): {self.remedy}, error {self.remaining:.2g}"


def samples_to_check(loader: Any, data: CalibrationData | None, held_out: Any) -> list[Any]:
    """Return samples to check a quantized model on.

    Args:
        loader: what it was calibrated on, as given.
        data: the same, opened.
        held_out: batches kept out of it; where there are none the first sample of ``data`` has to serve.
    """
    if held_out is None and isinstance(loader, (SelfMade, Batches)):
        held_out = loader.held_out or None
    if held_out is not None:
        return [sample for batch in CalibrationData(held_out) for sample in samples(batch)]
    return [] if data is None else samples(data.first)[:1]


def outcome(
    plan: Plan,
    mended: Mapping[str, tuple[Mended, nn.Module]],
    reports: Sequence[LayerReport],
) -> tuple[Plan, QuantReport]:
    """Return the plan, as it was solved, and the report of a model once what was off is mended."""
    plans = {name: layer for name, layer in plan.layers.items() if name not in mended}
    skipped = dict(plan.skipped)
    for name, (found, _) in mended.items():
        if found.plan is None:
            skipped[name] = f"guard: {found}"
        else:
            plans[name] = found.plan
    reports = [
        replace(r, what=mended[r.name][1].extra_repr(), guard=str(mended[r.name][0])) if r.name in mended else r
        for r in reports
    ]
    in_order = {name: plans[name] for name in plan.layers if name in plans}
    return replace(plan, layers=in_order, skipped=skipped), QuantReport(list(reports), skipped)


def mend(
    model: nn.Module,
    layers: Mapping[str, QuantLinear],
    originals: Mapping[str, nn.Module],
    folding: Folding,
    checks: Sequence[Any],
    options: Mapping[str, Any],
    group: Processes,
) -> dict[str, tuple[Mended, nn.Module]]:
    """Return what is to be put in the place of layers that are off, the same in all processes; each is logged.

    Args:
        model: with ``layers`` in it; left as it is.
        layers: name -> quantized linear; other kinds are not checked.
        originals: their float ones.
        folding: divisors that went into what comes before a layer.
        checks: samples of the model's input; empty where this process has none.
        options: keyword arguments that a sample may lack.
        group: the processes that share the work; the first with samples checks for all.
    """
    checker = [*group.gather(bool(checks)), True].index(True)

    def exact(name: str) -> tuple[Tensor, Tensor | None]:
        original = originals[name]
        kind = kind_of(original)
        assert kind is not None
        # Offloaded weights are fetched for the moment.
        with align_module_device(original):
            weight = kind.matrix(original.get_parameter("weight").detach())
            return folding.weight(name, weight), folding.bias(name, original._parameters.get("bias"))

    found: dict[str, Mended] = {}
    with group.together():
        if group.rank == checker:
            found = guard(model, layers, exact, checks, options)
    everyones = group.exchange({name: (replace(m, tensors={}), m.tensors) for name, m in found.items()})
    mended: dict[str, tuple[Mended, nn.Module]] = {}
    for name, (found_there, tensors) in everyones.items():
        if group.main:
            logger.warning("layer %r is off once quantized: %s", name, found_there)
        if found_there.plan is None:
            mended[name] = found_there, _in_float(name, originals[name], folding)
            continue
        device = layers[name].weight.device
        tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
        kind = type(layers[name])
        mended[name] = found_there, kind.from_tensors(found_there.plan, tensors, layers[name].bias, originals[name])
    return mended


def _in_float(name: str, original: nn.Module, folding: Folding) -> nn.Module:
    """Return the float layer, its weights as what was folded around it wants them."""
    if name not in folding.inputs and name not in folding.outputs:
        return original
    assert isinstance(original, nn.Linear)
    weight = folding.weight(name, original.weight.detach())
    with torch.device("meta"):
        linear = nn.Linear(original.in_features, original.out_features, bias=original.bias is not None)
    linear.weight = nn.Parameter(weight.to(original.weight.dtype), requires_grad=False)
    linear.bias = folding.bias(name, original.bias)  # type: ignore[assignment]
    return linear


def guard(
    model: nn.Module,
    layers: Mapping[str, QuantLinear],
    exact: Exact,
    batches: Iterable[Any],
    options: Mapping[str, Any] | None = None,
) -> dict[str, Mended]:
    """Find the layers that are off and what to put in their place. The model is left as it is.

    Args:
        model: with ``layers`` in it.
        layers: name -> quantized layer.
        exact: their float weights and biases, as the quantized model's activations want them.
        batches: samples of the model's input, kept out of calibration where there are such.
        options: keyword arguments that a sample may lack.
    """
    seen = watch(model, layers, exact, batches, options)
    off = far_off({name: s.error for name, s in seen.items()}, {n: layer.plan for n, layer in layers.items()})
    mended = {}
    for name in off:
        with torch.no_grad(), align_module_device(layers[name]):
            mended[name] = _mended(name, layers[name], *exact(name), seen[name])
    return mended


def watch(
    model: nn.Module,
    layers: Mapping[str, QuantLinear],
    exact: Exact,
    batches: Iterable[Any],
    options: Mapping[str, Any] | None = None,
) -> dict[str, Seen]:
    """Run the model once on each sample and compare each layer with its float one; the worst of several counts."""
    seen: dict[str, Seen] = {}

    def hook(name: str) -> Any:
        def compare(layer: QuantLinear, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
            x = args[0] if args else kwargs["input"]
            weight, bias = exact(name)
            right = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
            errors = row_errors(output.float(), right)
            error = relative_error(output.float(), right, errors)
            if not error or (name in seen and error <= seen[name].error):
                return None
            suspicious = error > LEAST
            seen[name] = Seen(error, _kept(x, errors) if suspicious else x.new_zeros(0, x.shape[-1]))
            return right.to(output.dtype) if error >= 1 else None

        return compare

    handles = [layer.register_forward_hook(hook(n), with_kwargs=True) for n, layer in layers.items()]
    try:
        with evaluating(model):
            for sample in batches:
                forward(model, sample, options)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def row_errors(output: Tensor, right: Tensor) -> Tensor:
    """Return the relative error of each row, [..., out] twice to [rows]; infinite where NaN or Inf is new."""
    output, right = output.reshape(-1, output.shape[-1]), right.reshape(-1, right.shape[-1])
    norm = right.norm(dim=1)
    errors = (output - right).norm(dim=1) / norm.clamp(min=torch.finfo(torch.float32).tiny)
    errors = torch.where(output.isfinite().all(1), errors, torch.inf)
    # What the float layer cannot do either is no fault.
    return torch.where(right.isfinite().all(1), errors, 0.0)


def relative_error(output: Tensor, right: Tensor, errors: Tensor) -> float:
    """Return the error over all rows, or that of the median row where it is larger."""
    if not len(errors) or errors.isinf().any():
        return torch.inf if len(errors) else 0.0
    sound = right.isfinite().all(-1)
    norm = right[sound].norm().item()
    whole = (output[sound] - right[sound]).norm().item() / norm if norm else 0.0
    return max(whole, errors.median().item())


def _kept(x: Tensor, errors: Tensor) -> Tensor:
    """Return the worst rows and others drawn evenly, at most :data:`ROWS`, so that a remedy is tried on both."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= ROWS:
        return rows.clone()
    worst = errors.argsort(descending=True)[: ROWS // 4]
    even = torch.arange(ROWS - len(worst), device=x.device) * len(rows) // (ROWS - len(worst))
    return rows[torch.cat([worst, even]).unique()]


# ----------------------------------------------------------------------------------------------------------- the rule


def far_off(errors: Mapping[str, float], plans: Mapping[str, LayerPlan]) -> list[str]:
    """Return the layers whose errors are off, by the rule above. An error of 1 always is: zeros would do as well."""
    limits = {name: max(LEAST, bound(plans[name], _peers(name, errors, plans))) for name in errors}
    return [name for name, error in errors.items() if error > min(limits[name], 1.0)]


def bound(plan: LayerPlan, peers: float) -> float:
    """Return how large an error may be, for what a layer's formats promise and for the median error of its peers."""
    return TIMES * max(promise(plan.config), peers)


def _peers(name: str, errors: Mapping[str, float], plans: Mapping[str, LayerPlan]) -> float:
    own = _formats(plans[name].config)
    found = [e for other, e in errors.items() if other != name and _formats(plans[other].config) == own]
    return statistics.median(found) if found else 0.0


def _formats(config: LayerConfig) -> tuple[WeightQuant, InputQuant | None]:
    return config.weight_quant, config.input_quant


def promise(config: LayerConfig) -> float:
    """Return the relative error of a product whose factors are bell curves, quantized in a config's formats."""
    formats = [config.weight_quant.format] + ([] if config.input_quant is None else [config.input_quant.format])
    return sum(bell_error(form) ** 2 for form in formats) ** 0.5


# ---------------------------------------------------------------------------------------------------------- the remedy


FLOAT = "left in full precision"


def _mended(name: str, layer: QuantLinear, weight: Tensor, bias: Tensor | None, seen: Seen) -> Mended:
    x = seen.rows
    right = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    cause = likely_cause(layer, weight, x) if x.isfinite().all() else "NaN or Inf in its input"
    for remedy, lower in LADDER.items():
        plan = lower(layer.plan)
        if plan is None:
            continue
        # Where the weights' side is the same it stays as it was solved, by statistics that are gone.
        same = (plan.config.weight_quant, plan.opt) == (layer.plan.config.weight_quant, layer.plan.opt)
        solved = {n: t for n, t in layer.solved_tensors().items() if n in plan.tensors()}
        if not same:
            solved = solve(name, weight, plan, None, x.dtype).tensors
        parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
        candidate = QuantLinear.from_tensors(plan, solved, parameter)
        output = candidate(x).float()
        remaining = relative_error(output, right, row_errors(output, right))
        if remaining <= bound(plan, 0.0):
            return Mended(seen.error, cause, remedy, remaining, plan, candidate.solved_tensors())
    return Mended(seen.error, cause, FLOAT, 0.0)
