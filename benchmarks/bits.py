"""Bits chosen per layer against one format in all layers, at equal size: SmolLM2 (KL on two texts), digits (PSNR).

One measurement serves every budget. Choices are INT3, INT4, INT5, INT6 and INT8 in groups of 64, some of them also in
groups of 16 (`--wide`), all with zero points and mse clipping and without smoothing. The uniform models are put
together from the same layers. A searched model is compared with the smallest uniform one that is at least as large.
Calibration, selection (the last fourth of the calibration windows) and evaluation use separate data.

    python -m benchmarks.bits smollm2 --rounding gptq
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import metrics, models
from hfquant.config import parse
from hfquant.experts import Unfused
from hfquant.integrations.facts import facts_of
from hfquant.replacing import replace_modules
from hfquant.search import MeasuredChoices, choose, limit_of
from hfquant.search.choices import rules_of
from hfquant.search.measure import measure
from hfquant.search.repair import TRIES, Judge

BUDGETS = (3.5, 4.45, 4.67, 5.1, 5.5, 6.25, 6.5)
WIDTHS = (3, 4, 5, 6, 8)
#: Tokens per window, and evaluation windows per text.
SEQLEN, WINDOWS = 512, 14
RESULTS = Path(__file__).parent / "results"


def base(rounding: str) -> dict[str, Any]:
    """Return the config that all choices share."""
    weight = {"type": "int4", "group_size": 64, "symmetric": False, "clip": "mse"}
    return {
        "default": {
            "opt": {"type": "default"},
            "calib": {"type": rounding},
            "input_quant": None,
            "weight_quant": weight,
            "real_quant": True,
        }
    }


Score = Callable[[], dict[str, Tensor]]


def smollm2(count: int) -> tuple[nn.Module, list[Any], Score]:
    """Return the model, its calibration windows, and a function that scores it: KL per window on two texts."""
    model, tokenizer = models.smollm2()
    # Every other window is for calibration; some of those in between are for evaluation.
    windows = models.token_batches(tokenizer, models.calibration_text(), SEQLEN, 2 * count, batch_size=1)
    data, between = windows[::2], [batch["input_ids"] for batch in windows[1::2]]
    texts = {
        "descriptions": metrics.evaluation_windows(tokenizer, models.evaluation_texts(), SEQLEN)[:WINDOWS],
        "reference manual": between[:: max(len(between) // WINDOWS, 1)][:WINDOWS],
    }
    before = {name: metrics.reference(model, windows) for name, windows in texts.items()}

    @torch.inference_mode()
    def score() -> dict[str, Tensor]:
        found = {}
        for name, ref in before.items():
            each = []
            for window, states in zip(ref.windows, ref.states, strict=True):
                log_q = model(input_ids=window).logits[0, :-1].log_softmax(-1)
                log_p = (states @ ref.head.T).log_softmax(-1)
                each.append(nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True))
            found[f"KL, {name}"] = torch.stack(each).double()
        return found

    return model, data, score


def digits(count: int) -> tuple[nn.Module, list[Any], Score]:
    """Return the denoiser, its calibration inputs, and a function that scores it: PSNR per image."""
    from hfquant.demo import load_digits_pipeline

    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    model, size = pipe.transformer, pipe.transformer.config.sample_size

    def images(number: int, seed: int) -> Tensor:
        noise = torch.randn(number, 1, size, size, generator=torch.Generator().manual_seed(seed))
        found: Tensor = pipe([i % 10 for i in range(number)], latents=noise, output_type="pt").images
        return found

    data: list[Any] = []
    recorder = model.register_forward_pre_hook(lambda _m, _a, kwargs: data.append(kwargs), with_kwargs=True)
    images(count, seed=1)
    recorder.remove()
    expected = images(64, seed=2)

    def score() -> dict[str, Tensor]:
        return {"PSNR dB": metrics.psnr(expected, images(64, seed=2), value_range=1.0).double()}

    return model, data, score


def run(subject: str, rounding: str, count: int, tries: int, wide: Sequence[int]) -> dict[str, Any]:
    """Return the scores of the searched and the uniform models for one subject and rounding."""
    model, data, score = {"smollm2": smollm2, "digits": digits}[subject](count)
    facts, began = facts_of(model), time.process_time()
    held, seen = data[-(len(data) // 4) :], data[: -(len(data) // 4)]
    choices = [f"int{bits}" for bits in WIDTHS]
    larger = [{"type": f"int{bits}", "group_size": 16} for bits in wide]
    measured = measure(model, rules_of([*choices, *larger], parse(base(rounding))), seen, facts, Unfused())
    labels = [option.name for option in next(iter(measured.table.values()))]
    times = {"measure": time.process_time() - began}
    judge = Judge.of(model, held)
    rows: dict[str, dict[str, Any]] = {}

    def scored(chosen: Mapping[str, str]) -> dict[str, Any]:
        layers = measured.modules(chosen)
        floats = {name: model.get_submodule(name) for name in layers}
        replace_modules(model, {floats[name]: layer for name, layer in layers.items()})
        found = score()
        replace_modules(model, {layer: floats[name] for name, layer in layers.items()})
        return {"bits": bits_of(measured, chosen), "scores": {k: v.tolist() for k, v in found.items()}}

    for label in labels:
        rows[f"all {label}"] = scored(dict.fromkeys(measured.table, label))
        print(label, _summary(rows[f"all {label}"]), flush=True)
    for budget in BUDGETS:
        began = time.process_time()
        chosen, judged = choose(measured, judge, limit_of(measured, budget), tries)
        times[f"search at {budget}"] = time.process_time() - began
        counts = {label: list(chosen.values()).count(label) for label in labels}
        rows[f"search {budget}"] = {**scored(chosen), "judged": judged, "counts": counts, "chosen": chosen}
        print(budget, _summary(rows[f"search {budget}"]), counts, judged, flush=True)
    return {"subject": subject, "rounding": rounding, "samples": len(data), "seconds": times, "rows": rows}


def bits_of(measured: MeasuredChoices, chosen: Mapping[str, str]) -> float:
    """Return the stored bits per weight of a choice, scales included."""
    sizes = {(unit, o.name): o.bytes for unit, options in measured.table.items() for o in options}
    return 8 * sum(sizes[pair] for pair in chosen.items()) / measured.weights


def _summary(row: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{k} {_mean(v)[0]:.5g}" for k, v in row["scores"].items())
    return f"{row['bits']:.3f} bits: {scores}"


def _mean(values: list[float]) -> tuple[float, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor.mean().item(), tensor.std().item() / math.sqrt(len(values))


def markdown(results: list[Mapping[str, Any]]) -> str:
    """Return one table per result: for each budget, the searched model and the smallest uniform one no smaller."""
    lines = [
        "# Automatic bits",
        "",
        "Made by `python -m benchmarks.bits`, whose docstring says what is compared with what. KL: less is better;",
        "PSNR: more. The uniform model is the smallest that is no smaller than the searched one; what a uniform one of",
        "the same size would have is interpolated between those below and above it (of KL the logarithm). Standard",
        "errors are over windows or images, those of differences over the differences of each.",
    ]
    for result in results:
        title = f"{result['subject']}, rounding: {result['rounding']}, {result['samples']} calibration samples"
        names = list(next(iter(result["rows"].values()))["scores"])
        head = [f"{n}: searched | uniform | difference | uniform at this size" for n in names]
        lines += ["", f"## {title}", ""]
        lines += ["| searched | uniform | " + " | ".join(head) + " |", "|" + " --- |" * (2 + 4 * len(names))]
        uniform = {k: v for k, v in result["rows"].items() if k.startswith("all")}
        for key, row in result["rows"].items():
            if key in uniform:
                continue
            larger = {k: v for k, v in uniform.items() if v["bits"] >= row["bits"]}
            other = min(larger, key=lambda k: larger[k]["bits"])
            cells = [f"{row['bits']:.2f} bits", f"{other.removeprefix('all ')}, {uniform[other]['bits']:.2f} bits"]
            for name in names:
                ours, theirs = row["scores"][name], uniform[other]["scores"][name]
                apart = _mean([a - b for a, b in zip(ours, theirs, strict=True)])
                cells += [f"{m:.4g} ± {e:.2g}" for m, e in (_mean(ours), _mean(theirs), apart)]
                cells.append(f"{_between(uniform, row['bits'], name):.4g}")
            lines.append("| " + " | ".join(cells) + " |")
        seconds = ", ".join(f"{what} {took:.0f} s" for what, took in result["seconds"].items())
        lines += ["", f"CPU time: {seconds}."]
    return "\n".join(lines) + "\n"


def _between(uniform: Mapping[str, Mapping[str, Any]], bits: float, name: str) -> float:
    """Interpolate a mean score at a size between the uniform models below and above it; for KL, its logarithm."""
    points = sorted((row["bits"], _mean(row["scores"][name])[0]) for row in uniform.values())
    (low, first), (high, second) = next(pair for pair in pairwise(points) if pair[0][0] <= bits <= pair[1][0])
    share = (bits - low) / (high - low)
    if name.startswith("KL"):
        return math.exp((1 - share) * math.log(first) + share * math.log(second))
    return (1 - share) * first + share * second


def main() -> None:
    """Run one subject, add it to the results and rewrite the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("subject", choices=["smollm2", "digits"])
    parser.add_argument("--rounding", choices=["gptq", "amax"], default="gptq")
    parser.add_argument("--samples", type=int, default=24, help="calibration windows, or images")
    parser.add_argument("--tries", type=int, default=TRIES, help="choices that a search may judge end to end")
    parser.add_argument("--wide", type=int, nargs="*", default=WIDTHS[:4], help="bits to measure in groups of 16 too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = run(args.subject, args.rounding, args.samples, args.tries, args.wide)
    path = RESULTS / "bits.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    key = (found["subject"], found["rounding"])
    results = [r for r in results if (r["subject"], r["rounding"]) != key] + [found]
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
