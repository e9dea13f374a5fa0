"""From a linear's weight, its plan and its statistics to the tensors of a QuantLinear: smooth -> SVD -> round.

Statistics are of the raw input X; what a smoothed layer sees follows from them: its range is range / s, its Hessian
``D^-1 H D^-1`` with D = diag(s).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hfquant import formats
from hfquant.activations import quantize_input, static_scales
from hfquant.algorithms import rounding
from hfquant.algorithms.gptq import gptq
from hfquant.algorithms.smooth import smoothing_vector
from hfquant.algorithms.svd import low_rank
from hfquant.calibration.batches import CalibrationError
from hfquant.config import CalibConfig, Calibrate, LayerConfig, OptConfig, Optimum
from hfquant.observers import LayerStats
from hfquant.planner import LayerPlan

logger = logging.getLogger(__name__)


@dataclass
class Solution:
    """A solved layer.

    Attributes:
        plan: as it ended up: the data has the last word on dual scale.
        tensors: by name, codes unpacked.
        alphas: smoothing strengths, one list a row group, one value an input segment.
        fallback: whether data was wanted and there was none.
    """

    plan: LayerPlan
    tensors: dict[str, Tensor]
    alphas: list[list[float]] = field(default_factory=list)
    fallback: bool = False


def solve(
    name: str, weight: Tensor, plan: LayerPlan, stats: LayerStats | None, dtype: torch.dtype | None = None
) -> Solution:
    """Quantize one layer.

    Args:
        name: for messages.
        weight: [out, in], any float dtype.
        plan: what the layer is to become.
        stats: of its inputs; None where the config needs no data or the layer never ran.
        dtype: of the low-rank branch; default: the weight's.

    Raises:
        ValueError: the weight has NaN or Inf.
    """
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise ValueError(f"layer {name!r}: {bad} of {weight.numel()} weights are NaN or Inf")
    fallback = plan.config.needs_data and stats is None
    if fallback:
        plan = without_data(plan)
    dtype = dtype or weight.dtype
    stats = None if stats is None else stats.to(weight.device)
    parts = [_solve_rows(name, weight[rows].float(), plan, stats, dtype) for rows in _blocks(plan.row_groups)]
    tensors = {key: _joined(key, [p.tensors[key] for p in parts]) for key in parts[0].tensors}
    if "input_scale_neg" in tensors:
        dual = (tensors["input_scale"] != tensors["input_scale_neg"]).view(-1, len(plan.input_segments)).any(0)
        plan = replace(plan, dual=tuple(dual.tolist()))
        if not any(plan.dual):
            del tensors["input_scale_neg"]
    elif any(plan.dual) and stats is not None:
        plan = replace(plan, dual=_useful_dual(plan, stats, tensors.get("smooth")))
    return Solution(plan, tensors, [p.alphas[0] for p in parts if p.alphas], fallback)


def _joined(key: str, parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.stack(list(parts)) if key == "smooth" else torch.cat(list(parts))


def _blocks(sizes: Sequence[int]) -> list[slice]:
    ends = torch.tensor(list(sizes)).cumsum(0).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _solve_rows(name: str, w: Tensor, plan: LayerPlan, stats: LayerStats | None, dtype: torch.dtype) -> Solution:
    """Solve the rows that share one view of the input: all of them, or one smoothed output segment."""
    config = plan.config
    tensors: dict[str, Tensor] = {}
    alphas: list[float] = []
    smooth = None
    if config.opt.type is not Optimum.DEFAULT:
        assert stats is not None
        smooth, alphas = _smoothing(w, plan, stats, dtype)
        tensors["smooth"] = smooth
        w = w * smooth
    if plan.rank:
        assert smooth is not None
        residual, tensors["svd_down"], tensors["svd_up"] = _split_low_rank(w, smooth, plan.rank, dtype)
        w = residual
    codes, scale, zero_point = _codes(name, w, plan, stats, smooth)
    tensors["weight"] = codes
    if scale is not None:
        tensors["weight_scale"] = scale.contiguous()
    if zero_point is not None:
        tensors["weight_zero_point"] = zero_point.contiguous()
    if plan.static_input:
        if stats is None:
            raise CalibrationError("a static input scale needs calibration data")
        scale, negative = _static_input(plan, stats, smooth)
        tensors["input_scale"] = scale
        if any(plan.dual):
            tensors["input_scale_neg"] = negative
    return Solution(plan, tensors, [alphas] if alphas else [])


def _codes(
    name: str, w: Tensor, plan: LayerPlan, stats: LayerStats | None, smooth: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    config, quant = plan.config, plan.config.weight_quant
    if config.calib.type is Calibrate.GPTQ:
        assert stats is not None
        assert stats.hessian is not None
        hessian = stats.hessian / stats.count
        hessian = hessian if smooth is None else hessian / smooth / smooth[:, None]
        return gptq(w, hessian, quant, config.calib, plan.columns, _rows_sharing(plan, len(w)), name)
    scale, zero_point = _weight_grid(w, plan, stats, smooth)
    return rounding.round_to_nearest(w, scale, zero_point, quant.type, plan.columns), scale, zero_point


def _weight_grid(
    w: Tensor, plan: LayerPlan, stats: LayerStats | None, smooth: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    importance = None
    if stats is not None:
        importance = stats.power / stats.count if smooth is None else stats.power / stats.count / smooth.square()
    return rounding.weight_grid(w, plan.config.weight_quant, plan.columns, _rows_sharing(plan, len(w)), importance)


def _rows_sharing(plan: LayerPlan, rows: int) -> Sequence[int] | None:
    """Sizes of the runs of these ``rows`` that have one scale; None where each row has its own."""
    if plan.config.weight_quant.axis is not None or plan.config.group_size:
        return None
    return plan.output_segments if len(plan.row_groups) == 1 else (rows,)


def _split_low_rank(w: Tensor, smooth: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Residual of the smoothed weight, and the factors as cast; ``down`` acts on the raw input, so 1/s is in it."""
    up, down = low_rank(w, rank)
    up, down = up.to(dtype), (down / smooth).to(dtype)
    return w - up.float() @ (down.float() * smooth), down, up


