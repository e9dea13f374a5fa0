"""Speed of single quantized convolutions relative to torch's float ones, on one thread.

    python -m benchmarks.conv --out benchmarks/results/conv.md
    python -m benchmarks.conv --rows "W8A8*" --cases "3x3 320*"

One process times all rows of a case in turns and takes medians of CPU time, so ratios are stable even if the machine's
speed is not. Inputs come from a pool and differ from those of the previous call. Every time includes unfolding,
quantization, scales and bias. The output of each row is compared with the float convolution first.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import hfquant
from benchmarks import timing


class Case(NamedTuple):
    """A convolution and the shape of its input."""

    conv: nn.Module
    shape: tuple[int, ...]


def _conv2d(kernel: int, channels: int, out: int, size: int, stride: int = 1) -> Case:
    return Case(nn.Conv2d(channels, out, kernel, stride, kernel // 2), (1, channels, size, size))


CASES = {
    "3x3 320-320, 64x64": lambda: _conv2d(3, 320, 320, 64),
    "3x3 640-640, 32x32": lambda: _conv2d(3, 640, 640, 32),
    "1x1 960-640, 32x32": lambda: _conv2d(1, 960, 640, 32),
    "3x3 stride 2 320-320, 64x64": lambda: _conv2d(3, 320, 320, 64, 2),
    "3x3x3 96-96, 4x16x16": lambda: Case(nn.Conv3d(96, 96, 3, padding=1), (1, 96, 4, 16, 16)),
    "tiny": lambda: _conv2d(3, 32, 32, 5),
}
QUICK = ["tiny"]

_CHANNEL = {"opt": {"type": "default"}, "weight_quant": {"type": "int8", "axis": -1}, "real_quant": True}
CONFIGS = {
    "W8A8": _CHANNEL | {"input_quant": {"type": "int8", "axis": -1, "dynamic": True}},
    "W8A16": _CHANNEL | {"input_quant": None},
    "W4A16 g32": _CHANNEL | {"input_quant": None, "weight_quant": {"type": "int4", "group_size": 32}},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Largest relative error of a correct output. Rounding Gaussian weights to 4 bits gives about 0.1.
TOLERANCE = 0.15


def quantized(conv: nn.Module, config: dict[str, object]) -> nn.Module:
    """Return a copy of a convolution, quantized without data."""
    model = nn.Sequential(copy.deepcopy(conv))
    hfquant.quantize(model, None, {"default": config, "0": {"enable": True}})
    return model[0]


def measure(case: Case, wanted: Sequence[str], seconds: float) -> dict[str, float]:
    """Return the time of each row of a case in seconds, float rows first.

    Raises:
        ValueError: the output of a row differs from the float convolution's.
    """
    layers: dict[str, tuple[nn.Module, torch.dtype]] = {}
    for name, dtype in DTYPES.items():
        conv = copy.deepcopy(case.conv).to(dtype)
        layers[f"float {name}"] = conv, dtype
        for config, section in CONFIGS.items():
            if any(fnmatchcase(f"{config} {name}", glob) for glob in wanted):
                layers[f"{config} {name}"] = quantized(conv, section), dtype
    inputs = [torch.randn(case.shape) for _ in range(4)]
    pools = {dtype: [x.to(dtype) for x in inputs] for dtype in DTYPES.values()}
    for name, (layer, dtype) in layers.items():
        error = timing.relative_error(layer(pools[dtype][0]), case.conv(inputs[0]))
        if not error < TOLERANCE:
            raise ValueError(f"{name}: relative error {error:.3g} to the float convolution")

    def row(layer: nn.Module, pool: list[Tensor]) -> timing.Run:
        return lambda i: layer(pool[i % len(pool)])

    rows = {name: row(layer, pools[dtype]) for name, (layer, dtype) in layers.items()}
    return timing.interleaved(rows, seconds, turns=5, clock=timing.clock_of("cpu"))


@torch.inference_mode()
def run(cases: Sequence[str], wanted: Sequence[str], seconds: float) -> str:
    """Return a table of rows by case: the speed of each row relative to the float convolution of its dtype."""
    columns: dict[str, dict[str, float]] = {}
    for name in cases:
        torch.manual_seed(0)
        columns[name] = measure(CASES[name](), wanted, seconds)
    names = list(next(iter(columns.values())))
    body = {
        row: [
            f"{times[row] * 1e3:.2f} ms"
            if row.startswith("float")
            else f"{times[f'float {row.split()[-1]}'] / times[row]:.2f}"
            for times in columns.values()
        ]
        for row in names
    }
    return timing.markdown("", list(columns), body)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["*"], help="globs of cases")
    parser.add_argument("--rows", nargs="+", default=["*"], help="globs of rows; the float ones are always there")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tiny case, to see that it runs")
    parser.add_argument("--out", type=Path, help="Markdown file")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(options.threads)
    full = [c for c in CASES if c not in QUICK and any(fnmatchcase(c, glob) for glob in options.cases)]
    with timing.watched() as others:
        table = run(QUICK if options.quick else full, options.rows, 0.1 if options.quick else options.seconds)
    text = (
        "# Speed of convolutions\n\nTimes of torch's own, then speeds as multiples of the float one of the same dtype. "
        f"{timing.machine()} Other processes took {timing.shares(others)} of the CPUs.\n\n{table}"
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
