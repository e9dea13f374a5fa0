"""Peak memory of calibrating on a streamed text file inside ``from_pretrained``, by file size.

    python -m benchmarks.streaming --json benchmarks/results/streaming.json

As in :mod:`benchmarks.memory`, each row is a fresh process that first does everything once with a tiny model and a few
lines of text, so imports are not counted, and the parent samples its anonymous memory while it loads SmolLM2. The row
"float model" loads without a config. *above the model* is the peak of anonymous memory during a calibrated load minus
what the process holds with the float model loaded. It counts the activations and logits of one batch, the statistics of
all layers, the stream's buffers, the tokenizer, the quantized layers (which coexist with the float ones until all are
solved), and pages that malloc keeps. Files repeat Python's language reference, with its paragraphs in a new order each
time. Linux only.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.memory import MB, load_watched, save_tiny, watch

BOUND = 200 * MB
COLUMNS = ("above the model", "resident above the model", "above the result", "held after", "model")


def main(argv: list[str] | None = None) -> int:
    """Measure every file size and print the table; return 1 if a row exceeds the bound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__.partition("\n")[0])
    parser.add_argument("--configs", nargs="+", default=["w8a8-smooth"], help="presets that need data")
    parser.add_argument("--megabytes", nargs="+", type=int, default=[1, 16, 128], help="lengths of the text files")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write; a .md of the same name goes beside it")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "OPTIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(args.child[0], json.loads(args.child[1]))

    from benchmarks.models import calibration_text, smollm2_folder
    from benchmarks.quality import environment

    stream = {"samples": args.samples, "seqlen": args.seqlen, "batch_size": args.batch_size}
    folder = smollm2_folder()
    with tempfile.TemporaryDirectory() as written:
        files = {size: write_text(Path(written), calibration_text(), size) for size in args.megabytes}
        measured = {"float model": measure(folder)}
        for config in args.configs:
            for size, file in files.items():
                row = measure(folder, config, {"dataset": str(file), **stream})
                measured[f"{config}, {size} MB of text"] = above(row, measured["float model"])
    described = f"{args.samples} sequences of {args.seqlen} tokens in batches of {args.batch_size}"
    table = markdown(measured) + f"\n{described}; {environment()['cpu']}.\n"
    print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"environment": environment(), "stream": stream, "rows": measured}, indent=1) + "\n"
        )
        args.json.with_suffix(".md").write_text(table)
    return int(any(row.get("above the model", 0) > BOUND for row in measured.values()))


def write_text(folder: Path, text: str, megabytes: int) -> Path:
    """Write a text file of at least ``megabytes`` * 10^6 bytes: the paragraphs of ``text``, reshuffled each time."""
    draw = random.Random(megabytes)
    paragraphs = text.split("\n\n")
    path = folder / f"{megabytes}.txt"
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * MB:
            draw.shuffle(paragraphs)
            file.write("\n\n".join(paragraphs) + "\n\n")
    return path


def measure(folder: Path, config: str | None = None, calibration: dict[str, Any] | None = None) -> dict[str, float]:
    """Load ``folder`` in a child process, calibrated if requested, and return bytes (see :func:`memory.watch`)."""
    options = json.dumps({"config": config, "calibration": calibration})
    return watch([sys.executable, "-W", "ignore", "-m", "benchmarks.streaming", "--child", str(folder), options])


def above(row: dict[str, float], model: dict[str, float]) -> dict[str, float]:
    """Add to ``row`` its peaks above a process that holds the float model, and above what is held at the end."""
    return {
        **row,
        "above the model": row["peak"] - model["held after"],
        "resident above the model": row["resident peak"] - model["float size"],
        "above the result": row["peak"] - row["held after"],
    }


def child(folder: str, options: dict[str, Any]) -> int:
    """Run in the fresh process: warm up, wait, load, report."""
    import torch
    from transformers import AutoModelForCausalLM

    import hfquant

    torch.set_num_threads(1)

    def load(path: str, calibration: dict[str, Any] | None) -> Any:
        extra: dict[str, Any] = {}
        if calibration:
            config = hfquant.HfQuantConfig(options["config"], calibration=calibration)
            extra = {"quantization_config": config}
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **extra)

    calibration = options["calibration"]
    with tempfile.TemporaryDirectory() as tiny:
        save_tiny(tiny)
        load(tiny, calibration and {"dataset": tiny_text(tiny)})
    load_watched(lambda: load(folder, calibration), Path(folder))
    return 0


def tiny_text(folder: str) -> str:
    """Write a word tokenizer next to the tiny model, and a text file, and return the path of the file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "a": 2, "text": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    path = Path(folder) / "few.txt"
    path.write_text("a text\n\nanother text\n" * 1000)
    return str(path)


def markdown(measured: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table in MB (10^6 bytes)."""
    lines = ["| MB | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for name, row in measured.items():
        cells = [f"{row[column] / MB:.0f}" if column in row else "" for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
