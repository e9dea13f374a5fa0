"""Distillation: train what a quantized model keeps in float until its outputs are the float model's again.

Codes stay as they are, and so does the size of the checkpoint. What is trained are vectors: gains and biases of norms
and other float layers, a factor for each output of a quantized linear and one for each group of its weights (they go
into the scales), its bias, and a factor for each input that is divided by a smoothing vector (it goes into that). The
loss is the divergence of the two models' outputs on calibration data, which needs no labels (Hinton et al., arXiv
1503.02531; vectors of a quantized model alone: QuIP#, arXiv 2402.04396; scales of groups: EfficientQAT, arXiv
2407.11062).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hfquant.algorithms import block_slices
from hfquant.calibration.batches import CalibrationData, evaluating, forward, samples
from hfquant.console import progress_bar
from hfquant.formats import scales, sum_columns
from hfquant.formats.rotation import rotated
from hfquant.nn.layer import QuantLayer
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import quant_modules
from hfquant.outputs import better, divergence, is_distribution, main_tensor, padding_mask
from hfquant.search.data import apart

logger = logging.getLogger(__name__)

#: Share of the steps in which the learning rate grows; from there it falls along a cosine.
_WARM_UP = 0.05

_Fold = Callable[[], None]


@dataclass(frozen=True)
class Distilled:
    """What distilling did.

    Attributes:
        before, after: mean divergence from the teacher on held-out samples: KL in nats a token, or the relative squared
            error of an output that is no distribution.
        kept: whether ``after`` is less beyond its error; else the model is as it was.
        losses: of each step.
    """

    before: float
    after: float
    kept: bool
    losses: list[float]


def distill(
    model: nn.Module, teacher: nn.Module, data: Any, steps: int = 100, learning_rate: float = 1e-3, seed: int = 0
) -> Distilled:
    """Train the vectors of a quantized ``model`` in place, so that it gives what ``teacher`` gives.

    Args:
        model: quantized, in memory.
        teacher: the float model; it shares no parameter with ``model``.
        data: calibration batches; every fourth sample judges, and is not trained on.
        steps: of the optimizer (Adam), each on one sample.
        learning_rate: relative to the root mean square of a vector.
        seed: of the samples' order.

    Raises:
        ValueError: ``model`` is not quantized, or is offloaded, or shares a parameter with ``teacher``.
        CalibrationError: a single sample that is no batch.
        FloatingPointError: a loss is not finite.
    """
    _check(model, teacher)
    seen, held = apart([sample for batch in CalibrationData(data) for sample in samples(batch)])
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    with ExitStack() as stack:
        for each in (model, teacher):
            stack.enter_context(evaluating(each))
            stack.enter_context(_frozen(each))
        before = torch.cat([_divergence(model, teacher, sample) for sample in held])
        values, folds = _attach(model, stack)
        optimizer = torch.optim.Adam(values, lr=learning_rate, betas=(0.9, 0.95), eps=1e-12)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        order: list[int] = []
        for _ in progress_bar(range(steps), "distilling"):
            order = order or torch.randperm(len(seen), generator=generator).tolist()
            with torch.enable_grad():
                loss = _divergence(model, teacher, seen[order.pop()]).mean()
                if not loss.isfinite():
                    raise FloatingPointError(f"the loss of step {len(losses)} is {loss.item()}")
                loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        after = torch.cat([_divergence(model, teacher, sample) for sample in held])
        kept = better(after, before) if len(after) > 1 else bool(after < before)
        if not kept:
            for value in values:
                value.zero_()
        for fold in folds:
            fold()
    found = Distilled(before.mean().item(), after.mean().item(), kept, losses)
    what = "" if kept else "; that is no gain beyond its error: the model stays as it was"
    logger.info("distilled: divergence on held-out samples %.4g, before %.4g%s", found.after, found.before, what)
    return found


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / max(1.0, _WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _check(model: nn.Module, teacher: nn.Module) -> None:
    if not quant_modules(model):
        raise ValueError(f"model: {type(model).__name__} has no quantized layer")
    if quant_modules(teacher):
        raise ValueError(f"teacher: {type(teacher).__name__} is quantized; pass the float model")
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(f"model: {type(model).__name__} is offloaded; training needs all of it in memory")
    ours = {id(parameter) for parameter in model.parameters()}
    if shared := [name for name, parameter in teacher.named_parameters() if id(parameter) in ours]:
        raise ValueError(f"teacher: shares {shared[0]!r} with the model; pass a copy made before it was quantized")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Have no parameter ask for gradients."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_()


def _divergence(model: nn.Module, teacher: nn.Module, sample: Any) -> Tensor:
    options = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    with torch.no_grad():
        expected = main_tensor(forward(teacher, sample, options)).float()
    output = main_tensor(forward(model, sample, options)).float()
    are_logits = is_distribution(teacher, expected)
    return divergence(output, expected.to(output.device), are_logits, padding_mask(sample, output))


# -------------------------------------------------------------------------------------------------- what is trained


def _attach(model: nn.Module, stack: ExitStack) -> tuple[list[Tensor], list[_Fold]]:
    """Put values, zeros at first, beside the vectors of ``model``; ``stack`` takes them away again.

    Returns:
        The values, and functions that make them part of the vectors, to be called in this order.
    """
    found: list[tuple[Tensor, _Fold]] = []
    for module in list(model.modules()):
        if isinstance(module, QuantLinear):
            found += _of_linear(module, stack)
        elif not isinstance(module, QuantLayer):
            parameters = dict(module._parameters)
            stack.callback(_in_order, module, list(parameters))  # after what is put on the stack later
            for name, vector in parameters.items():
                if vector is not None and vector.dim() == 1 and vector.is_floating_point():
                    found.append(_of_vector(module, name, vector, stack))
    return [value for value, _ in found], [fold for _, fold in found]


class _Moved(nn.Module):
    """A parametrization: a vector moved by a value that is trained, in units of the vector's root mean square."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.unit = _rms(vector)
        self.value = nn.Parameter(torch.zeros_like(vector, dtype=torch.float32))

    def forward(self, vector: Tensor) -> Tensor:
        return (vector + self.unit * self.value).to(vector.dtype)


