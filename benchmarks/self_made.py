"""Presets on SmolLM2 calibrated on real text and on text that the model generates itself.

    python -m benchmarks.self_made --json benchmarks/results/self_made.json

Real: 32 windows of Python's language reference, as in :mod:`benchmarks.quality`. Self-made: what a preset does without
data. Both are evaluated on two texts of other kinds: the dataset descriptions of :mod:`benchmarks.quality` and numpy's
help. Rows that the JSON file already has are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

import hfquant
from benchmarks import metrics, models
from benchmarks.quality import store
from benchmarks.static import HELP, help_text

PRESETS = [name for name in hfquant.PRESETS if hfquant.HfQuantConfig(name).needs_data]


def main(argv: list[str] | None = None) -> int:
    """Measure, print the page and store it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.self_made", description=__doc__.partition("\n")[0])
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=hfquant.PRESETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of what the model writes")
    parser.add_argument(
        "--orders", nargs="+", type=int, default=[0], help="of the channels; benchmarks.shuffles says why"
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument("--json", type=Path, help="file that rows are added to; a .md of the same name goes beside it")
    args = parser.parse_args(argv)

    arms: dict[str, Any] = {"real text": None, **{f"self-made, seed {s}": own(s) for s in args.seeds}}
    stored = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    rows: dict[str, dict[str, float]] = stored.get("rows", {})
    for order in args.orders:
        model, tokenizer = models.smollm2(order)
        references = {name: metrics.reference(model, windows) for name, windows in two_texts(tokenizer).items()}
        real = models.token_batches(tokenizer, models.calibration_text())
        for preset, (arm, data) in product(args.presets, arms.items()):
            name = f"{preset}, {arm}" + (f", order {order}" if order else "")
            if name in rows or (args.only and not any(part in name for part in args.only)):
                continue
            start = time.process_time()
            quantized = hfquant.quantize(copy.deepcopy(model), data or real, preset)
            rows[name] = {"seconds": time.process_time() - start}
            for text, reference in references.items():
                scores = metrics.language_scores(quantized, reference)
                rows[name] |= {f"{text}: KL": scores.kl, f"{text}: error": scores.kl_error}
            print(name, rows[name], file=sys.stderr, flush=True)
            if args.json:
                store(args.json, rows, markdown(rows))
    print(markdown(rows))
    return 0


def two_texts(tokenizer: Any) -> dict[str, list[Tensor]]:
    """Return windows of two kinds of text that no calibration uses, ``[1, tokens]`` int64 each."""
    numpy_help = models.token_batches(tokenizer, help_text(HELP[1]), count=12, batch_size=1)
    return {
        "dataset descriptions": metrics.evaluation_windows(tokenizer, models.evaluation_texts()),
        "numpy's help": [batch["input_ids"] for batch in numpy_help],
    }


def own(seed: int) -> dict[str, Any]:
    """Return a request for self-generated data: the defaults, with a given seed."""
    return {"source": "self", "seed": seed}


def markdown(rows: dict[str, dict[str, float]]) -> str:
    """Return a table of KL to full precision in nats per token, with standard errors, and CPU seconds to quantize."""
    texts = [key.removesuffix(": KL") for key in next(iter(rows.values())) if key.endswith(": KL")]
    lines = ["| KL to full precision | " + " | ".join(texts) + " | seconds |", "| --- |" + " ---: |" * (len(texts) + 1)]
    for name, row in rows.items():
        cells = [f"{row[f'{text}: KL']:.4f} ± {row[f'{text}: error']:.4f}" for text in texts]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
