"""Per-layer report of a quantization: the decisions, the error before and after, and the time taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hfquant.algorithms import Strength
from hfquant.nn.layer import QuantLayer
from hfquant.nn.linear import QuantLinear
from hfquant.solver import Solution, solve
from hfquant.statistics import LayerStats

_HEAD = ("layer", "RTN error", "error", "RTN SQNR dB", "SQNR dB", "alpha", "rank", "seconds", "module")


@dataclass(frozen=True)
class LayerReport:
    """One layer's result.

    Attributes:
        name: name of the module.
        what: formats and structure, as the module prints them.
        alphas: chosen smoothing strengths, one per segment, None if no smoothing is best; empty without smoothing.
        rank: rank of the low-rank branch, 0 without one.
        plain_error: relative L2 error of the output on the sampled calibration rows for the same formats with
            round-to-nearest only; None without data.
        error: the same error for the layer as solved.
        seconds: time to solve it.
        fallback: whether the layer never ran during calibration and was quantized without data.
        guard: finding and remedy of the guard (:mod:`hfquant.guard`); empty if the layer is as solved. The errors above
            are those before the remedy.
    """

    name: str
    what: str
    alphas: tuple[Strength, ...]
    rank: int
    plain_error: float | None
    error: float | None
    seconds: float
    fallback: bool
    guard: str = ""

    @property
    def sqnr(self) -> float | None:
        """Signal-to-quantization-noise ratio of the output, in dB; None without data, infinite without error."""
        return sqnr_of(self.error)

    @property
    def plain_sqnr(self) -> float | None:
        """The value of :attr:`sqnr` with round-to-nearest only."""
        return sqnr_of(self.plain_error)

    def __str__(self) -> str:
        name, *figures, what = _row(self)
        head = zip(_HEAD[1:-1], figures, strict=True)
        return f"{name}: {', '.join(f'{title} {figure}' for title, figure in head if figure != '-')}; {what}"


def sqnr_of(error: float | None) -> float | None:
    """Return the signal-to-noise ratio in dB of a relative L2 error; None for None, infinite for no error."""
    return None if error is None else (-20 * math.log10(error) if error else math.inf)


@dataclass(frozen=True)
class QuantReport:
    """All layers in the order they were solved, and the skipped linears with the reason."""

    layers: list[LayerReport]
    skipped: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {"layers": [asdict(layer) for layer in self.layers], "skipped": dict(self.skipped)}

    def __str__(self) -> str:
        rows = [_HEAD, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD) - 1)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"{name}  skipped: {why}" for name, why in self.skipped.items())])


def _row(layer: LayerReport) -> tuple[str, ...]:
    def number(value: float | None, digits: str) -> str:
        return "-" if value is None else format(value, digits)

    shown = ["none" if alpha is None else f"{alpha:g}" for alpha in layer.alphas]
    alphas = "/".join(shown[:4] + ["..."] * (len(shown) > 4))
    return (
        layer.name,
        number(layer.plain_error, ".5f"),
        number(layer.error, ".5f"),
        number(layer.plain_sqnr, ".1f"),
        number(layer.sqnr, ".1f"),
        alphas or "-",
        str(layer.rank or "-"),
        f"{layer.seconds:.2f}",
        layer.what
        + (" (never ran in calibration: quantized without data)" if layer.fallback else "")
        + (f" (guard: {layer.guard})" if layer.guard else ""),
    )


def layer_report(
    name: str, weight: Tensor, solution: Solution, layer: QuantLayer, stats: LayerStats | None, seconds: float
) -> LayerReport:
    """Measure a solved layer against its float weight [out, in] on the sampled rows of its input."""
    error = plain_error = None
    if stats is not None:
        x, rows = stats.rows.to(weight.device), stats.row_weights.to(weight.device)
        exact = F.linear(x, weight.float())
        error = plain_error = _relative_error(layer, x, exact, rows)
        simple = solution.plan.plain()
        if simple != solution.plan:
            tensors = solve(name, weight, simple, stats).tensors
            plain_error = _relative_error(QuantLinear.from_tensors(simple, tensors, None), x, exact, rows)
    return LayerReport(
        name=name,
        what=layer.extra_repr(),
        alphas=tuple(a for group in solution.alphas for a in group),
        rank=getattr(solution.plan.transform, "low_rank", 0),
        plain_error=plain_error,
        error=error,
        seconds=seconds,
        fallback=solution.fallback,
    )


@torch.no_grad()
def _relative_error(layer: QuantLayer, x: Tensor, exact: Tensor, row_weights: Tensor) -> float:
    output = layer.multiply(x) if layer.bias is None else layer.multiply(x) - layer.bias.float()
    root = row_weights.sqrt()[:, None]
    norm, error = (exact * root).norm().item(), ((output - exact) * root).norm().item()
    return error / norm if norm else error


def worst(layers: Sequence[LayerReport], count: int = 5) -> list[LayerReport]:
    """Return the layers with the largest error, largest first."""
    return sorted((r for r in layers if r.error is not None), key=lambda r: -(r.error or 0.0))[:count]
