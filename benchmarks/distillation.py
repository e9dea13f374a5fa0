"""What distillation gains: quantized SmolLM2 and digits before and after, on data used for nothing else.

    python -m benchmarks.distillation --json benchmarks/results/distillation.json
    python -m benchmarks.distillation --models digits --presets w3a16-gptq w4a16-gptq

SmolLM2 is quantized with the calibration data of :mod:`benchmarks.quality` and distilled on 96 windows that the model
generated itself (kept in `.models`). With `--text broad` there is a fresh window for each step: up to a quarter of them
its own text, the rest from READMEs and docstrings of the installed packages. Every fourth window, at most 32 in all, is
held out. It is scored on the dataset descriptions, in float32, whatever `--dtype` it was trained in. The digits are
distilled on the inputs recorded for calibration in :mod:`benchmarks.quality`, in batches of eight in random order. With
`--rounding-steps` the rounding of the weights is trained first. Rows that the JSON file already has are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import hfquant
from benchmarks import models
from benchmarks.ablation import SEARCHED, TWO_BITS
from benchmarks.quality import Settings, Subject, digits, quantized, smollm2, store

WINDOWS = 96
#: Steps by model; a step of the digits takes a twentieth of a second.
STEPS = {"smollm2": 120, "digits": 300}
#: Configs that can be distilled, by name.
CONFIGS = {**hfquant.PRESETS, **SEARCHED, **TWO_BITS}
#: Scores shown in the table, with their errors.
SHOWN = {"smollm2": [("KL", "KL error"), ("perplexity", "")], "digits": [("PSNR dB", "PSNR error")]}


def main(argv: list[str] | None = None) -> int:
    """Measure, print the page and store it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--presets", nargs="+", default=["w3a16-gptq", "w4a16-gptq"], choices=CONFIGS)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, help=f"in place of {STEPS}; 0 with --rounding-steps alone")
    parser.add_argument("--rounding-steps", type=int, default=0, help="steps of learned rounding before that")
    parser.add_argument("--text", default="own", choices=("own", "broad"), help="what SmolLM2 is distilled on")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of SmolLM2 in training")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows, or images")
    parser.add_argument("--json", type=Path, help="file that rows are added to; a .md of the same name goes beside it")
    args = parser.parse_args(argv)

    stored = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    rows: dict[str, dict[str, Any]] = stored.get("rows", {})
    for name in args.models:
        subject = {"smollm2": smollm2, "digits": digits}[name](Settings(args.samples))
        steps = STEPS[name] if args.steps is None else args.steps
        fresh = max(steps, args.rounding_steps + 16)  # windows to train on, or to judge the rounding by
        broad = name == "smollm2" and args.text == "broad"
        data: list[Any] | None = None
        for preset in args.presets:
            row = f"{name}, {preset}" + (", broad text" if broad else "")
            row += ", learned rounding" if args.rounding_steps else ""
            if row in rows:
                continue
            data = _data(name, subject, min(4 * fresh // 3, fresh + 32) if broad else 0) if data is None else data
            model = quantized(copy.deepcopy(CONFIGS[preset]), subject)
            dtype: torch.dtype = getattr(torch, args.dtype) if name == "smollm2" else torch.float32
            before, start = subject.score(model), time.process_time()
            teacher = copy.deepcopy(subject.model)
            if name == "smollm2":  # diffusers refuses to cast quantized models
                model, teacher = model.to(dtype), teacher.to(dtype)
            how = {"learning_rate": args.learning_rate, "rounding_steps": args.rounding_steps}
            found = hfquant.distill(model, teacher, data, steps, **how)
            if name == "smollm2":
                model.to(torch.float32)
            seconds = time.process_time() - start
            held = {"held out, before": found.before, "held out, after": found.after, "kept": found.kept}
            settings = {"seconds": seconds, "steps": steps, "learning rate": args.learning_rate}
            settings |= {"rounding steps": args.rounding_steps} if args.rounding_steps else {}
            settings["dtype"] = str(dtype).removeprefix("torch.")
            rows[row] = {"before": before, "after": subject.score(model), **settings, **held}
            print(row, rows[row], file=sys.stderr, flush=True)
            if args.json:
                store(args.json, rows, markdown(rows))
    print(markdown(rows))
    return 0


def _data(name: str, subject: Subject, broad: int) -> list[Any]:
    if name == "smollm2":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(models.smollm2_folder())
        file = models.MODELS / f"smollm2-wrote-{WINDOWS}.safetensors"
        own = models.written_batches(subject.model, tokenizer, file, count=WINDOWS, batch_size=1)
        if not broad:
            return own
        own = own[: broad // 4]
        return _shuffled([*own, *models.documentation_batches(tokenizer, broad - len(own))])
    parts = [_rows(batch, i) for batch in subject.calibration for i in range(0, len(batch["hidden_states"]), 8)]
    return _shuffled(parts)


def _shuffled(parts: list[Any]) -> list[Any]:
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(0))
    return [parts[i] for i in order]


def _rows(batch: dict[str, Any], start: int) -> dict[str, Any]:
    size = len(batch["hidden_states"])
    return {
        name: value[start : start + 8] if isinstance(value, torch.Tensor) and value.shape[:1] == (size,) else value
        for name, value in batch.items()
    }


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Return a table of scores before and after, with standard errors, the held-out divergence, and CPU seconds."""
    lines = ["| model, preset | score | before | after | divergence held out | seconds |", "| --- |" + " --- |" * 5]
    for name, row in rows.items():
        for score, error in SHOWN[name.partition(",")[0]]:
            cells = [f"{row[w][score]:.4g}" + (f" ± {row[w][error]:.2g}" if error else "") for w in ("before", "after")]
            held = f"{row['held out, before']:.3g} -> {row['held out, after']:.3g}{'' if row['kept'] else ', not kept'}"
            lines.append(f"| {name} | {score} | {' | '.join(cells)} | {held} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
