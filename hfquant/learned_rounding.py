"""Learned rounding: train the codes of quantized linears until blocks match those of the float model.

Which of its two neighboring codes is best for a weight depends on the other weights and on the errors of earlier
layers. Each weight has an offset from its first code, initially its distance from that code (at most half a step), and
the offsets are trained until the output of each block, on the inputs that it gets in the quantized model, comes closer
to that of the same block in the float model. This is SignRound (arXiv 2309.05516) with Adam in place of sign descent,
starting from the codes that are there.

Blocks are trained in the order in which they run, a few neighbors at a time. Training all of them together does harm,
because each would adapt to outputs of earlier blocks that are still changing; training one at a time would run the
blocks before it again for every step.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import cycle
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from hfquant.calibration.batches import forward, options_for
from hfquant.console import progress_bar
from hfquant.formats import IntegerFormat, expand_columns
from hfquant.formats.rotation import rotated
from hfquant.kernels.dequantize import gradient_dtype
from hfquant.nn.float_modules import first
from hfquant.nn.linear import QuantLinear
from hfquant.outputs import padding_mask
from hfquant.ptq import block_of

#: A weight starts just within the range that is rounded to its first code.
_START = 0.49
#: First rate times steps, in steps of the grid; the rate falls linearly to 0. With three times as much, rarely used
#: weights of blocks with a small error are moved by noise.
_REACH = 0.3
#: A layer is skipped if more than a share of _FEW of its weights are more than _FAR steps from their codes: it then
#: holds other weights than the float model.
_FAR, _FEW = 1.5, 0.05
#: Rounds of scaling columns and rows to given norms.
_BALANCED = 8
#: Blocks that train at a time.
_TOGETHER = 5
#: Samples on which a trained block is compared with its first codes.
_JUDGED = 16

#: Returns the gradient of a tensor, given that of the weight, [out, in].
Chain = Callable[[Tensor], Tensor]

logger = logging.getLogger(__name__)


class _Offsets:
    """Offsets of a layer's weights from their first codes, in steps of the grid."""

    def __init__(self, layer: QuantLinear, weight: Tensor) -> None:
        """Start at the float ``weight`` [out, in] of the same layer."""
        plan, grid = layer.plan, layer.grid()
        assert grid.scale is not None
        tensors = {**layer._parameters, **layer._buffers}
        exact = weight.detach().float().clone()
        if plan.config.opt.folds():
            held = plan.transform.restored(layer.dequantize().float(), tensors, plan.row_groups)
            exact = _with_norms_of(held, exact)
        exact = plan.transform.reapplied(exact, tensors, plan.row_groups)
        exact /= expand_columns(grid.scale, plan.columns)
        if grid.zero_point is not None:
            exact += expand_columns(grid.zero_point, plan.columns)
        self.layer, self.first = layer, layer.codes()
        largest = 2 ** (layer.format.bits - 1) - 1
        self.range = -largest - (not plan.config.weight_quant.symmetric), largest
        #: Their distance from the first codes, [out, in] float32.
        self.values = exact.sub_(self.first)
        # A weight beyond the range of codes may be far from its code, and feedback moves single ones. If many others
        # are, the layer holds another weight than the teacher.
        inside = (self.first > self.range[0]) & (self.first < self.range[1])
        self.fits = bool((self.values.abs() > _FAR)[inside].float().mean() < _FEW)
        self.values.clamp_(-_START, _START).requires_grad_()

    def write(self, trained: bool) -> None:
        """Have the layer run with the trained codes, or with the first ones."""
        codes = self.first
        if trained:
            codes = self.values.detach().round().add_(self.first).clamp_(*self.range).to(self.first.dtype)
        self.layer.weight.data.copy_(self.layer.in_memory("weight", codes))


def _with_norms_of(held: Tensor, weight: Tensor) -> Tensor:
    """Return ``weight`` [out, in], its rows and columns scaled to the norms of ``held``.

    This undoes what folding did to a weight, whose divisors are not stored. Single weights of ``held`` are rounded, but
    the norms of whole rows and columns are hardly affected.
    """
    for _ in range(_BALANCED):
        for dim in (0, 1):
            norms, own = held.norm(dim=dim, keepdim=True), weight.norm(dim=dim, keepdim=True)
            weight = weight * torch.where(own > 0, norms / own, 1.0)
    return weight


class _Traced(torch.autograd.Function):
    """Return a layer's output unchanged, with a gradient for a tensor that the weight depends on."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, value: Tensor, x: Tensor, layer: QuantLinear, chain: Chain) -> Tensor:
        """Return ``output``, which ``layer`` computed from ``x``."""
        ctx.save_for_backward(x)
        ctx.layer, ctx.chain = layer, chain
        # Not a regular view: autograd rejects in-place additions to those.
        return cast(Tensor, torch.ops.aten._unsafe_view(output, output.shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Return the gradients of the output and of the tensor."""
        return grad, ctx.chain(weight_gradient(ctx.layer, ctx.saved_tensors[0], grad)), None, None, None


