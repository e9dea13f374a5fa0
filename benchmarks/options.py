"""What each option of a config gains: switched on alone in a bare config, and switched off alone in the whole config.

    python -m benchmarks.options --json benchmarks/results/options.json
    python -m benchmarks.options --models digits second --configs w8a8-gptq

The bare config has the same number formats and nothing else switched on. A config has an option if switching it off, as
in :data:`OFF`, changes the config. Scores are those of :mod:`benchmarks.quality` and :mod:`benchmarks.second_denoiser`,
each row with its own standard error. Rows that the JSON file already has are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hfquant
from benchmarks import metrics, second_denoiser
from benchmarks.quality import SUBJECTS, Scores, Settings, Subject, store
from hfquant.presets import PRESETS

Entry = dict[str, Any]
WHOLE, BARE = "whole", "bare"
#: Configs to measure options of: the presets, and a former preset whose smoothing proved to gain nothing.
CONFIGS: dict[str, Entry] = {
    "w4a16-gptq, smoothed": {**PRESETS["w4a16-gptq"]["default"], "opt": PRESETS["w4a4-gptq"]["default"]["opt"]},
    **{name: preset["default"] for name, preset in PRESETS.items()},
}


def _set(*path: str, to: Any) -> Callable[[Entry], None]:
    """Return a function that sets the option at ``path`` of an entry, if the entry has it."""

    def change(entry: Entry) -> None:
        *outer, last = path
        for key in outer:
            entry = entry.get(key) or {}
        if last in entry:
            entry[last] = to

    return change


def _no_smoothing(entry: Entry) -> None:
    kept = {"smooth_hadamard": "hadamard", "smooth": "default"}
    if (kind := entry["opt"]["type"]) in kept:
        entry["opt"] = {"type": kept[kind]}


def _no_rotation(entry: Entry) -> None:
    kept = {"smooth_hadamard": "smooth", "hadamard": "default"}
    entry["opt"] = {**entry["opt"], "type": kept.get(entry["opt"]["type"], entry["opt"]["type"])}


def _no_patterns(entry: Entry) -> None:
    if entry["input_quant"]:
        entry["search_patterns"] = []


def _four_bit_groups_of_64(entry: Entry) -> None:
    if entry["weight_quant"].get("group_size") == 32:
        entry["weight_quant"]["group_size"] = 64


#: Functions that switch an option of an entry off.
OFF: dict[str, Callable[[Entry], None]] = {
    "groups of 32, not 64": _four_bit_groups_of_64,
    "zero points": _set("weight_quant", "symmetric", to=True),
    "clipping": _set("weight_quant", "clip", to="amax"),
    "GPTQ": _set("calib", to={"type": "amax"}),
    "smoothing": _no_smoothing,
    "rotation": _no_rotation,
    "INT8 ends": _set("weight_quant", "int8_share", to=0.0),
    "float ends": _set("float_share", to=0.0),
    "scales for parts of the input": _set("input_quant", "segments", to=1),
    "INT8 inputs where few multiply": _set("input_quant", "int8_share", to=0.0),
    "tokens' own scales where one does not do": _set("input_quant", "token_fallback", to=False),
    "dual scale and segments of patterns": _no_patterns,
}
#: The score shown for each model, its decimal places, and whether higher is better.
SHOWN: dict[str, tuple[str, int, bool]] = {
    "smollm2": ("KL", 4, False),
    "minilm": ("mean cosine", 4, True),
    "digits": ("PSNR dB", 2, True),
    "second": ("PSNR dB", 2, True),
}


def main(argv: list[str] | None = None) -> int:
    """Measure, print the page and store it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.options", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(SHOWN), choices=SHOWN)
    default = ["w4a16-gptq, smoothed", "w8a8-gptq", "w8a8", "w4a4-gptq"]
    parser.add_argument("--configs", nargs="+", default=default, choices=CONFIGS, metavar="NAME")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows (images for digits)")
    parser.add_argument("--json", type=Path, help="file that rows are added to; a .md of the same name goes beside it")
    args = parser.parse_args(argv)

    stored = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    rows: dict[str, Scores] = stored.get("rows", {})
    for model in args.models:
        subject = second() if model == "second" else SUBJECTS[model][0](Settings(args.samples))
        for config in args.configs:
            for row, changed in configs(config).items():
                if (name := f"{model}: {config}: {row}") in rows:
                    continue
                torch.manual_seed(0)
                model_copy = copy.deepcopy(subject.model)
                rows[name] = subject.score(hfquant.quantize(model_copy, subject.calibration, changed))
                print(name, rows[name], file=sys.stderr, flush=True)
                if args.json:
                    store(args.json, rows, markdown(rows))
    print(markdown(rows))
    return 0


def options(config: str) -> list[str]:
    """Return the options that are on in a config."""
    whole = _entry(config)
    return [name for name in OFF if _entry(config, [name]) != whole]


def configs(config: str) -> dict[str, dict[str, Any]]:
    """Return the configs to compare, by row: the whole config, each option off, each option alone, none."""
    names = options(config)
    off: dict[str, Collection[str]] = {WHOLE: ()}
    off |= {f"without {name}": [name] for name in names}
    off |= {f"only {name}": [other for other in names if other != name] for name in names}
    return {row: {"default": _entry(config, without)} for row, without in {**off, BARE: names}.items()}


def _entry(config: str, off: Collection[str] = ()) -> Entry:
    entry = copy.deepcopy(CONFIGS[config])
    for name in off:
        OFF[name](entry)
    return entry


def second() -> Subject:
    """Return the second denoiser, with the inputs recorded from its calibration images."""
    model = second_denoiser.denoiser()
    expected = second_denoiser.pictures(model, second_denoiser.PICTURES, "evaluation")

    def score(found: nn.Module) -> Scores:
        pictures = second_denoiser.pictures(found, second_denoiser.PICTURES, "evaluation")
        mean, error = metrics.mean_and_error(metrics.psnr(expected, pictures, 1.0))
        return {"PSNR dB": mean, "PSNR error": error}

    return Subject(model, lambda config: model, second_denoiser.calibration(model), score, {})


def markdown(rows: Mapping[str, Scores]) -> str:
    """Return a table per config: scores with each option alone and with all others, for each model."""
    measured = [tuple(name.split(": ", 2)) for name in rows]
    models = [model for model in SHOWN if any(m == model for m, *_ in measured)]
    parts = []
    for config in dict.fromkeys(config for _, config, _ in measured):
        heads = [f"{model}: {what}" for model in models for what in ("only it", "all but it")]
        lines = [f"| {config} | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
        for option in [BARE, *options(config)]:
            pair = (BARE, WHOLE) if option == BARE else (f"only {option}", f"without {option}")
            cells = [_cell(rows.get(f"{model}: {config}: {row}"), model) for model in models for row in pair]
            label = "nothing; everything" if option == BARE else option
            lines.append(f"| {label} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    better = ", ".join(f"{m} {key}: {'more' if more else 'less'} is better" for m, (key, _, more) in SHOWN.items())
    return "\n\n".join([*parts, better + "."]) + "\n"


def _cell(scores: Scores | None, model: str) -> str:
    key, places, _ = SHOWN[model]
    if scores is None or key not in scores:
        return ""
    error = scores.get(key.partition(" ")[0] + " error")
    return f"{scores[key]:.{places}f}" + ("" if error is None else f" ± {error:.{places}f}")


if __name__ == "__main__":
    sys.exit(main())
