"""Presets and peers on SmolLM2 in several orders of its channels: how far a figure depends on the draw.

    python -m benchmarks.shuffles --json benchmarks/results/shuffles.json

Which channels share a group changes with their order, and with it the error at four bits. Each row of
:mod:`benchmarks.quality` that is asked for is measured on each order, calibrated on Python's language reference and
evaluated on the two texts of :mod:`benchmarks.self_made`. Figures that the JSON file already has are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from benchmarks import metrics, models, quality
from benchmarks.quality import Scores, Subject
from benchmarks.self_made import two_texts

#: Every preset except those that measure layer by layer for a quarter of an hour, and the best of the peers' rows.
ROWS = ["preset/*[!o]", "w4a16/torchao*", "w8a16/torchao", "w8a8/torchao", "w4a16/sdnq-asym*"]


def subject(seed: int, samples: int) -> Subject:
    """Return SmolLM2 in one order of its channels, scored by KL on both texts."""
    whole = quality.smollm2(quality.Settings(samples, shuffle=seed))
    texts = two_texts(models.smollm2(seed)[1])
    references = {name: metrics.reference(whole.model, windows) for name, windows in texts.items()}

    def score(model: nn.Module) -> Scores:
        return {name: metrics.language_scores(model, reference).kl for name, reference in references.items()}

    return whole._replace(score=score)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table and store it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shuffles", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="GLOB", help="rows of benchmarks.quality, by name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the channels' order")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--json", type=Path, help="file that rows are added to; a .md of the same name goes beside it")
    args = parser.parse_args(argv)

    table = quality.SUBJECTS["smollm2"][1]
    chosen = [name for name in table if any(fnmatchcase(name, glob) for glob in args.rows)]
    stored = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    rows: dict[str, dict[str, Scores]] = stored.get("rows", {})
    for seed in map(str, args.seeds):
        missing = [name for name in chosen if seed not in rows.get(name, {})]
        measured = subject(int(seed), args.samples) if missing else None
        for name in missing:
            assert measured is not None
            torch.manual_seed(0)
            rows.setdefault(name, {})[seed] = quality.run_row(name, table[name], measured)
            print(name, seed, rows[name][seed], file=sys.stderr, flush=True)
            if args.json:
                quality.store(args.json, rows, markdown(rows))
    print(markdown(rows))
    return 0


def markdown(rows: Mapping[str, Mapping[str, Scores]]) -> str:
    """Return a table of KL in nats per token, each text averaged over the orders, ± the standard error over them."""
    texts = [key for key in next(iter(next(iter(rows.values())).values())) if key not in ("bits", "seconds")]
    lines = ["| KL to full precision | orders | bits | " + " | ".join(f"{t} | range" for t in texts) + " |"]
    lines.append("| --- | ---: | ---: |" + " ---: | ---: |" * len(texts))
    for name, row in rows.items():
        cells = [str(len(row)), f"{torch.tensor([scores['bits'] for scores in row.values()]).mean():.2f}"]
        for text in texts:
            values = torch.tensor([scores[text] for scores in row.values()], dtype=torch.float64)
            mean, error = metrics.mean_and_error(values)
            cells += [f"{mean:.4f} ± {error:.4f}", f"{values.min():.4f} to {values.max():.4f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
