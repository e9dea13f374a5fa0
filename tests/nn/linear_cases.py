"""Shared by the tests of QuantLinear: plans of every kind, layers with random tensors, and the layer in float64."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hfquant import QuantLinear
from hfquant.algorithms import Identity, Smooth, Transform
from hfquant.algorithms.low_rank import LowRank
from hfquant.formats import FORMATS
from hfquant.layer_config import InputQuant, LayerConfig, WeightQuant
from hfquant.layer_plan import LayerPlan
from tests import oracle

IN, OUT = 24, 10
#: float32 rounding, relative to the sum of the magnitudes of all terms.
TOLERANCE = 2e-6
PLAIN, SMOOTH, SVD = Identity(), Smooth(), LowRank(low_rank=3)


def rank(plan: LayerPlan) -> int:
    """Return the rank of the branch, 0 if there is none."""
    return getattr(plan.transform, "low_rank", 0)


@dataclass
class Case:
    """A plan without an input format."""

    weight: WeightQuant
    opt: Transform = PLAIN
    inputs: tuple[int, ...] = (IN,)
    outputs: tuple[int, ...] = (OUT,)
    dual: tuple[bool, ...] = ()

    def plan(self, quant: InputQuant | None = None, real: bool = False) -> LayerPlan:
        config = LayerConfig(weight_quant=self.weight, input_quant=quant, opt=self.opt, real_quant=real)
        dual = self.dual if quant and quant.format.is_integer and quant.format.bits < 16 else ()
        return LayerPlan(
            config, sum(self.inputs), sum(self.outputs), self.inputs, self.outputs, dual or (False,) * len(self.inputs)
        )


def cases(dtype: str) -> dict[str, Case]:
    form = FORMATS[dtype]
    channel, zero = WeightQuant(type=dtype), {"symmetric": not form.is_integer}
    group = {"group_size": 4} if form.has_scale else {}
    short = {"group_size": 10} if form.has_scale else {}
    return {
        "channel": Case(channel),
        "group": Case(WeightQuant(type=dtype, **group)),
        "float32 scales": Case(WeightQuant(type=dtype, **group, **zero, **({"scale": "float32"} if group else {}))),
        "short group": Case(WeightQuant(type=dtype, **short, **zero)),
        "short groups of segments": Case(WeightQuant(type=dtype, **short), SMOOTH, (13, 11), (3, 7), (True, False)),
        "input segments": Case(channel, inputs=(5, 8, 11)),
        "dual": Case(channel, inputs=(9, 15), dual=(True, False)),
        "asymmetric": Case(WeightQuant(type=dtype, **zero, **group)),
        "smooth": Case(channel, SMOOTH),
        "output segments": Case(channel, SMOOTH, outputs=(3, 7)),
        "svd": Case(channel, SVD),
        "all at once": Case(WeightQuant(type=dtype, **zero, **group), SVD, (8, 16), (3, 7), (True, True)),
    }


def random_tensors(plan: LayerPlan, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return tensors that a solver could have made, but random: unpacked codes over their whole range."""
    made = {name: torch.rand(spec.shape) + 0.5 for name, spec in plan.tensors().items()}
    weight, shape = plan.config.weight_quant, (plan.out_features, plan.in_features)
    form = weight.format
    half = 2 ** (form.bits - 1)
    if form.is_integer:
        low = -half if not weight.symmetric else 1 - half
        made["weight"] = torch.randint(low, half, shape).to(form.code_dtype)
    else:
        made["weight"] = form.quantize(torch.randn(shape), torch.full((1,), 0.01))
    groups = (plan.out_features, len(plan.columns))
    if "weight_scale_row" in made:
        made["weight_scale"] = torch.randint(96, 256, groups, dtype=torch.uint8)
        made["weight_scale_row"] /= form.qmax
    elif "weight_scale" in made:
        made["weight_scale"] /= form.qmax
    if "weight_zero_point" in made:
        made["weight_zero_point"] = form.pack(torch.randint(-half, half, groups).to(form.code_dtype))
    if "input_scale" in made:
        made["input_scale"] *= 2 / plan.config.input_quant.format.qmax
    if "input_scale_neg" in made:
        flags = torch.tensor(plan.dual * len(plan.row_groups))
        made["input_scale_neg"] = torch.where(flags, made["input_scale"] / 8, made["input_scale"])
    for name in ("svd_down", "svd_up"):
        if name in made:
            made[name] = ((made[name] - 1) / 4).to(dtype)
    return made


def layer_of(plan: LayerPlan, bias: bool = True, dtype: torch.dtype = torch.float32):
    """Return a QuantLinear and the tensors it was made from."""
    tensors = random_tensors(plan, dtype)
    vector = nn.Parameter(torch.randn(plan.out_features, dtype=dtype)) if bias else None
    return QuantLinear.from_tensors(plan, tensors, vector), tensors | ({"bias": vector.data} if bias else {})


