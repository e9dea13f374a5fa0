"""Follow features through one forward pass: whose output they are, and what was joined to make an input.

A tensor under watch has *shadows*: integer tensors of its own shape that say of every element

- ``index``: which output feature of which call of a linear it is (a view of ``arange(out_features)``), and
- ``labels``: which part it came from: an operand of ``cat`` or ``stack``, a merged dimension, an activation.

Shadows go through the very views that the tensor goes through (``chunk``, ``view``, ``permute``, ``x[..., 1]``), so no
operation's argument list is parsed here, and any order of views comes out right. Dimensions that a shadow does not
depend on have stride 0, so shadows are small whatever the size of the tensor.

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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from hfquant.config import SegPattern
from hfquant.dataflow.index_map import count, cuts_of, expand_row, merged_dims, reshape, squash, values


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CHUNKS = _words("chunk unbind")
SPLITS = _words("split split_with_sizes tensor_split narrow select __getitem__ hsplit dsplit")
MOVES = _words("transpose permute squeeze unsqueeze movedim moveaxis swapaxes swapdims t adjoint T mT H mH")
EXPANDS = _words("expand expand_as broadcast_to")
RESHAPES = _words("view reshape flatten unflatten view_as reshape_as ravel")
COPIES = _words(
    "to type type_as float half bfloat16 double contiguous clone detach dropout dropout1d dropout2d dropout3d "
    "alpha_dropout feature_alpha_dropout cpu cuda data requires_grad alias"
)
VIEWS = CHUNKS | SPLITS | MOVES | EXPANDS | RESHAPES | COPIES
JOINS = dict.fromkeys(("cat", "concat", "concatenate"), SegPattern.CONCAT2LINEAR) | {"stack": SegPattern.STACK2LINEAR}
NORMS = _words("layer_norm rms_norm group_norm batch_norm instance_norm normalize")
# Functions whose result has a small negative side or none, and those that leave it so.
ACTIVATIONS = _words("silu gelu relu relu6 leaky_relu elu selu celu mish softplus hardswish sigmoid")
PRODUCTS = _words("mul multiply div divide true_divide")
SIGN_KEEPING = PRODUCTS | _words("square pow clamp clip clamp_min clamp_max nan_to_num rms_norm")


class Join(NamedTuple):
    """An operation that made a tensor out of parts."""

    pattern: SegPattern
    how: str


@dataclass(frozen=True)
class Part:
    """A part of a tensor: which operand of which joins (by number) it is, and the activation that made it."""

    operands: frozenset[tuple[int, int]] = frozenset()
    activation: str | None = None


@dataclass(eq=False)
class Call:
    """One call of a linear: where its input was joined, by what, what made each stretch, and the uses of its output."""

    name: str
    in_cuts: frozenset[int]
    joins: tuple[Join, ...]
    activations: dict[tuple[int, int], str | None]
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

    def follow(self, index: Tensor, *cuts: tuple[SegPattern, str]) -> Slice:
        """The slice that a view or a pointwise function of this one holds."""
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


class Provenance(TorchFunctionMode):
    """Sees every torch function called while it is active and keeps the shadows of the results.

    Args:
        patterns: what to follow; an operation that belongs to another pattern ends the trail.
        weights: ``id`` of a linear's weight -> (names of the linears, the modules that may read it).
    """

    def __init__(
        self, patterns: Collection[SegPattern], weights: Mapping[int, tuple[Sequence[str], Collection[nn.Module]]]
    ) -> None:
        super().__init__()
        self.patterns = frozenset(patterns)
        self.weights = weights
        self.calls: list[Call] = []
        self.functional: set[str] = set()
        self.running: list[nn.Module] = []
        self._joins: list[Join] = []
        self._parts: list[Part] = [Part()]  # labels are places in this list
        self._numbers: dict[Part, int] = {Part(): 0}
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
        if name.endswith("grouped_mm") and len(args) > 1 and isinstance(args[0], FakeTensor) and args[1].ndim == 3:
            return args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1])  # its fake kernel knows aligned bf16 alone
        result = func(*args, **kwargs)
        outputs = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, Tensor)]
        if outputs or name == "__setitem__":
            inputs = list(_tensors([*args, *kwargs.values()]))
            self._check_weights(name, inputs)
            kind = name if name.startswith("__") else name.rstrip("_")
            unchanged = inputs and outputs and outputs[0] is inputs[0] and kind == name
            if not (kind in VIEWS and (unchanged or not inputs)):
                with unset_fake_temporarily():
                    self._step(Op(kind, func, args, kwargs, inputs, outputs))
        return result

    def call_linear(self, name: str, linear: nn.Linear, x: Tensor, out: Tensor) -> None:
        """Record a call of ``linear`` that made ``out`` [..., out_features] from ``x`` [..., in_features]."""
        with torch._C.DisableTorchFunction(), unset_fake_temporarily():
            call = Call(name, *self._read(self._labels.get(x), linear.in_features), linear.out_features)
            self.calls.append(call)
            if self.patterns & {SegPattern.LINEAR2CHUNK, SegPattern.LINEAR2SPLIT}:
                index = torch.arange(linear.out_features, dtype=torch.int32)
                self._slices[out] = Slice(call, index.expand(out.shape))

    def call_activation(self, name: str, out: Tensor) -> None:
        """Record that an activation module called ``name`` made ``out``, unless the functions in it already said so."""
        with torch._C.DisableTorchFunction(), unset_fake_temporarily():
            labels = self._labels.get(out)
            known = labels is not None and any(self._parts[i].activation for i in values(labels))
            if SegPattern.ACTIVATION2LINEAR in self.patterns and not known:
                self._labels[out] = self._relabel(labels, out.shape, lambda part: replace(part, activation=name))

    def _check_weights(self, name: str, inputs: list[Tensor]) -> None:
        """Note the linears whose weight is used while none of its owners runs."""
        if name.startswith("new_") or name.endswith("_like"):  # reads the shape and dtype alone
            return
        for t in inputs[:1] if name in ("to", "type_as") else inputs:
            names, owners = self.weights.get(id(t), ((), ()))
            if names and not any(module in owners for module in self.running):
                self.functional.update(names)

    def _step(self, op: Op) -> None:
        """Carry the shadows of the inputs over to the outputs."""
        if op.kind in VIEWS:
            return self._view(op)
        slices = {id(t): self._slices[t] for t in op.inputs if t in self._slices}
        pointwise = _is_pointwise(op.kind) and len(op.outputs) == 1
        labels = None
        if op.kind in JOINS:
            labels = self._join(op)
        elif op.kind in NORMS:
            labels = self._carry(op.kind, op.inputs[:1], op.outputs[0])
        elif pointwise:
            labels = self._carry(op.kind, op.inputs, op.outputs[0])
        for t in op.outputs or op.inputs[:1]:  # __setitem__ has no output: it writes over its first input
            if labels is None:
                self._labels.pop(t, None)
            else:
                self._labels[t] = labels
            self._slices.pop(t, None)
        if pointwise and len(slices) == 1:
            (piece,) = slices.values()
            self._slices[op.outputs[0]] = piece.follow(piece.index.expand(op.outputs[0].shape))
        else:
            for piece in slices.values():
                piece.used = True

    def _view(self, op: Op) -> None:
        """Put the shadows of the first input through the same view."""
        x, out = op.inputs[0], op.outputs[0]
        piece, labels = self._slices.get(x), self._labels.get(x)
        if op.kind in RESHAPES and out.numel() != x.numel():  # other bits, not another shape
            made, merged = None, None
        else:
            made = None if labels is None else _through(op, labels)
            merged = self._merge(op, made[0] if made else None) if op.kind in RESHAPES else None
        for t, label in zip(op.outputs, [merged] if merged is not None else made or (), strict=False):
            self._labels[t] = label
        if piece is None:
            return
        indices = _through(op, piece.index) if op.kind not in RESHAPES or out.numel() == x.numel() else None
        cuts: list[tuple[SegPattern, str]] = []
        if indices and op.kind in CHUNKS | SPLITS and any(count(i) < count(piece.index) for i in indices):
            cuts = [(SegPattern.LINEAR2CHUNK if _is_chunk(op) else SegPattern.LINEAR2SPLIT, op.kind.strip("_"))]
        if indices is None or (cuts and cuts[0][0] not in self.patterns):
            piece.used = True
            return
        for t, index in zip(op.outputs, indices, strict=True):
            self._slices[t] = piece.follow(index, *cuts)

    def _number(self, part: Part) -> int:
        number = self._numbers.setdefault(part, len(self._parts))
        if number == len(self._parts):
            self._parts.append(part)
        return number

    def _relabel(self, labels: Tensor | None, shape: torch.Size, change: Callable[[Part], Part]) -> Tensor:
        """Labels of changed parts; no labels means one part, of which nothing is known."""
        if labels is None:
            return torch.tensor(self._number(change(Part())), dtype=torch.int32).expand(shape)
        small = squash(labels)
        old, inverse = torch.unique(small, return_inverse=True)
        fresh = torch.tensor([self._number(change(self._parts[i])) for i in old.tolist()], dtype=torch.int32)
        return fresh[inverse].view(small.shape).expand(shape)

    def _combine(self, a: Tensor, b: Tensor) -> Tensor:
        """Labels of the common refinement of two labellings of one shape."""
        keep = tuple(slice(0, 1) if s == t == 0 else slice(None) for s, t in zip(a.stride(), b.stride(), strict=True))
        total = len(self._parts)
        pairs = a[keep].long() * total + b[keep]
        old, inverse = torch.unique(pairs, return_inverse=True)
        both = [(self._parts[i // total], self._parts[i % total]) for i in old.tolist()]
        parts = [Part(p.operands | q.operands, p.activation or q.activation) for p, q in both]
        fresh = torch.tensor([self._number(part) for part in parts], dtype=torch.int32)
        return fresh[inverse].view(pairs.shape).expand(a.shape)

    def _carry(self, kind: str, inputs: Sequence[Tensor], out: Tensor) -> Tensor | None:
        """Labels of a pointwise function (or a norm) of ``inputs``. What is broadcast is a factor or a shift."""
        if kind in ACTIVATIONS:
            labels = self._labels.get(inputs[0])
            if SegPattern.ACTIVATION2LINEAR not in self.patterns:
                return labels
            return self._relabel(labels, out.shape, lambda part: replace(part, activation=kind))
        full = {id(t): t for t in inputs if t.shape == out.shape and not isinstance(t, nn.Parameter)}
        carriers = [self._labels[t] for t in full.values() if t in self._labels]
        if not carriers or (kind not in PRODUCTS and len(full) > 1):
            return None
        labels = functools.reduce(self._combine, carriers)
        if kind in SIGN_KEEPING:
            return labels
        return self._relabel(labels, out.shape, lambda part: replace(part, activation=None))

    def _join(self, op: Op) -> Tensor | None:
        """Labels of ``cat`` or ``stack``: a part for each operand, or each part of an operand joined before."""
        if JOINS[op.kind] not in self.patterns:
            return None
        out, stacked = op.outputs[0], op.kind == "stack"
        given = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", op.kwargs.get("axis", 0))
        dim = given % out.ndim
        self._joins.append(Join(JOINS[op.kind], op.kind))
        pieces = []
        for i, t in enumerate(op.args[0] if op.args else op.kwargs["tensors"]):
            if stacked or t.ndim == out.ndim:  # cat accepts empty 1-d tensors
                labels = self._relabel(self._labels.get(t), t.shape, functools.partial(self._operand, i))
                pieces.append(labels.unsqueeze(dim) if stacked else labels)
        same = [d != dim and not any(p.stride(d) for p in pieces) for d in range(out.ndim)]
        keep = tuple(slice(0, 1) if s else slice(None) for s in same)
        return torch.cat([p[keep] for p in pieces], dim).expand(out.shape)

    def _operand(self, i: int, part: Part) -> Part:
        """A part of the i-th operand of the last join; the heads it was merged from do not matter any more."""
        joined = [o for o in part.operands if self._joins[o[0]].pattern is not SegPattern.RESHAPE2LINEAR]
        return Part(frozenset([*joined, (len(self._joins) - 1, i)]), part.activation)

    def _merge(self, op: Op, labels: Tensor | None) -> Tensor | None:
        """Labels of a reshape that merges dimensions (heads, mostly): a part for each index of the outermost."""
        after = op.outputs[0].shape
        if SegPattern.RESHAPE2LINEAR not in self.patterns:
            return None
        dim, sizes = merged_dims(op.inputs[0].shape, after)
        if not sizes or (labels is not None and labels.stride(dim)):  # joined along it by cat or stack: that says more
            return None
        self._joins.append(Join(SegPattern.RESHAPE2LINEAR, f"{op.kind} of {sizes}"))
        numbers = [self._number(Part(frozenset({(len(self._joins) - 1, i)}))) for i in range(sizes[0])]
        row = torch.tensor(numbers, dtype=torch.int32).repeat_interleave(after[dim] // sizes[0])
        heads = row.view(-1, *(1 for _ in after[dim + 1 :])).expand(after)
        return heads if labels is None else self._combine(heads, labels)

    def _read(
        self, labels: Tensor | None, size: int
    ) -> tuple[frozenset[int], tuple[Join, ...], dict[tuple[int, int], str | None]]:
        """Cuts of the last dimension, the joins that explain them, and the activation of each stretch between them."""
        if labels is None:
            return frozenset(), (), {(0, size): None}
        small = squash(labels)
        rows = torch.unique(small.reshape(-1, small.shape[-1]), dim=0).expand(-1, size)
        cuts: set[int] = set()
        joins: set[int] = set()
        for row in rows:
            edges = [0, *((row[1:] != row[:-1]).nonzero().flatten() + 1).tolist(), size]
            hulls: dict[int, tuple[int, int]] = {}
            for low, high in pairwise(edges):
                label = int(row[low])
                hulls[label] = (hulls.get(label, (low, high))[0], high)
            new = cuts_of(hulls.values(), size)
            for cut in new:  # what the parts on both sides have in common did not part them
                joins |= {join for join, _ in self._parts[row[cut - 1]].operands ^ self._parts[row[cut]].operands}
            cuts |= new
        activations: dict[tuple[int, int], str | None] = {}
        for low, high in pairwise([0, *sorted(cuts), size]):
            made_by = {self._parts[i].activation for i in values(rows[:, low:high])}
            activations[low, high] = made_by.pop() if len(made_by) == 1 else None
        return frozenset(cuts), tuple(dict.fromkeys(self._joins[i] for i in sorted(joins))), activations


def _tensors(found: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among ``found``, one level of lists and tuples deep."""
    for value in found:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (v for v in value if isinstance(v, Tensor))


