"""Cost of quantization relative to one calibration forward: time per piece, peak memory, and loss of the fast SVD.

    python -m benchmarks.algorithms --json benchmarks/results/algorithms.json

- pieces: SmolLM2's linears are observed, then solved with one config after another from the same statistics. Figures
  are CPU seconds of this process, on one thread unless ``--threads`` says otherwise, so other work on the machine does
  not count. "forwards" are multiples of the plain forward over the calibration data, timed between the pieces. *report*
  is the error report that ``quantize`` makes for each layer; targets cover solving and report together.
- memory: as in :mod:`benchmarks.streaming`, each in a fresh process: peak anonymous memory while the model is loaded
  and quantized, minus what a process holds with the float model. Linux only.
- low-rank: share of the energy of smoothed weights that ``low_rank`` captures, and its time, against
  ``torch.linalg.svd``.

Parts of an existing JSON file that are not requested are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

import hfquant
from benchmarks import models
from benchmarks.ablation import GPTQ, GROUP, INT8, SEARCH, SMOOTH, STATIC, SVD, TOKEN, config
from benchmarks.memory import MB, load_watched, save_tiny, watch
from benchmarks.quality import environment
from benchmarks.streaming import above
from hfquant import quantize
from hfquant.algorithms import low_rank
from hfquant.algorithms.smooth import smoothing_vector
from hfquant.nn.linear import QuantLinear
from hfquant.observe import observe
from hfquant.report.layers import layer_report
from hfquant.solver import solve
from hfquant.statistics import LayerStats

Row = dict[str, Any]
Batches = list[dict[str, Tensor]]

SEARCHED = {**SMOOTH, **SEARCH}
BEST = {"clip": "mse", "symmetric": False}


class Piece(NamedTuple):
    """A config to solve all linears with, and the most that this may cost."""

    config: dict[str, Any] | str
    forwards: float | None = None
    seconds: float | None = None


PIECES: dict[str, Piece] = {
    "round to nearest, W4A16 group 64": Piece(config(GROUP, None)),
    "round to nearest, W4A16 group 64, mse, asymmetric": Piece(config(GROUP, None, **BEST)),
    "SMOOTH alpha 0.5, W8A8 dynamic": Piece(config(INT8, TOKEN, SMOOTH)),
    "SMOOTH search, W8A8 dynamic": Piece(config(INT8, TOKEN, SEARCHED), forwards=3),
    "SMOOTH search, W8A8 static": Piece(config(INT8, STATIC, SEARCHED), forwards=3),
    "SMOOTH search, W4A16 group 64": Piece(config(GROUP, None, SEARCHED), forwards=3),
    "SMOOTH search, W4A16 group 64, mse, asymmetric": Piece(config(GROUP, None, SEARCHED, **BEST), forwards=3),
    "SVD rank 32, W4A16 group 64": Piece(config(GROUP, None, SVD)),
    "SVD rank 32 search, W4A16 group 64": Piece(config(GROUP, None, {**SVD, **SEARCH})),
    "GPTQ, W4A16 group 64": Piece(config(GROUP, None, calib=GPTQ), seconds=90),
    "GPTQ, W4A16 group 64, mse, asymmetric": Piece(config(GROUP, None, calib=GPTQ, **BEST), seconds=90),
    "w4a16-gptq: the same after a SMOOTH search": Piece("w4a16-gptq"),
}

RANKS = (16, 32, 64, 128)
#: Share of the energy captured by the best approximation that ``low_rank`` may lose.
MOST_LOST = 1e-3
#: Share of the one-pass peak that per-layer mode may take.
MOST_MEMORY = 0.5
PRESET = "w4a16-gptq"
MODES: dict[str, dict[str, Any]] = {
    # A budget beyond any machine: all statistics at once.
    "one pass": {"memory_budget": 1 << 60},
    "per_layer_mode": {"per_layer_mode": True},
}
MEMORY_COLUMNS = ("above the model", "resident above the model", "above the result", "held after", "model")


class Clock(NamedTuple):
    """CPU and wall seconds that a piece took."""

    cpu: float
    wall: float

    def __add__(self, other: object) -> Clock:
        assert isinstance(other, Clock)
        return Clock(self.cpu + other.cpu, self.wall + other.wall)

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.cpu - other.cpu, self.wall - other.wall)

    @classmethod
    def now(cls) -> Clock:
        """Return the current readings of both clocks."""
        return cls(time.process_time(), time.perf_counter())


def timed(work: Callable[[], Any]) -> tuple[Any, Clock]:
    """Return the result of ``work`` and the time it took."""
    start = Clock.now()
    result = work()
    return result, Clock.now() - start


# --- pieces ---------------------------------------------------------------------------------------------------------


def measure_pieces(model: nn.Module, batches: Batches, pieces: Mapping[str, Piece]) -> dict[str, Row]:
    """Return rows by name: CPU and wall seconds, multiples of the plain forward, for solves the report's seconds."""
    linears = models.quantizable_linears(model)

    def passed(layers: Mapping[str, nn.Module], hessian: bool = False) -> tuple[dict[str, LayerStats], Clock]:
        # Without layers to observe this is the plain forward, in the same loop and with the same model arguments.
        return timed(lambda: observe(model, layers, batches, dict.fromkeys(layers, ("hessian",) if hessian else ())))

    observe(model, {}, batches[:1])  # pays for one-time allocations and choices
    took: dict[str, tuple[Clock, Clock | None]] = {}
    forwards = [passed({})[1]]
    took["calibration pass: ranges and rows"] = passed(linears)[1], None
    forwards.append(passed({})[1])
    stats, clock = passed(linears, hessian=True)
    took["calibration pass: with Hessians"] = clock, None
    for name, piece in pieces.items():
        took[name] = solve_all(model, batches, piece, stats)
        print(f"{name}: {took[name][0].cpu:.1f} s", file=sys.stderr, flush=True)
    forwards.append(passed({})[1])

    forward = statistics.median(f.cpu for f in forwards)
    rows: dict[str, Row] = {
        "plain forward": {
            "CPU s": forward,
            "wall s": statistics.median(f.wall for f in forwards),
            "forwards": 1.0,
            "all CPU s": [f.cpu for f in forwards],
        }
    }
    for name, (clock, report) in took.items():
        rows[name] = {"CPU s": clock.cpu, "wall s": clock.wall, "forwards": clock.cpu / forward}
        if report is not None:
            rows[name]["report CPU s"] = report.cpu
        piece, cost = pieces.get(name, Piece("")), clock.cpu + (report.cpu if report else 0)
        if piece.forwards is not None:
            rows[name] |= {"at most": f"{piece.forwards:g} forwards", "met": cost <= piece.forwards * forward}
        if piece.seconds is not None:
            rows[name] |= {"at most": f"{piece.seconds:g} s", "met": cost <= piece.seconds}
    return rows


