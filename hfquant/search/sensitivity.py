"""Sensitivity of the model to each layer: its inputs, and the gradients of the output's loss at its outputs.

Rounding a layer changes its output at a row r by e_r. To second order, this moves the model's output by
``sum_r (g_r . e_r)^2``. For a distribution, g_r is the gradient of the log-likelihood of labels sampled from the model
itself (Fisher information; Martens and Grosse, arXiv 1503.05671); for any other output, it is the gradient of a random
projection, for the squared error. Errors of different outputs are nearly uncorrelated, which leaves
``sum_ro g_ro^2 e_ro^2``. The sum has to run row by row: a language model's first token has inputs a thousand times
larger than the others and almost no gradient, so a product of averages would overrate its layers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.calibration.batches import evaluating, forward
from hfquant.nn.conv import CONVS
from hfquant.nn.float_modules import first
from hfquant.outputs import is_distribution, main_tensor

logger = logging.getLogger(__name__)

#: Total number of rows kept for a layer that maps rows to rows.
ROWS = 512
#: Bytes of inputs kept for any other layer (convolutions).
_MOST = 1 << 26
#: Factors of the loss, tried in order: in float16, gradients above 65504 overflow.
_SCALES = 1.0, 2.0**-12


@dataclass
class Sample:
    """A sample of a layer's inputs, and the squared gradients of the loss at its outputs.

    Attributes:
        inputs: [rows, in] each, or whole inputs if the layer does not map rows to rows.
        squares: squared gradients in the shape of the outputs, or 0 where none arrived; empty without a backward.
        kept, rows: number of rows in ``inputs``, and number of rows that the layer saw.
    """

    inputs: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    kept: int = 0
    rows: int = 0

    @property
    def has_gradients(self) -> bool:
        """Whether every input has gradients, be they zero."""
        return len(self.squares) == len(self.inputs) > 0

    @property
    def is_reached(self) -> bool:
        """Whether any gradient is other than zero."""
        return any(bool(squares.any()) for squares in self.squares)

    @torch.no_grad()
    def errors(self, layer: nn.Module, other: nn.Module) -> tuple[float, float]:
        """Return the harm of replacing ``layer`` with ``other``, and the relative squared error of its outputs.

        Without gradients, the harm is the relative error.
        """
        harm = error = size = 0.0
        has_gradients = self.has_gradients
        for i, x in enumerate(self.inputs):
            y = layer(x).float()
            difference = (other(x).float() - y).square_()
            error, size = error + difference.sum().item(), size + y.square().sum().item()
            if has_gradients:
                harm += (difference * self.squares[i]).sum().item()
        relative = error / max(size, torch.finfo(torch.float32).tiny)
        return (harm * self.rows / max(self.kept, 1) if has_gradients else relative), relative


def watch(model: nn.Module, layers: Mapping[str, nn.Module], data: Sequence[Any], seed: int = 0) -> dict[str, Sample]:
    """Run ``model`` forward and backward over the data; return a sample for each layer that ran on floats.

    Where no gradient arrives (the output does not depend on the layer, or is cut off from it), it is 0. If a backward
    is not possible, or gives NaN or Inf, the samples have no gradients (with one warning).
    """
    for scale in _SCALES:
        seen = _watched(model, layers, data, seed, scale)
        if all(bool(squares.isfinite().all()) for found in seen.values() for squares in found.squares):
            return seen
    logger.warning("the gradients of the model's output are not finite: using forward differences instead")
    for found in seen.values():
        found.squares.clear()
    return seen


def _watched(
    model: nn.Module, layers: Mapping[str, nn.Module], data: Sequence[Any], seed: int, scale: float
) -> dict[str, Sample]:
    """Do one attempt of :func:`watch`, with gradients of the loss times ``scale``."""
    seen: dict[str, Sample] = {}
    generator = torch.Generator().manual_seed(seed)
    each = -(-ROWS // max(len(data), 1))

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            x = first(args, kwargs)
            if not x.is_floating_point() or not x.numel():
                return output
            if not output.requires_grad:
                output = output.detach().requires_grad_()
                if torch.is_grad_enabled():
                    # Neither a leaf nor a regular view: autograd rejects in-place operations on both.
                    output = torch.ops.aten._unsafe_view(output, output.shape)
            found = seen.setdefault(name, Sample())
            # A convolution's rows are windows, even if the shapes match a row-wise layer's: keep whole samples.
            by_rows = x.shape[:-1] == output.shape[:-1] and not isinstance(module, CONVS)
            rows = x[..., 0].numel() if by_rows else len(x)
            held = sum(i.nbytes for i in found.inputs)
            count = min(rows, each if by_rows else int(held < _MOST))
            found.rows += rows
            if not count:
                return output
            index = torch.randperm(rows, generator=generator)[:count].to(x.device)

            def picked(tensor: Tensor) -> Tensor:
                return (tensor.detach().reshape(-1, tensor.shape[-1]) if by_rows else tensor.detach())[index]

            place = len(found.inputs)
            found.inputs.append(picked(x))
            found.kept += count

            def add(gradient: Tensor) -> None:
                # Backward reaches later calls of a module first.
                _extend(found.squares, place + 1)
                found.squares[place] = (picked(gradient).float() / scale).square()

            output.register_hook(add)
            return output

        return after

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in layers.items()]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            for sample in data:
                (scale * loss_of(model, forward(model, sample), generator)).backward()
        for found in seen.values():
            _extend(found.squares, len(found.inputs))
    except RuntimeError as error:
        logger.warning("the model's output has no gradient (%s): using forward differences instead", error)
        for found in seen.values():
            found.squares.clear()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in learning:
            parameter.requires_grad_()
    return seen


def _extend(squares: list[Tensor], count: int) -> None:
    """Append zeros, which broadcast, until there are ``count`` entries."""
    squares += [torch.zeros(()) for _ in range(count - len(squares))]


def loss_of(model: nn.Module, output: Any, generator: torch.Generator) -> Tensor:
    """Return a number whose gradient has the Fisher information of the output as its covariance."""
    values = main_tensor(output)
    if is_distribution(model, values):
        flat = values.float().reshape(-1, values.shape[-1])
        drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator).to(flat.device)
        return nn.functional.cross_entropy(flat, drawn.squeeze(1), reduction="sum")
    direction = torch.randn(values.shape, generator=generator).to(values)
    return (values * direction).sum()
