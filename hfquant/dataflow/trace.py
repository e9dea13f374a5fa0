"""Find the patterns around every linear of a model by watching one forward pass.

The pass runs on fake tensors (shapes and dtypes, no values), so a model of any size, even on the meta device, is
analyzed in seconds without weights in memory. If a forward depends on values, the pass is repeated on real tensors. It
runs on a copy (:mod:`hfquant.dataflow.twin`), so the model itself is not modified. :mod:`hfquant.dataflow.tracker`
follows the features, and :mod:`hfquant.dataflow.weights` finds the linears that cannot be replaced.

The reference implementation of SegQuant (arXiv 2507.14811) finds these patterns in torch.fx graphs of edited model
files; here, the model needs no edits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.dataflow.index_map import cuts_of, squash
from hfquant.dataflow.scaling import ScaleWatch, Source
from hfquant.dataflow.source import obstacles_in_training
from hfquant.dataflow.tracker import Call, FeatureTracker, Slice
from hfquant.dataflow.twin import PatternError, run_twin
from hfquant.dataflow.weights import WeightWatch, find_obstacles
from hfquant.enums import SegPattern
from hfquant.nn.float_modules import first
from hfquant.nn.kinds import layers_in, size_of
from hfquant.nn.layer import QuantLayer
from hfquant.nn.linear import QuantLinear

__all__ = ["LinearTrace", "PatternError", "failure", "trace"]

ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations")


@dataclass(frozen=True)
class LinearTrace:
    """What one watched forward pass shows about one layer.

    Attributes:
        name: qualified module name.
        order: execution order of its first call.
        calls: how often it ran in the forward; 0 if it is only reported for its ``obstacle``.
        input_segments: sizes that partition ``in_features``; ``(in_features,)`` if nothing was joined.
        output_segments: sizes that partition ``out_features``; ``(out_features,)`` if nothing was split.
        activations: for each input segment, the activation whose output (or gated product) it is, or None.
        patterns: the patterns that produced these results.
        evidence: short reasons.
        obstacle: why no other module can replace it, or None if one can.
        source: the preceding module that can be divided per channel if this layer and all others with the same source
            multiply to compensate, or None.
        rows: number of rows multiplied by its matrix, over all calls.
    """

    name: str
    order: int
    calls: int
    input_segments: tuple[int, ...]
    output_segments: tuple[int, ...]
    activations: tuple[str | None, ...]
    patterns: tuple[SegPattern, ...]
    evidence: tuple[str, ...]
    obstacle: str | None = None
    source: Source | None = None
    rows: int = 0


def trace(
    model: nn.Module,
    example: Any = None,
    *,
    patterns: Collection[SegPattern] | None = None,
    codes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, LinearTrace]:
    """Run ``model`` under observation and return what was found around each linear.

    Args:
        model: any model that can run forward, on any device, including meta. It is not modified.
        example: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments. Tensor values are
            only needed if the forward branches on them; otherwise meta or fake tensors suffice.
        patterns: the patterns to look for; None for all.
        codes: for each linear that may be quantized, the dtype that its ``weight`` will have; None for int8 everywhere.
            If code depends on a weight's dtype, a second run tests it with that dtype.

    Returns:
        One :class:`LinearTrace` for each layer (:mod:`hfquant.nn.kinds`) that ran or cannot be replaced, in execution
        order. If the calls of one linear differ, its segments are the common refinement (an extra cut is never wrong),
        and an activation is kept only if all calls agree on it.

    Raises:
        ValueError: ``example`` is None.
        PatternError: The forward failed on fake tensors and on real ones.
    """
    if example is None:
        raise ValueError("trace needs example inputs: a tensor, a tuple of positional or a dict of keyword arguments")
    wanted = frozenset(SegPattern.all() if patterns is None else patterns)
    layers = layers_in(model)
    codes = dict.fromkeys(layers, torch.int8) if codes is None else codes
    run, fake = run_twin(model, example, functools.partial(_Watch, model, wanted, layers, codes))
    obstacles = {**obstacles_in_training(model), **find_obstacles(model, example, run.weights, fake)}
    calls: dict[str, list[Call]] = {}
    for call in run.features.calls:
        calls.setdefault(call.name, []).append(call)
    for name in sorted(obstacles.keys() - calls.keys()):
        calls[name] = []
    sources = run.scales.sources()
    return {
        name: replace(
            _summarize(name, order, model.get_submodule(name), made, obstacles.get(name)),
            source=sources.get(name),
            rows=sum(call.rows for call in made),
        )
        for order, (name, made) in enumerate(calls.items())
    }


def failure(model: nn.Module, example: Any) -> str | None:
    """Run ``model`` once as :func:`trace` does and report a failure: the error and the innermost module that raised it.

    Args:
        model: any model, with or without quantized layers. It is not modified.
        example: its inputs, as for :func:`trace`.

    Returns:
        The reason in one line, or None if the model runs.
    """
    running: list[str] = []

    def watch(twin: nn.Module) -> contextlib.AbstractContextManager[None]:
        running.clear()
        for name, module in twin.named_modules():
            module.register_forward_pre_hook(lambda m, args, name=name: running.append(name))
            module.register_forward_hook(lambda m, args, out, name=name: running.__delitem__(_last(running, name)))
        return contextlib.nullcontext()

    try:
        run_twin(model, example, watch)
    except PatternError as error:
        return f"{error}{f' (in {running[-1]})' if running and running[-1] else ''}"
    return None


def _last(names: list[str], name: str) -> slice:
    """Return the last ``name`` and everything after it: modules whose error the model itself caught."""
    return slice(len(names) - 1 - names[::-1].index(name), None)


class _Watch(contextlib.ExitStack):
    """Everything that observes one forward of a twin."""

    def __init__(
        self,
        model: nn.Module,
        patterns: frozenset[SegPattern],
        layers: Mapping[str, type[QuantLayer]],
        codes: Mapping[str, torch.dtype],
        twin: nn.Module,
    ) -> None:
        super().__init__()
        self.features = FeatureTracker(patterns)
        self.weights = WeightWatch(twin, layers, codes)
        self.scales = ScaleWatch(twin)
        for (_, real), (_, used) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
            if not real.is_meta:
                self.features.know(used, real)
        _hook(twin, layers, self.features)

    def __enter__(self) -> _Watch:
        self.enter_context(self.features)
        self.enter_context(self.weights)
        self.enter_context(self.scales)
        return self


def _hook(twin: nn.Module, layers: Mapping[str, type[QuantLayer]], tracker: FeatureTracker) -> None:
    """Report to ``tracker`` the inputs and outputs of each layer, and the outputs of each activation module."""
    for name, module in twin.named_modules():
        if name in layers:
            see = _on_linear if issubclass(layers[name], QuantLinear) else _on_other
            module.register_forward_hook(functools.partial(see, tracker, name), with_kwargs=True)
        elif type(module).__module__ in ACTIVATION_MODULES and "Softmax" not in type(module).__name__:
            label = type(module).__name__.lower().removesuffix("activation")
            if label not in ("identity", "linear", "tanh", "multihead"):
                module.register_forward_hook(functools.partial(_on_activation, tracker, label))


def _on_linear(tracker: FeatureTracker, name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
    tracker.call_linear(name, size_of(module), first(args, kwargs), out)


def _on_other(tracker: FeatureTracker, name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
    """Record only the call: cuts and joins along dimensions other than the last are not followed."""
    tracker.call_other(name, size_of(module), first(args, kwargs), out)


def _on_activation(tracker: FeatureTracker, label: str, module: nn.Module, args: Any, out: Any) -> None:
    if isinstance(out, Tensor):
        tracker.call_activation(label, out)


def _summarize(name: str, order: int, linear: nn.Module, calls: list[Call], obstacle: str | None) -> LinearTrace:
    """Combine the results of all calls of one linear."""
    in_features, out_features = size_of(linear)
    ins = _edges(frozenset[int]().union(*(c.input.cuts for c in calls)), in_features)
    out_cuts = [_out_cuts(c) for c in calls]
    outs = _edges(frozenset[int]().union(*out_cuts), out_features)
    activations = tuple(_agreed([_at(c, low, high) for c in calls]) for low, high in ins)
    inputs, outputs = tuple(b - a for a, b in ins), tuple(b - a for a, b in outs)
    joins = list(dict.fromkeys(j for c in calls for j in c.input.joins))
    splits = list(dict.fromkeys(cut for c in calls for s in _ends(c) for cut in s.cuts))
    if any(not s.cuts for c in calls for s in _ends(c)):  # also used whole: rotary embedding and the like
        splits = splits if len(outputs) > 1 else []
    found = {j.pattern for j in joins} | ({pattern for pattern, _ in splits} if len(outputs) > 1 else set())
    if any(activations):
        found.add(SegPattern.ACTIVATION2LINEAR)

    evidence = []
    if len(inputs) > 1:
        how = ", ".join(dict.fromkeys(j.how for j in joins))
        evidence.append(f"input = {how}: {_sizes(inputs, activations)}")
    elif activations[0]:
        evidence.append(f"input = {activations[0]}")
    if splits:
        how = ", ".join(dict.fromkeys(how for _, how in splits))
        whole = "not split, as the pieces are not contiguous features" if len(outputs) == 1 else _sizes(outputs)
        evidence.append(f"output -> {how}: {whole}")
    if len({(c.input.cuts, cuts) for c, cuts in zip(calls, out_cuts, strict=True)}) > 1:
        evidence.append(f"its {len(calls)} calls are cut differently: the cuts of all are used")
    ordered = tuple(p for p in SegPattern if p in found)
    return LinearTrace(name, order, len(calls), inputs, outputs, activations, ordered, tuple(evidence), obstacle)


def _ends(call: Call) -> list[Slice]:
    """Return the pieces of a call's output that were used by something that is not followed, or not used at all."""
    return [s for s in call.slices if s.used or not s.followed]


