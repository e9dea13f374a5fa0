"""Why static activation scales fall short on SmolLM2: the same configs on text like and unlike the calibration text.

    python -m benchmarks.static --json benchmarks/results/static.json

Scales are calibrated on windows of Python's language reference. Evaluation uses every fifth window, held out of the
calibration ("same kind"), and the dataset descriptions of :mod:`benchmarks.quality` ("other kind"). Further rows are
calibrated on more text: the same number of windows each of the standard library's and of numpy's help as well ("three
kinds of text"), and on top of these 128 windows that the model generated ("and its own writing"). Rows "on the other
kind itself" are calibrated on their evaluation text, so they are a bound and not a result. Rows that the JSON file
already has are kept.

Besides perplexity and KL, the page has for each down projection the share of its output energy that is lost by clipping
its inputs to each channel's calibrated range, without the first token of each sequence.
"""

from __future__ import annotations

import argparse
import json
import pydoc
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hfquant
from benchmarks import metrics, models
from benchmarks.ablation import FINE, FP8, GPTQ, INT8, INT8_GROUP, SEARCH, SMOOTH, STATIC, TOKEN, config
from benchmarks.quality import environment
from hfquant import QuantLinear
from hfquant.nn.modules import replace_modules
from hfquant.observe import observe
from hfquant.solver import solve
from hfquant.statistics import LayerStats

Batches = list[dict[str, Tensor]]

SEARCHED = {**SMOOTH, **FINE}
WIDE_DOWN = {"*down_proj": {"input_quant": {"type": "int16"}}}
CONFIGS: dict[str, dict[str, Any]] = {
    "W8A8 static, SMOOTH search": config(INT8, STATIC, SEARCHED),
    "W8A8 static, SMOOTH search, GPTQ": config(INT8, STATIC, SEARCHED, GPTQ),
    "W8A8 static, SMOOTH search, weights in groups of 64": config(INT8_GROUP, STATIC, SEARCHED),
    "W8A8 static, SMOOTH search, GPTQ, weights in groups of 64": config(INT8_GROUP, STATIC, SEARCHED, GPTQ),
    # Exponents absorb most outliers, so SMOOTH has less to move: the search covers alphas from 0 on.
    "W8A8 static, SMOOTH search, FP8 activations": config(INT8, FP8, {**SMOOTH, **SEARCH}),
    "W8A8 static, SMOOTH search, INT16 into down_proj": {**config(INT8, STATIC, SEARCHED), **WIDE_DOWN},
}
#: For comparison, calibrated on the first text only.
OTHERS: dict[str, dict[str, Any]] = {
    "W8A8 static, SMOOTH 0.5": config(INT8, STATIC, SMOOTH),
    "W8A8 a scale a token, SMOOTH search": config(INT8, TOKEN, SEARCHED),
}
HELP = (
    ("argparse", "decimal", "difflib", "logging", "statistics", "unittest"),
    ("numpy.linalg", "numpy.random"),
)


def split(batches: Batches) -> tuple[Batches, list[Tensor]]:
    """Return four of five windows for calibration, in batches of four, and every fifth window as [1, tokens]."""
    windows = [window for batch in batches for window in batch["input_ids"]]
    kept = [w for i, w in enumerate(windows) if i % 5 != 4]
    return [{"input_ids": torch.stack(kept[i : i + 4])} for i in range(0, len(kept), 4)], [
        window[None] for window in windows[4::5]
    ]


def help_text(modules: tuple[str, ...]) -> str:
    """Return what ``help()`` prints for modules: prose, lists, tables, examples."""
    return "\n\n".join(pydoc.plain(pydoc.render_doc(name)) for name in modules)


def help_batches(tokenizer: Any, like: Batches) -> Batches:
    """Return as many windows as ``like`` has, of each of the two kinds of help."""
    count = sum(len(batch["input_ids"]) for batch in like)
    return [b for names in HELP for b in models.token_batches(tokenizer, help_text(names), count=count)]


@torch.no_grad()
def solved(model: nn.Module, rules: dict[str, Any], stats: Mapping[str, LayerStats]) -> nn.Module:
    """Quantize ``model`` in place as ``quantize`` does, from statistics that serve several configs."""
    plan = hfquant.plan(model, rules, {"input_ids": torch.zeros(1, 8, dtype=torch.long)})
    layers = {}
    for name, layer in plan.layers.items():
        linear = model.get_submodule(name)
        solution = solve(name, linear.get_parameter("weight"), layer, stats[name])
        layers[linear] = QuantLinear.from_tensors(solution.plan, solution.tensors, None)
    replace_modules(model, layers)
    return model


