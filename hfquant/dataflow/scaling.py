"""Find modules whose output can be divided per channel if the linears that read it multiply to compensate.

A *source* is a module whose own parameters scale its output channels: a norm or any gain ``weight * x``, with its bias,
or a linear through its rows. Its output is followed through views and through functions that commute with a positive
per-channel factor: ReLU, the product with a gate, the weighted sum over tokens that attention computes from values.
Anything else that touches a channel rules it out: a function not listed here, a sum, an assignment, another use of the
parameter, a tensor that outlives the forward. A missed source costs only a division at run time, so nothing is guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hfquant.dataflow.functions import (
    BLIND,
    COPIES,
    HOMOGENEOUS,
    LIKE,
    MATMULS,
    OVER,
    RESHAPES,
    SUMS,
    TIMES,
    VIEWS,
    name_of,
)
from hfquant.dataflow.index_map import reshape, squash
from hfquant.dataflow.tracker import tensors_in
from hfquant.dataflow.twin import WeakTensorKeyDictionary, paused


@dataclass(frozen=True)
class Source:
    """A module whose output channels can be divided if the linears that read them multiply to compensate.

    Attributes:
        module: its qualified name.
        parameters: names of its parameters, each to be divided along its first dimension.
        channels: for each input channel of the linears that read it, the output channel it comes from; None: all, in
            order.
    """

    module: str
    parameters: tuple[str, ...]
    channels: tuple[int, ...] | None = None


@dataclass(eq=False)
class _Origin:
    """What is known about a source while the forward runs.

    Attributes:
        module: its qualified name.
        leaked: [channels] bool, channels that reach something that cannot compensate.
        parameters: the parameters' names in ``module``, by their ids.
        reads: one (linear, channels) pair for each time a linear reads it.
    """

    module: str
    leaked: Tensor
    parameters: dict[int, str] = field(default_factory=dict)
    reads: list[tuple[str, Tensor]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Held:
    """Which channels of a source a tensor holds: ``index`` has its shape, and stride 0 along irrelevant dimensions."""

    origin: _Origin
    index: Tensor


class _Step(NamedTuple):
    """One call of a torch function that computed ``out``."""

    name: str
    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    out: Tensor

    def get(self, position: int, name: str) -> Any:
        """Return an argument, or None if it is not given."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)