def _out_cuts(call: Call) -> frozenset[int]:
    """Return where the output was cut. Between cuts, pieces use all features or none: picking a few is not a split."""
    pieces = [squash(s.index) for s in _ends(call) if s.index.numel()]
    hulls = [(int(p.min()), int(p.max()) + 1) for p in pieces]
    cuts = cuts_of(hulls, call.out_features)
    if not cuts:
        return cuts
    touched = torch.zeros(call.out_features, dtype=torch.bool)
    for p, (low, high) in zip(pieces, hulls, strict=True):
        if p.numel() == high - low:  # contiguous
            touched[low:high] = True
        else:
            touched[p.flatten().long()] = True
    stretches = [touched[low:high] for low, high in _edges(cuts, call.out_features)]
    return cuts if all(t.all() or not t.any() for t in stretches) else frozenset()


def _edges(cuts: frozenset[int], size: int) -> list[tuple[int, int]]:
    edges = [0, *sorted(cuts), size]
    return list(pairwise(edges))


def _at(call: Call, low: int, high: int) -> str | None:
    return next(a for (start, stop), a in call.input.activations.items() if start <= low and high <= stop)


def _agreed(values: list[str | None]) -> str | None:
    return values[0] if len(set(values)) == 1 else None


def _sizes(sizes: tuple[int, ...], activations: tuple[str | None, ...] = ()) -> str:
    named = [f"{n} {a}" if a else str(n) for n, a in zip(sizes, activations or (None,) * len(sizes), strict=True)]
    if len(set(named)) == 1:
        return f"{len(named)} x {named[0]}"
    return ", ".join(named[:8]) + (f", ... ({len(named)})" if len(named) > 8 else "")
