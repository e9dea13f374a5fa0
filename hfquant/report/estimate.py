"""Estimate the cost of calibrating and solving a model, by timing one layer of each kind before weights are read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from hfquant.layer_plan import LayerPlan
from hfquant.memory import free_memory
from hfquant.planner import Plan
from hfquant.report.sizes import matrices
from hfquant.solver import solve
from hfquant.statistics import Collector, stats_bytes

#: Maximum number of features of a measured layer; times of larger layers are scaled up.
_LARGEST = 1024
#: Features and rows of the warm-up run, which is not timed.
_SMALLEST = 64


@dataclass(frozen=True)
class CalibrationCost:
    """Estimated cost of calibrating and solving a model.

    Attributes:
        tokens: number of rows of calibration data.
        forward_seconds: one pass of that many rows through the quantized layers, in float32 on the CPU.
        observe_seconds: collecting the statistics of these rows.
        solve_seconds: solving all layers.
        statistics_bytes: statistics of all layers; if a quarter of the free memory is less, several passes are made.
        passes: number of passes on this machine.
    """

    tokens: int
    forward_seconds: float
    observe_seconds: float
    solve_seconds: float
    statistics_bytes: int
    passes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        seconds = self.passes * (self.forward_seconds + self.observe_seconds) + self.solve_seconds
        memory = self.statistics_bytes / max(self.passes, 1) / 1e9
        return (
            f"about {_duration(seconds)} on this machine's CPU for {self.tokens} rows: "
            f"{self.passes} x ({_duration(self.forward_seconds)} forward + {_duration(self.observe_seconds)} "
            f"statistics) + {_duration(self.solve_seconds)} solving; {memory:.1f} GB of statistics per pass"
        )


def calibration_cost(model: nn.Module, plan: Plan, tokens: int = 128 * 512, measured: int = 512) -> CalibrationCost:
    """Estimate the cost of calibrating by running each kind of layer once on random weights and inputs.

    Each expert of a parameter is solved separately and sees only the share of rows routed to it.

    Args:
        model: model in full precision; it may be on the meta device.
        plan: its plan.
        tokens: total rows of calibration data.
        measured: number of rows to run.
    """
    counts = {name: matrices(model, name) for name in plan.layers}
    kinds: Counter[tuple[LayerPlan, int]] = Counter()
    for name, layer in plan.layers.items():
        kinds[replace(layer, evidence=()), counts[name]] += counts[name]
    forward = observed = solved = 0.0
    for layer, _ in kinds:  # warm up: compilation and setup are not part of the estimate
        _layer_seconds(_cut(layer, _SMALLEST), _SMALLEST)
    for (layer, experts), count in kinds.items():
        rows = tokens * _routed(model, experts)
        once = _layer_seconds(_cut(layer), measured)
        inputs, outputs = layer.in_features / _cut(layer).in_features, layer.out_features / _cut(layer).out_features
        forward += count * once[0] * inputs * outputs * rows / measured
        observed += count * once[1] * inputs**2 * rows / measured
        solved += count * once[2] * max(inputs, outputs) * inputs * outputs
    needing = {name: layer for name, layer in plan.layers.items() if layer.config.needs_data}
    statistics = sum(counts[n] * stats_bytes(layer.in_features, layer.config.needs) for n, layer in needing.items())
    passes = -(-statistics // max(free_memory() // 4, 1)) if needing else 0
    return CalibrationCost(tokens if needing else 0, forward, observed, solved, statistics, passes)


def _routed(model: nn.Module, experts: int) -> float:
    """Return the share of rows that one of ``experts`` matrices sees; 1 if the routing is unknown."""
    chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", None)
    return min(chosen / experts, 1.0) if isinstance(chosen, int) else 1.0


def _cut(layer: LayerPlan, largest: int = _LARGEST) -> LayerPlan:
    """Return the plan of a smaller layer that is quick to solve, without segments."""
    sizes = min(layer.in_features, largest), min(layer.out_features, largest)
    return replace(
        layer,
        in_features=sizes[0],
        out_features=sizes[1],
        input_segments=(sizes[0],),
        output_segments=(sizes[1],),
        dual=(False,),
    )


def _layer_seconds(layer: LayerPlan, rows: int) -> tuple[float, float, float]:
    """Return the time of a forward of ``rows`` rows, of collecting their statistics, and of solving."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, layer.in_features, generator=generator)
    weight = torch.randn(layer.out_features, layer.in_features, generator=generator) / layer.in_features**0.5
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
    with torch.no_grad():
        forward = _seconds(lambda: linear(x))
        if not layer.config.needs_data:
            return 0.0, 0.0, _seconds(lambda: solve("measured", weight, layer, None))
        collector = Collector({"measured": layer.config.needs})
        collector.start(0)
        observed = _seconds(lambda: collector.add("measured", x))
        stats = collector.stats["measured"]
        return forward, observed, _seconds(lambda: solve("measured", weight, layer, stats))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