class ScaleWatch(TorchFunctionMode):
    """Observe every torch function call while active, and follow the outputs of sources.

    Args:
        twin: the model that will run.
    """

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()
        self._held: Any = WeakTensorKeyDictionary()
        self._casts: Any = WeakTensorKeyDictionary()  # a parameter in another dtype -> the parameter
        self._origins: dict[int, _Origin] = {}  # by the id of the gain, or of the linear's weight
        self._uses: dict[int, set[int]] = {}  # parameter -> the origins it belongs to, 0 for anything else
        self._calls: Counter[str] = Counter()
        self._owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for name, module in twin.named_modules():
            for key, param in module.named_parameters(recurse=False):
                self._owners.setdefault(id(param), []).append((name, module, key))
        twin.register_forward_hook(lambda m, args, out: self._keep())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, given = name_of(func), list(tensors_in([*args, *kwargs.values()]))
        known = [t for t in given if t in self._held or self._param(t) is not None]
        if not known or _sees_no_values(func, name, result, known[0] is not given[0]):
            return result
        with paused():
            if name in COPIES and result is known[0]:
                return result
            outputs = list(tensors_in([result]))
            fresh = outputs and not any(out is t for out in outputs for t in given)
            if not fresh or not self._follow(_Step(name, func, args, kwargs, outputs[0]), known, outputs):
                self._lose(known)
        return result

    def sources(self) -> dict[str, Source]:
        """Return, by linear, the source of its inputs, if that source can be divided."""
        gains = {origin.module: gain for gain, origin in self._origins.items()}
        found: dict[str, Source] = {}
        for gain, origin in self._origins.items():
            readers = sorted({name for name, _ in origin.reads})
            whole = len(origin.reads) == sum(self._calls[name] for name in readers)
            own = [{gain} == self._uses[p] for p in origin.parameters]
            own += [{gains[name]} == self._uses[gains[name]] for name in readers]
            if not readers or not whole or not all(own):
                continue
            maps = [squash(index) for _, index in origin.reads]
            rows = [m.flatten().long() for m in maps if m.numel() == m.shape[-1]]
            if len(rows) < len(maps) or not all(torch.equal(rows[0], row) for row in rows):
                continue
            if not origin.leaked[rows[0]].any():
                in_order = torch.equal(rows[0], torch.arange(len(origin.leaked)))
                channels = None if in_order else tuple(rows[0].tolist())
                source = Source(origin.module, tuple(origin.parameters.values()), channels)
                found.update(dict.fromkeys(readers, source))
        return found

    def _param(self, t: Any) -> Tensor | None:
        """Return the parameter that ``t`` is, or is a cast of; None if neither."""
        if id(t) in self._owners:
            return cast(Tensor, t)
        return cast(Tensor | None, self._casts.get(t)) if isinstance(t, Tensor) else None

    def _lose(self, tensors: Iterable[Tensor]) -> None:
        """Rule out tensors that are used by something that cannot be followed."""
        for t in tensors:
            if (param := self._param(t)) is not None:
                self._uses.setdefault(id(param), set()).add(0)
            elif t in self._held:
                held = self._held[t]
                held.origin.leaked[squash(held.index).flatten().long()] = True

    def _keep(self) -> None:
        """Rule out what is still alive when the forward is over: in its result, in a cache, in an attribute."""
        with paused():
            self._lose(list(self._held.keys()))

    def _follow(self, step: _Step, known: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        """Propagate what the inputs hold to the outputs; return False if that is not possible."""
        if step.name in VIEWS:
            return self._view(step, known, outputs)
        if len(outputs) > 1:
            return False
        if step.name == "linear":
            return self._linear(step)
        if step.name in ("layer_norm", "rms_norm"):
            return self._norm(step)
        if step.name in TIMES | OVER:
            return self._product(step, known)
        if step.name in MATMULS or step.name == "scaled_dot_product_attention":
            return self._mix(step, known)
        if step.name in SUMS:
            return self._shift(step)
        x = known[0]
        if step.name in HOMOGENEOUS and len(known) == 1 and x in self._held:
            self._held[step.out] = self._held[x]
            return True
        return False

    def _view(self, step: _Step, known: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        x = known[0]
        if len(known) > 1 or not all(out.is_floating_point() for out in outputs):
            return False
        if (param := self._param(x)) is not None:
            if step.name in COPIES:
                self._casts[step.out] = param
            return step.name in COPIES
        held = self._held[x]
        indices = _through(step, x, held.index, outputs)
        for out, index in zip(outputs, indices or (), strict=False):
            self._held[out] = _Held(held.origin, index)
        return indices is not None

    def _linear(self, step: _Step) -> bool:
        x, weight, bias = step.get(0, "input"), step.get(1, "weight"), step.get(2, "bias")
        owners = self._owners.get(id(weight), [])
        if len(owners) != 1 or type(owners[0][1]) is not nn.Linear or owners[0][1].bias is not bias:
            return False
        name = owners[0][0]
        self._calls[name] += 1
        if x in self._held:
            held = self._held[x]
            held.origin.reads.append((name, held.index))
        return self._begin(step.out, weight, bias)

    def _norm(self, step: _Step) -> bool:
        weight, bias = step.get(2, "weight"), step.get(3, "bias") if step.name == "layer_norm" else None
        if weight is None or len(step.get(1, "normalized_shape")) != 1:
            return False
        self._lose([step.get(0, "input")])
        return self._begin(step.out, weight, bias)

    def _begin(self, out: Tensor, gain: Tensor, bias: Tensor | None = None) -> bool:
        """Start following a source's output; return False unless all its parameters belong to one module alone."""
        param = self._param(gain)
        owners = [] if param is None else self._owners[id(param)]
        if param is None or len(owners) != 1 or param.shape[0] != out.shape[-1]:
            return False
        module, owner, key = owners[0]
        if not module or next(owner.children(), None) is not None:
            return False
        leaked = torch.zeros(len(param), dtype=torch.bool)
        origin = self._origins.setdefault(id(param), _Origin(module, leaked, {id(param): key}))
        self._uses.setdefault(id(param), set()).add(id(param))
        self._held[out] = _Held(origin, torch.arange(len(param), dtype=torch.int32).expand(out.shape))
        return bias is None or self._add(id(param), bias)

    def _add(self, gain: int, bias: Tensor) -> bool:
        """Add a bias to the parameters of an origin; return False unless it belongs to the same module alone."""
        param, origin = self._param(bias), self._origins[gain]
        owners = self._owners.get(id(param), [])
        if param is None or [name for name, _, _ in owners] != [origin.module] or param.shape != origin.leaked.shape:
            return False
        origin.parameters[id(param)] = owners[0][2]
        self._uses.setdefault(id(param), set()).add(gain)
        return True

    def _product(self, step: _Step, known: Sequence[Tensor]) -> bool:
        """Follow the last factor that is held; a parameter as a factor starts a new source."""
        params = [t for t in known if self._param(t) is not None]
        if params:
            others = [t for t in tensors_in([*step.args, *step.kwargs.values()]) if t is not params[0]]
            spread = step.name in TIMES and len(others) == 1 and others[0].shape == step.out.shape
            if len(params) > 1 or params[0].dim() != 1 or not spread:
                return False
            self._lose(others)
            return self._begin(step.out, params[0])
        x = known[-1]
        if step.name in OVER and (x is not step.get(0, "input") or step.kwargs.get("rounding_mode")):
            return False
        if x.shape != step.out.shape or any(t is x for t in known[:-1]):
            return False
        self._lose(known[:-1])
        self._held[step.out] = self._held[x]
        return True

    def _shift(self, step: _Step) -> bool:
        """Follow the sum of a gain's product and the same module's bias."""
        for x, bias in (step.args, step.args[::-1]) if len(step.args) == 2 and not step.kwargs else ():
            if isinstance(x, Tensor) and x in self._held and x.shape == step.out.shape and isinstance(bias, Tensor):
                held = self._held[x]
                row = squash(held.index).flatten().long()
                gain = next(iter(held.origin.parameters))
                if torch.equal(row, torch.arange(len(held.origin.leaked))) and self._add(gain, bias):
                    self._held[step.out] = held
                    return True
        return False

    def _mix(self, step: _Step, known: Sequence[Tensor]) -> bool:
        """Follow values through a sum over tokens whose weights are the same for all channels of a head."""
        attention = step.name == "scaled_dot_product_attention"
        v = step.get(2, "value") if attention else step.get(1, "mat2" if step.name == "bmm" else "other")
        if not isinstance(v, Tensor) or v not in self._held or sum(t is v for t in known) > 1 or v.dim() < 2:
            return False
        held, shape = self._held[v], step.out.shape
        index = held.index
        if (index.shape[-2] > 1 and index.stride(-2)) or shape[-1] != v.shape[-1]:
            return False
        row = index[..., :1, :]
        if attention and v.dim() > 2 and shape[-3] != v.shape[-3]:  # each head of values serves several query heads
            row = row.repeat_interleave(shape[-3] // v.shape[-3], -3)
        try:
            row = row.expand(shape)
        except RuntimeError:
            return False
        self._lose([t for t in known if t is not v])
        self._held[step.out] = _Held(held.origin, row)
        return True


def _sees_no_values(func: Callable[..., Any], name: str, result: Any, like: bool) -> bool:
    """Return whether a call reads only shape, dtype or device; ``like``: of all its arguments but the first."""
    attribute = getattr(func, "__name__", "") == "__get__" and next(iter(tensors_in([result])), None) is None
    blind = name in BLIND or (name == "type" and isinstance(result, str))
    return attribute or blind or name.startswith("new_") or name.endswith("_like") or (like and name in LIKE)


def _through(step: _Step, x: Tensor, index: Tensor, outputs: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the maps of a view's outputs, given the map of its input ``x``; None if they cannot be determined."""
    if step.name in COPIES:
        return [index]
    if step.name in RESHAPES:
        same_bits = step.out.numel() == x.numel() and step.out.dtype == x.dtype
        return [reshape(index, step.out.shape)] if same_bits else None
    args = [index if a is x else a for a in step.args]
    kwargs = {k: index if a is x else a for k, a in step.kwargs.items()}
    if any(t is not index for t in tensors_in([*args, *kwargs.values()])):
        return None
    try:
        made = step.func(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return None
    made = [made] if isinstance(made, Tensor) else list(made)
    return made if [m.shape for m in made] == [t.shape for t in outputs] else None
