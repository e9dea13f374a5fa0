"""Recognize activations that a forward spells out, such as ``x * sigmoid(x)`` or ``0.5 * x * (1 + tanh(...))``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from hfquant.dataflow.functions import PRODUCTS, base_name
from hfquant.dataflow.twin import WeakTensorKeyDictionary

_SCALINGS = PRODUCTS | {"neg", "negative"}
_SHIFTS = frozenset(("add", "sub", "subtract", "rsub"))
_POWERS = frozenset(("pow", "square"))

#: Steps of a gate, without scalings and powers -> the activation that results when it multiplies ``x``.
_GATES = {
    frozenset({"sigmoid"}): "silu",
    frozenset({"sigmoid of a multiple"}): "quick_gelu",
    frozenset({"tanh", "shift"}): "gelu",
    frozenset({"erf", "shift"}): "gelu",
    frozenset({"tanh", "softplus"}): "mish",
}


class Formula(NamedTuple):
    """A tensor that is a pointwise function of ``root`` and constants only, computed in ``steps``."""

    root: Tensor
    steps: frozenset[str]


class Formulas:
    """Keep, for each tensor, the formula by which pointwise functions computed it from one other tensor."""

    def __init__(self) -> None:
        self._made: Any = WeakTensorKeyDictionary()

    def copy(self, x: Tensor, out: Tensor) -> None:
        """Record that ``out`` is a copy or a cast of ``x``."""
        if out is not x:
            self._made[out] = self._of(x)

    def apply(self, kind: str, inputs: Sequence[Tensor], out: Tensor) -> str | None:
        """Record that the pointwise function ``kind`` computed ``out`` from ``inputs``.

        Returns:
            The activation whose formula this call completes, or None.
        """
        name = base_name(kind) or kind
        full = [self._of(t) for t in inputs if t.ndim]  # tensors without dimensions are constants
        self._made.pop(out, None)
        if not full or any(t.ndim and t.shape != out.shape for t in inputs):
            return None
        if any(formula.root is not full[0].root for formula in full):
            return None
        if len(full) == 2 and name in ("mul", "multiply"):
            for x, gate in (full, full[::-1]):
                activation = _GATES.get(gate.steps - {"scale", "power"})
                if activation and x.steps <= {"scale"}:
                    return activation
        if any(t is out for t in inputs):  # written in place: it is not a function of its own old value
            return None
        steps = frozenset[str]().union(*(formula.steps for formula in full))
        self._made[out] = Formula(full[0].root, steps | _step(name, steps, len(full)))
        return None

    def _of(self, x: Tensor) -> Formula:
        return self._made.get(x) or Formula(x, frozenset())


def _step(name: str, steps: frozenset[str], operands: int) -> frozenset[str]:
    if name in _SCALINGS:
        return frozenset({"scale" if operands == 1 else "power"})
    if name in _SHIFTS:  # a sum of x and its powers is a polynomial; its constant term does not matter
        return frozenset({"shift" if operands == 1 else "power"})
    if name in _POWERS:
        return frozenset({"power"})
    if name == "sigmoid" and "scale" in steps:
        return frozenset({"sigmoid of a multiple"})
    return frozenset({name})
