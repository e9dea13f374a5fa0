"""State of one quantization: its inputs, and what its processes agree on before it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from hfquant.calibration.batches import CalibrationData, CalibrationError, samples
from hfquant.config import QuantRules
from hfquant.digests import digest_of, digest_of_each, update_with_weights
from hfquant.distributed import Processes, check_models_agree, shard_of
from hfquant.experts import Unfused
from hfquant.folding import Folding
from hfquant.guard import samples_to_check
from hfquant.layer_plan import LayerPlan
from hfquant.memory import free_memory
from hfquant.nn.kinds import kind_of, matrix_of
from hfquant.nn.layer import QuantLayer
from hfquant.planner import EXCLUDED, SWITCHED_OFF, ModelFacts, Plan, plan_apart
from hfquant.resume import Cache
from hfquant.solver import check_finite
from hfquant.statistics import LayerStats


@dataclass(frozen=True)
class Settings:
    """The caller's settings besides the config; see :func:`hfquant.quantize`.

    Attributes:
        allow_empty: whether to accept a model with nothing to quantize, as when all parts of a pipeline load with one
            config.
    """

    per_layer_mode: bool = False
    verbose: bool = False
    example: Any = None
    memory_budget: int | None = None
    resume_dir: str | os.PathLike[str] | None = None
    guard: bool = True
    held_out: Any = None
    allow_empty: bool = False


@dataclass(frozen=True)
class Run:
    """State of one quantization.

    Attributes:
        model: the model being quantized.
        plan: its plan, the same in all processes.
        data: calibration batches; None without data, or if this process has none.
        shard: (rank, size), which batches this process takes.
        group: the processes that share the work.
        cache: solved layers on disk; None without a cache.
        budget: bytes of statistics that a process may hold at once.
        facts: what a library knows about the model.
        per_layer_mode: whether layers are calibrated on the outputs of the quantized ones before them.
        experts: the experts that are unfused during the run.
        folding: divisors to fold into preceding modules.
        seen: statistics of all layers, if folding has already collected them.
        checks: samples for the guard, empty if this process has no data; None if the guard is off.
    """

    model: nn.Module
    plan: Plan
    data: CalibrationData | None
    shard: tuple[int, int]
    group: Processes
    cache: Cache | None
    budget: int
    facts: ModelFacts
    per_layer_mode: bool
    experts: Unfused
    folding: Folding = field(default_factory=Folding)
    seen: dict[str, LayerStats] = field(default_factory=dict)
    checks: Sequence[Any] | None = None

    def module(self, name: str) -> nn.Module:
        """Return a layer that has not been replaced yet."""
        return self.model.get_submodule(name)

    def matrix(self, name: str) -> Tensor:
        """Return a layer's float matrix [out, in] with divisors folded in; call within ``align_module_device``."""
        return self.folding.weight(name, matrix_of(self.module(name)))

    def quantized(self, name: str, plan: LayerPlan, tensors: Mapping[str, Tensor]) -> QuantLayer:
        """Build the quantized layer from solved tensors; call within ``align_module_device`` of the float layer."""
        module = self.module(name)
        bias = self.folding.bias(name, module._parameters.get("bias"))
        return kind_of(module).from_tensors(plan, tensors, bias, module)


def prepared(
    model: nn.Module,
    loader: Any,
    rules: QuantRules,
    settings: Settings,
    facts: ModelFacts,
    group: Processes,
    experts: Unfused,
) -> Run:
    """Check the inputs, plan, and agree on the plan with the other processes."""
    with group.together():
        data = None if loader is None else CalibrationData(loader)
        has_data = data is not None and data.first is not None
        if data is not None and not has_data and group.size == 1:
            raise CalibrationError("calibration data: the loader is empty")
        example = settings.example
        if example is None and data is not None and has_data:
            example = samples(data.first)[0]
        plan = plan_apart(model, rules, example, facts, experts)
        may_be_empty = settings.allow_empty or {EXCLUDED, SWITCHED_OFF} & set(plan.skipped.values())
        if not plan.layers and not may_be_empty:
            raise ValueError(f"{type(model).__name__} has nothing to quantize: {plan.why_skipped}")
        needing = [name for name, layer in plan.layers.items() if layer.config.needs_data]
        if needing and data is None:
            more = f" (and {len(needing) - 1} more)" if len(needing) > 1 else ""
            raise CalibrationError(f"layer {needing[0]!r}{more} needs calibration data; none was given")
        if needing:
            for name, param in model.named_parameters():
                # A NaN here would otherwise be reported as one in the input of a later layer.
                if param.is_floating_point() and not param.is_meta:
                    layer, _, tensor = name.rpartition(".")
                    check_finite(layer, f"values of its {tensor}", param.detach())
    check_models_agree(model, group)
    found = group.gather((plan, has_data))
    if data is not None and not any(has for _, has in found):
        raise CalibrationError("calibration data: the loaders of all processes are empty")
    # A process without data has no example input to detect patterns with.
    plan = next((p for p, has in found if has), found[0][0])
    data = data if has_data else None
    with group.together():
        cache = None
        if settings.resume_dir is not None:
            # A layer's inputs depend on all weights, and in per-layer mode on how those before it were quantized.
            mode = (facts.prefix, repr((plan.layers, plan.folds)) if settings.per_layer_mode else "")
            weights = xxhash.xxh3_128()
            update_with_weights(weights, model)
            # Another release may solve a layer differently.
            context = digest_of(
                version("hfquant"), mode, weights.hexdigest(), digest_of_each(() if data is None else data)
            )
            cache = Cache.open(settings.resume_dir, digest_of(group.gather(context)))
        checks = samples_to_check(loader, data, settings.held_out) if settings.guard else None
    # Statistics lie where the model is: processes share a machine's memory, but not a GPU's.
    device = next(model.parameters(), torch.empty(0)).device
    sharing = 1 if device.type == "cuda" else group.on_this_machine
    budget = min(group.gather(settings.memory_budget or free_memory(device) // (4 * sharing)))
    shard = shard_of(None if data is None else data.first, group)
    return Run(model, plan, data, shard, group, cache, budget, facts, settings.per_layer_mode, experts, checks=checks)
