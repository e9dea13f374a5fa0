"""Run a copy of a model once without modifying the model, on fake tensors if possible.

The copy, called the twin, has the model's module tree. Its parameters are fake (shapes and dtypes, no values) or share
the model's storage, so anything that a forward stores, caches or draws does not affect the model. All private names of
torch that :mod:`hfquant.dataflow` uses are imported here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hfquant.nn.float_modules import HOOKS
from hfquant.nn.kinds import layers_in
from hfquant.offload import drop_wrappers, has_hook, hooks_of

try:
    from torch._C import DisableTorchFunction
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
    from torch.utils._pytree import tree_map_only
    from torch.utils.weak import WeakTensorKeyDictionary
except ImportError as error:
    raise ImportError(f"torch {torch.__version__} lacks a private name that hfquant.dataflow needs: {error}") from error

__all__ = [
    "FakeTensor",
    "PatternError",
    "WeakTensorKeyDictionary",
    "described",
    "paused",
    "run_twin",
    "shapes_only",
    "unset_fake_temporarily",
]

logger = logging.getLogger(__name__)

Watch = TypeVar("Watch", bound=AbstractContextManager[Any])

#: Logger that warns about every operation without a fake kernel.
FAKE_TENSOR_LOG = "torch._subclasses.fake_tensor"

_LruCache = type(functools.lru_cache(lambda: None))


class PatternError(RuntimeError):
    """The model's forward could not be observed; the cause says why."""


def run_twin(
    model: nn.Module, example: Any, watch: Callable[[nn.Module], Watch], fakes: Sequence[bool] = (True, False)
) -> tuple[Watch, bool]:
    """Run a twin of ``model`` on fake tensors, or on real ones if that fails.

    Args:
        model: any model that can run forward, on any device, including meta.
        example: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        watch: given the twin, which it may hook, returns the context manager to run the forward in.
        fakes: whether to use fake tensors; the choices are tried in order.

    Returns:
        The context manager of the run that succeeded, and whether that run used fake tensors.

    Raises:
        PatternError: No run succeeded.
    """
    name, earlier = type(model).__name__, ""
    for fake in fakes:
        kind = "fake tensors" if fake else "real ones"
        try:
            return _run(model, example, watch, FakeTensorMode(allow_non_fake_inputs=True) if fake else None), fake
        except Exception as error:  # a model's own code may raise anything, on fake tensors or real ones
            if fake is fakes[-1] or _needs_fakes(model, example):
                how = f"runs neither on {earlier} nor on" if earlier else "does not run on"
                raise PatternError(f"{name} {how} {kind}: {described(error)}") from error
            earlier = f"{kind} ({described(error)})"
            logger.info("%s does not run on %s: trying real ones", name, earlier)
    raise ValueError("fakes is empty")


def described(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def shapes_only(tensor: Tensor) -> bool:
    """Return whether a tensor has a shape and a dtype but no values."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Let torch functions run on real tensors, hidden from function modes."""
    with DisableTorchFunction(), unset_fake_temporarily():
        yield


def _needs_fakes(model: nn.Module, example: Any) -> bool:
    """Return whether meta tensors make a real run impossible; offloading hooks load theirs."""
    return not has_hook(model) and any(t.is_meta for t in _tensors_of(model, example))


def _tensors_of(model: nn.Module, example: Any) -> list[Tensor]:
    found = [*model.parameters(), *model.buffers()]
    tree_map_only(Tensor, found.append, dict(example) if isinstance(example, Mapping) else example)
    return found


def _run(model: nn.Module, example: Any, watch: Callable[[nn.Module], Watch], fake: FakeTensorMode | None) -> Watch:
    cuda = sorted(
        {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
    # Compiled functions within a forward, such as flex attention's masks, read data pointers, which fakes do not have.
    eager = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(cuda), torch.no_grad(), eager, fake or contextlib.nullcontext(), _no_trace_left():
        twin = _twin(model, fake is not None)
        inputs = tree_map_only(
            Tensor, _clone if fake is None else _empty, dict(example) if isinstance(example, Mapping) else example
        )
        watching = watch(twin)
        with watching:
            if isinstance(inputs, dict):
                twin(**inputs)
            elif isinstance(inputs, (tuple, list)):
                twin(*inputs)
            else:
                twin(inputs)
    return watching


def _clone(t: Tensor) -> Tensor:
    return t.detach().clone()


def _empty(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")


def _twin(model: nn.Module, fake: bool) -> nn.Module:
    """Return a copy of the module tree in eval mode, with fake parameters or parameters that share storage."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            owner = getattr(hook, "__self__", hook)  # may hold what cannot be copied
            if not isinstance(owner, nn.Module):
                memo[id(owner)] = owner
        for shared in (getattr(module, "config", None), *hooks_of(module)):  # never written to; hooks may hold weights
            if not isinstance(shared, nn.Module):
                memo[id(shared)] = shared
        for p in module.parameters(recurse=False):
            memo[id(p)] = nn.Parameter(_empty(p) if fake else p.detach(), requires_grad=False)
    with _TensorCopies(_empty if fake else _clone):
        twin: nn.Module = copy.deepcopy(model, memo)
    for module in twin.modules():
        drop_wrappers(module, fetch=not fake)
    for name in layers_in(model):
        # Users' hooks, most of which only keep what they see.
        for hooks in (vars(twin.get_submodule(name))[key] for key in HOOKS):
            if hooks:
                hooks.clear()
    return twin.eval()


class _TensorCopies(TorchFunctionMode):
    """Make ``deepcopy`` copy tensors with a given function: buffers, and tensors in lists, dicts and objects.

    Its own copies cannot be fake, and it refuses tensors that are results of computations (weight norm has some).
    """

    def __init__(self, copied: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.copied = copied

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self.copied(tensor)
        return memo[id(tensor)]


@contextlib.contextmanager
def _no_trace_left() -> Iterator[None]:
    """Silence torch's log of operations it cannot fake, and clear each ``lru_cache`` that a fake tensor got into.

    Such a cache (of position encodings, say) would return the fake tensor in the next real forward.
    """
    log = logging.getLogger(FAKE_TENSOR_LOG)
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled
        for cache in [o for o in gc.get_objects() if type(o) is _LruCache]:
            own = (getattr(cache, "__module__", None) or "").partition(".")[0] in ("torch", "sympy")
            if not own and cache.cache_info().currsize and _holds_fake(cache):
                cache.cache_clear()


def _holds_fake(holder: Any, depth: int = 4) -> bool:
    """Return whether a fake tensor is reachable from a cache, through its links or tuples and lists in its results."""
    inner = gc.get_referents(holder)
    if any(type(o) is FakeTensor for o in inner):
        return True
    return depth > 0 and any(
        _holds_fake(o, depth - 1) for o in inner if type(o) in (dict, list, tuple) or "lru" in type(o).__name__
    )
