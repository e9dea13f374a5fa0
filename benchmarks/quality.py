"""Quality of quantized models next to full precision and peers: perplexity, KL, agreement, embeddings, images.

    python -m benchmarks.quality --model smollm2 --rows "fp32" "w4a16/*" --json benchmarks/results/smollm2.json

Every row of :data:`ROWS` is a name and one of: a preset's name (quantized by ``from_pretrained`` while loading), a
config (quantized by ``hfquant.quantize`` with calibration data), or a peer's function. Calibration and evaluation data
are separate, and the same for all rows. Rows that the JSON file already has are kept, so a long table can be made in
parts. The table of all rows is written next to it as Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import metrics, models
from benchmarks.ablation import ABLATION, DIGITS_ABLATION, SEARCHED, TWO_BITS
from benchmarks.peers import PEERS, linearized
from hfquant.config import parse
from hfquant.presets import PRESETS

Row = str | dict[str, Any] | Callable[[nn.Module, Any], nn.Module] | None
Scores = dict[str, float]

ROWS: dict[str, Row] = {
    "fp32": None,
    # Presets that need no data are given by name and quantize while loading.
    **{f"preset/{name}": entry if parse(entry).needs_data else name for name, entry in PRESETS.items()},
    **ABLATION,
    **PEERS,
}


class Settings(NamedTuple):
    """What a subject is built with.

    Attributes:
        samples: calibration windows, or images.
        full: whether all windows of each evaluation text count, not only the first ones.
        shuffle: seed of the order of SmolLM2's channels; None for the original order.
    """

    samples: int = 32
    full: bool = False
    shuffle: int | None = models.SHUFFLE


class Subject(NamedTuple):
    """A model under test, with everything that a row needs."""

    model: nn.Module  # full precision
    from_pretrained: Callable[[Any], nn.Module]  # quantization config -> model quantized while loading
    calibration: list[dict[str, Tensor]]
    score: Callable[[nn.Module], Scores]
    settings: dict[str, Any]  # what the figures depend on apart from the row


def smollm2(given: Settings) -> Subject:
    """Return SmolLM2, scored by perplexity, KL and top-1 agreement on the dataset descriptions."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = models.smollm2(given.shuffle)
    windows = metrics.evaluation_windows(tokenizer, models.evaluation_texts(), full=given.full)
    ref = metrics.reference(model, windows)

    def score(quantized: nn.Module) -> Scores:
        scores = metrics.language_scores(quantized, ref)
        change = 100 * (scores.perplexity / ref.perplexity - 1)
        return {
            "perplexity": scores.perplexity,
            "change %": change,
            "KL": scores.kl,
            "KL error": scores.kl_error,
            "top-1 %": 100 * scores.top1,
        }

    return Subject(
        model,
        lambda c: AutoModelForCausalLM.from_pretrained(models.smollm2_folder(given.shuffle), quantization_config=c),
        models.token_batches(tokenizer, models.calibration_text(), count=given.samples),
        score,
        {"evaluation tokens": sum(map(len, ref.states)), "calibration tokens": 512 * given.samples}
        | ({"is the shuffle": given.shuffle} if given.shuffle != models.SHUFFLE else {}),
    )


