"""Follow features through one forward pass: whose output they are, and what was joined to make an input.

A tensor under watch has *shadows*: integer tensors of its own shape that say of every element

- ``index``: which output feature of which call of a linear it is (a view of ``arange(out_features)``), and
- ``labels``: which part it came from: an operand of ``cat`` or ``stack``, a merged dimension, an activation.

Shadows go through the very view operations that the tensor goes through (``chunk``, ``view``, ``permute``, ``x[..., 1]``,
...), so no operation's argument list is parsed here, and any order of views comes out right. Dimensions that a shadow
does not depend on have stride 0, so shadows are small whatever the size of the tensor.

Decisions, each with a test:

- Pointwise functions are looked through: they act on every feature alone, so cutting before or after them is the same.
  A pointwise function of two followed outputs ends both trails (the sum is neither's output any more).
- Labels survive normalization (it scales the features of a row, it does not mix them up), but not the addition of
  another full-sized tensor: a residual stream is no longer the concatenation that it may have started as.
- An activation survives a product (the gate of GEGLU or SwiGLU) and RMS normalization, not a sum.
- What is not recognised ends a trail. A wrong segment costs accuracy, a missed one costs only its gain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from hfquant.config import SegPattern

CHUNKS = frozenset({"chunk", "unbind"})
SPLITS = frozenset({"split", "split_with_sizes", "tensor_split", "narrow", "select", "__getitem__", "hsplit", "dsplit"})
MOVES = frozenset(
    [
        "transpose",
        "permute",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "movedim",
        "moveaxis",
        "swapaxes",
        "swapdims",
        "t",
        "adjoint",
        "diagonal",
        "T",
        "mT",
        "H",
        "mH",
        "broadcast_to",
    ]
)
RESHAPES = frozenset(["view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel"])
COPIES = frozenset(
    [
        "to",
        "type",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "double",
        "contiguous",
        "clone",
        "detach",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
        "cpu",
        "cuda",
        "data",
        "requires_grad_",
        "alias",
    ]
)
JOINS = dict.fromkeys(("cat", "concat", "concatenate"), SegPattern.CONCAT2LINEAR) | {"stack": SegPattern.STACK2LINEAR}
NORMS = frozenset(["layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "normalize"])
# Functions whose result has a small negative side or none, and those that leave it so.
ACTIVATIONS = frozenset(
    ["silu", "gelu", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "mish", "softplus", "hardswish", "sigmoid"]
)
PRODUCTS = frozenset(["mul", "multiply", "div", "divide", "true_divide"])
SIGN_KEEPING = PRODUCTS | frozenset(["square", "pow", "clamp", "clamp_min", "clamp_max", "nan_to_num", "rms_norm"])


@dataclass(frozen=True)
class Part:
    """One of the parts that a tensor is made of."""

    pattern: SegPattern | None = None
    how: str = ""
    activation: str | None = None


@dataclass(eq=False)
class Call:
    """One call of a linear: the parts of its input and what became of its output."""

    name: str
    in_cuts: frozenset[int]
    activations: dict[tuple[int, int], str | None]
    parts: tuple[Part, ...]
    out_features: int
    slices: list[Slice] = field(default_factory=list)


@dataclass(eq=False)
class Slice:
    """The output features of one call that some tensor holds."""

    call: Call
    index: Tensor
    cuts: tuple[tuple[SegPattern, str], ...] = ()
    used: bool = False
    followed: bool = False

    def __post_init__(self) -> None:
        self.call.slices.append(self)

    def follow(self, index: Tensor, cuts: tuple[tuple[SegPattern, str], ...] = ()) -> Slice:
        self.followed = True
        return Slice(self.call, index, self.cuts + cuts)


def squash(shadow: Tensor) -> Tensor:
    """The shadow with each dimension that it does not depend on (stride 0) cut to size 1."""
    return shadow[tuple(slice(0, 1) if step == 0 else slice(None) for step in shadow.stride())]


def _count(index: Tensor) -> int:
    """How many different features an index shadow holds."""
    return len(torch.unique(squash(index)))


def cuts_of(hulls: Iterable[tuple[int, int]], size: int) -> frozenset[int]:
    """Where to cut ``range(size)`` so that no cut falls inside a hull: the ends of the hulls' overlapping groups.

    Interleaved pieces (per-head fused qkv, rotary halves) have overlapping hulls, so they stay together.
    """
    cuts, end = set(), 0
    for low, high in sorted(hulls):
        if low >= end:
            cuts |= {low, end}
        end = max(end, high)
    return frozenset((cuts | {end}) - {0, size})


class Provenance(TorchFunctionMode):
    """Sees every torch function called while it is active and keeps the shadows of the results.

    Args:
        patterns: what to follow; an operation that belongs to another pattern ends the trail.
        weights: ``id`` of a linear's weight -> (names of the linears, the modules that may read it).
    """

    def __init__(
        self, patterns: Collection[SegPattern], weights: dict[int, tuple[Sequence[str], Collection[nn.Module]]]
    ) -> None:
        super().__init__()
        self.patterns = frozenset(patterns)
        self.weights = weights
        self.calls: list[Call] = []
        self.functional: set[str] = set()
        self.running: list[nn.Module] = []
        self._parts: list[Part] = [Part()]
        self._slices: Any = WeakTensorKeyDictionary()
        self._labels: Any = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property of Tensor: mT, data, shape, ...
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "glu":  # splits and gates in one function: watch its two halves
            x, dim, *_ = [*args, *kwargs.values(), -1]
            with self:
                half, gate = torch.chunk(x, 2, dim)
                return half * torch.sigmoid(gate)
        result = func(*args, **kwargs)
        outputs = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, Tensor)]
        if outputs or name == "__setitem__":
            inputs = list(_tensors([*args, *kwargs.values()]))
            self._check_weights(name, inputs)
            with unset_fake_temporarily():
                self._step(name, func, args, kwargs, inputs, outputs)
        return result

    def call_linear(self, name: str, linear: nn.Linear, x: Tensor, out: Tensor) -> None:
        """Record a call of ``linear`` that made ``out`` [..., out_features] from ``x`` [..., in_features]."""
        with torch._C.DisableTorchFunction(), unset_fake_temporarily():
            labels = self._labels.get(x)
            cuts, activations, parts = self._read(labels, linear.in_features)
            call = Call(name, cuts, activations, parts, linear.out_features)
            self.calls.append(call)
            if self.patterns & {SegPattern.LINEAR2CHUNK, SegPattern.LINEAR2SPLIT}:
                index = torch.arange(linear.out_features, dtype=torch.int32)
                self._slices[out] = Slice(call, index.expand(out.shape))

    def call_activation(self, name: str, out: Tensor) -> None:
        """Record that an activation module called ``name`` made ``out``, unless the functions in it already said so."""
        with torch._C.DisableTorchFunction(), unset_fake_temporarily():
            labels = self._labels.get(out)
            known = labels is not None and any(p.activation for p in self._read(labels, out.shape[-1])[2])
            if SegPattern.ACTIVATION2LINEAR in self.patterns and not known:
                self._labels[out] = self._relabel(labels, out.shape, lambda part: replace(part, activation=name))

    def _check_weights(self, name: str, inputs: list[Tensor]) -> None:
        if not self.weights or name.startswith("new_") or name.endswith("_like"):  # reads the shape and dtype alone
            return
        for t in inputs[:1] if name in ("to", "type_as") else inputs:
            names, owners = self.weights.get(id(t), ((), ()))
            if names and not any(module in owners for module in self.running):
                self.functional.update(names)

    def _step(
        self,
        name: str,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        """Carry the shadows of ``inputs`` over to ``outputs``."""
        kind = name if name.startswith("__") else name.rstrip("_")
        if kind in COPIES or kind in RESHAPES or kind in MOVES or kind in CHUNKS or kind in SPLITS:
            if inputs and not (len(outputs) == 1 and outputs[0] is inputs[0] and name[-1] != "_"):
                self._view(kind, func, args, kwargs, inputs[0], outputs)
            return
        labels: Tensor | None = None
        if kind in JOINS:
            self._use(inputs)
            labels = self._join(kind, args, kwargs, outputs[0])
        elif kind in NORMS:
            self._use(inputs)
            labels = self._carry(kind, inputs[:1], outputs[0])
        elif _is_pointwise(kind) and len(outputs) == 1:
            found = {id(t): self._slices[t] for t in inputs if t in self._slices}
            labels = self._carry(kind, inputs, outputs[0])
            if len(found) == 1:
                (piece,) = found.values()
                self._slices[outputs[0]] = piece.follow(piece.index.expand(outputs[0].shape))
            else:
                self._use(inputs)
                self._slices.pop(outputs[0], None)
        else:
            self._use(inputs)
            for t in inputs[:1] if name == "__setitem__" else outputs:  # written over: no longer what it was
                self._slices.pop(t, None)
                self._labels.pop(t, None)
        for t in outputs:
            if labels is None:
                self._labels.pop(t, None)
            else:
                self._labels[t] = labels

    def _use(self, inputs: Iterable[Tensor]) -> None:
        for t in inputs:
            if t in self._slices:
                self._slices[t].used = True

    def _view(
        self,
        kind: str,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        x: Tensor,
        outputs: list[Tensor],
    ) -> None:
        """Put the shadows of ``x`` through the same view."""

        def shadows(shadow: Tensor) -> list[Tensor] | None:
            if kind in COPIES:
                return [shadow]
            if kind in RESHAPES:
                return [_reshape(shadow, outputs[0].shape)] if outputs[0].numel() == x.numel() else None
            if kind == "__getitem__" and any(isinstance(t, FakeTensor) for t in _tensors(args[1:])):
                return _index_leading(shadow, args[1], outputs[0])
            try:
                made = func(
                    *(shadow if a is x else a for a in args), **{k: shadow if a is x else a for k, a in kwargs.items()}
                )
            except (RuntimeError, TypeError, IndexError, ValueError):
                return None  # not a view of this tensor alone: the trail ends
            made = [made] if isinstance(made, Tensor) else list(made)
            return made if [m.shape for m in made] == [t.shape for t in outputs] else None

        piece, labels = self._slices.get(x), self._labels.get(x)
        if piece is not None:
            followed = shadows(piece.index)
            by_count = kind in CHUNKS or (kind == "tensor_split" and _is_count(args, kwargs))
            pattern = SegPattern.LINEAR2CHUNK if by_count else SegPattern.LINEAR2SPLIT
            cuts = kind in CHUNKS or kind in SPLITS
            for t, index in zip(outputs, followed or (), strict=False):
                cut = cuts and _count(index) < _count(piece.index)
                if cut and pattern not in self.patterns:
                    followed = None
                    break
                self._slices[t] = piece.follow(index, ((pattern, kind.strip("_")),) if cut else ())
            if followed is None:
                self._use([x])
        made = None if labels is None else shadows(labels)
        if kind in RESHAPES and SegPattern.RESHAPE2LINEAR in self.patterns:
            merged = self._merge(kind, x.shape, outputs[0].shape, made[0] if made else None)
            made = made if merged is None else [merged]
        for t, label in zip(outputs, made or (), strict=False):
            self._labels[t] = label

    def _relabel(self, labels: Tensor | None, shape: torch.Size, change: Callable[[Part], Part]) -> Tensor:
        """Fresh labels for changed parts; no labels means one part."""
        if labels is None:
            labels = torch.zeros((), dtype=torch.int32)
        small = squash(labels)
        old, inverse = torch.unique(small, return_inverse=True)
        fresh = torch.arange(len(self._parts), len(self._parts) + len(old), dtype=torch.int32)
        self._parts += [change(self._parts[i]) for i in old.tolist()]
        return fresh[inverse].view(small.shape).expand(shape)

    def _combine(self, a: Tensor, b: Tensor) -> Tensor:
        """Labels of the common refinement of two labellings of one shape."""
        keep = tuple(slice(0, 1) if s == t == 0 else slice(None) for s, t in zip(a.stride(), b.stride(), strict=True))
        pair = a[keep].long() * len(self._parts) + b[keep]
        old, inverse = torch.unique(pair, return_inverse=True)
        fresh = torch.arange(len(self._parts), len(self._parts) + len(old), dtype=torch.int32)
        pairs = [(self._parts[i // len(self._parts)], self._parts[i % len(self._parts)]) for i in old.tolist()]
        self._parts += [Part(p.pattern or q.pattern, p.how or q.how, p.activation or q.activation) for p, q in pairs]
        return fresh[inverse].view(pair.shape).expand(a.shape)

    def _carry(self, kind: str, inputs: Sequence[Tensor], out: Tensor) -> Tensor | None:
        """Labels of a pointwise function (or a norm) of ``inputs``."""
        if kind in ACTIVATIONS:
            if SegPattern.ACTIVATION2LINEAR not in self.patterns:
                return self._labels.get(inputs[0])
            return self._relabel(self._labels.get(inputs[0]), out.shape, lambda part: replace(part, activation=kind))
        full = {id(t): t for t in inputs if t.shape == out.shape and not isinstance(t, nn.Parameter)}
        carriers = [self._labels[t] for t in full.values() if t in self._labels]
        if not carriers or (kind not in PRODUCTS and len(full) > 1):
            return None
        labels = functools.reduce(self._combine, carriers)
        if kind in SIGN_KEEPING:
            return labels
        return self._relabel(labels, out.shape, lambda part: replace(part, activation=None))

    def _join(self, kind: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
        """Labels of ``cat`` or ``stack``: a part for each operand, or each part of an operand that was joined itself."""
        pattern = JOINS[kind]
        if pattern not in self.patterns:
            return None
        operands = args[0] if args else kwargs["tensors"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        dim = dim % out.ndim
        pieces = []
        for t in operands:
            if kind != "stack" and t.ndim != out.ndim:
                continue  # the empty 1-d tensor that cat accepts
            labels = self._labels.get(t)
            if labels is not None:
                values = torch.unique(squash(labels)).tolist()
                if any(self._parts[i].pattern is SegPattern.RESHAPE2LINEAR for i in values):  # heads are not operands
                    kinds = {self._parts[i].activation for i in values}
                    labels = self._relabel(
                        None, t.shape, lambda _, k=kinds: Part(activation=k.pop() if len(k) == 1 else None)
                    )
            labels = self._relabel(labels, t.shape, lambda part: Part(pattern, kind, part.activation))
            pieces.append(labels.unsqueeze(dim) if kind == "stack" else labels)
        still = [all(p.stride(d) == 0 for p in pieces) and d != dim for d in range(out.ndim)]
        keep = tuple(slice(0, 1) if s else slice(None) for s in still)
        return torch.cat([p[keep] for p in pieces], dim).expand(out.shape)

    def _merge(self, kind: str, before: torch.Size, after: torch.Size, labels: Tensor | None) -> Tensor | None:
        """Labels of a reshape that merges dimensions (heads, mostly): a part for each index of the outermost."""
        for ins, outs in reversed(_groups(before, after)):
            merged = [n for n in before[ins] if n > 1]
            made = [d for d in range(outs.start, outs.stop) if after[d] > 1]
            if len(merged) < 2 or len(made) > 1 or (ins.start == 0 and outs.stop < len(after)):
                continue  # nothing merged here, or the batch with the tokens
            if labels is not None and labels.stride(made[0]):
                return None  # cat or stack joined what is merged here: that says more
            size, (first, count) = after[made[0]], (len(self._parts), merged[0])
            self._parts += [Part(SegPattern.RESHAPE2LINEAR, f"{kind} of {tuple(merged)}")] * count
            row = torch.arange(first, first + count, dtype=torch.int32).repeat_interleave(size // count)
            fresh = row.view(-1, *(1 for _ in after[made[0] + 1 :])).expand(after)
            return fresh if labels is None else self._combine(fresh, labels)
        return None

    def _read(
        self, labels: Tensor | None, size: int
    ) -> tuple[frozenset[int], dict[tuple[int, int], str | None], tuple[Part, ...]]:
        """Cuts of the last dimension, the activation of each stretch between them, and the parts met."""
        if labels is None:
            return frozenset(), {(0, size): None}, ()
        small = squash(labels)
        rows = torch.unique(small.reshape(-1, small.shape[-1]), dim=0).expand(-1, size)
        cuts: frozenset[int] = frozenset()
        for row in rows:
            edges = [0, *((row[1:] != row[:-1]).nonzero().flatten() + 1).tolist(), size]
            hulls: dict[int, tuple[int, int]] = {}
            for low, high in zip(edges, edges[1:], strict=False):
                hulls[int(row[low])] = (hulls.get(int(row[low]), (low, high))[0], high)
            cuts |= cuts_of(hulls.values(), size)
        edges = [0, *sorted(cuts), size]
        activations: dict[tuple[int, int], str | None] = {}
        for low, high in zip(edges, edges[1:], strict=False):
            kinds = {self._parts[i].activation for i in torch.unique(rows[:, low:high]).tolist()}
            activations[low, high] = kinds.pop() if len(kinds) == 1 else None
        return cuts, activations, tuple(dict.fromkeys(self._parts[i] for i in torch.unique(rows).tolist()))


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among ``values``, one level of lists and tuples deep."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (v for v in value if isinstance(v, Tensor))


@functools.cache
def _is_pointwise(name: str) -> bool:
    """Whether torch tags the operator behind a function (``mul``, ``__rsub__``, ``silu``) as pointwise."""
    name = name.strip("_")
    for candidate in (name, name.removeprefix("r"), name.removeprefix("i")):
        packet = getattr(torch.ops.aten, candidate, None)
        if packet is not None:
            return (
                any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads()) or name in ACTIVATIONS
            )
    return False


def _is_count(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether tensor_split was given a number of pieces (not positions)."""
    return isinstance(
        kwargs.get("indices_or_sections", kwargs.get("sections", args[1] if len(args) > 1 else None)), int
    )


