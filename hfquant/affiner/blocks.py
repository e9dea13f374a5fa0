"""Block alignment: a per-channel scale and shift at the output of chosen blocks of a quantized denoiser.

One map serves all timesteps. Blocks are fitted one after the other in the order they run, each on activations that the
maps of the blocks before it have corrected, against the same block of the real model on the same latents. Blocks
that come closer to the real ones need not bring the prediction closer, so maps are kept up to the block at which the
prediction's error is lowest; that may be none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfquant.affiner.config import BlocksConfig
from hfquant.affiner.hooks import Undo, float_dtype, output_tensor
from hfquant.affiner.solvers import Moments, moments, solve_blocks
from hfquant.nn.linear import QuantLinear

logger = logging.getLogger(__name__)

Call = tuple[tuple[Any, ...], dict[str, Any]]


class BlockMap(NamedTuple):
    """Scale and shift, float32 `[C]`, of one output tensor of a module (number 0 where it returns a tensor)."""

    module: str
    output: int
    scale: Tensor
    shift: Tensor


def hook_blocks(denoiser: nn.Module, maps: Sequence[BlockMap]) -> Undo:
    """Applies maps by forward hooks, until the function returned is called.

    Raises:
        ValueError: The denoiser has no such module.
    """
    by_module: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for block in maps:
        by_module.setdefault(block.module, {})[block.output] = block.scale, block.shift
    modules = _modules(denoiser, by_module)

    def hook(outputs: dict[int, tuple[Tensor, Tensor]]) -> Callable[..., Any]:
        def correct(module: nn.Module, args: Any, output: Any) -> Any:
            found = _tensors(output)
            for i, (scale, _) in outputs.items():
                value = found[i] if i < len(found) else None
                if value is None or value.shape[_channel_axis(value)] != len(scale):
                    raise ValueError(
                        f"output {i} of {type(module).__name__} is no tensor of {len(scale)} channels, which its map "
                        "was fitted on: was the affiner fitted on another denoiser?"
                    )
            if isinstance(output, Tensor):
                return _affine(output, *outputs[0])
            return tuple(_affine(x, *outputs[i]) if i in outputs else x for i, x in enumerate(output))

        return correct

    handles = [modules[name].register_forward_hook(hook(outputs)) for name, outputs in by_module.items()]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _modules(denoiser: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    modules = dict(denoiser.named_modules())
    if missing := [name for name in names if name not in modules]:
        raise ValueError(f"{type(denoiser).__name__} has no block {missing[0]!r}; was the affiner fitted on another?")
    return modules


def fit_blocks(
    real: nn.Module, quant: nn.Module, calls: Sequence[Call], config: BlocksConfig, progress: bool = True
) -> list[BlockMap]:
    """Fits the maps of all blocks whose names match, and keeps those up to the prediction's lowest squared error.

    Args:
        real: The full-precision denoiser.
        quant: The quantized one. It is left as it was.
        calls: Arguments of calls of the real denoiser, brought to the device and dtype of each model as needed.
        config: Which blocks, and the ridge.
        progress: Show a bar.

    Raises:
        ValueError: No block matches, one is missing in the quantized model, or outputs are not finite.
    """
    names = _in_order(real, calls[0], config.modules)
    if missing := set(names) - set(dict(quant.named_modules())):
        raise ValueError(f"the quantized denoiser has no block {min(missing)!r}: the models differ")
    theirs = _converted(calls, float_dtype(real), float_dtype(quant))
    fitted: list[BlockMap] = []
    predictions = [_run(real, call) for call in calls]
    best, kept = _error(quant, theirs, predictions), 0
    for name in tqdm(names, desc="aligning blocks", disable=not progress):
        undo = hook_blocks(quant, fitted)
        try:
            sums: dict[int, Moments] = {}
            for call, other in zip(calls, theirs, strict=True):
                pair = zip(_outputs(real, name, call), _outputs(quant, name, other), strict=True)
                for i, (r, q) in enumerate(pair):
                    if r is None or q is None:
                        continue
                    r, q = _channels_second(r), _channels_second(q)
                    if r.shape != q.shape:
                        raise ValueError(
                            f"block {name!r} gives {list(r.shape)} in the real model, {list(q.shape)} here"
                        )
                    if not bool(r.isfinite().all()) or not bool(q.isfinite().all()):
                        raise ValueError(f"block {name!r} gives NaN or infinity")
                    added = moments(r, q, None)
                    sums[i] = sums[i] + added if i in sums else added
        finally:
            undo()
        pairs = {i: solve_blocks(total, config.alpha, config.lambda1, config.lambda2) for i, total in sums.items()}
        fitted += [
            BlockMap(name, i, scale.flatten().float(), shift.flatten().float()) for i, (scale, shift) in pairs.items()
        ]
        undo = hook_blocks(quant, fitted)
        try:
            error = _error(quant, theirs, predictions)
        finally:
            undo()
        if error < best:
            best, kept = error, len(fitted)
    if kept < len(fitted):
        logger.info("aligning blocks from %r on does not lower the error of predictions", fitted[kept].module)
    return fitted[:kept]


def _converted(calls: Sequence[Call], own: torch.dtype, other: torch.dtype) -> Sequence[Call]:
    """The calls for a model of another dtype. Vectors stay: timesteps lose their last digits in 16 bits."""
    from accelerate.utils import recursively_apply

    def ours(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == own and value.dim() > 1

    return calls if own == other else [recursively_apply(lambda x: x.to(other), c, test_type=ours) for c in calls]


def _error(quant: nn.Module, calls: Sequence[Call], predictions: Sequence[Tensor]) -> float:
    """Squared error of the quantized model's predictions."""
    pairs = zip(predictions, (_run(quant, call) for call in calls), strict=True)
    return sum(float((p.double() - q.to(p.device).double()).square().sum()) for p, q in pairs)


