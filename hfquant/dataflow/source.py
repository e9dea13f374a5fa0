"""Find linears whose weight is used outside their own forward from source code, for models that cannot be run.

This finds less than a run does (:mod:`hfquant.dataflow.weights`): only the attribute ``self.name.weight`` in
``forward`` and in the methods of ``self`` that it calls. A use of the dtype counts as harmless if the same method
mentions int8.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
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
    found = dict.fromkeys(sorted(fast_path_linears(model)), READ)
    linears = {id(model.get_submodule(name)): name for name in layers_in(model)}
    uses = {kind: _uses(kind) for kind in {type(m) for m in model.modules()}}
    for module in model.modules():
        for use in sorted(uses[type(module)], reverse=True):  # READ takes precedence over CAST
            try:
                target = module.get_submodule(use.path)
            except AttributeError:
                continue
            if id(target) in linears and target is not module:
                found.setdefault(linears[id(target)], use.reason)
    return found


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