def _ranges(plan: LayerPlan, stats: LayerStats, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest (smoothed) input of each input segment, two [segments]."""
    low, high = (stats.low, stats.high) if smooth is None else (stats.low / smooth, stats.high / smooth)
    low, _ = formats.range_columns(low, plan.input_segments)
    _, high = formats.range_columns(high, plan.input_segments)
    return low, high


def _static_input(plan: LayerPlan, stats: LayerStats, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    assert plan.config.input_quant is not None
    low, high = _ranges(plan, stats, smooth)
    return static_scales(low, high, plan.config.input_quant.type, plan.dual)


def _useful_dual(plan: LayerPlan, stats: LayerStats, smooth: Tensor | None) -> tuple[bool, ...]:
    """Segments nominated for dual scale whose negative side is small over all data (e >= 1)."""
    assert plan.config.input_quant is not None
    useful = torch.zeros(len(plan.input_segments), dtype=torch.bool)
    for s in [smooth] if smooth is None or smooth.dim() == 1 else smooth:
        scale, negative = _static_input(plan, stats, s)
        useful |= (scale != negative).cpu()
    return tuple(useful.tolist())


def _smoothing(w: Tensor, plan: LayerPlan, stats: LayerStats, dtype: torch.dtype) -> tuple[Tensor, list[float]]:
    """The smoothing vector [in], and the alpha of each input segment: the config's, or the best on the sampled rows."""
    opt, magnitudes = plan.config.opt, _magnitudes(w, plan, stats)
    if not opt.search_alpha_config.enable:
        return smoothing_vector(*magnitudes, opt.alpha), [opt.alpha] * len(plan.input_segments)
    grid = opt.search_alpha_config.grid()
    losses = alpha_losses(w, plan, stats, grid, dtype)
    best = [grid[i] for i in losses.argmin(0).tolist()]
    vectors = {alpha: smoothing_vector(*magnitudes, alpha) for alpha in best}
    columns = _blocks(plan.input_segments)
    return torch.cat([vectors[alpha][c] for alpha, c in zip(best, columns, strict=True)]), best


def _magnitudes(w: Tensor, plan: LayerPlan, stats: LayerStats) -> tuple[Tensor, Tensor]:
    """What smoothing balances: of each input channel, and of each column of ``w``, two [in]."""
    if plan.config.opt.magnitude == "rms":
        return (stats.power / stats.count).sqrt(), w.square().mean(0).sqrt()
    return stats.amax, w.abs().amax(0)


def alpha_losses(w: Tensor, plan: LayerPlan, stats: LayerStats, grid: Sequence[float], dtype: torch.dtype) -> Tensor:
    """``||Q(X_i / s) Q(W_i s)^T (+ low rank) - X_i W_i^T||^2`` of each alpha and input segment i, [alphas, segments].

    Estimated on the sampled rows. Where the activations' scale is static it comes from the half of the data that the
    row is not in.
    """
    # Round to nearest stands in for GPTQ, which would cost a sweep for each alpha.
    plan = replace(plan, config=_rounded(plan.config))
    weights = stats.row_weights
    everything = [(stats, torch.ones_like(stats.fold))]
    losses = torch.zeros(len(grid), len(plan.input_segments), device=w.device)
    for half, chosen in stats.halves() if plan.static_input else everything:
        rows = chosen.to(w.device)
        x, row_weights = stats.sample[rows], weights[rows, None]
        exact = [x[:, columns] @ w[:, columns].T for columns in _blocks(plan.input_segments)]
        magnitudes = _magnitudes(w, plan, half)
        for i, alpha in enumerate(grid):
            smooth = smoothing_vector(*magnitudes, alpha)
            outputs = _segment_outputs(w, x, plan, half, smooth, dtype)
            for j, (output, target) in enumerate(zip(outputs, exact, strict=True)):
                losses[i, j] += (output.sub_(target).square_() * row_weights).sum()
    return losses


def _segment_outputs(
    w: Tensor, x: Tensor, plan: LayerPlan, stats: LayerStats, smooth: Tensor, dtype: torch.dtype
) -> Iterator[Tensor]:
    """What each input segment of the quantized layer contributes to the output, [rows, out] each."""
    ws, down, up = w * smooth, None, None
    if plan.rank:
        ws, down, up = _split_low_rank(ws, smooth, plan.rank, dtype)
    scale, zero_point = _weight_grid(ws, plan, stats, smooth)
    w_hat = rounding.rounded_weight(ws, scale, zero_point, plan.config.weight_quant.type, plan.columns)
    x_hat, quant = x / smooth, plan.config.input_quant
    if quant is not None:
        static = _static_input(plan, stats, smooth) if plan.static_input else (None, None)
        values, x_scale = quantize_input(x_hat, quant, plan.input_segments, plan.dual, *static)
        x_hat = values if x_scale is None else values * formats.expand_columns(x_scale, plan.input_segments)
    for columns in _blocks(plan.input_segments):
        output = x_hat[:, columns] @ w_hat[:, columns].T
        if down is not None and up is not None:
            output += x[:, columns] @ down.float()[:, columns].T @ up.float().T
        yield output


def without_data(plan: LayerPlan) -> LayerPlan:
    """The stated fallback for a layer that calibration never ran.

    No smoothing, no low-rank branch, weights rounded to nearest, activations scaled by the token at run time.
    """
    quant = plan.config.input_quant
    if quant is not None and quant.type.is_scaled:
        quant = quant.model_copy(update={"dynamic": True, "axis": -1})
    update = {"opt": OptConfig(type=Optimum.DEFAULT), "input_quant": quant}
    return replace(plan, config=_rounded(plan.config).model_copy(update=update))


def plain(plan: LayerPlan) -> LayerPlan:
    """The same formats with nothing done to help them: what the report compares with."""
    config = _rounded(plan.config).model_copy(update={"opt": OptConfig(type=Optimum.DEFAULT)})
    return replace(plan, config=config, dual=(False,) * len(plan.dual))


def _rounded(config: LayerConfig) -> LayerConfig:
    """The config with round-to-nearest in place of GPTQ, whose group size moves to the weight."""
    weight = config.weight_quant.model_copy(update={"group_size": config.group_size})
    return config.model_copy(update={"calib": CalibConfig(), "weight_quant": weight})
