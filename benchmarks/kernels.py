"""Speed of single quantized linears relative to fp32 ``F.linear``, next to bf16, ``torch._int_mm`` and peers.

    python -m benchmarks.kernels --out benchmarks/results/kernels.md
    python -m benchmarks.kernels --device cuda
    python -m benchmarks.kernels --rows "fp32*" "hfquant W8*" --shapes 64x1152x4608

One process times all rows of a shape in turns and takes medians, so ratios are stable even if the machine's speed is
not. Inputs come from a pool and differ from those of the previous call. A turn repeats a row for a few milliseconds, so
weights that fit the caches are read from there. Every time includes quantization, scales and bias, except that of
``torch._int_mm``, which only multiplies codes. The output of each row is first compared with the float product (for
hfquant, with the same layer in fake quantization), and a wrong row is not timed. Peers that are meant to be compiled
are compiled, with weights frozen into the graph.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import timing
from benchmarks.peer_kernels import ALL_PEERS, compiling, missing, peer_rows
from hfquant import QuantLinear
from hfquant.algorithms import Identity, Transform
from hfquant.algorithms.low_rank import LowRank
from hfquant.kernels.table import pick
from hfquant.layer_config import InputQuant, LayerConfig, WeightQuant
from hfquant.layer_plan import LayerPlan

SHAPES = ("1x1024x4096", "1x4096x4096", "64x1152x4608", "256x1152x1152", "1024x1536x6144", "4096x640x2560")
QUICK = ("1x128x64", "5x128x64")

TOKEN = InputQuant(type="int8", axis=-1, dynamic=True)
CHANNEL = WeightQuant(type="int8", axis=-1)


class Layer(NamedTuple):
    """A layer of hfquant without its shape."""

    weight: WeightQuant
    input: InputQuant | None = TOKEN
    transform: Transform = Identity()
    segments: int = 1
    dual: bool = False

    def plan(self, in_features: int, out_features: int) -> LayerPlan:
        """Return the plan of such a layer of a given shape."""
        segments = tuple(len(part) for part in torch.arange(in_features).tensor_split(self.segments))
        config = LayerConfig(weight_quant=self.weight, input_quant=self.input, opt=self.transform, real_quant=True)
        return LayerPlan(config, in_features, out_features, segments, (out_features,), (self.dual,) * self.segments)


LAYERS = {
    "W8A8": Layer(CHANNEL),
    "W8A8 static": Layer(CHANNEL, InputQuant(type="int8")),
    "W8A8 dual scale": Layer(CHANNEL, dual=True),
    "W8A8 4 segments": Layer(CHANNEL, segments=4),
    "W8A8 rank 32": Layer(CHANNEL, transform=LowRank(low_rank=32)),
    "W4A8 g32": Layer(WeightQuant(type="int4", group_size=32)),
    "W4A8 g64": Layer(WeightQuant(type="int4", group_size=64)),
    "W4A16 g64 asymmetric": Layer(WeightQuant(type="int4", group_size=64, symmetric=False), None),
    "W4A16 g32 asymmetric": Layer(WeightQuant(type="int4", group_size=32, symmetric=False), None),
    "W8A16": Layer(CHANNEL, None),
    "INT16 weights": Layer(WeightQuant(type="int16", axis=-1), None),
    "FP16 weights": Layer(WeightQuant(type="fp16"), None),
    "FP8A16": Layer(WeightQuant(type="fp8e4m3", axis=-1), None),
    "FP8A8": Layer(WeightQuant(type="fp8e4m3", axis=-1), InputQuant(type="fp8e4m3", axis=-1, dynamic=True)),
}


class Subject(NamedTuple):
    """Input to building a row: a float32 linear and the number of tokens."""

    linear: nn.Linear
    tokens: int


class Built(NamedTuple):
    """A row for one shape."""

    run: Callable[[Tensor], Tensor]
    expected: Callable[[Tensor], Tensor]  # output for the same input
    prepare: Callable[[Tensor], Tensor]  # converts a float32 input of the pool for this row
    kernel: str = ""  # kernel picked by hfquant's table


class Row(NamedTuple):
    """How a row is built, and the largest relative error of a correct output."""

    build: Callable[[Subject], Built]
    tolerance: float


def random_layer(plan: LayerPlan, dtype: torch.dtype, device: torch.device) -> QuantLinear:
    """Return a layer with random codes over their whole range and scales of a plausible size."""
    form = plan.config.weight_quant.format
    half, shape = 2 ** (form.bits - 1), (plan.out_features, plan.in_features)
    made = {name: torch.rand(spec.shape) + 0.5 for name, spec in plan.tensors().items()}
    if form.is_integer:
        low = 1 - half if plan.config.weight_quant.symmetric else -half
        made["weight"] = torch.randint(low, half, shape).to(form.code_dtype)
    else:
        made["weight"] = form.quantize(torch.randn(shape), torch.full((1,), 0.01))
    row = "weight_scale_row" if "weight_scale_row" in made else "weight_scale"
    if form.has_scale:
        made[row] /= 20 * form.qmax
    if "weight_scale_row" in made:
        made["weight_scale"] = torch.randint(96, 256, made["weight_scale"].shape, dtype=torch.uint8)
    if "weight_zero_point" in made:
        made["weight_zero_point"] = form.pack(torch.randint(-2, 3, (shape[0], len(plan.columns))).to(form.code_dtype))
    if "input_scale" in made:
        made["input_scale"] *= 4 / 127
    for name in ("svd_down", "svd_up"):
        if name in made:
            made[name] = ((made[name] - 1) / 4).to(dtype)
    tensors = {name: tensor.to(device) for name, tensor in made.items()}
    return QuantLinear.from_tensors(plan, tensors, nn.Parameter(torch.randn(shape[0], dtype=dtype, device=device)))


def _hfquant(layer: Layer, dtype: torch.dtype) -> Row:
    def build(subject: Subject) -> Built:
        linear = subject.linear
        device = linear.weight.device
        module = random_layer(layer.plan(linear.in_features, linear.out_features), dtype, device)

        def fake(x: Tensor) -> Tensor:
            module.real_quant = False
            y = module(x)
            module.real_quant = True
            return y

        def prepare(x: Tensor) -> Tensor:
            return (F.silu(2 * x) if layer.dual else x).to(dtype)

        kernel = pick(module.product, device.type, dtype, subject.tokens, linear.out_features)
        return Built(module, fake, prepare, kernel.name)

    return Row(build, 1e-3 if dtype == torch.float32 else 1e-2)


def _plain(dtype: torch.dtype) -> Row:
    def build(subject: Subject) -> Built:
        module = copy.deepcopy(subject.linear).to(dtype)
        return Built(module, lambda x: subject.linear(x.float()), lambda x: x.to(dtype))

    return Row(build, 0.02)


def _int_mm(subject: Subject) -> Built:
    shape = subject.linear.weight.shape
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=subject.linear.weight.device)
    wide = codes.float()
    return Built(
        lambda x: torch._int_mm(x, codes.T), lambda x: x.float() @ wide.T, lambda x: (x * 32).clamp(-127, 127).char()
    )


def _peer(name: str, dtype: torch.dtype) -> Row:
    def build(subject: Subject) -> Built:
        model = nn.Sequential(copy.deepcopy(subject.linear).to(dtype)).eval()
        model = ALL_PEERS[name](model, [])
        run = torch.compile(model, dynamic=False) if "torchao" in name else model
        return Built(run, lambda x: subject.linear(x.float()), lambda x: x.to(dtype))

    return Row(build, 0.2 if name.startswith("w4") else 0.05)


def _rows() -> dict[str, Row]:
    fp32, bf16 = torch.float32, torch.bfloat16
    rows = {"fp32 F.linear": _plain(fp32), "bf16 F.linear": _plain(bf16), "torch._int_mm alone": Row(_int_mm, 1e-5)}
    rows |= {f"hfquant {name}": _hfquant(layer, fp32) for name, layer in LAYERS.items()}
    integers = ("W8A8", "W4A8 g32", "W4A8 g64", "W4A16 g32 asymmetric", "W4A16 g64 asymmetric", "W8A16")
    for name in (*integers, "INT16 weights", "FP16 weights", "FP8A16", "FP8A8"):
        rows[f"hfquant {name}, bf16"] = _hfquant(LAYERS[name], bf16)
    rows |= {row: _peer(name, dtype) for row, (name, dtype) in peer_rows().items()}
    return rows


#: All rows by name; the first is the baseline.
ROWS: dict[str, Row] = _rows()


class Measured(NamedTuple):
    """Figures for one shape, by row."""

    seconds: dict[str, float]
    kernels: dict[str, str]
    faults: dict[str, str]  # why a row has no time
    others: float  # share of the CPUs that other processes took


def measure(
    shape: tuple[int, int, int], rows: Mapping[str, Row], seconds: float, device: torch.device, pool: int
) -> Measured:
    """Build all rows for a shape (M, K, N), check their outputs, and time them in turns for ``seconds``."""
    tokens, columns, out = shape
    torch.manual_seed(0)
    subject = Subject(nn.Linear(columns, out, device=device), tokens)
    inputs = [torch.randn(tokens, columns, device=device) for _ in range(pool)]
    runs: dict[str, timing.Run] = {}
    kernels, faults = {}, {}
    for name, row in rows.items():
        try:
            with compiling():
                built = row.build(subject)
                mine = [built.prepare(x) for x in inputs]
                error = timing.relative_error(built.run(mine[0]), built.expected(mine[0]))
        except Exception as caught:
            logging.debug("%s at %s", name, shape, exc_info=True)
            faults[name] = timing.reason(caught)
            continue
        if not error <= row.tolerance:
            faults[name] = f"computes something else (relative error {error:.2g})"
            continue
        runs[name] = lambda i, run=built.run, mine=mine: run(mine[i % len(mine)])
        if built.kernel:
            kernels[name] = built.kernel
    sync = torch.cuda.synchronize if device.type == "cuda" else int
    with timing.watched() as share:
        medians = timing.interleaved(runs, seconds, sync=sync, clock=timing.clock_of(device.type))
    return Measured(medians, kernels, faults, share[0])


def report(results: Mapping[str, Measured], rows: list[str], absent: Mapping[str, str], header: str) -> str:
    """Return the tables of ratios and of kernels, and the rows not measured, as Markdown."""
    unit = rows[0]

    def ratio(found: Measured, name: str) -> str:
        if name not in found.seconds:
            return "-"
        own = f" ({found.seconds[name] * 1e3:.3g} ms)" if name == unit else ""
        return f"{found.seconds[unit] / found.seconds[name]:.2f}{own}"

    columns = [f"({shape.replace('x', ', ')})" for shape in results]
    found = results.values()
    parts = [
        f"Speed relative to {unit} for (M, K, N); more is faster. {header}\n",
        f"Share of the CPUs that other processes took meanwhile: {timing.shares([m.others for m in found])}.\n",
        timing.markdown("", columns, {name: [ratio(m, name) for m in found] for name in rows}),
        "The kernels that the table picked:\n",
        timing.markdown(
            "", columns, {n: [m.kernels.get(n, "-") for m in found] for n in rows if n.startswith("hfquant")}
        ),
    ]
    notes = [f"- {why}" for why in dict.fromkeys(absent.values())]
    notes += [f"- {name} at {shape}: {why}" for shape, m in results.items() for name, why in m.faults.items()]
    return "\n".join([*parts, *(["Not measured:\n", *notes, ""] if notes else [])])


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables and write them; return 1 if a row that should run did not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--shapes", nargs="+", metavar="MxKxN", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB", help="rows to run; the first always is")
    parser.add_argument("--seconds", type=float, default=40.0, help="time for the turns of one shape")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, as few turns as possible")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)

    device = torch.device(args.device)
    shapes = args.shapes or (QUICK if args.quick else SHAPES)
    first = next(iter(ROWS))
    wanted = [name for name in ROWS if name == first or any(fnmatchcase(name, glob) for glob in args.rows)]
    absent = {name: why for name in wanted if (why := missing(name))}
    rows = {name: ROWS[name] for name in wanted if name not in absent}
    name = torch.cuda.get_device_name(device) + ", " if device.type == "cuda" else ""
    results: dict[str, Measured] = {}
    text = ""
    for shape in shapes:
        start = time.perf_counter()
        tokens, columns, out = map(int, shape.split("x"))
        with torch.no_grad():
            results[shape] = measure((tokens, columns, out), rows, 0 if args.quick else args.seconds, device, 8)
        print(f"{shape}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        text = report(results, wanted, absent, name + timing.machine())
        if args.out:  # a run that is interrupted leaves what it has measured
            args.out.write_text(text)
    print(text)
    own = [name for m in results.values() for name in m.faults if name.startswith(("fp32", "bf16", "hfquant"))]
    return int(bool(own))


if __name__ == "__main__":
    sys.exit(main())