def _through(op: Op, shadow: Tensor) -> list[Tensor] | None:
    """The shadows of the outputs of a view, given its input's; None where they cannot be known."""
    x, out = op.inputs[0], op.outputs[0]
    if op.kind in COPIES:
        return [shadow]
    if op.kind in RESHAPES:
        return [reshape(shadow, out.shape)]
    if op.kind in EXPANDS:
        return [shadow.expand(out.shape)]
    if op.kind == "__getitem__" and any(isinstance(t, FakeTensor) for t in _tensors(op.args[1:])):
        row = expand_row(shadow, op.args[1], out.shape)
        return None if row is None else [row]
    args = (shadow if a is x else a for a in op.args)
    try:
        made = op.func(*args, **{k: shadow if a is x else a for k, a in op.kwargs.items()})
    except (RuntimeError, TypeError, IndexError, ValueError):
        return None  # not a view of this tensor alone
    made = [made] if isinstance(made, Tensor) else list(made)
    return made if [m.shape for m in made] == [t.shape for t in op.outputs] else None


@functools.cache
def _is_pointwise(kind: str) -> bool:
    """Whether torch tags the operator behind a function (``mul``, ``__rsub__``, ``silu``) as pointwise."""
    kind = kind.strip("_")
    for candidate in (kind, kind.removeprefix("r"), kind.removeprefix("i")):
        packet = getattr(torch.ops.aten, candidate, None)
        if packet is not None:
            tagged = any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())
            return tagged or kind in ACTIVATIONS
    return False


def _is_chunk(op: Op) -> bool:
    """Whether a split was asked for by the number of pieces (not by sizes or positions)."""
    given = op.kwargs.get("indices_or_sections", op.kwargs.get("sections", op.args[1] if len(op.args) > 1 else None))
    return op.kind in CHUNKS or (op.kind == "tensor_split" and isinstance(given, int))
