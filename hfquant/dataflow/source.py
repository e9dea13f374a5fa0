"""Find linears whose weight is used outside their own forward from source code, for what a run does not show.

For models that cannot be run, :func:`obstacles_in_source` finds less than a run does (:mod:`hfquant.dataflow.weights`):
only the attribute ``self.name.weight`` in ``forward`` and in the methods of ``self`` that it calls. A use of the dtype
counts as harmless if the same method mentions int8. A run, which is in evaluation mode, does not show what happens in
training: :func:`obstacles_in_training`.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from hfquant.dataflow.weights import CAST, READ, fast_path_linears
from hfquant.nn.kinds import layers_in

_HARMLESS = frozenset(("device", "shape", "ndim", "size", "numel", "is_floating_point", "requires_grad"))


class _Use(NamedTuple):
    path: str
    reason: str


def obstacles_in_source(model: nn.Module) -> dict[str, str]:
    """Find the linears of ``model`` whose weight is used outside their own forward, as far as source code shows.

    Returns:
        Linear -> reason, as in ``LinearTrace.obstacle``; linears with no known obstacle are left out.
    """
    return _found(model, _uses, dict.fromkeys(sorted(fast_path_linears(model)), READ))


def obstacles_in_training(model: nn.Module) -> dict[str, str]:
    """Find the linears of ``model`` whose weight is worked on as a tensor where ``self.training`` is true.

    Gemma 3n clamps such weights. A weight that is only passed on does not count: Mamba passes some to a kernel that
    computes a whole block, and in evaluation calls the linears.

    Returns:
        Linear -> reason, as in ``LinearTrace.obstacle``.
    """
    return _found(model, _uses_in_training, {})


def _found(model: nn.Module, uses_of: Callable[[type], frozenset[_Use]], found: dict[str, str]) -> dict[str, str]:
    """Add to ``found`` the linears of a model that the code of its modules' classes uses, with the reason."""
    linears = {id(model.get_submodule(name)): name for name in layers_in(model)}
    uses = {kind: uses_of(kind) for kind in {type(m) for m in model.modules()}}
    for module in model.modules():
        for use in sorted(uses[type(module)], reverse=True):  # READ takes precedence over CAST
            try:
                target = module.get_submodule(use.path)
            except AttributeError:
                continue
            if id(target) in linears and target is not module:
                found.setdefault(linears[id(target)], use.reason)
    return found


def _uses_in_training(kind: type) -> frozenset[_Use]:
    """Return the uses of other modules' weights in the branches of a class's methods that run only in training."""
    if kind.__module__.partition(".")[0] == "torch":
        return frozenset()
    found: set[_Use] = set()
    for method, function in inspect.getmembers(kind, inspect.isfunction):
        if not {"training", "weight"} <= {*function.__code__.co_names}:
            continue  # parsing is slow
        branches = ast.walk(_parsed(kind, method) or ast.Module([], []))
        for branch in (node for node in branches if isinstance(node, ast.If) and _asks_for_training(node.test)):
            for node in itertools.chain.from_iterable(map(ast.walk, branch.body)):
                if not isinstance(node, ast.Attribute) or node.attr in (*_HARMLESS, "dtype"):
                    continue
                names = _chain(node.value)
                if len(names) > 1 and names[-1] == "weight":
                    found.add(_Use(".".join(names[:-1]), READ))
    return frozenset(found)


def _asks_for_training(test: ast.expr) -> bool:
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(map(_asks_for_training, test.values))
    return _chain(test) == ["training"]


def _uses(kind: type) -> frozenset[_Use]:
    """Return the uses of other modules' weights in the forward of a class and in the methods that it calls."""
    if kind.__module__.partition(".")[0] == "torch":
        return frozenset()
    found: set[_Use] = set()
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        tree = _parsed(kind, waiting.pop())
        if tree is None:
            continue
        exempt = any(isinstance(node, ast.Attribute) and node.attr == "int8" for node in ast.walk(tree))
        for outer in ast.walk(tree):
            for node in ast.iter_child_nodes(outer):
                names = _chain(node)
                if isinstance(outer, ast.Call) and node is outer.func and len(names) == 1:
                    waiting += {names[0]} - seen
                    seen.add(names[0])
                elif len(names) > 1 and names[-1] == "weight" and not _only_asks(outer):
                    asked = outer.attr if isinstance(outer, ast.Attribute) else ""
                    if asked not in _HARMLESS and not (asked == "dtype" and exempt):
                        found.add(_Use(".".join(names[:-1]), CAST if asked == "dtype" else READ))
    return frozenset(found)


def _parsed(kind: type, method: str) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(getattr(kind, method))))
    except (AttributeError, OSError, TypeError, SyntaxError):  # no source, or source that does not parse on its own
        return None


def _only_asks(node: ast.AST) -> bool:
    """Return whether an expression inspects a weight without reading its values: ``isinstance(...)``, ``is None``."""
    called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    return isinstance(node, ast.Compare) or called in ("isinstance", "hasattr", "getattr", "type", "id")


def _chain(node: ast.AST) -> list[str]:
    """Return ``["a", "b"]`` for ``self.a.b``, and an empty list for anything that is not an attribute of ``self``."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return names if isinstance(node, ast.Name) and node.id == "self" else []
