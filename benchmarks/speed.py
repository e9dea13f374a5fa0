"""End-to-end speed of quantized models relative to the float model, next to bf16 and the peers at equal bits.

    python -m benchmarks.speed --out benchmarks/results/speed.md
    python -m benchmarks.speed --workloads "DiT*" --rows "hfquant w8a8*" "torchao*"

Workloads: SmolLM2-135M, a prefill of 512 tokens (logits of the last one) and 64 tokens decoded after them on a static
cache; MiniLM on 64 sentences; two blocks of DiT-XL/2 with random weights (1152 wide, 256 tokens), batches of 1 and 8.
All rows of a workload stay loaded, share what is not quantized, and take turns. Figures are medians over the turns.

Every linear but the output head is quantized. Presets run unchanged except for steps that take time to solve and do not
affect the form of the layers: weights are rounded to nearest, and SMOOTH's alpha is fixed instead of searched. Peers
are timed in eager mode, except torchao's W8A8, which needs compiling (a minute or two with SmolLM2). *Memory* is the
peak increase of the process's resident memory during a call, after malloc returned its free memory. It does not include
the weights. For decoding it is measured over two tokens.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import hfquant
from benchmarks import models, timing
from benchmarks.peer_kernels import ALL_PEERS, compiling, missing, peer_rows
from hfquant.presets import PRESETS

#: The only compiled peer: the whole model, with its weights frozen into the graph.
COMPILED = "torchao W8A8"
#: Peer rows that would repeat other rows, or that are useful only if compiled.
LEFT_OUT = ("torchao W8A8, bf16", "torchao W8A16", "torchao W8A16, bf16", "quanto W8A16")

#: Takes a model (possibly compiled) and returns the function to time. That function returns the model's output; its
#: argument asks for a short run, just enough to compile and to compare outputs.
Workload = Callable[[nn.Module], Callable[[bool], Tensor]]


class Subject(NamedTuple):
    """A float model, calibration batches, and its workloads by name."""

    model: nn.Module
    calibration: list[dict[str, Any]]
    workloads: dict[str, Workload]


def language_model(model: nn.Module, prompt: int, decoded: int, name: str) -> Subject:
    """Return prefill and decode of a causal language model on random tokens."""
    from transformers import StaticCache

    ids = torch.randint(model.config.vocab_size, (1, prompt + decoded))

    def prefill(model: nn.Module) -> Callable[[bool], Tensor]:
        return lambda short: model(ids[:, :prompt], use_cache=False, logits_to_keep=1).logits

    def decode(model: nn.Module) -> Callable[[bool], Tensor]:
        plain = getattr(model, "_orig_mod", model)
        cache = StaticCache(config=plain.config, max_cache_len=prompt + decoded)
        plain(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)

        def run(short: bool) -> Tensor:
            for layer in cache.layers:
                layer.cumulative_length.fill_(prompt)
            logits = [
                model(ids[:, i : i + 1], past_key_values=cache, logits_to_keep=1).logits
                for i in range(prompt, prompt + (2 if short else decoded))
            ]
            return torch.cat(logits, 1)

        return run

    workloads = {f"{name} prefill of {prompt}": prefill, f"{name} decode of {decoded}": decode}
    return Subject(model, [{"input_ids": ids[:, : min(prompt, 32)]}], workloads)


def encoder(model: nn.Module, inputs: dict[str, Tensor], name: str) -> Subject:
    """Return a text encoder on one batch."""

    def start(model: nn.Module) -> Callable[[bool], Tensor]:
        return lambda short: model(**inputs).last_hidden_state

    batch = {key: value[:4] for key, value in inputs.items()}
    return Subject(model, [batch], {f"{name} on {len(inputs['input_ids'])} sentences": start})


def denoiser(model: nn.Module, batches: tuple[int, ...], name: str) -> Subject:
    """Return a class-conditional transformer on batches of several sizes."""
    config = model.config

    def inputs(batch: int, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        return {
            "hidden_states": torch.randn(shape, generator=generator).to(dtype),
            "timestep": torch.full((batch,), 500),
            "class_labels": torch.arange(batch),
        }

    def workload(batch: int) -> Workload:
        def start(model: nn.Module) -> Callable[[bool], Tensor]:
            given = inputs(batch, getattr(model, "_orig_mod", model).dtype)
            return lambda short: model(**given).sample

        return start

    return Subject(model, [inputs(2, torch.float32)], {f"{name}, batch {size}": workload(size) for size in batches})


def _smollm2() -> Subject:
    return language_model(models.smollm2()[0], 512, 64, "SmolLM2")


def _minilm() -> Subject:
    model, tokenizer = models.minilm()
    lines = [line.strip() for text in models.evaluation_texts() for line in text.splitlines() if len(line) > 40]
    sentences = lines[:: len(lines) // 64][:64]
    return encoder(model, dict(tokenizer(sentences, padding=True, return_tensors="pt")), "MiniLM")


def _dit(**sizes: int) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(num_layers=2, **sizes).eval()  # its defaults are DiT-XL/2's


#: Models by name.
SUBJECTS: dict[str, Callable[[], Subject]] = {
    "SmolLM2": _smollm2,
    "MiniLM": _minilm,
    "DiT-XL/2": lambda: denoiser(_dit(), (1, 8), "DiT-XL/2"),
}


def _tiny_llama() -> Subject:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 96}
    return language_model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval(), 16, 4, "SmolLM2")


def _tiny_bert() -> Subject:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 96}
    ids = torch.randint(96, (4, 8))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return encoder(BertModel(BertConfig(num_hidden_layers=1, **sizes)).eval(), inputs, "MiniLM")


#: The same with tiny models of random weights.
QUICK: dict[str, Callable[[], Subject]] = {
    "SmolLM2": _tiny_llama,
    "MiniLM": _tiny_bert,
    "DiT-XL/2": lambda: denoiser(
        _dit(num_attention_heads=2, attention_head_dim=32, sample_size=8, num_embeds_ada_norm=10), (1, 2), "DiT-XL/2"
    ),
}


class Row(NamedTuple):
    """A model dtype and the function that quantizes such a model."""

    dtype: torch.dtype
    apply: Callable[[nn.Module, list[dict[str, Any]]], nn.Module]
    compiled: bool = False


def _preset(name: str) -> Callable[[nn.Module, list[dict[str, Any]]], nn.Module]:
    section: dict[str, Any] = copy.deepcopy(PRESETS[name]["default"])
    section |= {"real_quant": True, "calib": {"type": "amax"}}
    section["opt"].pop("search_alpha_config", None)
    section["weight_quant"].pop("clip", None)

    def apply(model: nn.Module, calibration: list[dict[str, Any]]) -> nn.Module:
        chosen = models.quantizable_linears(model)
        others = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in chosen]
        config = hfquant.HfQuantConfig({"default": section}, modules_to_not_convert=others)
        return hfquant.quantize(model, calibration, config)

    return apply


def _rows() -> dict[str, Row]:
    fp32, bf16 = torch.float32, torch.bfloat16
    rows = {"fp32": Row(fp32, lambda model, _: model), "bf16": Row(bf16, lambda model, _: model)}
    rows |= {f"hfquant {name}": Row(fp32, _preset(name)) for name in PRESETS}
    for name in ("w8a8-dynamic", "w4a8-dynamic", "w4a16", "w8a16", "fp8-dynamic"):
        rows[f"hfquant {name}, bf16"] = Row(bf16, _preset(name))
    peers = {row: Row(dtype, ALL_PEERS[name], row == COMPILED) for row, (name, dtype) in peer_rows().items()}
    return rows | {row: entry for row, entry in peers.items() if row not in LEFT_OUT}


#: All rows by name; the first is the baseline.
ROWS: dict[str, Row] = _rows()


class Measured(NamedTuple):
    """Figures for one workload, by row."""

    seconds: dict[str, float]
    memory: dict[str, float]  # bytes
    others: float  # share of the CPUs that other processes took


def built(subject: Subject, rows: Mapping[str, Row], faults: dict[str, str]) -> dict[str, nn.Module]:
    """Return a model for each row, sharing the parameters that no row changes. ``faults`` gets the rows that failed."""
    floats = {torch.float32: subject.model}
    found = {}
    for name, row in rows.items():
        start = time.perf_counter()
        if row.dtype not in floats:
            floats[row.dtype] = copy.deepcopy(subject.model).to(row.dtype)
        source = floats[row.dtype]
        own = {id(p) for linear in models.quantizable_linears(source).values() for p in linear.parameters()}
        shared = {id(p): p for p in source.parameters() if id(p) not in own}
        batches = [
            {k: v.to(row.dtype) if v.is_floating_point() else v for k, v in batch.items()}
            for batch in subject.calibration
        ]
        try:
            with compiling():
                model = row.apply(copy.deepcopy(source, dict(shared)), batches).eval()
        except Exception as caught:
            logging.debug("%s failed", name, exc_info=True)
            faults[name] = timing.reason(caught)
            continue
        found[name] = torch.compile(model, dynamic=False) if row.compiled else model
        print(f"  {name}: built in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return found


def measure(workload: Workload, ready: Mapping[str, nn.Module], seconds: float, faults: dict[str, str]) -> Measured:
    """Call every model once, compare its output with the first model's, and time all in turns for ``seconds``."""
    runs: dict[str, timing.Run] = {}
    memory, expected = {}, None
    for name, model in ready.items():
        try:
            with compiling():
                run = workload(model)
                y = run(True)
        except Exception as caught:
            logging.debug("%s failed", name, exc_info=True)
            faults[name] = timing.reason(caught)
            continue
        expected = y if expected is None else expected
        if not (error := timing.relative_error(y, expected)) < 1:
            faults[name] = f"computes something else (relative error {error:.2g})"
            continue
        memory[name] = timing.peak_above(lambda _, run=run: run(True))
        runs[name] = lambda _, run=run: run(False)
    with timing.watched() as share:
        medians = timing.interleaved(runs, seconds, shortest=0, clock=timing.clock_of("cpu"))
    return Measured(medians, memory, share[0])