def _in_order(module: nn.Module, names: list[str]) -> None:
    """Bring parameters back into the order that a checkpoint has them in."""
    parameters = module._parameters
    parameters.update({name: parameters.pop(name) for name in names})


def _rms(vector: Tensor) -> Tensor:
    return vector.detach().float().square().mean().sqrt()


def _of_vector(module: nn.Module, name: str, vector: Tensor, stack: ExitStack) -> tuple[Tensor, _Fold]:
    moved = _Moved(vector)
    parametrize.register_parametrization(module, name, moved)
    stack.callback(parametrize.remove_parametrizations, module, name, leave_parametrized=False)
    return moved.value, lambda: _assign(vector, moved(vector))


def _of_linear(layer: QuantLinear, stack: ExitStack) -> Iterator[tuple[Tensor, _Fold]]:
    """Yield what is trained of a quantized linear: logarithms of factors of groups, outputs and inputs, and its bias.

    Hooks multiply and add; the layer's own gradient reaches its input.
    """
    plan, bias = layer.plan, layer.bias
    scale, divisor = _scale(layer), _divisor(layer)

    def zeros(size: int) -> Tensor:
        return torch.zeros(size, device=layer.weight.device, requires_grad=True)

    if scale is not None and len(plan.columns) > 1 and len(plan.row_groups) == 1:
        yield _of_groups(layer, stack)  # first: their gradient is that of the product, which all else changes
    if scale is not None:
        rows = zeros(plan.out_features)
        stack.callback(layer.register_forward_hook(lambda _m, _x, y: (y * rows.exp()).to(y.dtype)).remove)

        def fold_rows() -> None:
            _assign(scale, scale * rows.exp()[:, None])
            for group, part in enumerate(block_slices(plan.row_groups)):
                if branch := plan.transform.branch(layer._buffers, group, part):
                    _assign(branch[1], branch[1] * rows[part].exp()[:, None])
            if bias is not None:
                _assign(bias, bias * rows.exp())

        yield rows, fold_rows
    if bias is not None:
        offset, unit = zeros(plan.out_features), _rms(bias)
        stack.callback(layer.register_forward_hook(lambda _m, _x, y: (y + unit * offset).to(y.dtype)).remove)
        yield offset, lambda: _assign(bias, bias + unit * offset)
    if divisor is not None:
        columns = zeros(plan.in_features)
        stack.callback(
            layer.register_forward_pre_hook(lambda _m, x: ((x[0] * columns.exp()).to(x[0].dtype), *x[1:])).remove
        )
        yield columns, lambda: _assign(divisor, divisor / columns.exp())


