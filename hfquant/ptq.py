"""Post-training quantization of a model in memory: plan -> fold -> observe -> solve -> swap."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from hfquant.config import QuantRules
from hfquant.console import counted, log_shown, progress_bar
from hfquant.distributed import Processes, processes
from hfquant.experts import unfused
from hfquant.folding import Folding, find_folding
from hfquant.guard import Comparison, Mends, mend
from hfquant.layer_plan import LayerPlan
from hfquant.memory import release_free_memory
from hfquant.nn.experts import QuantExperts, fuse, plans_of
from hfquant.nn.layer import QuantLayer
from hfquant.nn.modules import log_share, quant_modules, tie
from hfquant.observe import observe
from hfquant.offload import refuse_group_offloaded, stored_dtype
from hfquant.planner import ModelFacts, Plan, warn_if_empty
from hfquant.replacing import replace_modules
from hfquant.report.layers import LayerReport, QuantReport, layer_report
from hfquant.resume import LayerFigures
from hfquant.run import Run, Settings, prepared
from hfquant.solver import Solution, check_finite, solve
from hfquant.statistics import SAMPLE_ROWS, LayerStats, stats_bytes, within_budget

logger = logging.getLogger(__name__)

#: An expert that saw fewer rows is rounded to nearest. Measured on SmolLM2's MLPs with held-out rows: solved from 32
#: or more rows (w8a8-smooth, w4a16-gptq), an expert has at most 13 % more error than rounded to nearest, and mostly
#: less; from 8 rows, up to 43 % more. Also, in any one channel, a row beyond the n rows seen exceeds their range with
#: probability 2 / (n + 1).
FEWEST_ROWS = 32
#: Most layers named in a warning.
NAMED = 8


@dataclass
class Applied:
    """A finished quantization.

    Attributes:
        plan: the final plan of each layer, and what was skipped.
        report: each layer's decision and error.
        originals: the modules that were replaced, by name.
    """

    plan: Plan
    report: QuantReport
    originals: dict[str, nn.Module] = field(default_factory=dict)

    def undo(self, model: nn.Module) -> None:
        """Put the original modules back."""
        placed = {name: model.get_submodule(name) for name in self.originals}
        replace_modules(model, {placed[name]: module for name, module in self.originals.items()})


def quantize(
    model: nn.Module,
    loader: Any,
    rules: QuantRules,
    settings: Settings | None = None,
    facts: ModelFacts | None = None,
    finish: Callable[[Applied], None] = lambda applied: None,
) -> Applied:
    """Quantize the layers of ``model`` in place; if that fails, the model is left unchanged.

    Args:
        model: any module.
        loader: calibration data; may be None if the config needs none.
        rules: the validated config.
        settings: the caller's other settings.
        facts: what a library knows about the model.
        finish: called last, within the transaction: if it raises, everything is undone.

    Raises:
        ConfigError: the config does not fit a layer.
        CalibrationError: data is missing, empty, or has NaN or Inf.
        ValueError: the model is already quantized or group offloaded, stores weights as FP8, has no layers, or differs
            between processes.
        RuntimeError: quantization failed in another process; the message names the process and the cause.
    """
    settings, facts = settings or Settings(), facts or ModelFacts()
    if quant_modules(model):
        raise ValueError(f"{type(model).__name__} is already quantized; call hfquant.dequantize(model) first")
    refuse_group_offloaded(model)
    # Without data there is little to share, and the caller may be quantizing in one process only.
    sharing = processes() if rules.needs_data else nullcontext(Processes())
    shown = log_shown() if settings.verbose else nullcontext()
    # Codes and scales made as inference tensors would not pass gradients on.
    with torch.inference_mode(False), shown, sharing as group, unfused(model, facts.experts) as experts:
        run = prepared(model, loader, rules, settings, facts, group, experts)
        _refuse_stored_in_8_bits(run)
        if not run.plan.layers:
            warn_if_empty(model, run.plan)
            plan = run.plan.fused(experts)
            applied = Applied(plan, QuantReport([], plan.skipped))
            if settings.allow_empty:
                finish(applied)
            return applied
        return _solve_and_swap(_folded(run), settings.verbose, finish)


def _refuse_stored_in_8_bits(run: Run) -> None:
    """Reject layers stored as FP8, as under layerwise casting, which casts them for each call; codes cannot be cast.

    Raises:
        ValueError: a layer to quantize is stored so.
    """
    for name in run.plan.layers:
        dtype = stored_dtype(run.module(name))
        if dtype.itemsize == 1:
            raise ValueError(
                f"layer {name!r} stores its weight as {dtype}: load the model in float32 or bfloat16, and call "
                "enable_layerwise_casting after quantizing"
            )


def _folded(run: Run) -> Run:
    """Compute the divisors to fold, in the first process for all of them."""
    if not run.plan.folds:
        return run
    if run.group.size == 1 and not run.per_layer_mode and len(list(_groups(run))) == 1:
        # One pass serves both folding and solving.
        needs = {n: p.config.needs for n, p in run.plan.layers.items() if p.config.needs_data}
        run = replace(run, seen=_observed(run, needs, dict.fromkeys(needs, 0)))

    def observed(needs: Mapping[str, Collection[str]]) -> Mapping[str, LayerStats]:
        return run.seen or _observed(run, needs, dict.fromkeys(needs, 0))

    with run.group.together():
        folding = find_folding(run.model, run.plan, observed, run.budget)
    kinds = {"inputs": (None, folding.inputs), "outputs": (None, folding.outputs)} if run.group.main else {}
    found = {kind: tensors for kind, (_, tensors) in run.group.exchange(kinds).items()}
    layers = {n: replace(p, folded=n in found["inputs"]) for n, p in run.plan.layers.items()}
    return replace(run, folding=Folding(**found), plan=replace(run.plan, layers=layers))


def _solve_and_swap(run: Run, verbose: bool, finish: Callable[[Applied], None]) -> Applied:
    """Solve all layers, swap them in and finish, as one transaction."""
    originals: dict[str, nn.Module] = {name: run.module(name) for name in run.plan.layers}
    layers: dict[str, QuantLayer] = {}
    sources = run.folding.sources(run.model, run.plan)
    originals |= {name: run.model.get_submodule(name) for name in sources} | run.experts.modules
    finished: Mapping[str, nn.Module] = layers
    reports: list[LayerReport] = []
    mended = Mends()
    try:
        bar = progress_bar(total=len(run.plan.layers), desc="quantizing", shown=run.group.main)
        with ExitStack() as unfolded, bar as progress:
            for names in _groups(run):
                for name, layer, report in _solve_group(run, names):
                    layers[name] = layer
                    reports.append(report)
                    progress.update()
                    if verbose and run.group.main:
                        logger.info("%s", report)
                if run.per_layer_mode:
                    replace_modules(run.model, {originals[name]: layers[name] for name in names})
                    for handle in (h for name in names for h in run.folding.unfolded(name, layers[name])):
                        unfolded.callback(handle.remove)
        plan = replace(run.plan, layers={name: layer.plan for name, layer in layers.items()})
        fused = fuse(run.experts, layers, {report.name for report in reports if report.fallback})
        plan = plan.fused(run.experts, plans_of(fused))
        finished = layers | sources | fused
        replace_modules(run.model, {originals[name]: module for name, module in finished.items()})
        _log_rounded(run, plan)
        tie(run.model)
        needing = {name for name, layer in run.plan.layers.items() if layer.config.needs_data}
        _log_unseen(run, needing, [r.name for r in reports if r.fallback and r.name in needing])
        floats = originals | run.experts.originals
        if needing and run.checks is not None:
            mended = _mends(run, run.checks, layers, fused, floats)
            replace_modules(run.model, {finished[name]: module for name, module in mended.modules.items()})
        applied = Applied(*mended.outcome(plan, reports), {name: floats[name] for name in finished})
        finish(applied)
        if verbose and run.group.main:
            logger.info("\n%s", applied.report)
        if run.group.main:
            log_share(run.model, run.facts.uncounted)
        return applied
    except BaseException:
        back = [*finished.items(), *mended.modules.items()]
        replace_modules(run.model, {module: originals[name] for name, module in back if module is not originals[name]})
        raise


def _mends(
    run: Run,
    checks: Sequence[Any],
    layers: dict[str, QuantLayer],
    fused: dict[str, QuantExperts],
    floats: Mapping[str, nn.Module],
) -> Mends:
    """Compare the quantized modules with their float ones, and return the replacements of those that are off."""
    # Tied layers share their codes with another layer, and keep them.
    tied = {n for name, x in layers.items() if x.plan.tied for n in (name, x.plan.tied)}
    modules = {name: module for name, module in (layers | fused).items() if name not in tied}
    compared = Comparison(run.model, modules, floats, run.experts.parameters, run.folding)
    return mend(compared, checks, run.facts.options(layers.values()), run.group)


def _log_rounded(run: Run, plan: Plan) -> None:
    """Log the experts that saw too few rows, in one line."""
    few = [f"{name} {list(layer.rounded)}" for name, layer in plan.layers.items() if layer.rounded]
    if few and run.group.main:
        logger.warning("experts that saw fewer than %d rows are rounded to nearest: %s", FEWEST_ROWS, "; ".join(few))


def _log_unseen(run: Run, needing: Collection[str], unseen: Sequence[str]) -> None:
    """Log the layers that never ran, in one line; those of experts have a line of their own."""
    if needing and len(unseen) == len(needing):
        logger.warning("none of the layers that need calibration data ran during calibration")
    unseen = [name for name in unseen if name not in run.experts.parameters]
    if unseen and run.group.main:
        names = ", ".join(map(repr, unseen[:NAMED]))
        logger.warning(
            "%s never ran during calibration and got round-to-nearest and per-token input scales: %s%s",
            *(counted(len(unseen), "layer"), names, ", ..." if len(unseen) > NAMED else ""),
        )


def _groups(run: Run) -> Iterator[list[str]]:
    """Yield layers whose statistics fit the budget together; in per-layer mode, only layers of one block."""
    layers = run.plan.layers

    def size(name: str) -> int:
        config = layers[name].config
        return stats_bytes(layers[name].in_features, config.needs) if config.needs_data else 0

    blocks = groupby(layers, key=block_of) if run.per_layer_mode else [("", iter(layers))]
    for _, names in blocks:
        yield from within_budget(names, size, run.budget)


def block_of(name: str) -> str:
    """Return a name up to its first index, as in ``model.layers.3``; without one, everything before its last dot."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found.group() if found else name.rpartition(".")[0]


