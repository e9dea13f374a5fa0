"""Label maps: integer tensors that hold, for every element of a tensor, the part it came from.

A label is the number of a :class:`Part` in a :class:`LabelTable`. Equal parts share a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hfquant.dataflow.index_map import cuts_of, squash, values
from hfquant.enums import SegPattern


class Join(NamedTuple):
    """An operation that joined parts into one tensor."""

    pattern: SegPattern
    how: str


@dataclass(frozen=True)
class Part:
    """A part of a tensor: its operand number in each join (by number), and the activation that produced it."""

    operands: frozenset[tuple[int, int]] = frozenset()
    activation: str | None = None


class Reading(NamedTuple):
    """What a label map says about the features of a linear's input.

    Attributes:
        cuts: where the features were joined.
        joins: the operations that joined them there.
        activations: for each range between two cuts, the activation that produced it.
    """

    cuts: frozenset[int]
    joins: tuple[Join, ...]
    activations: dict[tuple[int, int], str | None]


class LabelTable:
    """The parts that the labels of one forward pass refer to."""

    def __init__(self) -> None:
        self.parts: list[Part] = [Part()]
        self.joins: list[Join] = []
        self._numbers: dict[Part, int] = {Part(): 0}

    def number(self, part: Part) -> int:
        """Return the label of ``part``, creating one if necessary."""
        number = self._numbers.setdefault(part, len(self.parts))
        if number == len(self.parts):
            self.parts.append(part)
        return number

    def activations(self, labels: Tensor) -> set[str | None]:
        """Return the activations of all parts in a label map."""
        return {self.parts[i].activation for i in values(labels)}

    def join(self, pattern: SegPattern, how: str) -> int:
        """Add a join and return its number."""
        self.joins.append(Join(pattern, how))
        return len(self.joins) - 1

    def relabel(self, labels: Tensor | None, shape: torch.Size, change: Callable[[Part], Part]) -> Tensor:
        """Return the labels after changing each part; no labels means a single part about which nothing is known."""
        if labels is None:
            return torch.tensor(self.number(change(Part())), dtype=torch.int32).expand(shape)
        small = squash(labels)
        old, inverse = torch.unique(small, return_inverse=True)
        fresh = torch.tensor([self.number(change(self.parts[i])) for i in old.tolist()], dtype=torch.int32)
        return fresh[inverse].view(small.shape).expand(shape)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the labels of the common refinement of two labelings of the same shape."""
        keep = tuple(slice(0, 1) if s == t == 0 else slice(None) for s, t in zip(a.stride(), b.stride(), strict=True))
        total = len(self.parts)
        pairs = a[keep].long() * total + b[keep]
        old, inverse = torch.unique(pairs, return_inverse=True)
        both = [(self.parts[i // total], self.parts[i % total]) for i in old.tolist()]
        parts = [Part(p.operands | q.operands, p.activation or q.activation) for p, q in both]
        fresh = torch.tensor([self.number(part) for part in parts], dtype=torch.int32)
        return fresh[inverse].view(pairs.shape).expand(a.shape)

    def operand(self, join: int, i: int, part: Part) -> Part:
        """Return a part as the i-th operand of a join; the heads it was merged from no longer matter."""
        joined = [o for o in part.operands if self.joins[o[0]].pattern is not SegPattern.RESHAPE2LINEAR]
        return Part(frozenset([*joined, (join, i)]), part.activation)

    def read(self, labels: Tensor | None, size: int) -> Reading:
        """Return what a label map says about the last dimension, which has ``size`` features."""
        if labels is None:
            return Reading(frozenset(), (), {(0, size): None})
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
            for cut in new:  # an operation that both sides share did not separate them
                joins |= {join for join, _ in self.parts[row[cut - 1]].operands ^ self.parts[row[cut]].operands}
            cuts |= new
        activations: dict[tuple[int, int], str | None] = {}
        for low, high in pairwise([0, *sorted(cuts), size]):
            made_by = self.activations(rows[:, low:high])
            activations[low, high] = made_by.pop() if len(made_by) == 1 else None
        return Reading(frozenset(cuts), tuple(dict.fromkeys(self.joins[i] for i in sorted(joins))), activations)
