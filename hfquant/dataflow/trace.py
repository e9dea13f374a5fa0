"""Find the patterns around every linear of a model by watching one forward pass.

The pass runs on fake tensors (shapes and dtypes, no numbers), so a model of any size, on the meta device too, is read
in seconds without weights in memory; where a forward depends on numbers it is repeated on real ones. It runs on a twin
of the model: a copy of the module tree whose parameters are fake (or shared, for the real pass), so that whatever the
forward stores, caches or draws stays out of the model. Following the features is
:mod:`hfquant.dataflow.tracker`'s work.

What the reference implementation of SegQuant (arXiv 2507.14811) reads off torch.fx graphs of edited model files is read
off the unmodified model here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from hfquant.config import SegPattern
from hfquant.dataflow.index_map import cuts_of, squash
from hfquant.dataflow.tracker import Call, Provenance, Slice
from hfquant.integrations.examples import example_inputs

__all__ = ["LinearTrace", "PatternError", "example_inputs", "trace"]

logger = logging.getLogger(__name__)

ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations")


class PatternError(RuntimeError):
    """The model's forward could not be watched; the cause says why."""


@dataclass(frozen=True)
class LinearTrace:
    """What one watched forward says about one ``nn.Linear``.

    Attributes:
        name: qualified module name.
        order: execution order of its first call.
        calls: how often it ran in the forward; 0 for one that is only read by others (``functional``).
        input_segments: sizes that partition ``in_features``; ``(in_features,)`` where nothing was joined.
        output_segments: sizes that partition ``out_features``; ``(out_features,)`` where nothing was split.
        activations: for each input segment the activation whose output (or gated product) it is, else None.
        patterns: the patterns that gave that.
        evidence: short reasons.
        functional: its weight is read outside its own forward, so replacing the module would break the model.
    """

    name: str
    order: int
    calls: int
    input_segments: tuple[int, ...]
    output_segments: tuple[int, ...]
    activations: tuple[str | None, ...]
    patterns: tuple[SegPattern, ...]
    evidence: tuple[str, ...]
    functional: bool = False


def trace(
    model: nn.Module, example: Any = None, *, patterns: Collection[SegPattern] | None = None
) -> dict[str, LinearTrace]:
    """Run ``model`` once under watch and say what was found around each linear.

    Args:
        model: any model that can run forward, on any device, meta included. It is left as it is.
        example: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments. Values of tensors
            are not needed (meta and fake tensors do) unless the forward branches on them.
        patterns: the patterns to look for; None for all.

    Returns:
        One :class:`LinearTrace` for each module of type ``nn.Linear`` (no subclass) that ran or whose weight was read,
        in order of execution. Where the calls of one linear disagree, its segments are the finest common refinement
        (a cut is never wrong) and an activation is kept if all calls agree on it.

    Raises:
        ValueError: ``example`` is None.
        PatternError: the forward ran neither on fake tensors nor on real ones.
    """
    if example is None:
        raise ValueError("trace needs example inputs: a tensor, a tuple of positional or a dict of keyword arguments")
    wanted = frozenset(SegPattern.all() if patterns is None else patterns)
    try:
        watch = _watch(model, example, wanted, FakeTensorMode(allow_non_fake_inputs=True))
    except Exception as fake_error:  # whatever a model's own code raises when it has no numbers to look at
        if any(t.is_meta for t in _leaves(model, example)) and not any(hasattr(m, "_hf_hook") for m in model.modules()):
            raise PatternError(f"{_who(model)} does not run on fake tensors: {_why(fake_error)}") from fake_error
        logger.info("%s does not run on fake tensors (%s): running it on real ones", _who(model), _why(fake_error))
        try:
            watch = _watch(model, example, wanted, None)
        except Exception as error:
            raise PatternError(
                f"{_who(model)} runs neither on fake tensors ({_why(fake_error)}) nor on real ones: {_why(error)}"
            ) from error
    watch.functional |= _fast_path_linears(model)
    calls: dict[str, list[Call]] = {}
    for call in watch.calls:
        calls.setdefault(call.name, []).append(call)
    for name in sorted(watch.functional - calls.keys()):
        calls[name] = []
    return {
        name: _summarize(name, order, model.get_submodule(name), made, name in watch.functional)
        for order, (name, made) in enumerate(calls.items())
    }