def solve_all(model: nn.Module, batches: Batches, piece: Piece, stats: Mapping[str, LayerStats]) -> tuple[Clock, Clock]:
    """Return the time to solve every linear of the model from its statistics, and the time to report on it."""
    linears = models.quantizable_linears(model)
    plan = hfquant.plan(model, piece.config, batches[0])
    solving = reporting = Clock(0, 0)
    with torch.no_grad():
        for name, linear in linears.items():
            weight = linear.weight.detach()

            def solved() -> tuple[Any, QuantLinear]:
                solution = solve(name, weight, plan.layers[name], stats[name])  # noqa: B023
                return solution, QuantLinear.from_tensors(solution.plan, solution.tensors, linear.bias)  # noqa: B023

            (solution, layer), clock = timed(solved)
            solving += clock
            start = Clock.now()
            layer_report(name, weight, solution, layer, stats[name], clock.wall)
            reporting += Clock.now() - start
    return solving, reporting


# --- memory ---------------------------------------------------------------------------------------------------------


def measure_memory(folder: Path, batches: Batches, threads: int) -> dict[str, Row]:
    """Return bytes by mode (see :func:`streaming.above`) for quantizing the model in ``folder`` in a fresh process."""
    with tempfile.TemporaryDirectory() as written:
        file = Path(written) / "batches.pt"
        torch.save(batches, file)

        def row(mode: str | None) -> dict[str, float]:
            options = json.dumps({"mode": mode, "batches": str(file), "threads": threads})
            command = ["-m", "benchmarks.algorithms", "--child", str(folder), options]
            return watch([sys.executable, "-W", "ignore", *command])

        float_model = row(None)
        rows: dict[str, Row] = {"float model": dict(float_model)}
        for mode in MODES:
            rows[f"{PRESET}, {mode}"] = above(row(mode), float_model)
    most, least = (rows[f"{PRESET}, {mode}"] for mode in MODES)
    least["at most"] = f"{MOST_MEMORY:.0%} of one pass"
    least["met"] = least["above the model"] <= MOST_MEMORY * most["above the model"]
    return rows


