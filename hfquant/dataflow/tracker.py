"""Follow features through one forward pass: which linear produced them, and what was joined to form an input.

A tracked tensor has up to two *maps*, integer tensors of its own shape that hold for every element

- the *index map*: which output feature of which call of a linear it is (a view of ``arange(out_features)``), and
- the *label map*: which part it came from: an operand of ``cat`` or ``stack``, a merged dimension, an activation.

Maps go through the same views as the tensor itself (``chunk``, ``view``, ``permute``, ``x[..., 1]``), so no argument
lists need to be parsed, and any sequence of views is handled correctly. Dimensions that a map does not depend on have
stride 0, so maps stay small whatever the size of the tensor.

Design decisions, each with a test:

- Pointwise functions are transparent: they act on each feature independently, so cutting before or after them is the
  same. Two tensors with the same features can be combined by one (``x * sigmoid(x)``); the sum of two linears' outputs
  belongs to neither.
- Labels survive normalization, which scales the features of a row without mixing them, but not the addition of another
  full-sized tensor: a residual stream is no longer the concatenation that it may have started as.
- An activation survives a product (the gate of GEGLU or SwiGLU) and RMS normalization, but not a sum.
- Anything unrecognized ends the tracking. A wrong segment costs accuracy; a missed one only forgoes its benefit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hfquant.dataflow.formulas import Formulas
from hfquant.dataflow.functions import (
    ACTIVATIONS,
    CHUNKS,
    COPIES,
    EXPANDS,
    JOIN_DIMS,
    JOINS,
    NORMS,
    PRODUCTS,
    RESHAPES,
    SIGN_KEEPING,
    SPLITS,
    VIEWS,
    is_pointwise,
    name_of,
)
from hfquant.dataflow.index_map import count, expand_row, merged_dims, reshape, same
from hfquant.dataflow.labels import LabelTable, Part, Reading
from hfquant.dataflow.twin import FakeTensor, WeakTensorKeyDictionary, paused, unset_fake_temporarily
from hfquant.enums import SegPattern

#: Index tensors up to this size keep their values when all other tensors are fake.
KNOWN_SIZE = 2**16
#: Gathers with one index per element are followed up to this size, since their maps are as large as their outputs.
GATHER_SIZE = 2**22


@dataclass(eq=False)
class Call:
    """One call of a linear: the composition of its input, the uses of its output, and the number of output rows."""

    name: str
    input: Reading
    out_features: int
    rows: int
    slices: list[Slice] = field(default_factory=list)


@dataclass(eq=False)
class Slice:
    """Output features of one call, as held by some tensor.

    Attributes:
        index: the tensor's index map.
        cuts: the operations that cut it out of the output, with their patterns.
        used: whether an operation that is not followed used it.
        followed: whether another slice was derived from it.
    """

    call: Call
    index: Tensor
    cuts: tuple[tuple[SegPattern, str], ...] = ()
    used: bool = False
    followed: bool = False

    def __post_init__(self) -> None:
        self.call.slices.append(self)

    def follow(self, index: Tensor, *cuts: tuple[SegPattern, str]) -> Slice:
        """Return the slice held by a view or a pointwise function of this one."""
        self.followed = True
        return Slice(self.call, index, self.cuts + cuts)


class Op(NamedTuple):
    """One call of a torch function; ``kind`` is its name without the underscore of in-place variants."""

    kind: str
    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]


class FeatureTracker(TorchFunctionMode):
    """Observe every torch function call while active, and keep the maps of the results.

    Args:
        patterns: the patterns to follow; an operation that belongs to another pattern ends the tracking.

    Attributes:
        calls: the calls of linears, in order of execution.
    """

    def __init__(self, patterns: Collection[SegPattern]) -> None:
        super().__init__()
        self.patterns = frozenset(patterns)
        self.calls: list[Call] = []
        self._table = LabelTable()
        self._formulas = Formulas()
        self._slices: Any = WeakTensorKeyDictionary()
        self._labels: Any = WeakTensorKeyDictionary()
        self._known: Any = WeakTensorKeyDictionary()  # index tensor -> its values

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name == "glu":  # splits and gates in one function: replay it as two halves
            x, dim, *_ = [*args, *kwargs.values(), -1]
            with self:
                half, gate = torch.chunk(x, 2, dim)
                return half * torch.sigmoid(gate)
        if name.endswith("grouped_mm") and len(args) > 1 and isinstance(args[0], FakeTensor) and args[1].ndim == 3:
            return args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1])  # its fake kernel needs aligned bf16
        result = func(*args, **kwargs)
        outputs = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, Tensor)]
        if outputs or name == "__setitem__":
            inputs = list(tensors_in([*args, *(kwargs[k] for k in sorted(kwargs, key="input".__ne__))]))
            kind = name if name.startswith("__") else name.rstrip("_")
            unchanged = inputs and outputs and outputs[0] is inputs[0] and kind == name
            with unset_fake_temporarily():
                if name in ("arange", "tensor", "as_tensor") and not inputs:
                    self._keep_values(outputs[0], func, args, kwargs)
                elif not (kind in VIEWS and (unchanged or not inputs)):
                    self._step(Op(kind, func, args, kwargs, inputs, outputs))
        return result

    def call_linear(self, name: str, size: tuple[int, int], x: Tensor, out: Tensor) -> None:
        """Record a call of a linear of ``size`` (in, out) that computed ``out`` [..., out] from ``x`` [..., in]."""
        in_features, out_features = size
        with paused():
            reading = self._table.read(self._labels.get(x), in_features)
            call = Call(name, reading, out_features, out.numel() // out_features)
            self.calls.append(call)
            if self.patterns & {SegPattern.LINEAR2CHUNK, SegPattern.LINEAR2SPLIT}:
                index = torch.arange(out_features, dtype=torch.int32)
                self._slices[out] = Slice(call, index.expand(out.shape))

    def call_other(self, name: str, size: tuple[int, int], x: Tensor, out: Tensor) -> None:
        """Record a call of another layer of ``size`` (in, out): the activation that produced ``x``, and the rows."""
        in_features, out_features = size
        with paused():
            labels = self._labels.get(x)
            made_by = {None} if labels is None else self._table.activations(labels)
            activation = made_by.pop() if len(made_by) == 1 else None
            reading = Reading(frozenset(), (), {(0, in_features): activation})
            self.calls.append(Call(name, reading, out_features, out.numel() // out_features))

    def call_activation(self, name: str, out: Tensor) -> None:
        """Record that an activation module called ``name`` produced ``out``, unless its functions showed it."""
        with paused():
            labels = self._labels.get(out)
            if labels is None or not any(self._table.activations(labels)):
                self._activate(name, out)

    def know(self, index: Tensor, numbers: Tensor) -> None:
        """Remember the values of an index tensor [n] that is fake during the run."""
        if index.ndim == 1 and index.numel() <= KNOWN_SIZE and index.dtype in (torch.int32, torch.int64):
            self._known[index] = numbers

    def _keep_values(
        self, out: Tensor, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Also compute an index tensor for real, so that indexing with it can be followed."""
        if isinstance(out, FakeTensor) and out.ndim == 1 and out.numel() <= KNOWN_SIZE:
            self.know(out, func(*args, **{**kwargs, "device": "cpu"}))

    def _activate(self, name: str, out: Tensor) -> None:
        if SegPattern.ACTIVATION2LINEAR in self.patterns:
            self._labels[out] = self._table.relabel(
                self._labels.get(out), out.shape, lambda part: replace(part, activation=name)
            )

    def _step(self, op: Op) -> None:
        """Propagate the maps of the inputs to the outputs."""
        if op.kind in VIEWS:
            return self._view(op)
        slices = {id(t): self._slices[t] for t in op.inputs if t in self._slices}
        pointwise = is_pointwise(op.kind) and len(op.outputs) == 1
        labels = None
        if op.kind in JOINS:
            labels = self._join(op)
        elif op.kind in NORMS:
            labels = self._carry(op.kind, op.inputs[:1], op.outputs[0])
        elif pointwise:
            labels = self._carry(op.kind, op.inputs, op.outputs[0])
        for t in op.outputs or op.inputs[:1]:  # __setitem__ has no output; it writes to its first input
            self._known.pop(t, None)
            self._slices.pop(t, None)
            if labels is None:
                self._labels.pop(t, None)
            else:
                self._labels[t] = labels
        if pointwise:
            activation = self._formulas.apply(op.kind, op.inputs, op.outputs[0])
            if activation:
                self._activate(activation, op.outputs[0])
        self._use(list(slices.values()), op.outputs[0] if pointwise else None)

    def _use(self, pieces: list[Slice], out: Tensor | None) -> None:
        """Follow slices into ``out``, a pointwise function of them, or mark them as used."""
        if pieces and out is not None and all(p.call is pieces[0].call for p in pieces):
            first, *others = pieces
            if all(same(first.index, p.index) for p in others):
                cuts = [cut for p in others for cut in p.cuts if cut not in first.cuts]
                self._slices[out] = first.follow(first.index.expand(out.shape), *dict.fromkeys(cuts))
                for p in others:
                    p.followed = True
                return
        for p in pieces:
            p.used = True

    def _view(self, op: Op) -> None:
        """Apply the same view to the maps of the first input."""
        x, out = op.inputs[0], op.outputs[0]
        piece, labels = self._slices.get(x), self._labels.get(x)
        if op.kind in COPIES:
            self._formulas.copy(x, out)
        if x in self._known:
            self._known.update(zip(op.outputs, self._through(op, self._known[x]) or (), strict=False))
        if op.kind in RESHAPES and out.numel() != x.numel():  # reinterprets the bits instead of the shape
            made, merged = None, None
        else:
            made = None if labels is None else self._through(op, labels)
            merged = self._merge(op, made[0] if made else None) if op.kind in RESHAPES else None
        for t, label in zip(op.outputs, [merged] if merged is not None else made or (), strict=False):
            self._labels[t] = label
        if piece is None:
            return
        indices = self._through(op, piece.index) if op.kind not in RESHAPES or out.numel() == x.numel() else None
        cuts: list[tuple[SegPattern, str]] = []
        if indices and op.kind in CHUNKS | SPLITS and any(count(i) < count(piece.index) for i in indices):
            cuts = [(SegPattern.LINEAR2CHUNK if _is_chunk(op) else SegPattern.LINEAR2SPLIT, op.kind.strip("_"))]
        if indices is None or (cuts and cuts[0][0] not in self.patterns):
            piece.used = True
            return
        for t, index in zip(op.outputs, indices, strict=True):
            self._slices[t] = piece.follow(index, *cuts)

    def _through(self, op: Op, old: Tensor) -> list[Tensor] | None:
        """Return the maps of a view's outputs, given its input's map; None if they cannot be determined."""
        x, out = op.inputs[0], op.outputs[0]
        if op.kind in COPIES:
            return [old]
        if op.kind in RESHAPES:
            return [reshape(old, out.shape)]
        if op.kind in EXPANDS:
            return [old.expand(out.shape)]
        if op.kind in ("gather", "take_along_dim") and out.numel() > GATHER_SIZE:
            return None
        args = [self._real(a, x, old) for a in op.args]
        kwargs = {k: self._real(a, x, old) for k, a in op.kwargs.items()}
        if any(isinstance(t, FakeTensor) for t in tensors_in([*args, *kwargs.values()])):  # index with unknown values
            row = None
            if op.kind == "__getitem__":
                row = expand_row(old, op.args[1], out.shape)
            elif op.kind == "index_select" and old.stride(dim := kwargs["dim"] if "dim" in kwargs else args[1]) == 0:
                row = old.narrow(dim, 0, 1).expand(out.shape)
            return None if row is None else [row]
        try:
            made = op.func(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None  # not a view of this tensor alone
        made = [made] if isinstance(made, Tensor) else list(made)
        return made if [m.shape for m in made] == [t.shape for t in op.outputs] else None

    def _real(self, value: Any, x: Tensor, old: Tensor) -> Any:
        """Return an argument with the map ``old`` in place of ``x``, and the values of an index tensor if known."""
        if isinstance(value, (tuple, list)):
            real = [self._real(v, x, old) for v in value]
            return real if isinstance(value, list) else tuple(real)
        return old if value is x else self._known.get(value, value) if isinstance(value, Tensor) else value

    def _carry(self, kind: str, inputs: Sequence[Tensor], out: Tensor) -> Tensor | None:
        """Return the labels after a pointwise function or norm of ``inputs``. Broadcast inputs only scale or shift."""
        if kind in ACTIVATIONS:
            labels = self._labels.get(inputs[0])
            if SegPattern.ACTIVATION2LINEAR not in self.patterns:
                return labels
            return self._table.relabel(labels, out.shape, lambda part: replace(part, activation=kind))
        full = {id(t): t for t in inputs if t.shape == out.shape and not isinstance(t, nn.Parameter)}
        carriers = [self._labels[t] for t in full.values() if t in self._labels]
        if not carriers or (kind not in PRODUCTS and len(full) > 1):
            return None
        labels = functools.reduce(self._table.combine, carriers)
        if kind in SIGN_KEEPING:
            return labels
        return self._table.relabel(labels, out.shape, lambda part: replace(part, activation=None))

    def _join(self, op: Op) -> Tensor | None:
        """Return the labels of a join: one part per operand, or per part of an operand that was itself joined."""
        if JOINS[op.kind] not in self.patterns:
            return None
        out, stacked = op.outputs[0], op.kind == "stack"
        operands = [t for t in op.inputs if stacked or t.ndim == out.ndim]  # cat accepts empty 1-d tensors
        if op.kind in JOIN_DIMS and len(operands) < len(op.inputs):  # gains dimensions
            return None
        given = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", op.kwargs.get("axis", 0))
        dim = min(JOIN_DIMS.get(op.kind, given % out.ndim), out.ndim - 1)
        join = self._table.join(JOINS[op.kind], op.kind)
        pieces = []
        for i, t in enumerate(operands):
            part = functools.partial(self._table.operand, join, i)
            labels = self._table.relabel(self._labels.get(t), t.shape, part)
            pieces.append(labels.unsqueeze(dim) if stacked else labels)
        alike = [d != dim and not any(p.stride(d) for p in pieces) for d in range(out.ndim)]
        keep = tuple(slice(0, 1) if s else slice(None) for s in alike)
        return torch.cat([p[keep] for p in pieces], dim).expand(out.shape)

    def _merge(self, op: Op, labels: Tensor | None) -> Tensor | None:
        """Return the labels of a reshape that merges dimensions (heads, usually): one part per outermost index."""
        after = op.outputs[0].shape
        if SegPattern.RESHAPE2LINEAR not in self.patterns:
            return None
        dim, sizes = merged_dims(op.inputs[0].shape, after)
        if not sizes or (labels is not None and labels.stride(dim)):  # joined along it by cat or stack: more specific
            return None
        join = self._table.join(SegPattern.RESHAPE2LINEAR, f"{op.kind} of {sizes}")
        numbers = [self._table.number(Part(frozenset({(join, i)}))) for i in range(sizes[0])]
        row = torch.tensor(numbers, dtype=torch.int32).repeat_interleave(after[dim] // sizes[0])
        heads = row.view(-1, *(1 for _ in after[dim + 1 :])).expand(after)
        return heads if labels is None else self._table.combine(heads, labels)


def tensors_in(found: Iterable[Any]) -> Iterable[Tensor]:
    """Yield the tensors among ``found``, one level of lists and tuples deep."""
    for value in found:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (v for v in value if isinstance(v, Tensor))


def _is_chunk(op: Op) -> bool:
    """Return whether a split was specified by the number of pieces (not by sizes or positions)."""
    given = op.kwargs.get("indices_or_sections", op.kwargs.get("sections", op.args[1] if len(op.args) > 1 else None))
    return op.kind in CHUNKS or (op.kind == "tensor_split" and isinstance(given, int))
