"""Solve a layer: from a linear's weight, plan and statistics to the tensors of a QuantLinear (transform, then round).

Statistics describe the raw input X; those of the transformed input are derived from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hfquant.algorithms import Problem, Strength, block_slices, segment_ranges
from hfquant.calibration.batches import CalibrationError
from hfquant.formats import Grid, GridRule, expand_columns, range_columns
from hfquant.formats.nominal_error import nominal_error
from hfquant.layer_plan import LayerPlan
from hfquant.statistics import LayerStats

#: Error of a static scale, relative to the format's nominal error, beyond which a layer switches to per-token scales.
COARSE = 2.0
#: Fewest rows to decide that: with fewer, it is chance whether a row exceeds the scale of the others.
JUDGED_FROM = 128
#: Root mean square, in steps, below which a change of weights on a grid is rounded stochastically. At this size,
#: rounding to nearest keeps ``1 - 2 exp(-2 (pi * SMALL)^2)`` of a normally distributed change, more than four fifths,
#: with half the noise of stochastic rounding.
SMALL = 0.35


@dataclass
class Solution:
    """A solved layer.

    Attributes:
        plan: the final plan: the data may rule out dual scale or static input scales.
        tensors: tensors by name, codes unpacked.
        alphas: smoothing strengths, one list per row group, one value per input segment, None for no smoothing.
        fallback: whether the layer needed data and had none.
    """

    plan: LayerPlan
    tensors: dict[str, Tensor]
    alphas: list[list[Strength]] = field(default_factory=list)
    fallback: bool = False


def solve(
    name: str, weight: Tensor, plan: LayerPlan, stats: LayerStats | None, dtype: torch.dtype | None = None
) -> Solution:
    """Quantize one layer.

    Args:
        name: layer name for messages.
        weight: [out, in], any float dtype.
        plan: how to quantize the layer.
        stats: statistics of its inputs; None if the config needs no data or the layer never ran.
        dtype: dtype of tensors that are kept in the model's dtype; default: the weight's.

    Raises:
        ValueError: the weight has NaN or Inf.
    """
    check_finite(name, "weights", weight)
    # A transposed or permuted matrix would give non-contiguous codes, which neither kernels nor safetensors accept.
    weight = weight.contiguous()
    fallback = plan.config.needs_data and stats is None
    if fallback:
        plan = plan.without_data()
    dtype = dtype or weight.dtype
    stats = None if stats is None else stats.to(weight.device)
    row_groups = block_slices(plan.row_groups)
    parts = [_solve_rows(name, weight[rows].float(), plan, stats, dtype) for rows in row_groups]
    if stats is not None and plan.config.input_quant is not None and plan.config.input_quant.token_fallback:
        divisors = [part.divisor for part in parts]
        if any(
            needs_token_scales(weight[r].float(), d, plan, stats) for r, d in zip(row_groups, divisors, strict=True)
        ):
            return solve(name, weight, plan.by_token(), stats, dtype)
    tensors = {key: _joined(plan, key, [p.tensors[key] for p in parts]) for key in parts[0].tensors}
    if "input_scale_neg" in tensors:
        dual = (tensors["input_scale"] != tensors["input_scale_neg"]).view(-1, len(plan.input_segments)).any(0)
        plan = replace(plan, dual=tuple(dual.tolist()))
        if not any(plan.dual):
            del tensors["input_scale_neg"]
    elif any(plan.dual) and stats is not None:
        plan = replace(plan, dual=_useful_dual(plan, stats, [p.divisor for p in parts]))
    return Solution(plan, tensors, [list(p.alphas) for p in parts if p.alphas], fallback)


def requantize(name: str, weight: Tensor, plan: LayerPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the weight of a solved layer. Its transform is kept, and no data is needed.

    A row that changes by less than :data:`SMALL` steps keeps its grid and is rounded stochastically, so that the change
    is preserved on average: rounding to nearest would lose most of it, since the weights already lie on the grid. The
    random draw is the same each time. A row that changes more gets a new grid and is rounded to nearest. Formats
    without a scale are rounded to nearest.

    Args:
        name: layer name for messages.
        weight: [out, in], any float dtype, in terms of the raw input.
        plan: plan of the solved layer.
        tensors: tensors of the solved layer, by name.

    Returns:
        The tensors of the layer, codes unpacked; those kept from ``tensors`` are the same objects.

    Raises:
        ValueError: the weight has NaN or Inf.
    """
    check_finite(name, "weights", weight)
    weight = plan.transform.reapplied(weight.float().clone(), tensors, plan.row_groups)
    form = plan.config.weight_quant.format
    stored = tensors["weight"].reshape(plan.out_features, -1)
    packed = stored.shape[1] != plan.in_features
    codes = form.unpack(stored, plan.in_features) if packed else stored
    grid = Grid.from_tensors(form, plan.columns, tensors)
    parts = []
    for rows in block_slices(plan.row_groups):
        made, its = _rerounded(weight[rows], codes[rows], grid.part(rows), plan.grid_rule(rows.stop - rows.start))
        parts.append({"weight": made, **its.tensors()})
    return {**tensors, **{key: torch.cat([part[key] for part in parts]) for key in parts[0]}}


