"""Speed of the CUDA kernels relative to ``F.linear``, on a machine with a GPU.

    python -m benchmarks.kernels_cuda [--eager]

Prints a Markdown table: for each shape and product, the speed of the layer with bfloat16 or float16 in and out relative
to ``F.linear`` in the same dtype. Times include input quantization, scales and bias. Each product is captured in a CUDA
graph, so only the device is timed; with ``--eager`` it is called from Python. Repeats are interleaved and medians are
taken. Before timing, each product is compared with the reference, and a wrong one ends the run. Rotated inputs are
rotated by the op, so these products are timed as a layer calls them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from hfquant.formats import FORMATS, InputRule, split_columns
from hfquant.kernels import reference
from hfquant.kernels.base import Operands, Product
from hfquant.kernels.op import rotating
from hfquant.kernels.table import KERNELS, obstacle

#: Tokens, input features, output features.
SHAPES = (
    (1, 1024, 4096), (1, 4096, 4096), (64, 1152, 4608), (256, 1152, 1152), (1024, 1536, 6144), (4096, 640, 2560),
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kind:
    """A product to time, of any shape, with fields as in a config. ``segments`` divide the input evenly."""

    kernel: str
    weight: str
    input: str | None = None
    group: int | None = None
    segments: int = 1
    dual: bool = False
    rank: int = 0
    symmetric: bool = True
    rotation: int = 0

    def product(self, columns: int) -> Product:
        """Return the product for ``columns`` input features."""
        sizes = (columns // self.segments,) * self.segments
        flags = (self.dual,) * self.segments
        rule = InputRule(FORMATS[self.input], True, True, sizes, flags) if self.input else None
        blocks = split_columns(sizes, self.group)
        return Product(FORMATS[self.weight], blocks, sizes, rule, self.symmetric, self.rotation)

    def operands(self, product: Product, out: int, dtype: torch.dtype, device: str) -> Operands:
        """Return random operands of a product."""
        form, columns, groups = product.weight, product.in_features, len(product.columns)
        weight = torch.randn(out, columns) / columns**0.5
        codes = form.quantize(weight, weight.abs().amax(1, keepdim=True) / form.qmax)
        scale = torch.randint(96, 256, (out, groups), dtype=torch.uint8) if self.group else torch.rand(out, groups)
        zeros = None if self.symmetric else form.pack(torch.randint(-4, 4, (out, groups), dtype=torch.int8))
        tensors = {
            "weight": form.pack(codes),
            "zero_point": zeros,
            "scale": scale,
            "scale_row": torch.rand(out, 1) / form.qmax if self.group else None,
            "down": (torch.randn(self.rank, columns) / columns).to(dtype) if self.rank else None,
            "up": torch.randn(out, self.rank).to(dtype) if self.rank else None,
            "bias": torch.randn(out).to(dtype),
        }
        return Operands(**{name: None if t is None else t.to(device) for name, t in tensors.items()})


KINDS = {
    "W8A8": Kind("triton-integer", "int8", "int8"),
    "W8A8, torch._int_mm": Kind("int-mm-cuda", "int8", "int8"),
    "W8A8, dual scale": Kind("triton-integer", "int8", "int8", dual=True),
    "W8A8, 4 segments": Kind("triton-integer", "int8", "int8", segments=4),
    "W8A8, rank 32": Kind("triton-integer", "int8", "int8", rank=32),
    "W4A8 group 32": Kind("triton-integer", "int4", "int8", 32),
    "W4A8 group 64": Kind("triton-integer", "int4", "int8", 64),
    "W4A16 group 64": Kind("triton-weight-only", "int4", None, 64),
    "W8A16": Kind("triton-weight-only", "int8"),
    "W4A16 group 32, as w4a16-gptq": Kind("triton-weight-only", "int4", group=32, symmetric=False, rotation=64),
    "W6A16 group 64, as w6a16": Kind("triton-weight-only", "int6", group=64, symmetric=False),
    "FP8, torch._scaled_mm": Kind("scaled-mm", "fp8e4m3", "fp8e4m3"),
}


def runs_of(tokens: int, columns: int, out: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Tensor]]:
    """Return the calls to time, by name, each checked against the reference; kernels that cannot run here are left out.

    Raises:
        RuntimeError: a kernel's output is wrong.
    """
    x = torch.nn.functional.silu(torch.randn(tokens, columns, device=device)).to(dtype)
    weight, bias = torch.randn(out, columns, device=device).to(dtype), torch.randn(out, device=device).to(dtype)
    runs: dict[str, Callable[[], Tensor]] = {"F.linear": lambda: linear(x, weight, bias)}
    for name, kind in KINDS.items():
        product, kernel = kind.product(columns), KERNELS[kind.kernel]
        run = rotating(kernel.run) if kind.rotation else kernel.run
        if obstacle(kernel, product, device):
            continue
        operands = kind.operands(product, out, dtype, device)
        expected = reference.run(x, operands, product).float()
        error = float((run(x, operands, product).float() - expected).abs().max() / expected.abs().max())
        if not error < 2 * torch.finfo(dtype).eps:
            raise RuntimeError(
                f"{name} at {(tokens, columns, out)} in {dtype}: off by {error:.1e} of the largest output"
            )
        runs[name] = lambda run=run, operands=operands, product=product: run(x, operands, product)
    return runs


def captured(run: Callable[[], Tensor], calls: int) -> Callable[[], None]:
    """Return a function that replays ``calls`` calls of ``run`` as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def called(run: Callable[[], Tensor], calls: int) -> Callable[[], None]:
    """Return a function that calls ``run`` ``calls`` times."""

    def all_calls() -> None:
        for _ in range(calls):
            run()

    return all_calls


def seconds(runs: dict[str, Callable[[], None]], calls: int, repeats: int) -> dict[str, float]:
    """Return the median seconds per call of each run, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1000 / calls)
    return {name: statistics.median(found[1:] or found) for name, found in times.items()}


def table(rows: dict[str, dict[tuple[int, int, int], list[float | None]]]) -> str:
    """Return a Markdown table of ratios: products by shapes, with the ratios of both dtypes in each cell."""
    lines = ["| bf16 / fp16 | " + " | ".join(map(str, SHAPES)) + " |", "| --- |" + " --- |" * len(SHAPES)]
    for name, found in rows.items():
        cells = [" / ".join("-" if r is None else f"{r:.2f}" for r in found.get(shape, [None])) for shape in SHAPES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark.

    Raises:
        SystemExit: there is no CUDA device.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels_cuda", description=__doc__)
    parser.add_argument("--eager", action="store_true", help="call from Python in place of CUDA graphs")
    parser.add_argument("--calls", type=int, default=20, help="calls that are timed as one")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels_cuda times kernels on a GPU, and torch finds no CUDA device here")
    torch.manual_seed(0)
    prepare = called if options.eager else captured
    rows: dict[str, dict[tuple[int, int, int], list[float | None]]] = {name: {} for name in KINDS}
    for shape in SHAPES:
        for dtype in DTYPES:
            runs = runs_of(*shape, dtype, "cuda")
            found = seconds({n: prepare(r, options.calls) for n, r in runs.items()}, options.calls, options.repeats)
            for name in KINDS:
                ratio = found["F.linear"] / found[name] if name in found else None
                rows[name].setdefault(shape, []).append(ratio)
    how = "called from Python" if options.eager else "CUDA graphs"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {how}: times as fast as F.linear\n")
    print(table(rows))


if __name__ == "__main__":
    main()
