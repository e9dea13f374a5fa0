"""Run the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

The cases cover layers of every kind and of odd sizes, numbers of tokens on both sides of each switch between kernels,
and inputs of every dtype, including NaN and infinities, on every instruction set of this machine. The first fault ends
the process with a report. Tensors come from the sanitizer's allocator, so even a one-byte overread is found.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from hfquant import QuantLinear
from hfquant.algorithms import Identity, Smooth
from hfquant.algorithms.hadamard import Hadamard
from hfquant.algorithms.low_rank import LowRank
from hfquant.formats import FORMATS
from hfquant.kernels import cpu
from hfquant.kernels.cpu import build
from hfquant.layer_config import InputQuant, WeightQuant
from tests.nn.linear_cases import Case, layer_of, some_input

FLAGS = (
    "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow "
    "-fno-sanitize-recover=all -Wno-psabi"
)
INPUTS = (
    None,
    InputQuant(dynamic=True, axis=-1),
    InputQuant(type="int6", dynamic=True),
    InputQuant(),
)
#: For weights that are converted to floats, also these.
FP8 = InputQuant(type="fp8e4m3", dynamic=True, axis=-1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Columns and rows: below, at and beyond a vector, a group, a panel; never a multiple of all of them.
SIZES = ((1, 1), (7, 5), (64, 48), (65, 33), (129, 17), (260, 101))
#: Tiles begin at five to seventeen tokens; from 257 on, several float panels share a tile's tokens, and are refilled
#: after 1024.
TOKENS = (1, 7, 8, 33)
MANY = 257
#: From 64 tokens on, weights may be rounded to bfloat16 for bf16 inputs.
BFLOAT16_TOKENS = 70
SVD = LowRank(low_rank=3)


def cases(form: str) -> Iterator[Case]:
    """Yield layers with weights of a format, for each size and kind."""
    if form in cpu.DECODED:
        groups = (None, 10, 64) if FORMATS[form].has_scale else (None,)
        for group, (columns, rows) in itertools.product(groups, SIZES):
            yield Case(WeightQuant(type=form, group_size=group), inputs=(columns,), outputs=(rows,))
        yield Case(WeightQuant(type=form), SVD, inputs=(87, 130), outputs=(3, 70))
        return
    weights = [
        WeightQuant(type=form),
        WeightQuant(type=form, axis=-1, symmetric=False),
        WeightQuant(type=form, group_size=10, symmetric=False),
        WeightQuant(type=form, group_size=16, scale="float32"),
        WeightQuant(type=form, group_size=32, symmetric=False),
        WeightQuant(type=form, group_size=64),
        WeightQuant(type=form, group_size=128, symmetric=False, scale="float32"),
    ]
    for weight, (columns, rows) in itertools.product(weights, SIZES):
        yield Case(weight, inputs=(columns,), outputs=(rows,))
        if columns not in (65, 260):
            continue
        first = columns // 3
        yield Case(weight, SVD, inputs=(columns,), outputs=(rows,), dual=(True,))
        yield Case(weight, Smooth(), (first, columns - first), (3, rows - 3), (True, False))
        yield Case(weight, Identity(), (first, 5, columns - first - 5), (rows,))
        yield Case(weight, Hadamard(block_size=columns // 64 * 16), inputs=(columns,), outputs=(rows,))


def large_cases(form: str) -> Iterator[tuple[Case, int]]:
    """Yield layers whose sums exceed 32 bits, or whose tokens do not fit into one chunk, with the number of tokens."""
    yield Case(WeightQuant(type=form), inputs=(37,), outputs=(300,)), 1030
    group = 64 if FORMATS[form].has_scale else None
    for columns, size, tokens in ((40_001, None, 2), (40_001, None, 8), (20_000, group, 2), (20_000, group, 130)):
        yield Case(WeightQuant(type=form, group_size=size), inputs=(columns,), outputs=(9,), dual=(True,)), tokens


def check(layer: QuantLinear, names: list[str], tokens: int, dtype: torch.dtype) -> int:
    """Run a layer on each kernel and compare with the reference; return the number of calls.

    Raises:
        AssertionError: they differ.
    """
    x = some_input(tokens, features=layer.in_features)
    if layer.product.rotation:
        # Sums of these are exact in any order; otherwise their last bit can decide a tie, and change a code.
        x = (64 * x).round() / 64
    x = x.to(dtype)
    if tokens == 33:
        x[3, 0], x[4, -1], x[32, 0] = torch.inf, torch.nan, -torch.inf
    os.environ["HFQUANT_KERNEL"] = "reference"
    expected = layer(x).float()
    finite = expected.isfinite()
    # The rounding error of float inputs at 16 bits is proportional to this.
    size = x.nan_to_num(0, 0, 0).float().norm(dim=-1).max() * layer.effective_weight().norm(dim=-1).max()
    most = (1 + size.item()) * (2e-4 + 2 * torch.finfo(dtype).eps)
    for name in names:
        os.environ["HFQUANT_KERNEL"] = name
        y = layer(x).float()
        assert torch.equal(y.isfinite(), finite), (name, tokens, dtype, layer)
        error = (y - expected)[finite].abs().max().item() if finite.any() else 0
        assert error <= most, (name, tokens, dtype, layer, error)
    return len(names)


def main() -> None:
    """Compile with sanitizers, restart with their library preloaded, and run every case."""
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        os.environ[build.EXTRA_FLAGS] = FLAGS
        build.library()
        command = [os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        os.environ["LD_PRELOAD"] = found
        # Python itself leaks by design, and torch's libraries redefine each other's types.
        os.environ["ASAN_OPTIONS"] = "detect_leaks=0:detect_odr_violation=0"
        os.environ["UBSAN_OPTIONS"] = "print_stacktrace=1"
        os.execv(sys.executable, [sys.executable, "-m", "tests.kernels.cpu.sanitize"])
    torch.manual_seed(0)
    torch.set_num_threads(2)
    missing = {kernel.name: kernel.missing() for kernel in cpu.KERNELS}
    names = [name for name, why in missing.items() if not why]
    if not names:
        raise SystemExit(f"nothing to check: {missing}")
    start, calls = time.perf_counter(), 0
    dtypes = itertools.cycle(DTYPES)
    pairs = itertools.product((*(f"int{bits}" for bits in range(2, 9)), *cpu.DECODED), INPUTS)
    for form, quant in (*pairs, *((form, FP8) for form in cpu.DECODED)):
        for case in cases(form):
            if case.opt.rotation and quant is not None and not quant.dynamic:
                continue  # a static scale comes from the ranges of unrotated channels
            layer, _ = layer_of(case.plan(quant, real=True))
            # Four token counts and three dtypes: every combination occurs within a few layers.
            sizes = (*TOKENS, MANY) if form in cpu.DECODED else TOKENS
            calls += sum(check(layer, names, tokens, next(dtypes)) for tokens in sizes)
            if quant is None:
                calls += check(layer, names, BFLOAT16_TOKENS, torch.bfloat16)
        for case, tokens in large_cases(form) if quant in INPUTS[:2] else ():
            layer, _ = layer_of(case.plan(quant, real=True))
            calls += check(layer, names, tokens, next(dtypes))
    seconds = time.perf_counter() - start
    print(f"{calls} calls of {', '.join(names)} in {seconds:.0f} s: no fault")  # noqa: T201
    for name, why in missing.items():
        if why:
            print(f"not run: {name} ({why})")  # noqa: T201


if __name__ == "__main__":
    main()