def report(results: Mapping[str, Measured], rows: list[str], notes: list[str]) -> str:
    """Return the tables of ratios and of memory, and the rows not measured, as Markdown."""
    unit, found = rows[0], results.values()

    def ratio(m: Measured, name: str) -> str:
        if name not in m.seconds:
            return "-"
        own = f" ({m.seconds[name] * 1e3:.3g} ms)" if name == unit else ""
        return f"{m.seconds[unit] / m.seconds[name]:.2f}{own}"

    def megabytes(m: Measured, name: str) -> str:
        return f"{m.memory[name] / 1e6:.0f}" if name in m.memory else "-"

    parts = [
        f"Speed relative to {unit}; more is faster. {timing.machine()}\n",
        f"Share of the CPUs that other processes took meanwhile: {timing.shares([m.others for m in found])}.\n",
        timing.markdown("", list(results), {name: [ratio(m, name) for m in found] for name in rows}),
        "Peak memory of a call above the weights, MB:\n",
        timing.markdown("", list(results), {name: [megabytes(m, name) for m in found] for name in rows}),
    ]
    return "\n".join([*parts, *(["Not measured:\n", *notes, ""] if notes else [])])


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables and write them; return 1 if a row that should run did not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--workloads", nargs="+", default=["*"], metavar="GLOB", help="workloads to run, by name")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB", help="rows to run; the first always is")
    parser.add_argument("--seconds", type=float, default=30.0, help="time for the turns of one workload")
    parser.add_argument("--quick", action="store_true", help="tiny models, as few turns as possible")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)

    first = next(iter(ROWS))
    wanted = [name for name in ROWS if name == first or any(fnmatchcase(name, glob) for glob in args.rows)]
    absent = {name: why for name in wanted if (why := missing(name))}
    notes = [f"- {why}" for why in dict.fromkeys(absent.values())]
    results: dict[str, Measured] = {}
    failed = False
    for name, make in (QUICK if args.quick else SUBJECTS).items():
        torch.manual_seed(0)
        with torch.no_grad():
            subject = make()
            chosen = {
                title: workload
                for title, workload in subject.workloads.items()
                if any(fnmatchcase(title, glob) for glob in args.workloads)
            }
            if not chosen:
                continue
            rows = {row: ROWS[row] for row in wanted if row not in absent}
            faults: dict[str, str] = {}
            ready = built(subject, rows, faults)
            for title, workload in chosen.items():
                start = time.perf_counter()
                results[title] = measure(workload, ready, 0 if args.quick else args.seconds, faults)
                print(f"{title}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
                if args.out:  # a run that is interrupted leaves what it has measured
                    args.out.write_text(report(results, wanted, notes))
            del ready
        notes += [f"- {row} on {name}: {why}" for row, why in faults.items()]
        failed |= any(row.startswith(("fp32", "bf16", "hfquant")) for row in faults)
    text = report(results, wanted, notes)
    print(text)
    if args.out:
        args.out.write_text(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
