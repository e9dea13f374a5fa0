"""Block alignment: a per-channel scale and shift at the output of selected blocks of a quantized denoiser.

One map serves all timesteps. Blocks are fitted one by one in the order they run, each on activations already corrected
by the maps of earlier blocks, against the same block of the real model on the same latents. Bringing a block closer to
the real one does not always bring the prediction closer. Maps are therefore kept only up to the block with the lowest
prediction error on held-out samples, which may mean none at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hfquant.affiner.config import BlocksConfig
from hfquant.affiner.hooks import Undo
from hfquant.affiner.solvers import Moments, moments, solve_blocks
from hfquant.console import progress_bar
from hfquant.denoisers import compute_dtype, run_denoiser, uncompiled

logger = logging.getLogger(__name__)

Call = tuple[tuple[Any, ...], dict[str, Any]]

#: One in this many samples is held out of the fit to judge the maps.
HELD_OUT = 4


class BlockMap(NamedTuple):
    """Scale and shift, float32 `[C]`, of one output tensor of a module (index 0 if it returns a tensor)."""

    module: str
    output: int
    scale: Tensor
    shift: Tensor


def hook_blocks(denoiser: nn.Module, maps: Sequence[BlockMap]) -> Undo:
    """Apply maps with forward hooks until the returned function is called.

    Raises:
        ValueError: The denoiser has no such module.
    """
    modules = dict(uncompiled(denoiser).named_modules())
    if missing := [block.module for block in maps if block.module not in modules]:
        raise ValueError(
            f"{type(denoiser).__name__} has no block {missing[0]!r}; was the affiner fitted on another denoiser?"
        )

    def correct(block: BlockMap, output: Any) -> Any:
        found = _tensors(output)
        value = found[block.output] if block.output < len(found) else None
        if value is None or value.shape[1 if value.dim() >= 4 else -1] != len(block.scale):
            raise ValueError(
                f"output {block.output} of {block.module!r} is not a tensor of {len(block.scale)} channels, as its map "
                "expects: was the affiner fitted on another denoiser?"
            )
        shape = (-1, *[1] * (value.dim() - 2)) if value.dim() >= 4 else (-1,)
        scale, shift = (x.to(value.device).view(shape) for x in (block.scale, block.shift))
        changed = (value.float() * scale + shift).to(value.dtype)
        if isinstance(output, Tensor):
            return changed
        return (*output[: block.output], changed, *output[block.output + 1 :])

    undo = ExitStack()
    if maps and _is_compiled(denoiser):
        # By default, compiled code does not notice hooks that come and go.
        undo.callback(torch._dynamo.reset)
        torch._dynamo.reset()
    for block in maps:
        hook = modules[block.module].register_forward_hook(lambda _m, _a, out, block=block: correct(block, out))
        undo.callback(hook.remove)
    return undo.close


def _is_compiled(denoiser: nn.Module) -> bool:
    compiled = (getattr(module, "_compiled_call_impl", None) is not None for module in denoiser.modules())
    return uncompiled(denoiser) is not denoiser or any(compiled)


def fit_blocks(
    real: nn.Module, quant: nn.Module, calls: Sequence[Call], config: BlocksConfig, progress: bool = True
) -> list[BlockMap]:
    """Return maps of the blocks with matching names, up to the block with the lowest squared error of the prediction.

    Args:
        real: The full-precision denoiser.
        quant: The quantized one. It is left unchanged.
        calls: Arguments of calls of the real denoiser, moved to each model's device and dtype as needed.
        config: Which blocks to fit, and the ridge.
        progress: Show a progress bar.

    Raises:
        ValueError: No block matches, one is missing in the quantized model, or outputs are not finite.
    """
    real, quant = uncompiled(real), uncompiled(quant)
    names = _in_order(real, calls[0], config.modules)
    if missing := set(names) - set(dict(quant.named_modules())):
        raise ValueError(f"the quantized denoiser has no block {min(missing)!r}: the models differ")
    pairs = list(zip(calls, _converted(calls, real, quant), strict=True))
    fitted: list[BlockMap] = []
    best, kept = float("inf"), 0
    # One pass yields both the error with the maps so far and the outputs of the next block.
    for name in progress_bar([*names, ""], "aligning blocks", shown=progress):
        error = 0.0
        sums: dict[int, Moments] = {}
        with ExitStack() as stack:
            stack.callback(hook_blocks(quant, fitted))
            for call, other in pairs:
                expected, reals = _outputs(real, name, call)
                predicted, quants = _outputs(quant, name, other)
                judged = [_rows(x, held_out=True).double() for x in (expected, predicted)]
                error += float((judged[0] - judged[1].to(judged[0].device)).square().sum())
                for i, added in _moments(name, reals, quants) if name else ():
                    sums[i] = sums[i] + added if i in sums else added
        if error < best:
            best, kept = error, len(fitted)
        for i, total in sums.items():
            scale, shift = solve_blocks(total, config.alpha, config.lambda1, config.lambda2)
            fitted.append(BlockMap(name, i, scale.flatten().float(), shift.flatten().float()))
    if kept < len(fitted):
        logger.info("aligning blocks from %r onward does not lower the prediction error", fitted[kept].module)
    return fitted[:kept]


def _rows(values: Tensor, held_out: bool) -> Tensor:
    """Return the samples to fit or judge maps on; a batch too small to split serves for both."""
    if len(values) < HELD_OUT:
        return values
    return values[(torch.arange(len(values)) % HELD_OUT == HELD_OUT - 1) == held_out]


def _moments(name: str, reals: list[Tensor | None], quants: list[Tensor | None]) -> Iterator[tuple[int, Moments]]:
    """Yield the sums of each output tensor of a block, with its index."""
    if len(reals) != len(quants):
        raise ValueError(
            f"block {name!r} returns {len(reals)} outputs in the real model, {len(quants)} in the quantized one"
        )
    for i, (r, q) in enumerate(zip(reals, quants, strict=True)):
        if r is None or q is None:
            continue
        if r.shape != q.shape:
            raise ValueError(
                f"block {name!r} returns {list(r.shape)} in the real model, {list(q.shape)} in the quantized one"
            )
        if not bool(r.isfinite().all()) or not bool(q.isfinite().all()):
            raise ValueError(f"block {name!r} returns NaN or infinity")
        fitted = [_channels_second(_rows(x, held_out=False)) for x in (r, q)]
        yield i, moments(fitted[0], fitted[1], None)


def _converted(calls: Sequence[Call], real: nn.Module, quant: nn.Module) -> Sequence[Call]:
    """Return the calls converted to the other model's dtype, except vectors: 16 bits would truncate timesteps."""
    from accelerate.utils import recursively_apply

    own, other = compute_dtype(real), compute_dtype(quant)

    def ours(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == own and value.dim() > 1

    return calls if own == other else [recursively_apply(lambda x: x.to(other), c, test_type=ours) for c in calls]


def _run(model: nn.Module, call: Call) -> Tensor:
    """Run a denoiser with the hooks that are there now."""
    with torch.compiler.set_stance("force_eager") if _is_compiled(model) else nullcontext():
        return run_denoiser(model, *call)


def _outputs(model: nn.Module, name: str, call: Call) -> tuple[Tensor, list[Tensor | None]]:
    """Return the prediction of one call, and the output tensors of a block during that call."""
    found: list[Tensor | None] = []
    with _hooked(model.get_submodule(name), lambda _m, _a, output: found.extend(_tensors(output))):
        return _run(model, call), found


def _in_order(model: nn.Module, call: Call, patterns: Sequence[str]) -> list[str]:
    """Return the names of matching blocks in the order they first run."""
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

    def note(name: str, output: Any) -> None:
        if any(x is not None for x in _tensors(output)):
            order.append(name)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(_hooked(module, lambda _m, _a, output, name=name: note(name, output)))
        _run(model, call)
    if not order:
        raise ValueError(
            f"config.blocks.modules: none of the modules that match {list(patterns)} runs and returns tensors; "
            f'the first is {next(iter(modules))!r}; to match the blocks in a list, use "name.*"'
        )
    if len(order) > len(set(order)):
        raise ValueError(f"config.blocks.modules: {order[0]!r} or another block runs more than once in a call")
    return order


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _tensors(output: Any) -> list[Tensor | None]:
    """Return the floating-point tensors at the top level of an output, with None in place of anything else."""
    outputs = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, tuple) else []
    return [x.detach() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 else None for x in outputs]


def _channels_second(values: Tensor) -> Tensor:
    """Return `[B, C, H, W]`: convolutional outputs have channels second, `[B, L, C]` and `[B, C]` have them last."""
    if values.dim() >= 4:
        return values.flatten(2).unsqueeze(3)
    return values[..., None, None] if values.dim() == 2 else values.transpose(1, 2).unsqueeze(3)