def _groups(before: torch.Size, after: torch.Size) -> list[tuple[slice, slice]]:
    """The dimensions of a reshape's input and output in groups of equal size, as small as can be."""
    groups: list[tuple[slice, slice]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        start, size_in, size_out = (i, j), before[i], after[j]
        i, j = i + 1, j + 1
        while size_in != size_out:
            if size_in < size_out:
                i, size_in = i + 1, size_in * before[i]
            else:
                j, size_out = j + 1, size_out * after[j]
        groups.append((slice(start[0], i), slice(start[1], j)))
    return groups


def _reshape(shadow: Tensor, shape: torch.Size) -> Tensor:
    """Reshape group by group of dimensions, so that groups that the shadow does not depend on keep stride 0."""
    keep, middle = [slice(None)] * shadow.ndim, list(shape)
    for ins, outs in _groups(shadow.shape, shape):
        if not any(shadow.stride()[ins]):
            keep[ins] = [slice(0, 1)] * (ins.stop - ins.start)
            middle[outs] = [1] * (outs.stop - outs.start)
    return shadow[tuple(keep)].reshape(middle).expand(shape)


def _index_leading(shadow: Tensor, index: Any, out: Tensor) -> list[Tensor] | None:
    """``x[tensor]`` with unknown values: followed where only dimensions are indexed that the shadow does not depend on."""
    index = index if isinstance(index, tuple) else (index,)
    indexed = sum(i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else i is not None for i in index)
    if Ellipsis in [i for i in index if not isinstance(i, Tensor)] or indexed >= shadow.ndim:
        return None
    if any(shadow.stride()[:-1]):
        return None
    return [shadow[(0,) * (shadow.ndim - 1)].expand(out.shape)]
