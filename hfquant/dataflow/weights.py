"""Find the linears that cannot be replaced, because code outside them depends on their weight.

The ``weight`` of a quantized linear holds codes of another dtype. This breaks two uses of the weight outside the
linear's own forward:

- Its values are read: ``F.linear(x, other.weight)``, ``x @ linear.weight.T``, a fused kernel.
- Its dtype is used to create tensors: ``x.to(linear.weight.dtype)``, ``x.type_as(linear.weight)``,
  ``linear.weight.new_zeros(3)``.

A dtype that is merely compared is harmless, and such comparisons are common (``if weight.dtype != torch.int8`` before a
cast). So if a first run sees a weight's dtype being read, a second run returns the dtype of the codes instead and
observes which casts really happen. It corrects the casts as they happen, so a single run finds all of them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hfquant.dataflow.functions import name_of
from hfquant.dataflow.twin import PatternError, run_twin
from hfquant.nn.kinds import layers_in

logger = logging.getLogger(__name__)

READ = "its weight is read outside its own forward"
CAST = "code outside it casts to the dtype of its weight"
UNCLEAR = "code outside it reads the dtype of its weight and may fail on the dtype of codes"


class WeightWatch(TorchFunctionMode):
    """Observe every use of a linear's weight outside its own forward.

    Args:
        twin: the model that will run; hooks are put on the modules that own a layer's weight.
        layers: names of the layers in it that can be quantized.
        codes: for each linear that may be quantized, the dtype that its weight will then have.
        answer: return the dtype of the codes when a weight's dtype is read.

    Attributes:
        codes: the given dtypes that differ from the weights' current ones.
        obstacles: linear -> why it cannot be replaced.
        asked: the linears whose dtype was read, with the functions that read it.
    """

    def __init__(
        self, twin: nn.Module, layers: Collection[str], codes: Mapping[str, torch.dtype], answer: bool = False
    ) -> None:
        super().__init__()
        self._dtypes = {name: twin.get_submodule(name).get_parameter("weight").dtype for name in layers}
        self.codes = {n: dtype for n, dtype in codes.items() if dtype != self._dtypes.get(n, dtype)}
        self.answer = answer
        self.obstacles: dict[str, str] = {}
        self.asked: dict[str, set[CodeType]] = {}
        self._owners = _owners(twin, layers)
        self._running: list[nn.Module] = []
        for module in {id(m): m for _, modules in self._owners.values() for m in modules}.values():
            module.register_forward_pre_hook(lambda m, args: self._running.append(m))
            module.register_forward_hook(lambda m, args, out: self._running.remove(m), always_call=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name in ("dtype", "is_floating_point"):
            weight = next(iter([*args, *kwargs.values()]))
            if names := self._strangers(weight):
                return self._ask(names, name, func(*args, **kwargs))
            return func(*args, **kwargs)
        if self.answer and self.asked:
            args = [self._true_dtype(a) if isinstance(a, torch.dtype) else a for a in args]
            kwargs = {k: self._true_dtype(a) if isinstance(a, torch.dtype) else a for k, a in kwargs.items()}
        result = func(*args, **kwargs)
        if name == "__setitem__" or _has_tensor(result):
            self._use(name, args, kwargs)
        return result

    def _strangers(self, value: Any) -> list[str]:
        """Return the linears whose weight ``value`` is, unless one of its owners is running."""
        names, owners = self._owners.get(id(value), ((), ()))
        return [] if any(module in owners for module in self._running) else list(names)

    def _use(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        values = [*args, *kwargs.values()]
        makes = name.startswith("new_") or name.endswith("_like")  # reads only shape and dtype
        for i, value in enumerate(values):
            for weight in value if isinstance(value, (list, tuple)) else (value,):
                for linear in self._strangers(weight) if isinstance(weight, Tensor) else ():
                    if not makes and not (i and name in ("to", "type_as")):
                        self.obstacles[linear] = READ
                    elif kwargs.get("dtype") is None and linear in self.codes:
                        self.obstacles.setdefault(linear, CAST)

    def _ask(self, names: Sequence[str], name: str, truth: Any) -> Any:
        """Return a weight's dtype (or whether it is floating point) as the code that reads it should see it."""
        planned = [n for n in names if n in self.codes]
        for linear in planned:
            self.asked.setdefault(linear, set()).add(_caller())
        if not self.answer or not planned:
            return truth
        codes = self.codes[planned[0]]
        return codes if name == "dtype" else codes.is_floating_point

    def _true_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Replace the dtype of codes with the weight's own, after recording which linears it belongs to."""
        asked = [n for n in self.asked if self.codes[n] == dtype]
        if not asked:
            return dtype
        caller = _caller()
        # The code that reads a dtype and casts to it is usually one function; otherwise, the dtype may be any linear's.
        culprits = [n for n in asked if caller in self.asked[n]] or asked
        for linear in culprits:
            self.obstacles.setdefault(linear, CAST)
        return self._dtypes[culprits[0]]


def find_obstacles(model: nn.Module, example: Any, first: WeightWatch, fake: bool) -> dict[str, str]:
    """Find the linears of ``model`` that cannot be replaced, and why.

    Args:
        model: the model.
        example: its inputs, as in :func:`~hfquant.dataflow.twin.run_twin`.
        first: the result of a first run of the model.
        fake: whether that run used fake tensors.

    Returns:
        Linear -> reason. Linears that can be replaced are left out.
    """
    found = {**first.obstacles, **dict.fromkeys(fast_path_linears(model), READ)}
    asked = {name: first.codes[name] for name in first.asked if name not in found}
    if asked:
        layers = layers_in(model)
        try:
            second, _ = run_twin(model, example, lambda twin: WeightWatch(twin, layers, asked, answer=True), [fake])
        except PatternError as error:
            logger.info("with weights in the dtype of their codes, %s", error)
            return {**dict.fromkeys(asked, UNCLEAR), **found}
        found = {**second.obstacles, **found}
    return found


def _owners(model: nn.Module, layers: Collection[str]) -> dict[int, tuple[list[str], list[nn.Module]]]:
    """Return, by the ``id`` of each layer's weight, the layers it belongs to and all modules that own it."""
    owners: dict[int, tuple[list[str], list[nn.Module]]] = {
        id(model.get_submodule(name).get_parameter("weight")): ([], []) for name in layers
    }
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if id(p) in owners:
                owners[id(p)][1].append(module)
                if name in layers:
                    owners[id(p)][0].append(name)
    return owners


def fast_path_linears(model: nn.Module) -> set[str]:
    """Return the linears whose weights ``nn.TransformerEncoderLayer`` passes to a fused kernel when not observed."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.TransformerEncoderLayer)]
    return {
        f"{name}.{child}" if name else child
        for name, layer in layers
        for child, m in layer.named_children()
        if type(m) is nn.Linear
    }


def _caller() -> CodeType:
    """Return the code outside torch and this package that called the observed torch function."""
    frame = sys._getframe(1)
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(("torch.", "hfquant.dataflow.")):
        frame = frame.f_back
    return frame.f_code


def _has_tensor(result: Any) -> bool:
    return any(isinstance(t, Tensor) for t in (result if isinstance(result, (tuple, list)) else (result,)))