def _solve_group(run: Run, names: Sequence[str]) -> Iterator[tuple[str, QuantLayer, LayerReport]]:
    """Observe the layers of a group in one pass over the data, then solve each in one of the processes."""
    group, layers = run.group, {name: run.plan.layers[name] for name in names}
    with group.together():
        known = _known(run, names)
    # A layer that is cached on disk belongs to the first process that has it.
    owners = {name: rank for rank, found in reversed([*enumerate(group.gather(set(known)))]) for name in found}
    needs = {n: p.config.needs for n, p in layers.items() if p.config.needs_data and n not in owners}
    owners |= group.share({n: _cost(p) for n, p in layers.items() if n not in owners})
    stats = run.seen
    if needs and not stats:
        stats = _observed(run, needs, {n: owners[n] for n in needs})

    def solved() -> Iterator[tuple[str, QuantLayer, LayerReport]]:
        for name in names:
            if owners[name] == group.rank:
                yield name, *_solve_layer(run, name, stats.pop(name, None), known.get(name))

    if group.size == 1:
        yield from solved()
        return
    with group.together():
        mine = {name: (layer, report) for name, layer, report in solved()}
    everyones = group.exchange({n: ((x.plan, report), x.solved_tensors()) for n, (x, report) in mine.items()})
    for name in names:
        (layer_plan, report), tensors = everyones[name]
        if name in mine:
            yield name, *mine[name]
            continue
        module = run.module(name)
        with align_module_device(module):
            device = module.get_parameter("weight").device
            tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
            yield name, run.quantized(name, layer_plan, tensors), report