def _who(model: nn.Module) -> str:
    return type(model).__name__


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _leaves(model: nn.Module, example: Any) -> list[Tensor]:
    found = [*model.parameters(), *model.buffers()]
    tree_map_only(Tensor, found.append, dict(example) if isinstance(example, Mapping) else example)
    return found


def _watch(model: nn.Module, example: Any, patterns: frozenset[SegPattern], fake: FakeTensorMode | None) -> Provenance:
    """One forward of a twin of ``model`` under :class:`Provenance`, on fake tensors or (``fake=None``) on real ones."""

    def stand_in(t: Tensor) -> Tensor:
        if fake is None:
            return t.detach().clone()
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")

    cuda = sorted(
        {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
    with torch.random.fork_rng(cuda), torch.no_grad(), fake or contextlib.nullcontext(), _no_trace_left():
        twin = _twin(model, fake is not None)
        inputs = tree_map_only(Tensor, stand_in, dict(example) if isinstance(example, Mapping) else example)
        watch = Provenance(patterns, _weight_readers(twin))
        _hook(twin, watch)
        with watch:
            if isinstance(inputs, dict):
                twin(**inputs)
            elif isinstance(inputs, (tuple, list)):
                twin(*inputs)
            else:
                twin(inputs)
    return watch


def _twin(model: nn.Module, fake: bool) -> nn.Module:
    """A copy of the module tree in eval mode, with fake tensors or with parameters that share the model's storage."""

    def empty(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")

    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("config", "_internal_dict", "_hf_hook", "_diffusers_hook"):  # not written to; some hold weights
                memo[id(value)] = value
            elif isinstance(value, Tensor):  # of the kind that deepcopy refuses, as weight norm's
                memo[id(value)] = value.detach().clone()
        for p in module._parameters.values():
            if p is not None:
                memo[id(p)] = nn.Parameter(empty(p) if fake else p.detach(), requires_grad=False)
        for b in module._buffers.values() if fake else ():
            if b is not None:
                memo[id(b)] = empty(b)
    twin: nn.Module = copy.deepcopy(model, memo)
    for module in twin.modules():  # offloading hooks would fetch weights; some run the original module's forward
        if "_diffusers_hook" in vars(module) or (fake and "_hf_hook" in vars(module)):
            vars(module).pop("forward", None)
    return twin.eval()


def _weight_readers(model: nn.Module) -> dict[int, tuple[list[str], list[nn.Module]]]:
    """For the weight of each linear: the linears it belongs to, and all modules that own it (tied embeddings too)."""
    readers: dict[int, tuple[list[str], list[nn.Module]]] = {
        id(m.weight): ([], []) for m in model.modules() if type(m) is nn.Linear
    }
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if id(p) in readers:
                readers[id(p)][1].append(module)
                if type(module) is nn.Linear:
                    readers[id(p)][0].append(name)
    return readers


def _hook(twin: nn.Module, watch: Provenance) -> None:
    """Tell ``watch`` which module runs and what each linear and activation module eats and makes."""
    owners = {id(m): m for _, modules in watch.weights.values() for m in modules}
    for module in owners.values():
        module.register_forward_pre_hook(lambda m, args: watch.running.append(m))
        module.register_forward_hook(lambda m, args, out: watch.running.remove(m), always_call=True)
    for name, module in twin.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(functools.partial(_on_linear, watch, name), with_kwargs=True)
        elif type(module).__module__ in ACTIVATION_MODULES and "Softmax" not in type(module).__name__:
            label = type(module).__name__.lower().removesuffix("activation")
            if label not in ("identity", "linear", "tanh", "multihead"):
                module.register_forward_hook(functools.partial(_on_activation, watch, label))


def _on_linear(watch: Provenance, name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
    assert isinstance(module, nn.Linear)
    watch.call_linear(name, module, args[0] if args else kwargs["input"], out)


def _on_activation(watch: Provenance, label: str, module: nn.Module, args: Any, out: Any) -> None:
    if isinstance(out, Tensor):
        watch.call_activation(label, out)


def _fast_path_linears(model: nn.Module) -> set[str]:
    """Linears that ``nn.TransformerEncoderLayer`` hands to a fused kernel by their weights, but not under watch."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.TransformerEncoderLayer)]
    return {
        f"{name}.{child}" if name else child
        for name, layer in layers
        for child, m in layer.named_children()
        if type(m) is nn.Linear
    }


@contextlib.contextmanager
def _no_trace_left() -> Iterator[None]:
    """Keep torch from logging what it cannot fake, and empty each ``lru_cache`` that took in a fake tensor.

    Such a cache (of position codes, say) would hand the fake to the next real forward.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled
        for cache in [o for o in gc.get_objects() if type(o) is functools._lru_cache_wrapper]:
            own = (getattr(cache, "__module__", None) or "").partition(".")[0] in ("torch", "sympy")
            if not own and cache.cache_info().currsize and _holds_fake(cache):
                cache.cache_clear()


def _holds_fake(holder: Any, depth: int = 4) -> bool:
    """Whether a fake tensor hangs on ``holder``: in a cache's links, and in the tuples and lists of its results."""
    inner = gc.get_referents(holder)
    if any(type(o) is FakeTensor for o in inner):
        return True
    return depth > 0 and any(
        _holds_fake(o, depth - 1) for o in inner if type(o) in (dict, list, tuple) or "lru" in type(o).__name__
    )


def _summarize(name: str, order: int, linear: nn.Module, calls: list[Call], functional: bool) -> LinearTrace:
    """Join what the calls of one linear say."""
    assert isinstance(linear, nn.Linear)
    ins = _edges(frozenset[int]().union(*(c.in_cuts for c in calls)), linear.in_features)
    out_cuts = [_out_cuts(c) for c in calls]
    outs = _edges(frozenset[int]().union(*out_cuts), linear.out_features)
    activations = tuple(_agreed([_at(c, low, high) for c in calls]) for low, high in ins)
    inputs, outputs = tuple(b - a for a, b in ins), tuple(b - a for a, b in outs)
    joins = list(dict.fromkeys(j for c in calls for j in c.joins))
    splits = list(dict.fromkeys(cut for c in calls for s in _ends(c) for cut in s.cuts))
    if any(not s.cuts for c in calls for s in _ends(c)):  # used whole as well: rotary embedding and the like
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
        whole = "left whole, the pieces are not runs of features" if len(outputs) == 1 else _sizes(outputs)
        evidence.append(f"output -> {how}: {whole}")
    if len({(c.in_cuts, cuts) for c, cuts in zip(calls, out_cuts, strict=True)}) > 1:
        evidence.append(f"its {len(calls)} calls differ: common refinement")
    if functional:
        evidence.append("weight read outside its forward")
    ordered = tuple(p for p in SegPattern if p in found)
    return LinearTrace(name, order, len(calls), inputs, outputs, activations, ordered, tuple(evidence), functional)


def _ends(call: Call) -> list[Slice]:
    """The pieces in which a call's output was used: eaten by something that is not followed, or never touched again."""
    return [s for s in call.slices if s.used or not s.followed]


def _out_cuts(call: Call) -> frozenset[int]:
    """Where the output was cut: between groups of pieces that leave no feature out (picking a few is no split)."""
    pieces = [squash(s.index) for s in _ends(call) if s.index.numel()]
    hulls = [(int(p.min()), int(p.max()) + 1) for p in pieces]
    cuts = cuts_of(hulls, call.out_features)
    if not cuts:
        return cuts
    touched = torch.zeros(call.out_features, dtype=torch.bool)
    for p, (low, high) in zip(pieces, hulls, strict=True):
        if p.numel() == high - low:  # a run
            touched[low:high] = True
        else:
            touched[p.flatten().long()] = True
    stretches = [touched[low:high] for low, high in _edges(cuts, call.out_features)]
    return cuts if all(t.all() or not t.any() for t in stretches) else frozenset()


def _edges(cuts: frozenset[int], size: int) -> list[tuple[int, int]]:
    edges = [0, *sorted(cuts), size]
    return list(pairwise(edges))


def _at(call: Call, low: int, high: int) -> str | None:
    return next(a for (start, stop), a in call.activations.items() if start <= low and high <= stop)


def _agreed(values: list[str | None]) -> str | None:
    return values[0] if len(set(values)) == 1 else None


def _sizes(sizes: tuple[int, ...], activations: tuple[str | None, ...] = ()) -> str:
    named = [f"{n} {a}" if a else str(n) for n, a in zip(sizes, activations or (None,) * len(sizes), strict=True)]
    if len(set(named)) == 1:
        return f"{len(named)} x {named[0]}"
    return ", ".join(named[:8]) + (f", ... ({len(named)})" if len(named) > 8 else "")
