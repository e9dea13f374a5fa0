"""Measure each quantized layer's error against its float version, in one forward of the quantized model.

The error is a relative L2 error: over all rows, or of the median row if that is larger, so that neither a few huge rows
nor many small ones hide the others. A row is the output of one product: an output position of a convolution, or one
token routed to an expert. Inputs are those of the quantized model, so each layer is judged on its own. A layer whose
output is lost returns its float output for the rest of the forward, so that later layers are not blamed for inputs that
calibration never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.calibration.batches import evaluating, forward
from hfquant.nn.base import QuantModule, See
from hfquant.nn.layer import QuantLayer

#: Relative error above which an output counts as lost, and up to which it is never off: a static scale on text of
#: another kind comes close to it.
LEAST = 0.5
#: Input rows of a suspicious layer that are kept for choosing a remedy: the worst, and others drawn evenly.
ROWS = 128

Exact = Callable[[str], tuple[Tensor, Tensor | None]]
"""Returns the float matrix [out, in] and bias [out] of a layer."""


@dataclass(frozen=True)
class Observed:
    """What was observed of a layer in the forward.

    Attributes:
        error: error of its output, see above; infinite for NaN or Inf.
        rows: input rows, [rows, in], if the error is suspicious; else empty.
        right: the float layer's output for these rows, [rows, out] float32.
    """

    error: float
    rows: Tensor
    right: Tensor


def part_name(module: str, part: str) -> str:
    """Return the name of a part of a module; "" is the module itself."""
    return ".".join(name for name in (module, part) if name)


def watch(
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    exact: Exact,
    batches: Iterable[Any],
    options: Mapping[str, Any] | None = None,
) -> dict[str, Observed]:
    """Run the model once on each sample and compare each layer with its float version; the worst error counts.

    Args:
        model: model that contains ``modules``.
        modules: quantized modules by name.
        exact: returns the float matrix and bias of each of their parts, matched to the quantized model's activations.
        batches: samples of the model's input.
        options: keyword arguments to add to samples that lack them.

    Returns:
        Observations by name, of the parts that ran and whose error is not 0.
    """
    seen: dict[str, Observed] = {}

    def watcher(module_name: str, parts: Mapping[str, QuantLayer]) -> See:
        def compare(part: str, x: Tensor, y: Tensor) -> Tensor | None:
            name, layer = part_name(module_name, part), parts[part]
            right = layer.float_output(x, *exact(name))
            output_rows, right_rows = layer.output_rows(y.float()), layer.output_rows(right)
            errors = row_errors(output_rows, right_rows)
            error = relative_error(output_rows, right_rows, errors)
            lost = error > LEAST
            if error and (name not in seen or error > seen[name].error):
                index = _kept(errors) if lost else errors.new_zeros(0, dtype=torch.long)
                seen[name] = Observed(error, layer.input_rows(x, index), right_rows[index])
            return right.to(y.dtype) if lost else None

        return compare

    handles = [module.listen(watcher(name, module.parts())) for name, module in modules.items()]
    try:
        with evaluating(model):
            for sample in batches:
                forward(model, sample, options)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def row_errors(output: Tensor, right: Tensor) -> Tensor:
    """Return the relative error of each row, [rows], from two [rows, out]; infinite if NaN or Inf is new."""
    norm = right.norm(dim=1)
    errors = (output - right).norm(dim=1) / norm.clamp(min=torch.finfo(torch.float32).tiny)
    errors = torch.where(output.isfinite().all(1), errors, torch.inf)
    # NaN or Inf in the float output is not the quantized layer's fault.
    return torch.where(right.isfinite().all(1), errors, 0.0)


def relative_error(output: Tensor, right: Tensor, errors: Tensor) -> float:
    """Return the error over all rows, or that of the median row if it is larger."""
    if not len(errors) or errors.isinf().any():
        return torch.inf if len(errors) else 0.0
    sound = right.isfinite().all(-1)
    norm = right[sound].norm().item()
    whole = (output[sound] - right[sound]).norm().item() / norm if norm else 0.0
    return max(whole, errors.median().item())


def _kept(errors: Tensor) -> Tensor:
    """Return indices of the worst rows and of others drawn evenly, at most :data:`ROWS`, to try a remedy on both."""
    if len(errors) <= ROWS:
        return torch.arange(len(errors), device=errors.device)
    worst = errors.argsort(descending=True)[: ROWS // 4]
    even = torch.arange(ROWS - len(worst), device=errors.device) * len(errors) // (ROWS - len(worst))
    return torch.cat([worst, even]).unique()