def minilm(given: Settings) -> Subject:
    """Return MiniLM, scored by cosine similarity of sentence embeddings to full precision's, on description lines."""
    from transformers import AutoModel

    model, tokenizer = models.minilm()
    lines = [line.strip() for text in models.evaluation_texts() for line in text.splitlines() if len(line) > 40]
    lines = lines[:: len(lines) // 128]
    expected = models.sentence_embeddings(model, tokenizer, lines)

    def score(quantized: nn.Module) -> Scores:
        cosine = (models.sentence_embeddings(quantized, tokenizer, lines) * expected).sum(-1).double()
        return {"mean cosine": cosine.mean().item(), "least cosine": cosine.min().item()}

    return Subject(
        model,
        lambda config: AutoModel.from_pretrained(models.MINILM, quantization_config=config),
        models.token_batches(tokenizer, models.calibration_text(), seqlen=128, count=given.samples),
        score,
        {"sentences": len(lines), "calibration tokens": 128 * given.samples},
    )


def digits(given: Settings) -> Subject:
    """Return the digits denoiser, scored by PSNR of 64 final images from equal noise, not used for calibration."""
    from hfquant.demo import DIGITS_PATH, load_digits_pipeline

    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    model, shape = pipe.transformer, (1, pipe.transformer.config.sample_size, pipe.transformer.config.sample_size)

    def sample(count: int, seed: int) -> Tensor:
        noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
        return pipe([i % 10 for i in range(count)], latents=noise, output_type="pt").images

    calibration: list[dict[str, Tensor]] = []
    recorder = model.register_forward_pre_hook(lambda _m, _a, kwargs: calibration.append(kwargs), with_kwargs=True)
    sample(given.samples, seed=1)
    recorder.remove()
    expected = sample(64, seed=2)

    def score(quantized: nn.Module) -> Scores:
        if quantized is model:
            return {}  # images are equal: PSNR is infinite
        pipe.transformer = quantized
        mean, error = metrics.mean_and_error(metrics.psnr(expected, sample(64, seed=2), value_range=1.0))
        pipe.transformer = model
        return {"PSNR dB": mean, "PSNR error": error}

    return Subject(
        model,
        lambda config: type(model).from_pretrained(DIGITS_PATH / "transformer", quantization_config=config),
        calibration,
        score,
        {"images": 64, "calibration images": given.samples},
    )


def _by_kind(rows: Mapping[str, Row]) -> dict[str, Row]:
    kinds = ["fp32", "preset", "w8a16", "w8a8", "fp8a16", "fp8a8", "w6a16", "w6a8", "w4a16", "w4a8", "w4a4"]
    kinds += ["w2a16", "searched"]
    return dict(sorted(rows.items(), key=lambda row: kinds.index(row[0].partition("/")[0])))


SUBJECTS: dict[str, tuple[Callable[[Settings], Subject], Mapping[str, Row]]] = {
    "smollm2": (smollm2, _by_kind({**ROWS, **SEARCHED, **TWO_BITS})),
    "minilm": (minilm, _by_kind(ROWS)),
    "digits": (digits, _by_kind({**ROWS, **DIGITS_ABLATION})),
}


def run_row(name: str, row: Row, subject: Subject) -> Scores:
    """Quantize a copy of the subject's model as given by the row, and score it."""
    weights = {n: linear.weight.numel() for n, linear in models.quantizable_linears(subject.model).items()}
    if row is None:
        return {"bits": 32.0, **subject.score(subject.model)}
    start = time.perf_counter()
    model = row(copy.deepcopy(subject.model), subject.calibration) if callable(row) else quantized(row, subject)
    seconds = time.perf_counter() - start
    bits = metrics.bits_per_weight(model, weights)
    if callable(row) and name.partition("/")[0].endswith("a16"):
        model = linearized(model, weights)
    return {"bits": bits, **subject.score(model), "seconds": seconds}


def quantized(row: str | dict[str, Any], subject: Subject) -> nn.Module:
    """Quantize the layers that all rows quantize: while loading for a preset's name, otherwise a copy, with data."""
    import hfquant

    chosen = models.quantizable_linears(subject.model)
    linears = (n for n, m in subject.model.named_modules() if isinstance(m, nn.Linear))
    config = hfquant.HfQuantConfig(row, modules_to_not_convert=[n for n in linears if n not in chosen])
    if isinstance(row, str):
        return subject.from_pretrained(config).eval()
    return hfquant.quantize(copy.deepcopy(subject.model), subject.calibration, config)


def environment() -> dict[str, Any]:
    """Return the CPU and the library versions that the figures were made with."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    flags = [
        flag
        for flag in ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
        if flag in info
    ]
    packages = ("torch", "transformers", "diffusers", "torchao", "optimum-quanto", "sdnq", "auto-round-lib", "zentorch")
    versions = {name: d.version for name in packages for d in distributions(name=name)}
    return {"cpu": f"{name or platform.processor()} ({', '.join(flags)})", "versions": versions}


def store(path: Path, rows: Mapping[str, Any], page: str) -> None:
    """Write rows and the environment to a JSON file, and their page next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(page)


def markdown(result: Mapping[str, Any], order: Mapping[str, Any]) -> str:
    """Return the result as a Markdown table, rows in the order of ``order``; errors follow their figures after ±."""
    rows = [(name, result["rows"][name]) for name in order if name in result["rows"]]
    columns = list(dict.fromkeys(key for _, scores in rows for key in scores if not key.endswith(" error")))
    digits_of = {"bits": 2, "perplexity": 3, "change %": 2, "top-1 %": 2, "PSNR dB": 2, "seconds": 1}

    def cell(scores: Scores, key: str) -> str:
        if key not in scores:
            return ""
        places = digits_of.get(key, 4)
        error = scores.get(key.partition(" ")[0] + " error")
        return f"{scores[key]:.{places}f}" + (f" ± {error:.{places}f}" if error is not None else "")

    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [f"| {name} | " + " | ".join(cell(scores, key) for key in columns) + " |" for name, scores in rows]
    settings = ", ".join(f"{v} {k}" for k, v in result["settings"].items())
    versions = ", ".join(f"{k} {v}" for k, v in result["environment"]["versions"].items())
    return "\n".join([*lines, "", f"{settings}. {result['environment']['cpu']}. {versions}.", ""])


def main(argv: list[str] | None = None) -> int:
    """Run the requested rows, print the table, and store it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=SUBJECTS, default="smollm2")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB", help="rows to run, by name")
    parser.add_argument("--list", action="store_true", help="print the rows' names and stop")
    parser.add_argument("--json", type=Path, help="file that rows are added to; a .md of the same name goes beside it")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows (images for digits)")
    parser.add_argument("--full", action="store_true", help="all windows of each evaluation text, not only the first")
    parser.add_argument("--shuffle", type=int, default=models.SHUFFLE, help="seed of the order of SmolLM2's channels")
    parser.add_argument("--threads", type=int, help="torch threads")
    args = parser.parse_args(argv)

    build, table = SUBJECTS[args.model]
    chosen = [name for name in table if any(fnmatchcase(name, glob) for glob in args.rows)]
    if args.list or not chosen:
        print("\n".join(table))
        return 0 if args.list else 2
    if args.threads:
        torch.set_num_threads(args.threads)
    subject = build(Settings(args.samples, args.full, args.shuffle))
    result = {"settings": subject.settings, "environment": environment(), "rows": {}}
    if args.json and args.json.exists():
        stored = json.loads(args.json.read_text())
        if stored["settings"] != subject.settings:
            parser.error(f"{args.json} was made with other settings ({stored['settings']}): name another file")
        result["rows"] = stored["rows"]

    failed = []
    for name in chosen:
        torch.manual_seed(0)
        try:
            result["rows"][name] = run_row(name, table[name], subject)
        except Exception:
            logging.exception("row %s failed", name)
            failed.append(name)
            continue
        print(name, {k: round(v, 4) for k, v in result["rows"][name].items()}, file=sys.stderr, flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n")
            args.json.with_suffix(".md").write_text(markdown(result, table))
    print(markdown(result, table))
    if failed:
        print("failed: " + ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