def _of_groups(layer: QuantLinear, stack: ExitStack) -> tuple[Tensor, _Fold]:
    """Return logarithms of factors of each group's scale, [out, G], and what makes them part of it.

    The layer runs with the scales as they can be stored. In the gradient that rounding counts as identity.
    """
    stored = layer._buffers["weight_scale"]
    assert stored is not None
    row, first = layer._buffers.get("weight_scale_row"), stored.clone()
    factors = torch.zeros(stored.shape, device=stored.device, requires_grad=True)
    written = factors._version

    def write() -> None:
        nonlocal written
        if factors._version == written:  # a layer may run several times a step, and each saves its scales
            return
        written = factors._version
        with torch.no_grad():
            if row is None:
                stored.copy_(first * factors.exp())
            else:
                stored.copy_(scales.encode(scales.values(first) * row * factors.exp(), row))

    def undo(error: type[BaseException] | None, *_: Any) -> None:
        if error is not None:
            stored.copy_(first)

    stack.push(undo)
    stack.callback(layer.register_forward_pre_hook(lambda _m, _x: write()).remove)
    hook = layer.register_forward_hook(lambda _m, x, y: cast(Tensor, _Product.apply(y, factors, x[0], layer)))
    stack.callback(hook.remove)
    return factors, write


class _Product(torch.autograd.Function):
    """The output of a layer as it is, with a gradient to the logarithms of its weight's scales."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, factors: Tensor, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x,), layer = ctx.saved_tensors, ctx.layer
        divisor = layer.plan.transform.divisor(layer._buffers, 0)
        x = x.float() if divisor is None else x.float() / divisor
        x = rotated(x, layer.product.rotation) if layer.product.rotation else x
        of_weight = grad.flatten(0, -2).float().T @ x.flatten(0, -2)
        return grad, sum_columns(of_weight * layer.dequantize(), layer.plan.columns), None, None


def _scale(layer: QuantLinear) -> Tensor | None:
    """Return what multiplies whole rows of the weight, [out, ...]; None where other layers share it."""
    if layer.plan.tied or layer.lends:
        return None
    row = layer._buffers.get("weight_scale_row")
    return layer._buffers.get("weight_scale") if row is None else row


def _divisor(layer: QuantLinear) -> Tensor | None:
    """Return what the input is divided by, [in], where nothing else depends on it."""
    rule, transform = layer.product.input, layer.plan.transform
    # Row groups have divisors of their own, a calibrated scale knows the range that one leaves, and a low-rank branch
    # reads the raw input.
    depends = len(layer.plan.row_groups) > 1 or (rule is not None and rule.static)
    if depends or transform.branch(layer._buffers, 0, slice(None)) is not None:
        return None
    return transform.divisor(layer._buffers, 0)


def _assign(tensor: Tensor, value: Tensor) -> None:
    tensor.data.copy_(value)