def child(folder: str, options: dict[str, Any]) -> int:
    """Run in the fresh process: warm up, wait, load and quantize, report."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options["threads"])
    batches = torch.load(options["batches"], weights_only=True)

    def load(path: str, data: Batches) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        return model if options["mode"] is None else quantize(model, data, PRESET, **MODES[options["mode"]])

    with tempfile.TemporaryDirectory() as tiny:
        save_tiny(tiny)
        load(tiny, [{"input_ids": torch.arange(64)[None]}])
    load_watched(lambda: load(folder, batches), Path(folder))
    return 0


# --- low rank -------------------------------------------------------------------------------------------------------


def measure_low_rank(model: nn.Module, batches: Batches, blocks: Sequence[int], ranks: Sequence[int]) -> dict[str, Row]:
    """Return rows by kind of layer and rank: energy lost to the best approximation, and CPU time of both.

    Args:
        model: its weights are smoothed with alpha 0.5, from its inputs on ``batches``.
        batches: calibration data.
        blocks: indices of the model's blocks; negative ones count from the end.
        ranks: ranks to try on every layer that is large enough.
    """
    linears = models.quantizable_linears(model)
    kinds: dict[str, list[str]] = {}
    for name in linears:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    chosen = {kind: [names[i] for i in blocks if -len(names) <= i < len(names)] for kind, names in kinds.items()}
    stats = observe(model, {name: linears[name] for names in chosen.values() for name in names}, batches)
    rows: dict[str, Row] = {}
    for kind, names in chosen.items():
        weights = [_smoothed(linears[name].weight.detach(), stats[name]) for name in names]
        exact = [timed(lambda w=w: torch.linalg.svd(w, full_matrices=False))[1].cpu for w in weights]  # type: ignore[misc]
        energies = [torch.linalg.svdvals(w.double()).square() for w in weights]
        for rank in ranks:
            if rank < min(weights[0].shape):
                row = _lost(weights, energies, rank)
                rows[f"{kind}, rank {rank}"] = {**row, "torch.linalg.svd ms": 1e3 * statistics.fmean(exact)}
    return rows


def _smoothed(weight: Tensor, stats: LayerStats) -> Tensor:
    return weight.float() * smoothing_vector(stats.amax, weight.float().abs().amax(0), SMOOTH["alpha"])


def _lost(weights: Sequence[Tensor], energies: Sequence[Tensor], rank: int) -> Row:
    lost, took, fell_back = [], [], 0
    for w, energy in zip(weights, energies, strict=True):
        with _counted_exact() as calls:
            (up, down), clock = timed(lambda w=w: low_rank.low_rank(w, rank))  # type: ignore[misc]
        fell_back += len(calls)
        took.append(clock.cpu)
        left = (w.double() - up.double() @ down.double()).square().sum()
        best = energy[:rank].sum()
        lost.append(float(1 - (energy.sum() - left) / best))
    return {
        "rows": weights[0].shape[0],
        "columns": weights[0].shape[1],
        "captured %": 100 * statistics.fmean(float(e[:rank].sum() / e.sum()) for e in energies),
        "most lost %": 100 * max(lost),
        "exact": fell_back / len(weights),
        "low_rank ms": 1e3 * statistics.fmean(took),
        "at most": f"{MOST_LOST:.1%} lost",
        "met": max(lost) < MOST_LOST,
    }


@contextmanager
def _counted_exact() -> Iterator[list[Any]]:
    """Yield a list that grows with each call of the exact SVD, which ``low_rank`` uses if the fast one does not pay."""
    with patch.object(low_rank, "_exact", wraps=low_rank._exact) as mock:
        yield mock.mock_calls


# --- tables ---------------------------------------------------------------------------------------------------------


def _flag(row: Row) -> str:
    return f"{row['at most']}: {'met' if row['met'] else 'MISSED'}" if "met" in row else ""


def pieces_table(rows: Mapping[str, Row]) -> str:
    """Return the rows of :func:`measure_pieces` as Markdown."""
    lines = ["| | CPU s | forwards | report CPU s | wall s | target |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    for name, row in rows.items():
        report = f"{row['report CPU s']:.1f}" if "report CPU s" in row else ""
        figures = f"{row['CPU s']:.1f} | {row['forwards']:.2f} | {report} | {row['wall s']:.1f}"
        lines.append(f"| {name} | {figures} | {_flag(row)} |")
    return "\n".join(lines)


def memory_table(rows: Mapping[str, Row]) -> str:
    """Return the rows of :func:`measure_memory` as Markdown, in MB (10^6 bytes)."""
    lines = ["| MB | " + " | ".join(MEMORY_COLUMNS) + " | target |", "| --- |" + " ---: |" * len(MEMORY_COLUMNS)]
    lines[1] += " --- |"
    for name, row in rows.items():
        cells = [f"{row[column] / MB:.0f}" if column in row else "" for column in MEMORY_COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {_flag(row)} |")
    return "\n".join(lines)


def low_rank_table(rows: Mapping[str, Row]) -> str:
    """Return the rows of :func:`measure_low_rank` as Markdown."""
    head = ("", "shape", "captured %", "most lost %", "exact", "low_rank ms", "torch.linalg.svd ms", "target")
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * 6 + " --- |"]
    for name, row in rows.items():
        figures = (
            f"{row['rows']} x {row['columns']}",
            f"{row['captured %']:.1f}",
            f"{row['most lost %']:.4f}",
            f"{row['exact']:.0%}",
            f"{row['low_rank ms']:.0f}",
            f"{row['torch.linalg.svd ms']:.0f}",
        )
        lines.append(f"| {name} | " + " | ".join(figures) + f" | {_flag(row)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Mapping[str, Row]], str]] = {
    "pieces": pieces_table,
    "memory": memory_table,
    "low-rank": low_rank_table,
}


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of all measured parts, each with its settings and CPU."""
    parts = []
    for part, table in TABLES.items():
        if part in result:
            settings = ", ".join(f"{value} {key}" for key, value in result[part]["settings"].items())
            cpu = result[part]["environment"]["cpu"]
            parts.append(f"## {part.capitalize()}\n\n{table(result[part]['rows'])}\n\n{settings}; {cpu}.\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Measure the requested parts and print their tables; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.algorithms", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="pieces whose name contains one of these")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows")
    parser.add_argument(
        "--memory-windows", type=int, default=4, help="the same for the memory part, which depends on one batch only"
    )
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 10, 20, -1], help="of the low-rank part")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", type=Path, help="file to write; a .md of the same name goes beside it")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "OPTIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(args.child[0], json.loads(args.child[1]))
    pieces = {n: p for n, p in PIECES.items() if not args.only or any(text in n for text in args.only)}
    if not pieces:
        parser.error("no such piece; there are: " + "; ".join(PIECES))

    torch.set_num_threads(args.threads)
    model, tokenizer = models.smollm2()

    def batches(count: int) -> Batches:
        text = models.calibration_text()
        return models.token_batches(tokenizer, text, args.seqlen, count, args.batch_size)

    measure: dict[str, tuple[int, Callable[[Batches], dict[str, Row]]]] = {
        "pieces": (args.windows, lambda data: measure_pieces(model, data, pieces)),
        "memory": (args.memory_windows, lambda data: measure_memory(models.smollm2_folder(), data, args.threads)),
        "low-rank": (args.memory_windows, lambda data: measure_low_rank(model, data, args.blocks, args.ranks)),
    }
    result = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for part in args.parts:
        windows, measured = measure[part]
        settings = {"windows": windows, "tokens each": args.seqlen, "windows a batch": args.batch_size}
        settings["threads"] = args.threads
        rows = measured(batches(windows))
        result[part] = {"settings": settings, "environment": environment(), "rows": rows}
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n")
            args.json.with_suffix(".md").write_text(markdown(result))
    print(markdown({part: result[part] for part in args.parts}))
    missed = [n for part in args.parts for n, row in result[part]["rows"].items() if not row.get("met", True)]
    if missed:
        print("missed: " + "; ".join(missed), file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