@torch.no_grad()
def clipped(model: nn.Module, calibration: Batches, windows: list[Tensor]) -> dict[str, float]:
    """Return the share of each down projection's output energy lost by clipping its inputs to the calibrated ranges."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith("down_proj")}
    stats = observe(model, layers, calibration)
    lost, whole = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def hook(name: str) -> Any:
        def look(layer: nn.Linear, args: tuple[Tensor, ...]) -> None:
            x = args[0][0, 1:]
            error = x - x.clamp(stats[name].low, stats[name].high)
            lost[name] += float((error @ layer.weight.T).square().sum())
            whole[name] += float((x @ layer.weight.T).square().sum())

        return look

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    for window in windows:
        model(window, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: lost[name] / whole[name] for name in layers}


def main(argv: list[str] | None = None) -> int:
    """Measure everything, print the page and store it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=40, help="windows of 512 tokens, a fifth of them kept out")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument("--json", type=Path, help="file to write; a .md of the same name goes beside it")
    args = parser.parse_args(argv)

    model, tokenizer = models.smollm2()
    calibration, same = split(models.token_batches(tokenizer, models.calibration_text(), count=args.windows))
    texts = {"same kind": same, "other kind": metrics.evaluation_windows(tokenizer, models.evaluation_texts())}
    references = {kind: metrics.reference(model, windows) for kind, windows in texts.items()}
    stored = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    if stored.get("windows", args.windows) != args.windows:
        parser.error(f"{args.json} was made with {stored['windows']} windows: name another file")
    shares = stored.get("clipped") or {k: clipped(model, calibration, windows) for k, windows in texts.items()}
    calibrations = {
        "": calibration,
        "; three kinds of text": [*calibration, *help_batches(tokenizer, calibration)],
        "; three kinds and its own writing": [
            *calibration,
            *help_batches(tokenizer, calibration),
            *models.written_batches(model, tokenizer, models.MODELS / "smollm2-wrote.safetensors"),
        ],
        "; on the other kind itself": [{"input_ids": window} for window in texts["other kind"]],
    }
    work = {f"{name}{text}": (text, rules) for text in calibrations for name, rules in CONFIGS.items()}
    work = {**{name: ("", rules) for name, rules in OTHERS.items()}, **work}

    @cache
    def observed(text: str) -> dict[str, LayerStats]:
        linears = models.quantizable_linears(model)
        return observe(model, linears, calibrations[text], dict.fromkeys(linears, ("hessian",)))

    rows: dict[str, dict[str, float]] = stored.get("rows", {})
    for name, (text, rules) in work.items():
        if args.only and not any(part in name for part in args.only):
            continue
        quantized = solved(models.smollm2()[0], rules, observed(text))
        rows[name] = {}
        for kind, reference in references.items():
            scores = metrics.language_scores(quantized, reference)
            rows[name][f"{kind}: change %"] = 100 * (scores.perplexity / reference.perplexity - 1)
            rows[name][f"{kind}: KL"] = scores.kl
        print(name, rows[name], file=sys.stderr, flush=True)
        if args.json:
            store(args.json, args.windows, {n: rows[n] for n in work if n in rows}, shares)
    print(markdown({n: rows[n] for n in work if n in rows}, shares))
    return 0


def store(file: Path, windows: int, rows: dict[str, dict[str, float]], shares: dict[str, dict[str, float]]) -> None:
    """Write the figures and their Markdown page."""
    result = {"environment": environment(), "windows": windows, "rows": rows, "clipped": shares}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    page = f"{markdown(rows, shares)}\n{windows} windows of 512 tokens. {environment()['cpu']}.\n"
    file.with_suffix(".md").write_text(page)


def markdown(rows: dict[str, dict[str, float]], shares: dict[str, dict[str, float]]) -> str:
    """Return two tables: quality of each config, and clipping losses over the layers."""
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name, row in rows.items():
        cells = [f"{row[c]:+.2f}" if c.endswith("%") else f"{row[c]:.4f}" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| output energy of down_proj lost to clipping, % | median layer | worst layer |",
        "| --- | ---: | ---: |",
    ]
    for kind, share in shares.items():
        values = torch.tensor(list(share.values())) * 100
        lines.append(f"| {kind} | {values.median():.3f} | {values.max():.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