def trace(layer: QuantLinear, value: Tensor, chain: Chain) -> RemovableHandle:
    """Give ``value`` a gradient whenever ``layer`` runs, until the handle is removed."""

    def traced(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return cast(Tensor, _Traced.apply(output, value, first(args, kwargs), layer, chain))

    return layer.register_forward_hook(traced, with_kwargs=True)


def weight_gradient(layer: QuantLinear, x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of a layer's dequantized weight, [out, in], in the dtype of products of the backward pass.

    Args:
        layer: with a single group of rows.
        x: its input, [..., in].
        grad: gradient of its output, [..., out].
    """
    divisor, dtype = layer.plan.transform.divisor(layer._buffers, 0), gradient_dtype(grad)
    if divisor is not None or layer.product.rotation:
        x = x.float() if divisor is None else x.float() / divisor
        x = rotated(x, layer.product.rotation)
    return grad.reshape(-1, grad.shape[-1]).to(dtype).T @ x.reshape(-1, x.shape[-1]).to(dtype)


class _Block:
    """A block in training, with hooks that keep the backward pass within it."""

    def __init__(self, module: nn.Module, teacher: nn.Module, layers: Sequence[_Offsets], steps: int) -> None:
        self.layers, self.steps, self.step = layers, steps, 0
        #: By how much the trained codes lower the error of a call, for each call that they are judged by.
        self.gains: list[float] = []
        #: For the output of a call, which tokens count; None if all do.
        self.mask: Callable[[Tensor], Tensor | None] = lambda _: None
        self._expected: list[list[Tensor]] = []
        self._optimizer = torch.optim.Adam(
            [{"params": [each.values for each in layers]}], lr=0.0, betas=(0.9, 0.95), eps=1.0
        )

        self._hooks = [
            teacher.register_forward_hook(lambda _m, _x, output: self._expected.append(_tensors(output))),
            module.register_forward_pre_hook(lambda _m, x, kwargs: _detached((x, kwargs)), with_kwargs=True),
            # With the gradient of the weight, in place of its code's: scales within a layer are alike.
            *(trace(each.layer, each.values, Tensor.float) for each in layers),
            module.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        expected = self._expected.pop(0)
        error = _error(_tensors(output), expected, self.mask)
        if not math.isfinite(error.item()):
            raise FloatingPointError(f"the error of a block is {error.item()}")
        if self.step >= self.steps:
            self.write(trained=False)
            with torch.no_grad():
                before = _error(_tensors(module.forward(*args, **kwargs)), expected, self.mask)
            self.write(trained=True)
            self.gains.append((before - error).item())
        elif error.requires_grad:
            error.backward()
        return _detached(output)

    def advance(self) -> bool:
        """Take a step with the gradients of the last sample, and return whether none is left to take."""
        self._expected.clear()
        if self.step < self.steps:
            for gradient in (each.values.grad for each in self.layers):
                if gradient is not None:
                    # Adam moves weights by less if their gradients are below 1 (its `eps`), the mean of their layer.
                    gradient /= gradient.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
            self._optimizer.param_groups[0]["lr"] = _REACH / self.steps * (1 - self.step / self.steps)
            self._optimizer.step()
            self._optimizer.zero_grad()
            self.write(trained=True)
        self.step += 1
        return self.step == self.steps + _JUDGED

    def finish(self) -> bool:
        """Remove the hooks, and return whether the trained codes stay: they do if they lower the error."""
        for hook in self._hooks:
            hook.remove()
        kept = sum(self.gains) > 0
        self.write(trained=kept)
        return kept

    def write(self, trained: bool) -> None:
        """Have the block run with the trained codes, or with the first ones."""
        for each in self.layers:
            each.write(trained)


class _Enough(Exception):
    """The rest of the forward is not needed."""


def learn_rounding(
    model: nn.Module, teacher: nn.Module, samples: Sequence[Any], steps: int, seed: int
) -> Callable[[], None]:
    """Train the codes of a quantized ``model`` in place.

    Layers outside of repeated blocks, convolutions, fused experts, and layers that share their codes or do not hold the
    teacher's weight keep their codes. So does a block that does not come closer on the samples that it is judged by.

    Args:
        model: quantized model, in evaluation mode, without parameters that require gradients.
        teacher: the float model, likewise.
        samples: if there are 16 more than ``steps``, no block is judged by samples that it was trained on.
        steps: number of steps of each block, each on one sample.
        seed: seed of the sample order.

    Returns:
        A function that restores the first codes.

    Raises:
        FloatingPointError: the error of a block is not finite; the first codes are restored.
    """
    layers, options = _layers(model, teacher), options_for(model, [])
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    calls = _calls(teacher, layers, samples[order[0]], options)
    before = {layer: layer.weight.detach().clone() for block in calls for layer in layers[block].values()}

    def restore() -> None:
        for layer, codes in before.items():
            layer.weight.data.copy_(codes)

    active: dict[str, _Block] = {}
    waiting, kept, (total, apart) = list(calls), 0, _passes(len(calls), steps)
    with ExitStack() as stack:
        stack.push(lambda error, *_: restore() if error else None)
        stack.callback(lambda: [block.finish() for block in active.values()])
        for step, i in zip(progress_bar(range(total), "learning rounding"), cycle(order), strict=False):
            if waiting and step % apart == 0:
                name = waiting.pop(0)
                offsets = [_Offsets(layer, _weight(teacher, path, layer)) for path, layer in layers[name].items()]
                trained = [each for each in offsets if each.fits]
                active[name] = _Block(model.get_submodule(name), teacher.get_submodule(name), trained, steps)
            for name, block in active.items():
                block.mask = partial(padding_mask, model, samples[i], module=model.get_submodule(name))
            last = next(reversed(active))
            _run(teacher, last, calls[last], samples[i], options)
            with torch.enable_grad():
                _run(model, last, calls[last], samples[i], options)
            for name in [name for name, block in active.items() if block.advance()]:
                kept += active.pop(name).finish()
    logger.info("learned rounding: %d of %d blocks came closer to the float model's", kept, len(calls))
    return restore


def forwards(model: nn.Module, teacher: nn.Module, steps: int) -> float:
    """Return about how many forward passes of both models :func:`learn_rounding` takes as long as."""
    count = len(_layers(model, teacher))
    # Blocks before those in training run forward only, on average half of all; a step of training is three times that.
    return _passes(count, steps)[0] * (0.5 + 2 * min(1.0, _TOGETHER / count)) if count else 0.0


def _passes(blocks: int, steps: int) -> tuple[int, int]:
    """Return the number of samples that so many blocks take, and after how many the next block starts."""
    apart = max(1, steps // _TOGETHER)
    return ((blocks - 1) * apart + steps + _JUDGED if blocks else 0), apart


def _layers(model: nn.Module, teacher: nn.Module) -> dict[str, dict[str, QuantLinear]]:
    """Return the layers to train by name, by the name of their block."""
    found: dict[str, dict[str, QuantLinear]] = defaultdict(dict)
    floats = dict(teacher.named_modules())
    for name, layer in model.named_modules():
        block = block_of(name)
        if not isinstance(layer, QuantLinear) or not isinstance(layer.format, IntegerFormat):
            continue
        repeated = block in floats and block.rpartition(".")[2].isdigit()
        alone = not layer.plan.tied and not layer.lends and len(layer.plan.row_groups) == 1
        if repeated and alone and isinstance(getattr(floats.get(name), "weight", None), Tensor):
            found[block][name] = layer
    return dict(found)


def _weight(teacher: nn.Module, name: str, layer: QuantLinear) -> Tensor:
    return layer.matrix(teacher.get_parameter(f"{name}.weight").to(layer.weight.device))


def _calls(model: nn.Module, names: Collection[str], sample: Any, options: Mapping[str, Any]) -> Counter[str]:
    """Return how often each of the modules ``names`` runs, in the order of their first calls."""
    found: Counter[str] = Counter()
    with ExitStack() as stack:
        for name in names:
            hook = model.get_submodule(name).register_forward_pre_hook(lambda _m, _x, name=name: found.update([name]))
            stack.callback(hook.remove)
        forward(model, sample, options)
    return found


def _run(model: nn.Module, last: str, calls: int, sample: Any, options: Mapping[str, Any]) -> None:
    """Run ``model`` until its module ``last`` has been called so often."""
    left = calls

    def after(_module: nn.Module, _args: Any, _output: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise _Enough

    hook = model.get_submodule(last).register_forward_hook(after)
    try:
        with suppress(_Enough):
            forward(model, sample, options)
    finally:
        hook.remove()


def _tensors(output: Any) -> list[Tensor]:
    """Return the float tensors of a block's output that have channels."""
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1]


def _detached(values: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, values)


def _error(output: Sequence[Tensor], expected: Sequence[Tensor], mask_of: Callable[[Tensor], Tensor | None]) -> Tensor:
    """Return the mean relative squared error of rows (channels of a token or position), summed over tensors.

    Rows that the mask of a tensor leaves out do not count.
    """
    total = torch.zeros(())
    for one, other in zip(output, expected, strict=True):
        channels = -1 if one.dim() < 4 else 1
        right = other.float().to(one.device)
        size, error = right.square().sum(channels), (one.float() - right).square().sum(channels)
        if (mask := mask_of(one)) is not None:
            size, error = size[mask != 0], error[mask != 0]
        if len(error):
            # Rows of (almost) zeros would outweigh all others.
            size = size.clamp(min=max(1e-3 * size.median().item(), torch.finfo(torch.float32).tiny))
            total = total.to(one.device) + (error / size).mean()
    return total
