"""LoRA on SmolLM2: what training gains on the quantized model relative to the float model, and what merging keeps.

    python -m benchmarks.adapters --json benchmarks/results/adapters.json

The shuffled SmolLM2 (:mod:`benchmarks.models`) gets an adapter on every linear and is trained on the first three
quarters of Python's language reference. The loss is measured on windows of the last quarter, used for nothing else. A
seed fixes the adapter's random start and the order of the windows, for all models alike. Presets that need data are
calibrated on the training part. "merged" is the loss after the trained adapter has been rounded into the codes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import calibration_text, smollm2, token_batches

COLUMNS = ("before", "after", "gain", "share of the float gain", "merged", "gain kept")


def main(argv: list[str] | None = None) -> int:
    """Train adapters on each model and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__.partition("\n")[0])
    parser.add_argument("--presets", nargs="*", default=["w8a8-dynamic", "w4a16-gptq"])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write; a .md of the same name goes beside it")
    args = parser.parse_args(argv)
    rows: dict[str, list[dict[str, float]]] = {}
    for preset in [None, *args.presets]:
        rows[preset or "float"] = train(preset, args.steps, args.seqlen, args.seeds)
        print(markdown(rows), flush=True)
    if args.json:
        from benchmarks.quality import environment

        described = (
            f"{args.steps} steps of one window of {args.seqlen} tokens, rank 8; means of {args.seeds} seeds and their "
            f"standard errors; {environment()['cpu']}."
        )
        args.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"environment": environment(), "steps": args.steps, "seqlen": args.seqlen, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(f"{markdown(rows)}\n{described}\n")
    return 0


def train(preset: str | None, steps: int, seqlen: int, seeds: int) -> list[dict[str, float]]:
    """Train adapters on SmolLM2 quantized with ``preset`` (None: float), one window of ``seqlen`` tokens per step.

    Returns:
        For each seed: the held-out losses in nats per token before training, after it and after merging; the gain from
        training; the share of the gain that merging keeps.
    """
    import hfquant

    model, tokenizer = smollm2()
    training, held_out = parts(tokenizer, steps, seqlen)
    if preset is not None:
        hfquant.quantize(model, training, preset)
    before, found = loss_of(model, held_out), []
    for seed in range(seeds):
        order = torch.randperm(steps, generator=torch.Generator().manual_seed(seed)).tolist()
        adapted = fitted(model, [training[i] for i in order], seed)
        after = loss_of(adapted, held_out)
        adapted.merge_adapter()
        merged, gain = loss_of(adapted, held_out), before - after
        kept = (before - merged) / gain
        found.append({"before": before, "after": after, "gain": gain, "merged": merged, "gain kept": kept})
        adapted.unmerge_adapter()
        model = adapted.unload()
    return found


def parts(tokenizer: Any, steps: int, seqlen: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Return training windows and evaluation windows, from separate parts of the text."""
    text = calibration_text()
    cut = len(text) * 3 // 4
    windows = token_batches(tokenizer, text[:cut], seqlen, steps, 1)
    return windows, token_batches(tokenizer, text[cut:], seqlen, 16, 2)


def fitted(model: nn.Module, batches: Sequence[dict[str, Tensor]], seed: int) -> Any:
    """Return ``model`` with an adapter trained on the batches, one AdamW step each."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, len(batches))
    adapted.train()
    for batch in batches:
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return adapted.eval()


def loss_of(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> float:
    """Return the mean loss in nats per token."""
    with torch.inference_mode():
        losses = [model(**batch, labels=batch["input_ids"]).loss for batch in batches]
    return float(torch.stack(losses).double().mean())


def markdown(rows: dict[str, list[dict[str, float]]]) -> str:
    """Return the rows as a Markdown table; the float model must be among them."""
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, runs in rows.items():
        share = [run["gain"] / floats["gain"] for run, floats in zip(runs, rows["float"], strict=True)]
        cells = [_mean([run[c] for run in runs] if c in runs[0] else share) for c in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> str:
    """Return the mean as text, with its standard error if the values differ."""
    mean = f"{statistics.mean(values):.3f}"
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


if __name__ == "__main__":
    raise SystemExit(main())
