"""The error of each quantized layer beside its float one, in one forward of the quantized model.

It is relative, in L2: over all rows, or of the median row where that is larger, so that neither a few huge rows nor the
many small ones beside them hide the others. A row is what one product gives: of a convolution an output position, of an
expert one of the tokens that are sent to it. Input and output are those of the quantized model, so each layer answers
for itself alone: one whose output is lost answers in float for the rest of the forward, so that what comes after it is
not blamed for inputs that calibration never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.calibration.batches import evaluating, forward
from hfquant.nn.checked import See
from hfquant.nn.experts import QuantExperts
from hfquant.nn.layer import QuantLayer

#: Share of a layer's output from which on it is lost, and below which an error is never off: a static scale on text of
#: another kind comes near it.
LEAST = 0.5
#: Rows of a suspicious layer's input that are kept to choose a remedy by: the worst, and others drawn evenly.
ROWS = 128

Exact = Callable[[str], tuple[Tensor, Tensor | None]]
"""Gives the float matrix [out, in] and bias [out] of a layer."""


@dataclass(frozen=True)
class Seen:
    """What a layer did in the forward.

    Attributes:
        error: of its output, see above; infinite for NaN or Inf.
        rows: that it multiplied, [rows, in], where the error is suspicious; else none.
        right: what the float layer makes of them, [rows, out] float32.
    """

    error: float
    rows: Tensor
    right: Tensor


def part_name(module: str, part: str) -> str:
    """Return the name of a part of a module: "" is the module itself."""
    return ".".join(name for name in (module, part) if name)


def watch(
    model: nn.Module,
    modules: Mapping[str, QuantLayer | QuantExperts],
    exact: Exact,
    batches: Iterable[Any],
    options: Mapping[str, Any] | None = None,
) -> dict[str, Seen]:
    """Run the model once on each sample and compare each layer with its float one; the worst of several counts.

    Args:
        model: with ``modules`` in it.
        modules: by name.
        exact: float matrices and biases of their parts, as the quantized model's activations want them.
        batches: samples of the model's input.
        options: keyword arguments that a sample may lack.

    Returns:
        Of the parts that ran, by name.
    """
    seen: dict[str, Seen] = {}

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
                seen[name] = Seen(error, layer.input_rows(x, index), right_rows[index])
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
    """Return the relative error of each row, [rows, out] twice to [rows]; infinite where NaN or Inf is new."""
    norm = right.norm(dim=1)
    errors = (output - right).norm(dim=1) / norm.clamp(min=torch.finfo(torch.float32).tiny)
    errors = torch.where(output.isfinite().all(1), errors, torch.inf)
    # What the float layer cannot do either is no fault.
    return torch.where(right.isfinite().all(1), errors, 0.0)


def relative_error(output: Tensor, right: Tensor, errors: Tensor) -> float:
    """Return the error over all rows, or that of the median row where it is larger."""
    if not len(errors) or errors.isinf().any():
        return torch.inf if len(errors) else 0.0
    sound = right.isfinite().all(-1)
    norm = right[sound].norm().item()
    whole = (output[sound] - right[sound]).norm().item() / norm if norm else 0.0
    return max(whole, errors.median().item())


def _kept(errors: Tensor) -> Tensor:
    """Return the worst rows and others drawn evenly, at most :data:`ROWS`, so that a remedy is tried on both."""
    if len(errors) <= ROWS:
        return torch.arange(len(errors), device=errors.device)
    worst = errors.argsort(descending=True)[: ROWS // 4]
    even = torch.arange(ROWS - len(worst), device=errors.device) * len(errors) // (ROWS - len(worst))
    return torch.cat([worst, even]).unique()
