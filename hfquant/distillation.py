"""Distillation: train the parameters that a quantized model keeps in float until its outputs match the float model's.

The checkpoint size does not change, nor do the codes, unless they are trained first (:mod:`hfquant.learned_rounding`).
After that, only vectors are trained: the gains and biases of norms and other float
layers and, for each quantized linear, one factor per output and one per weight group (folded into the scales), the
bias, and one factor per input if the input is divided by a smoothing vector (folded into that vector). The loss is the
divergence between the two models' outputs on calibration data; it needs no labels (Hinton et al., arXiv 1503.02531;
training only the vectors of a quantized model: QuIP#, arXiv 2402.04396; group scales: EfficientQAT, arXiv 2407.11062).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hfquant import learned_rounding
from hfquant.algorithms import block_slices
from hfquant.calibration.batches import CalibrationData, evaluating, forward, samples
from hfquant.console import progress_bar
from hfquant.formats import scales, sum_columns
from hfquant.nn.float_modules import first, with_first
from hfquant.nn.layer import QuantLayer
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import quant_modules
from hfquant.outputs import better, divergence, is_distribution, main_tensor, padding_mask
from hfquant.search.data import apart

logger = logging.getLogger(__name__)

#: Fraction of the steps over which the learning rate warms up; it also decays along a cosine.
_WARM_UP = 0.05
#: Most samples to judge the result by.
_HELD_OUT = 32
#: Time of a training step in forward passes of both models, for the estimate.
_FORWARDS = 2.5

_Fold = Callable[[], None]


@dataclass(frozen=True)
class Distilled:
    """Result of a distillation.

    Attributes:
        before, after: mean divergence from the teacher on held-out samples: KL in nats per token, or the relative
            squared error if the output is not a distribution.
        kept: whether ``after`` is lower by more than its error; if not, the model was left unchanged.
        losses: training loss of each step, those of learned rounding excluded.
    """

    before: float
    after: float
    kept: bool
    losses: list[float]


def distill(
    model: nn.Module,
    teacher: nn.Module,
    data: Any,
    steps: int = 100,
    learning_rate: float = 1e-3,
    seed: int = 0,
    rounding_steps: int = 0,
) -> Distilled:
    """Train the vectors of a quantized ``model`` in place to match the outputs of ``teacher``.

    Args:
        model: quantized model, in memory.
        teacher: the float model; it must not share parameters with ``model``.
        data: calibration batches; every fourth sample (at most 32 in all) is held out for evaluation, not trained on.
        steps: number of optimizer steps (Adam), each on one sample; 0 trains the rounding only.
        learning_rate: relative to the root mean square of each vector.
        seed: seed of the sample order.
        rounding_steps: number of steps of learned rounding before that, each on one sample.

    Raises:
        ValueError: ``model`` is not quantized, or is offloaded, or shares a parameter with ``teacher``.
        CalibrationError: the data is a single sample that is not a batch.
        FloatingPointError: a loss is not finite.
    """
    check(model, teacher)
    seen, held = apart([sample for batch in CalibrationData(data) for sample in samples(batch)], _HELD_OUT)
    with ExitStack() as stack:
        for each in (model, teacher):
            stack.enter_context(evaluating(each))
            stack.enter_context(_frozen(each))

        def judged() -> Tensor:
            return torch.cat([_divergence(model, teacher, sample) for sample in held])

        start = time.perf_counter()
        before = judged()
        passes = steps * _FORWARDS + (
            learned_rounding.forwards(model, teacher, rounding_steps) if rounding_steps else 0
        )
        seconds = passes * (time.perf_counter() - start) / len(held)
        rounding = f"{rounding_steps} steps of learned rounding, then " if rounding_steps else ""
        sizes = len(seen), len(held)
        logger.info("distilling: %s%d steps on %d samples, %d held out, about %.0f s", rounding, steps, *sizes, seconds)
        rounded = before
        if rounding_steps:
            undo = learned_rounding.learn_rounding(model, teacher, seen, rounding_steps, seed)
            stack.push(lambda error, *_: undo() if error else None)
            rounded = judged()
            if not _improved(rounded, before):
                undo()
                rounded = before
        values, folds = _attach(model, stack)
        losses = _train(model, teacher, seen, values, steps, learning_rate, seed)
        after = judged()
        kept = _improved(after, rounded)
        if not kept:
            for value in values:
                value.zero_()
            if rounded is not before:
                after, kept = rounded, True
        for fold in folds:
            fold()
    found = Distilled(before.mean().item(), after.mean().item(), kept, losses)
    what = "" if kept else "; no significant improvement: the model was left unchanged"
    logger.info("distilled: divergence on held-out samples %.4g, before %.4g%s", found.after, found.before, what)
    return found


def _train(
    model: nn.Module,
    teacher: nn.Module,
    seen: Sequence[Any],
    values: Sequence[Tensor],
    steps: int,
    learning_rate: float,
    seed: int,
) -> list[float]:
    """Train ``values`` and return the loss of each step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(values, lr=learning_rate, betas=(0.9, 0.95), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    order: list[int] = []
    losses: list[float] = []
    for _ in progress_bar(range(steps), "distilling"):
        order = order or torch.randperm(len(seen), generator=generator).tolist()
        with torch.enable_grad():
            terms = _divergence(model, teacher, seen[order.pop()])
            loss = terms.mean().item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of step {len(losses)} is {loss}")
            # Adam does not depend on the scale of the loss; the gradients of a mean could vanish in float16.
            terms.sum().backward()
        losses.append(loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return losses


def _improved(after: Tensor, before: Tensor) -> bool:
    return better(after, before) if len(after) > 1 else bool(after < before)


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / max(1.0, _WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


def check(model: nn.Module, teacher: nn.Module) -> None:
    """Check that ``model`` can be trained to match ``teacher``.

    Raises:
        ValueError: ``model`` is not quantized, or is offloaded, or shares a parameter with ``teacher``.
    """
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
    """Turn off ``requires_grad`` for all parameters."""
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
    return divergence(output, expected.to(output.device), are_logits, padding_mask(model, sample, output))


# -------------------------------------------------------------------------------------------------- what is trained


def _attach(model: nn.Module, stack: ExitStack) -> tuple[list[Tensor], list[_Fold]]:
    """Attach trainable values, initially zero, to the vectors of ``model``; ``stack`` detaches them on exit.

    Returns:
        The values, and functions that fold them into the vectors, to be called in this order.
    """
    found: list[tuple[Tensor, _Fold]] = []
    for module in list(model.modules()):
        if isinstance(module, QuantLinear):
            found += _of_linear(module, stack)
        elif not isinstance(module, QuantLayer):
            parameters = dict(module._parameters)
            stack.callback(_in_order, module, list(parameters))  # runs after the callbacks that are pushed later
            for name, vector in parameters.items():
                if vector is not None and vector.dim() == 1 and vector.is_floating_point():
                    found.append(_of_vector(module, name, vector, stack))
    return [value for value, _ in found], [fold for _, fold in found]


class _Moved(nn.Module):
    """Parametrization that adds a trained value to a vector, in units of the vector's root mean square."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.unit = _rms(vector)
        self.value = nn.Parameter(torch.zeros_like(vector, dtype=torch.float32))

    def forward(self, vector: Tensor) -> Tensor:
        return (vector + self.unit * self.value).to(vector.dtype)


def _in_order(module: nn.Module, names: list[str]) -> None:
    """Restore the order in which a checkpoint stores the parameters."""
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
    """Yield the trained values of a quantized linear: log factors of groups, outputs and inputs, and the bias offset.

    Hooks multiply and add; the layer's own gradient flows to its input.
    """
    plan, bias = layer.plan, layer.bias
    scale, divisor = _scale(layer), _divisor(layer)

    def zeros(size: int) -> Tensor:
        return torch.zeros(size, device=layer.weight.device, requires_grad=True)

    if scale is not None and len(plan.columns) > 1 and len(plan.row_groups) == 1:
        yield _of_groups(layer, stack)  # first: its gradient is that of the product, before other hooks
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

        def multiplied(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = first(args, kwargs)
            return with_first(args, kwargs, (x * columns.exp()).to(x.dtype))

        stack.callback(layer.register_forward_pre_hook(multiplied, with_kwargs=True).remove)
        yield columns, lambda: _assign(divisor, divisor / columns.exp())


def _of_groups(layer: QuantLinear, stack: ExitStack) -> tuple[Tensor, _Fold]:
    """Return log factors of the group scales, [out, G], and a function that folds them in.

    The layer runs with scales rounded to their storage format. The gradient treats that rounding as the identity.
    """
    stored = layer._buffers["weight_scale"]
    assert stored is not None
    row, start = layer._buffers.get("weight_scale_row"), stored.clone()
    factors = torch.zeros(stored.shape, device=stored.device, requires_grad=True)
    written = factors._version

    def write() -> None:
        nonlocal written
        if factors._version == written:  # a layer may run several times per step, and each run saves its scales
            return
        written = factors._version
        with torch.no_grad():
            if row is None:
                stored.copy_(start * factors.exp())
            else:
                stored.copy_(scales.encode(scales.values(start) * row * factors.exp(), row))

    def undo(error: type[BaseException] | None, *_: Any) -> None:
        if error is not None:
            stored.copy_(start)

    stack.push(undo)
    stack.callback(layer.register_forward_pre_hook(lambda _m, _x: write()).remove)

    def of_factors(of_weight: Tensor) -> Tensor:
        return sum_columns(of_weight * layer.dequantize(), layer.plan.columns)

    stack.callback(learned_rounding.trace(layer, factors, of_factors).remove)
    return factors, write


def _scale(layer: QuantLinear) -> Tensor | None:
    """Return the scale of whole weight rows, [out, ...]; None if other layers share it."""
    if layer.plan.tied or layer.lends:
        return None
    row = layer._buffers.get("weight_scale_row")
    return layer._buffers.get("weight_scale") if row is None else row


def _divisor(layer: QuantLinear) -> Tensor | None:
    """Return the divisor of the input, [in], if nothing else depends on it; else None."""
    rule, transform = layer.product.input, layer.plan.transform
    # Several row groups have separate divisors, a static input scale is calibrated for the divided input, and a
    # low-rank branch reads the raw input.
    depends = len(layer.plan.row_groups) > 1 or (rule is not None and rule.static)
    if depends or transform.branch(layer._buffers, 0, slice(None)) is not None:
        return None
    return transform.divisor(layer._buffers, 0)


def _assign(tensor: Tensor, value: Tensor) -> None:
    tensor.data.copy_(value)
