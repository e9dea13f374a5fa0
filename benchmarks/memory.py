"""Peak memory of quantizing a model while ``from_pretrained`` loads it, in a fresh process.

    python -m benchmarks.memory

A child process imports everything, quantizes a tiny model of the same architecture while loading it (to pay for
one-time allocations), and says "ready"; its memory at that point is the baseline. While it loads SmolLM2, the parent
samples the child's anonymous memory (RssAnon of ``/proc/PID/status``) every half millisecond. That is the memory of the
process itself, without the pages of the mapped safetensors file, which the kernel can drop at any time. The high-water
mark of resident memory (VmHWM, reset at the baseline) also counts those pages, but misses no peak; both are printed.
Tensors that do not change (the embedding) remain mapped, so the memory held can be below the model's size. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MB = 1e6


def main(argv: list[str] | None = None) -> int:
    """Measure both checkpoint layouts and print the table; return 1 if a bound is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="w4a16", help="a data-free preset, or none to load in full precision")
    parser.add_argument("--json", type=Path, help="file to write; a .md of the same name goes beside it")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "CONFIG"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(*args.child)

    from benchmarks.models import smollm2_folder
    from benchmarks.quality import environment

    measured = {
        f"{config}, {layout}": measure(smollm2_folder(sharded=layout == "sharded"), config)
        for config in dict.fromkeys([args.config, "none"])
        for layout in ("single file", "sharded")
    }
    table = markdown(measured) + f"\n{environment()['cpu']}.\n"
    print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"environment": environment(), "rows": measured}, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(table)
    quantized = [row for name, row in measured.items() if not name.startswith("none")]
    return int(any(row["peak"] > min(row["bound"], row["float size"]) for row in quantized))


def measure(folder: Path, config: str) -> dict[str, float]:
    """Load ``folder`` in a child process and return bytes: peak and final memory over the baseline, sizes, bounds."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--child", str(folder), config]
    measured = watch(command)
    return {**measured, "bound": measured["model"] + 3 * measured["largest tensor"]}


def watch(command: list[str]) -> dict[str, float]:
    """Run a child that ends in :func:`load_watched` and return bytes: memory over its baseline, and what it reports."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        _expect(process.stdout, "ready")
        baseline = status(process.pid)
        samples: list[int] = []
        loaded = threading.Event()

        def sample() -> None:
            while not loaded.is_set():
                samples.append(status(process.pid)["RssAnon"])
                time.sleep(0.0005)

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            process.stdin.write("go\n")
            process.stdin.flush()
            sizes = json.loads(_expect(process.stdout, "loaded"))
        finally:
            loaded.set()
            sampler.join()
        final = status(process.pid)
        process.stdin.close()
    return {
        "peak": max(samples) - baseline["RssAnon"],
        "resident peak": final["VmHWM"] - baseline["VmRSS"],
        "held after": final["RssAnon"] - baseline["RssAnon"],
        "resident after": final["VmRSS"] - baseline["VmRSS"],
        "samples": len(samples),
        **sizes,
    }


def child(folder: str, config: str) -> int:
    """Run in the fresh process: warm up, wait, load, report."""
    import torch
    from transformers import AutoModelForCausalLM

    import hfquant

    torch.set_num_threads(2)

    def load(path: str) -> Any:
        options = {} if config == "none" else {"quantization_config": hfquant.HfQuantConfig(config)}
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)

    with tempfile.TemporaryDirectory() as tiny:
        save_tiny(tiny)
        load(tiny)
    load_watched(lambda: load(folder), Path(folder))
    return 0


def save_tiny(folder: str) -> None:
    """Write a tiny Llama with 64 tokens, for a first call that pays for one-time allocations."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    LlamaForCausalLM(
        LlamaConfig(hidden_size=128, intermediate_size=128, vocab_size=64, tie_word_embeddings=True, **heads)
    ).save_pretrained(folder)


def load_watched(load: Callable[[], Any], folder: Path) -> None:
    """Run in the child: say "ready", load when told to, report sizes in bytes, hold the model until told to end."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    print("ready", flush=True)
    sys.stdin.readline()
    model = load()
    # Buffers that are not saved (a rotary embedding's table) also count as the model's memory.
    tensors = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    shapes = _float_sizes(folder)
    report = {"model": sum(tensors.values()), "float size": sum(shapes), "largest tensor": max(shapes)}
    print("loaded" + json.dumps(report), flush=True)
    sys.stdin.readline()


def status(pid: int) -> dict[str, int]:
    """Return the memory fields of ``/proc/PID/status`` in bytes."""
    fields = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in fields if len(f) == 3 and f[2] == "kB"}


def markdown(measured: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table in MB (10^6 bytes)."""
    columns = ["peak", "resident peak", "held after", "model", "float size", "largest tensor", "bound"]
    lines = ["| MB | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [f"| {n} | " + " | ".join(f"{row[c] / MB:.0f}" for c in columns) + " |" for n, row in measured.items()]
    return "\n".join(lines) + "\n"


def _float_sizes(folder: Path) -> list[int]:
    from safetensors import safe_open

    sizes = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            sizes += [4 * math.prod(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118
    return sizes


def _expect(stream: Any, word: str) -> str:
    """Return the rest of the child's next line that starts with ``word``."""
    for line in stream:
        if line.startswith(word):
            return line[len(word) :]
    raise RuntimeError(f"the child process ended before it said {word!r}")


if __name__ == "__main__":
    sys.exit(main())