def _rerounded(weight: Tensor, codes: Tensor, grid: Grid, rule: GridRule) -> tuple[Tensor, Grid]:
    """Return codes and grid of ``weight`` [rows, in], float32, which replaces ``codes`` on ``grid``."""
    fitted = rule.fit(weight)
    if grid.scale is None:
        return fitted.quantize(weight), fitted
    before = grid.dequantize(codes)
    change = ((weight - before) / grid.spacing(weight)).square().mean(1)
    low, high = range_columns(before, grid.columns)
    empty = ((low == 0) & (high == 0)).any(1)  # the scale of zeros carries no information
    if rule.rows is not None:  # rows that share a scale are treated alike
        sharing = list(rule.rows)
        change = torch.cat([part.mean().expand_as(part) for part in change.split(sharing)])
        empty = torch.cat([part.all().expand_as(part) for part in empty.split(sharing)])
    small = (change < SMALL**2) & ~empty
    draw = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.device)
    # Away from 0 and 1, so that weights on the grid stay there despite earlier rounding errors.
    by_chance = grid.quantize_stochastic(weight, draw.clamp_(0.0005, 0.9995))
    return torch.where(small[:, None], by_chance, fitted.quantize(weight)), fitted.where(small, grid)


def check_finite(name: str, what: str, values: Tensor) -> None:
    """Raise ValueError, naming the layer, if values contain NaN or Inf."""
    if values.dtype.itemsize == 1:  # torch has no isfinite for FP8
        values = values.float()
    bad = values.numel() - int(values.isfinite().sum())
    if bad:
        raise ValueError(f"layer {name!r}: {bad} of {values.numel()} {what} are NaN or Inf")


def _joined(plan: LayerPlan, key: str, parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if key in plan.transform.tensors(plan.in_features, plan.row_groups):
        return plan.transform.joined(key, parts)
    return torch.cat(list(parts))


@dataclass
class _Part:
    """The solution of one row group."""

    tensors: dict[str, Tensor]
    divisor: Tensor | None
    alphas: tuple[Strength, ...]


def _solve_rows(name: str, w: Tensor, plan: LayerPlan, stats: LayerStats | None, dtype: torch.dtype) -> _Part:
    """Solve rows that see the same quantized input: all of them, or one separately transformed output segment."""
    rule = plan.grid_rule(len(w))
    problem = Problem(name, rule, plan.input_rule, plan.input_segments, stats, dtype)
    transformed = plan.transform.solve(w, problem)
    seen = None if stats is None else plan.transform.seen(stats, transformed.divisor)
    codes, grid = plan.config.calib.solve(transformed.weight, rule, seen, name)
    tensors = dict(transformed.tensors)
    tensors["weight"] = codes
    tensors |= grid.tensors()
    if plan.static_input:
        if seen is None:
            raise CalibrationError(f"layer {name!r}: a static input scale needs calibration data")
        tensors["input_scale"], negative = _input_scales(plan, seen)
        if any(plan.dual):
            tensors["input_scale_neg"] = negative
    return _Part(tensors, transformed.divisor, transformed.alphas)


def needs_token_scales(weight: Tensor, divisor: Tensor | None, plan: LayerPlan, stats: LayerStats) -> bool:
    """Return whether one calibrated scale is too coarse for the inputs of some rows of a layer's weight.

    The criterion is the relative output error caused by rounding the inputs, averaged over input rows that the scale
    was not computed from. It must be more than :data:`COARSE` times the format's nominal error, and per-token scales
    must at least halve it. All rows count equally, so that a few huge ones do not hide the others. With fewer than
    :data:`JUDGED_FROM` rows, the result is False.

    Args:
        weight: [rows, in] float32, in terms of the raw input.
        divisor: [in], divisor of the input; None for none.
        plan: plan of the layer, with static scales.
        stats: statistics of its raw inputs.
    """
    rule = plan.input_rule
    assert rule is not None
    if stats.count < JUDGED_FROM:
        return False
    by_token = replace(rule, dynamic=True, per_token=True)
    weight = weight if divisor is None else weight * divisor
    static_error = token_error = total = 0.0
    for half, held_out in stats.divided(divisor).halves():
        rows = held_out.to(weight.device)
        x, counts = half.rows[rows], half.row_weights[rows]
        size = (x @ weight.T).square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)

        def error(values: Tensor, scale: Tensor | None, x: Tensor = x, size: Tensor = size) -> Tensor:
            assert scale is not None
            off = (values * expand_columns(scale, plan.input_segments)).sub_(x) @ weight.T
            return (off.square_().sum(1) / size).clamp_(max=1)

        scales = rule.scales(*segment_ranges(half, plan.input_segments))
        static_error += float((error(*rule.quantize(x, *scales)) * counts).sum())
        token_error += float((error(*by_token.quantize(x)) * counts).sum())
        total += float(counts.sum())
    limit = (COARSE * nominal_error(rule.format)) ** 2 * total
    return static_error > limit and static_error > 4 * token_error


def _input_scales(plan: LayerPlan, seen: LayerStats) -> tuple[Tensor, Tensor]:
    assert plan.input_rule is not None
    return plan.input_rule.scales(*segment_ranges(seen, plan.input_segments))


def _useful_dual(plan: LayerPlan, stats: LayerStats, divisors: Sequence[Tensor | None]) -> tuple[bool, ...]:
    """Return which of the segments planned with dual scale have a small negative side over all data (e >= 1)."""
    useful = torch.zeros(len(plan.input_segments), dtype=torch.bool)
    for divisor in divisors:
        scale, negative = _input_scales(plan, stats.divided(divisor))
        useful |= (scale != negative).cpu()
    return tuple(useful.tolist())