def _observed(run: Run, needs: Mapping[str, Collection[str]], owners: Mapping[str, int]) -> dict[str, LayerStats]:
    """Return the statistics of the layers that this process owns, from one pass over all processes' data."""
    stats: dict[str, LayerStats] = {}
    with run.group.together():
        if run.data is not None:
            modules = {n: run.module(n) for n in needs}
            stats = observe(
                run.model,
                modules,
                run.data,
                needs,
                options=run.facts.options(modules.values()),
                stop_early=run.per_layer_mode,
                shard=run.shard,
            )
    features = {n: run.plan.layers[n].in_features for n in needs}
    return run.group.merge(stats, owners, features, needs)


def _known(run: Run, names: Sequence[str]) -> dict[str, tuple[Solution, LayerFigures | None]]:
    """Return the layers that an interrupted run has already solved, and what it measured of them."""
    known = {}
    for name in names if run.cache is not None else ():
        plan = run.plan.layers[name]
        with align_module_device(run.module(name)):
            assert run.cache is not None
            weight = run.matrix(name)
            found = run.cache.find(name, run.cache.key(name, weight, plan), plan)
        if found is not None:
            known[name] = found
    return known


def _solve_layer(
    run: Run, name: str, stats: LayerStats | None, known: tuple[Solution, LayerFigures | None] | None
) -> tuple[QuantLayer, LayerReport]:
    module, plan = run.module(name), run.plan.layers[name]
    start = time.perf_counter()
    # Offloaded weights are fetched temporarily.
    with align_module_device(module), torch.no_grad():
        weight, stats = run.matrix(name), run.folding.stats(name, stats)
        bias = module._parameters.get("bias")
        if bias is not None:
            check_finite(name, "biases", bias)
        enough = name not in run.experts.parameters or (stats is not None and stats.count >= FEWEST_ROWS)
        dtype = module.get_parameter("weight").dtype
        solution, measured = known or (solve(name, weight, plan, stats if enough else None, dtype), None)
        layer = run.quantized(name, solution.plan, solution.tensors)
        seconds = time.perf_counter() - start
        report = layer_report(name, weight, solution, layer, None if measured else stats, seconds)
        if measured is not None:
            report = replace(report, **asdict(measured))
        if run.cache is not None and known is None:
            measured = LayerFigures(report.error, report.plain_error, report.seconds)
            run.cache.store(name, run.cache.key(name, weight, plan), solution, measured)
    release_free_memory()
    return layer, report


def _cost(plan: LayerPlan) -> float:
    """Return the rough cost of solving a layer, to balance layers among processes."""
    sampled = plan.in_features * plan.out_features * SAMPLE_ROWS
    return max(float(sampled), plan.config.calib.cost(plan.in_features, plan.out_features))
