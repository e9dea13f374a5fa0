"""Post-training quantization of a model in memory: plan -> observe -> solve -> swap."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import xxhash
from accelerate.utils import align_module_device
from torch import nn
from tqdm.auto import tqdm

from hfquant import integrations
from hfquant.calibration.batches import CalibrationError, batches, release_free_memory, samples
from hfquant.calibration.provenance import update, update_with_weights
from hfquant.config import Calibrate
from hfquant.console import log_shown
from hfquant.distributed import Processes, processes
from hfquant.integrations.checkpoint import dequantized
from hfquant.integrations.config import HfQuantConfig
from hfquant.nn.linear import QuantLinear, log_real_quant, quant_linears, replace_modules
from hfquant.observers import SAMPLE_ROWS, LayerStats, observe, stats_bytes
from hfquant.planner import LayerPlan, Plan, aliases, plan_layers
from hfquant.report.layers import LayerReport, QuantReport, layer_report
from hfquant.resume import find, fingerprint, store
from hfquant.solver import Solution, solve

logger = logging.getLogger(__name__)


def quantize(
    model: nn.Module,
    calib_data_loader: Any,
    config: Any = None,
    per_layer_mode: bool = False,
    verbose: bool = False,
    example: Any = None,
    *,
    memory_budget: int | None = None,
    resume_dir: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Quantize the linears of ``model`` in place and return it.

    Under ``accelerate launch`` all processes call this, each with its copy of the model and the same data (or each with
    its own part); they share the work of a config that needs data, and all end with the same model.

    Args:
        model: any module. Where quantization fails it is left as it was.
        calib_data_loader: batches for calibration; each a tensor, a tuple of positional arguments, a dict of keyword
            arguments, or a list of such samples. Must start anew each time it is iterated. May be None where the
            config needs no data.
        config: a dict, the name of a preset, an :class:`~hfquant.HfQuantConfig`, or None (the reference's dict).
        per_layer_mode: solve layers in execution order, each on inputs that the quantized layers before it produce.
        verbose: log each layer's decision and error, and the whole report at the end; shown on the console even where
            logging is not set up.
        example: model input for pattern detection; default: the first calibration batch.
        memory_budget: bytes that statistics may take at once in this process; default: a quarter of the free memory,
            shared with the processes on this machine.
        resume_dir: folder that keeps solved layers, so that an interrupted run goes on.

    Raises:
        ConfigError: the config is invalid or does not fit a layer.
        CalibrationError: data is missing, empty, or has NaN or Inf.
        ValueError: the model is already quantized, has nothing to quantize, or differs from another process'.
        RuntimeError: it failed in another process, which the message names with its cause.
    """
    config = HfQuantConfig.of(config)
    if quant_linears(model) or getattr(model, "is_quantized", False):
        raise ValueError(f"{type(model).__name__} is already quantized; call hfquant.dequantize(model) first")
    with log_shown() if verbose else nullcontext():
        return _quantize(
            model,
            calib_data_loader,
            config,
            per_layer_mode or config.per_layer_mode,
            verbose,
            example,
            memory_budget,
            None if resume_dir is None else Path(resume_dir),
        )


def check_data_free(plan: Plan) -> None:
    """Raise where a layer's merged config needs data although no entry of the config does by itself."""
    needy = next((name for name, layer in plan.layers.items() if layer.config.needs_data), None)
    if needy is not None:
        raise CalibrationError(f"layer {needy!r} needs calibration data, which quantizing while loading has not got")


def quantize_loaded(model: nn.Module, config: HfQuantConfig, loader: Any) -> nn.Module:
    """Quantize a model that ``from_pretrained`` has just loaded, on batches made of its config's calibration data."""
    return _quantize(model, loader, config, config.per_layer_mode)


