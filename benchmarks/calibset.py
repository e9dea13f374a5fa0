"""Size and speed of calibration sets on disk, against `torch.save` with zstd, the format of the reference.

    python -m benchmarks.calibset

Both store the same samples in chunks of the same size, flushed to the same disk in the same run. They take turns, and
the fastest turn of each counts. Ratios are ours over theirs, and must be at most 1. The samples:

- digits: inputs of a block of the embedded digits DiT, recorded from its sampler;
- sd3: denoiser inputs of SD3's shapes, bf16; the text embedding repeats at each of the 20 steps of a run;
- sd3-alone: the same with a new text embedding at each step, so nothing repeats;
- gelu: activations after a GELU, fp32; relu: after a ReLU, half of them zero;
- tokens: int64 token ids and masks.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import zstandard

from hfquant.calibration import BaseCalibSet, UniformSampler, generate_calibrate_set, load_calibrate_set
from hfquant.calibration.recorder import Recording
from hfquant.calibration.storage import Cursor, Index, Writer

STEPS = 20


def digits(count: int) -> Iterator[Any]:
    """Yield inputs of a transformer block, from 10 steps of each run."""
    from hfquant.demo import load_digits_pipeline

    labels = [[i % 10, (i + 3) % 10] for i in range(count // 10)]
    layer = "transformer.transformer_blocks.1"
    yield from generate_calibrate_set(load_digits_pipeline(), UniformSampler(10), labels, layer)


def sd3(count: int, *, shared: bool = True) -> Iterator[Any]:
    """Yield arguments of SD3's transformer at 512x512, both halves of the guidance in one batch."""
    for i in range(count):
        if not shared or i % STEPS == 0:
            context = torch.randn(2, 154, 1024).bfloat16()
        yield {
            "hidden_states": torch.randn(2, 16, 64, 64).bfloat16(),
            "timestep": torch.full((2,), 1000.0 * (1 - i % STEPS / STEPS)),
            "encoder_hidden_states": context,
            "joint_attention_kwargs": None,
            "return_dict": False,
        }


def activations(count: int, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Any]:
    """Yield outputs of an activation function on Gaussian data."""
    for _ in range(count):
        yield (function(torch.randn(1, 128, 768)),)


def tokens(count: int) -> Iterator[Any]:
    """Yield token batches with a mask of ones; they are small, so there are five times as many."""
    for _ in range(5 * count):
        ids = torch.randint(0, 49152, (4, 512))
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


WORKLOADS: dict[str, Callable[[int], Iterator[Any]]] = {
    "digits": digits,
    "sd3": sd3,
    "sd3-alone": lambda count: sd3(count, shared=False),
    "gelu": lambda count: activations(count, torch.nn.functional.gelu),
    "relu": lambda count: activations(count, torch.relu),
    "tokens": tokens,
}


def write_torch(samples: list[Any], directory: Path, chunk_size: int) -> None:
    """Write lists of samples with `torch.save` and zstd at its default level."""
    for number, start in enumerate(range(0, len(samples), chunk_size)):
        buffer = io.BytesIO()
        torch.save(samples[start : start + chunk_size], buffer)
        with open(directory / f"{number}.pt.zst", "wb") as file:
            file.write(zstandard.ZstdCompressor().compress(buffer.getbuffer()))
            file.flush()
            os.fsync(file.fileno())


def read_torch(directory: Path) -> int:
    """Read every sample and return their number."""
    count = 0
    for path in sorted(directory.glob("*.pt.zst")):
        data = zstandard.ZstdDecompressor().decompress(path.read_bytes())
        count += len(torch.load(io.BytesIO(data), weights_only=True))
    return count


def write_ours(recorded: Recording, directory: Path, chunk_size: int) -> None:
    """Write the recorded samples as a calibration set."""
    writer = Writer(directory, Index(chunk_size=chunk_size, compress=True, provenance={}))
    for position in range(len(recorded)):
        writer.add(recorded, position, Cursor())
    writer.finish(Cursor())


def read_ours(directory: Path) -> int:
    """Read every sample and return their number."""
    stored = load_calibrate_set(directory)
    assert stored is not None
    return sum(1 for _ in stored)


def measure(samples: list[Any], repeat: int, chunk_size: int) -> dict[str, dict[str, float]]:
    """Return the best seconds to write and to read, and the megabytes, for both formats."""
    recorded = BaseCalibSet.from_samples(samples).chunks[0]
    ways = {"torch": (write_torch, samples, read_torch), "ours": (write_ours, recorded, read_ours)}
    results = {name: {"write": float("inf"), "read": float("inf"), "MB": 0.0} for name in ways}
    for _ in range(repeat):
        for name, (write, data, read) in ways.items():
            directory = Path(tempfile.mkdtemp(prefix="calibset-"))
            try:
                start = time.perf_counter()
                write(data, directory, chunk_size)  # type: ignore[operator]
                written = time.perf_counter()
                assert read(directory) == len(samples)  # type: ignore[operator]
                done = time.perf_counter()
                result = results[name]
                result["write"] = min(result["write"], written - start)
                result["read"] = min(result["read"], done - written)
                result["MB"] = sum(path.stat().st_size for path in directory.iterdir()) / 1e6
            finally:
                shutil.rmtree(directory)
    return results


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table; return 1 if ours is slower or larger anywhere."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibset", description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--chunk-size", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--only", choices=WORKLOADS, nargs="*", default=list(WORKLOADS))
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args(argv)
    print(f"{args.samples} samples in chunks of {args.chunk_size}, best of {args.repeat} turns")
    print(f"{'samples':<10} {'':>6} {'write s':>9} {'read s':>9} {'MB':>9}")
    torch.set_num_threads(1)  # torch only makes the samples; two threads are very slow on a busy machine
    report, worst = {}, 0.0
    for name in args.only:
        torch.manual_seed(0)
        results = measure(list(WORKLOADS[name](args.samples)), args.repeat, args.chunk_size)
        results["ratio"] = {key: results["ours"][key] / results["torch"][key] for key in results["ours"]}
        for who, row in results.items():
            print(f"{name:<10} {who:>6} {row['write']:9.3f} {row['read']:9.3f} {row['MB']:9.3f}", flush=True)
        report[name] = results
        worst = max(worst, *results["ratio"].values())
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return int(worst > 1)


if __name__ == "__main__":
    raise SystemExit(main())