def fold_blocks(denoiser: nn.Module, maps: Sequence[BlockMap]) -> list[str]:
    """Folds maps of linears into the linears themselves: `s (W x + c) + t = (s W) x + (s c + t)`.

    Rows of the weight (of a :class:`~hfquant.QuantLinear`: its weight scales and low-rank factor) are multiplied, the
    bias takes the shift. Nothing is left to compute at run time, and the result equals the hook's up to rounding. Maps
    of modules that are no linears, linears without a bias or without weight scales (16-bit formats), and maps with a
    scale that is not positive are left to their hooks.

    Returns:
        Names of the linears folded.

    Raises:
        ValueError: The denoiser has no such module; nothing is folded then.
    """
    modules = _modules(denoiser, [block.module for block in maps])
    folded = []
    for block in maps:
        linear = modules[block.module]
        if not isinstance(linear, nn.Linear) or not bool((block.scale > 0).all()) or linear.bias is None:
            continue
        tensors = dict(linear.state_dict())
        if isinstance(linear, QuantLinear) and "weight_scale" not in tensors:
            continue
        rows = ("weight_scale", "svd_up") if isinstance(linear, QuantLinear) else ("weight",)
        scale, shift = (x.to(linear.bias.device) for x in (block.scale, block.shift))
        new = {name: tensors[name].float() * scale[:, None] for name in rows if name in tensors}
        new["bias"] = tensors["bias"].float() * scale + shift
        for name, value in new.items():
            value = value.to(tensors[name].dtype)
            if isinstance(linear, QuantLinear):
                linear.set_tensor(name, value)
            else:
                getattr(linear, name).data = value
        folded.append(block.module)
    return folded


class _Reached(Exception):
    """Ends a forward pass once the block of interest has run."""


def _outputs(model: nn.Module, name: str, call: Call) -> list[Tensor | None]:
    """The output tensors of a block in one call of the model, which is not run further than that."""
    found: list[Tensor | None] = []

    def take(module: nn.Module, args: Any, output: Any) -> None:
        found.extend(_tensors(output))
        raise _Reached

    with _hooked(model.get_submodule(name), take):
        try:
            _run(model, call)
        except _Reached:
            return found
    raise ValueError(f"block {name!r} did not run")


def _in_order(model: nn.Module, call: Call, patterns: Sequence[str]) -> list[str]:
    """Names of the blocks that match, in the order they first run."""
    modules: dict[str, nn.Module] = {}
    for pattern in patterns:
        outer: list[str] = []
        for name, module in model.named_modules():  # parents come before their children
            if name and fnmatchcase(name, pattern) and not any(name.startswith(f"{o}.") for o in outer):
                outer.append(name)
                modules[name] = module
    if not modules:
        raise ValueError(f"config.blocks.modules: no module of {type(model).__name__} matches {list(patterns)}")
    order: list[str] = []
    handles = [
        m.register_forward_hook(lambda _m, _a, output, name=n: order.append(name) if any(_tensors_in(output)) else None)
        for n, m in modules.items()
    ]
    try:
        _run(model, call)
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise ValueError(
            f"config.blocks.modules: none of the modules that match {list(patterns)} runs and gives tensors; "
            f'the first is {next(iter(modules))!r}, a list of blocks is matched by "name.*"'
        )
    if len(order) > len(set(order)):
        raise ValueError(f"config.blocks.modules: {order[0]!r} or another block runs more than once in a call")
    return order


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _run(model: nn.Module, call: Call) -> Tensor:
    from accelerate.utils import send_to_device

    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    args, kwargs = send_to_device(call, device)
    return output_tensor(model(*args, **kwargs))


def _tensors(output: Any) -> list[Tensor | None]:
    """The floating-point tensors at the top level of an output, None in the place of anything else."""
    outputs = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, tuple) else []
    return [x.detach() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 else None for x in outputs]


def _tensors_in(output: Any) -> list[bool]:
    return [x is not None for x in _tensors(output)]


def _channels_second(values: Tensor) -> Tensor:
    """`[B, C, H, W]`: convolutional outputs have channels second, tokens `[B, L, C]` and vectors `[B, C]` last."""
    if values.dim() >= 4:
        return values.flatten(2).unsqueeze(3)
    return values[..., None, None] if values.dim() == 2 else values.transpose(1, 2).unsqueeze(3)


def _channel_axis(values: Tensor) -> int:
    return 1 if values.dim() >= 4 else -1


def _affine(values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    shape = (-1, *[1] * (values.dim() - 2)) if values.dim() >= 4 else (-1,)
    scale, shift = (x.to(values.device).view(shape) for x in (scale, shift))
    return (values.float() * scale + shift).to(values.dtype)