def _quantize(
    model: nn.Module,
    loader: Any,
    config: HfQuantConfig,
    per_layer_mode: bool = False,
    verbose: bool = False,
    example: Any = None,
    memory_budget: int | None = None,
    resume_dir: Path | None = None,
) -> nn.Module:
    given = loader is not None
    # Without data there is little to share, and a caller may well quantize in one process alone.
    with processes() if config.needs_data else nullcontext(Processes()) as crew:
        with crew.together():
            loader = batches(loader, may_be_empty=crew.size > 1) if given else None
            if example is None and loader is not None:
                example = samples(next(iter(loader)))[0]
            plan = plan_layers(model, config.rules, config.modules_to_not_convert or (), example)
            if not plan.layers:
                raise ValueError(f"{type(model).__name__} has nothing to quantize: {plan.skipped or 'no nn.Linear'}")
            needy = [name for name, layer in plan.layers.items() if layer.config.needs_data]
            if needy and not given:
                more = f" (and {len(needy) - 1} more)" if len(needy) > 1 else ""
                raise CalibrationError(f"layer {needy[0]!r}{more} needs calibration data; none was given")
        _check_models_agree(model, crew)
        plan = _agreed(plan, given, loader, crew)
        shard = _shard(loader, crew)
        budget = min(crew.gather(memory_budget or _free_memory() // (4 * crew.neighbours)))
        originals = {name: model.get_submodule(name) for name in plan.layers}
        layers: dict[str, QuantLinear] = {}
        reports: list[LayerReport] = []
        try:
            with tqdm(total=len(plan.layers), desc="quantizing", disable=not crew.main) as progress:
                for group in _groups(plan, per_layer_mode, budget):
                    solved = _solve_group(model, plan, group, loader, shard, per_layer_mode, resume_dir, crew)
                    for name, layer, result in solved:
                        layers[name] = layer
                        reports.append(result)
                        progress.update()
                        if verbose and crew.main:
                            logger.info("%s", result)
                    if per_layer_mode:
                        replace_modules(model, {originals[name]: layers[name] for name in group})
        except BaseException:
            if per_layer_mode:
                replace_modules(model, {layer: originals[name] for name, layer in layers.items()})
            raise
    if not per_layer_mode:
        replace_modules(model, {originals[name]: layer for name, layer in layers.items()})
    report = QuantReport(reports, plan.skipped)
    if needy and all(r.fallback for r in reports if r.name in needy):
        logger.warning("calibration ran none of the layers that need its data")
    integrations.attach(model, own_config(model, config, Plan({n: x.plan for n, x in layers.items()}, plan.skipped)))
    model.quant_report = report  # type: ignore[assignment]
    if verbose and crew.main:
        logger.info("\n%s", report)
    if crew.main:
        log_real_quant(model)
        log_share(model)
    return model


def _check_models_agree(model: nn.Module, crew: Processes) -> None:
    if crew.size == 1:
        return
    digest = xxhash.xxh3_128()
    update_with_weights(digest, model)
    for rank, other in enumerate(crew.gather(digest.hexdigest())):
        if other != digest.hexdigest():
            raise ValueError(f"process {rank} has another model, or other weights, than process {crew.rank}")


def _agreed(plan: Plan, given: bool, loader: Any, crew: Processes) -> Plan:
    """The plan of the first process that has data: what an example shows, a process without cannot see."""
    found = crew.gather((plan, loader is not None))
    if given and not any(has_data for _, has_data in found):
        raise CalibrationError("calibration data: the loaders of all processes are empty")
    return next((p for p, has_data in found if has_data), found[0][0])


def _shard(loader: Any, crew: Processes) -> tuple[int, int]:
    """Which batches this process takes: every ``size``-th of data that all have, all of data that differ."""
    if crew.size == 1:
        return 0, 1
    digest = xxhash.xxh3_128()
    with crew.together():
        update(digest, None if loader is None else next(iter(loader)))
    if len(set(crew.gather(digest.hexdigest()))) == 1:
        return crew.rank, crew.size
    if crew.main:
        logger.info("the processes' calibration data differ: each takes all of its own")
    return 0, 1


def _solve_group(
    model: nn.Module,
    plan: Plan,
    group: Sequence[str],
    loader: Any,
    shard: tuple[int, int],
    stop_early: bool,
    resume_dir: Path | None,
    crew: Processes,
) -> Iterator[tuple[str, QuantLinear, LayerReport]]:
    """Observe the layers of a group in one pass over the data, then solve them, each in one of the processes."""
    linears = {name: model.get_submodule(name) for name in group}
    with crew.together():
        known = {} if resume_dir is None else _known(linears, plan, resume_dir)
    # A layer known somewhere is its first knower's.
    owners = {name: rank for rank, names in reversed([*enumerate(crew.gather(set(known)))]) for name in names}
    needy = [n for n in group if plan.layers[n].config.needs_data and n not in owners]
    owners |= crew.share({n: _cost(plan.layers[n]) for n in group if n not in owners})
    stats: dict[str, LayerStats] = {}
    if needy:
        gptq = {n: plan.layers[n].config.calib.type is Calibrate.GPTQ for n in needy}
        with crew.together():
            if loader is not None:
                stats = observe(model, {n: linears[n] for n in needy}, loader, gptq, stop_early, shard=shard)
        stats = crew.merge(stats, {n: owners[n] for n in needy}, {n: plan.layers[n].in_features for n in needy})

    def solved() -> Iterator[tuple[str, QuantLinear, LayerReport]]:
        for name in group:
            if owners[name] == crew.rank:
                yield name, *_solve_layer(name, linears[name], plan, stats.pop(name, None), known, resume_dir)

    if crew.size == 1:
        yield from solved()
        return
    with crew.together():
        mine = {name: (layer, report) for name, layer, report in solved()}
    everyones = crew.exchange({n: ((x.plan, report), x.solved_tensors()) for n, (x, report) in mine.items()})
    for name in group:
        (layer_plan, report), tensors = everyones[name]
        if name in mine:
            yield name, *mine[name]
            continue
        linear = linears[name]
        assert isinstance(linear, nn.Linear)
        with align_module_device(linear):
            tensors = {key: tensor.to(linear.weight.device) for key, tensor in tensors.items()}
            yield name, QuantLinear.from_tensors(layer_plan, tensors, linear.bias), report


def _known(linears: Mapping[str, nn.Module], plan: Plan, resume_dir: Path) -> dict[str, Solution]:
    """Layers that an interrupted run solved."""
    known = {}
    for name, linear in linears.items():
        with align_module_device(linear):
            solution = find(
                resume_dir, fingerprint(linear.get_parameter("weight"), plan.layers[name]), plan.layers[name]
            )
        if solution is not None:
            known[name] = solution
    return known


def _solve_layer(
    name: str,
    linear: nn.Module,
    plan: Plan,
    stats: LayerStats | None,
    known: Mapping[str, Solution],
    resume_dir: Path | None,
) -> tuple[QuantLinear, LayerReport]:
    assert isinstance(linear, nn.Linear)
    start = time.perf_counter()
    # Offloaded weights are fetched for the moment.
    with align_module_device(linear), torch.no_grad():
        weight = linear.weight.detach()
        solution = known.get(name) or solve(name, weight, plan.layers[name], stats)
        if resume_dir is not None and name not in known:
            store(resume_dir, name, fingerprint(weight, plan.layers[name]), solution)
        layer = QuantLinear.from_tensors(solution.plan, solution.tensors, linear.bias)
        seconds = time.perf_counter() - start
        report = layer_report(name, weight, solution, layer, stats, seconds)
    release_free_memory()
    if solution.fallback:
        logger.warning("layer %r never ran during calibration: rounded to nearest, inputs scaled by token", name)
    return layer, report


def _cost(plan: LayerPlan) -> float:
    """Roughly what solving a layer takes, to share layers out evenly."""
    inverse = plan.in_features**3 if plan.config.calib.type is Calibrate.GPTQ else 0
    return float(inverse + plan.in_features * plan.out_features * (plan.in_features if inverse else SAMPLE_ROWS))


def _groups(plan: Plan, per_layer_mode: bool, budget: int) -> Iterator[list[str]]:
    """Layers whose statistics fit the budget together; in per-layer mode those of one block, in order of execution."""
    blocks = groupby(plan.layers, key=_block) if per_layer_mode else [("", iter(plan.layers))]
    for _, names in blocks:
        group: list[str] = []
        size = 0
        for name in names:
            layer = plan.layers[name]
            needs = stats_bytes(layer.in_features, layer.config.calib.type is Calibrate.GPTQ)
            needs *= layer.config.needs_data
            if group and size + needs > budget:
                yield group
                group, size = [], 0
            group.append(name)
            size += needs
        yield group


def _block(name: str) -> str:
    """The part of a name up to its first index, ``model.layers.3``; without one, what comes before its last dot."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found.group() if found else name.rpartition(".")[0]


def _free_memory() -> int:
    return int(psutil.virtual_memory().available)


def check_data(config: HfQuantConfig) -> None:
    """Raise where a config needs calibration data and carries none."""
    if config.needs_data and config.calibration is None:
        raise CalibrationError(
            "this config needs calibration data (static activations, smoothing, a low-rank branch or GPTQ): pass "
            "HfQuantConfig(..., calibration=[...]), or choose one without, such as 'w8a8-dynamic'"
        )


def own_config(model: nn.Module, config: HfQuantConfig, plan: Plan) -> HfQuantConfig:
    """The model's own copy of ``config``, with each layer's plan where it differs from the config's own rule."""
    found = {n: p.differences(config.rules.resolve(*aliases(n, model))) for n, p in plan.layers.items()}
    return config.for_model({n: difference for n, difference in found.items() if difference}, list(plan.skipped))


def log_share(model: nn.Module) -> None:
    """Say what share of the model's matrices was quantized (embeddings and heads aside); warn below 80 %."""
    quantized = sum(layer.in_features * layer.out_features for layer in quant_linears(model).values())
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    embeddings = [m for m in model.modules() if m is head or isinstance(m, nn.Embedding)]
    excluded = {id(p) for module in embeddings for p in module.parameters()}
    codes = {id(layer.weight) for layer in quant_linears(model).values()}
    kept = [(n, p) for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in excluded | codes]
    share = quantized / (quantized + sum(p.numel() for _, p in kept))
    level = logging.INFO if share >= 0.8 else logging.WARNING
    largest = ", ".join(n for n, _ in sorted(kept, key=lambda item: -item[1].numel())[:3])
    logger.log(
        level,
        "%d linears quantized, %.0f %% of the parameters in matrices%s",
        len(codes),
        100 * share,
        f"; the largest left: {largest}" if kept else "",
    )


def dequantize(model: nn.Module) -> nn.Module:
    """Replace every quantized linear by a plain ``nn.Linear``, in place; activations are no longer quantized.

    Raises:
        ValueError: ``model`` has no quantized linear.
    """
    layers = quant_linears(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized linear")
    if hasattr(model, "hf_quantizer") and hasattr(model, "dequantize"):
        return cast(nn.Module, cast(Any, model).dequantize())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return dequantized(model, dtype)