def some_input(*lead: int, features: int = IN) -> torch.Tensor:
    x = torch.nn.functional.silu(torch.randn(*lead, features) * 2)
    if x.numel():
        x[..., 0] *= 8
    return x


def weight_by_hand(plan: LayerPlan, tensors) -> np.ndarray:
    """Return the smoothed weight in float64."""
    form = plan.config.weight_quant.format
    codes = tensors["weight"].numpy()
    if not form.is_integer:
        values = oracle.decode(form.name)[codes.view(f"u{codes.itemsize}")]
        if not form.has_scale:
            return values
    else:
        values = codes.astype(np.float64)
    count = len(plan.columns)
    group = np.repeat(np.arange(count), plan.columns)
    if "weight_zero_point" in tensors:
        zero = tensors["weight_zero_point"].numpy()
        if form.bits < 8:
            zero = np.array([oracle.unpacked(row.tobytes(), form.bits, count) for row in zero])
        values = values - zero[:, group]
    return values * scale_by_hand(plan, tensors)


def scale_by_hand(plan: LayerPlan, tensors) -> np.ndarray:
    """Return the weight's scale of each column in float64."""
    scale = tensors["weight_scale"].numpy()
    if "weight_scale_row" in tensors:
        row = tensors["weight_scale_row"].numpy()
        scale = np.vectorize(oracle.group_scale)(scale).astype(np.float32) * row
    return scale.astype(np.float64)[:, np.repeat(np.arange(len(plan.columns)), plan.columns)]


def terms_by_hand(plan: LayerPlan, tensors) -> np.ndarray:
    """Return the largest magnitude that a kernel may add up for each weight.

    Integer kernels may multiply unsigned codes, and later subtract the offset 2^(b-1) times the sum of the inputs.
    """
    form, weight = plan.config.weight_quant.format, np.abs(weight_by_hand(plan, tensors))
    offset = plan.config.real_quant and form.is_integer and form.bits <= 8
    return weight + scale_by_hand(plan, tensors) * 2.0 ** (form.bits - 1) if offset else weight


def forward_by_hand(plan: LayerPlan, tensors, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the layer's output in float64 and, for tolerances, the magnitude of everything summed."""
    x = x.float().numpy()
    w, terms = weight_by_hand(plan, tensors), terms_by_hand(plan, tensors)
    y, size, start = [], [], 0
    quant, segments = plan.config.input_quant, plan.input_segments
    for i, rows in enumerate(plan.row_groups):
        xs = x
        if "smooth" in tensors:
            xs = x / tensors["smooth"].reshape(-1, plan.in_features)[i].numpy()
        if quant is None:
            values = xs.astype(np.float64)
            if plan.config.real_quant:
                # A kernel may convert floats to 16-bit integers, with a separate unit for each 128 columns.
                units = [
                    np.abs(v).max(-1, keepdims=True) / 32639 for v in np.split(xs, range(128, xs.shape[-1], 128), -1)
                ]
                halves = np.concatenate([np.repeat(u / 2, 128, -1) for u in units], -1)[..., : xs.shape[-1]]
                rounding = halves @ np.abs(w[start : start + rows]).T
        elif quant.dynamic or not quant.format.has_scale:
            values, _ = oracle.activation(xs, quant.type, quant.axis, segments, plan.dual)
        else:
            column = np.repeat(np.arange(len(segments)), segments)
            scale = tensors["input_scale"].reshape(-1, len(segments))[i].numpy()[column]
            if "input_scale_neg" in tensors:
                negative = tensors["input_scale_neg"].reshape(-1, len(segments))[i].numpy()[column]
                scale = np.where(xs < 0, negative, scale)
            values = oracle.codes_of(xs, scale, quant.type) * scale.astype(np.float64)
        block = slice(start, start + rows)
        part, bound = values @ w[block].T, np.abs(values) @ terms[block].T
        if quant is None and plan.config.real_quant:
            bound = bound + rounding / TOLERANCE
        if rank(plan):
            down = tensors["svd_down"].double().numpy().reshape(-1, rank(plan), plan.in_features)[i]
            up = tensors["svd_up"].double().numpy()[block]
            part = part + x.astype(np.float64) @ down.T @ up.T
            bound = bound + np.abs(x.astype(np.float64)) @ np.abs(down).T @ np.abs(up).T
        y.append(part)
        size.append(bound)
        start += rows
    y, size = np.concatenate(y, -1), np.concatenate(size, -1)
    if "bias" in tensors:
        y, size = y + tensors["bias"].double().numpy(), size + tensors["bias"].abs().double().numpy()
    return y, size


def assert_close(y: torch.Tensor, expected: np.ndarray, size: np.ndarray) -> None:
    error = np.abs(y.double().numpy() - expected)
    assert (error <= TOLERANCE * size + 1e-30).all(), (error / size).max()
