"""Memory of a saved quantized model once it is reloaded and run, next to the size of its checkpoint.

    python -m benchmarks.reload --json benchmarks/results/reload.json

Each row is a fresh process, as in :mod:`benchmarks.memory`, that first loads and runs a tiny quantized model. It then
loads SmolLM2 and runs a forward over 8 tokens, which touches every weight. *held* is the resident memory afterwards
minus that before, including mapped pages of the checkpoint; *peak* is the maximum on the way. Linux only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.memory import MB, load_watched, save_tiny, watch

BOUND = 1.10


def main(argv: list[str] | None = None) -> int:
    """Measure every preset and print the table; return 1 if one exceeds the bound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reload", description=__doc__.partition("\n")[0])
    parser.add_argument("--configs", nargs="+", default=["w8a8-dynamic", "w4a16", "fp8-dynamic"], help="presets")
    parser.add_argument("--json", type=Path, help="file to write; a .md of the same name goes beside it")
    parser.add_argument("--child", nargs=2, metavar=("TINY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        load(args.child[0])
        load_watched(lambda: load(args.child[1]), Path(args.child[1]))
        return 0

    from benchmarks.models import smollm2_folder
    from benchmarks.quality import environment

    measured: dict[str, dict[str, float]] = {}
    for config in args.configs:
        with tempfile.TemporaryDirectory() as root:
            tiny, folder = Path(root, "tiny"), Path(root, "model")
            save_tiny(str(tiny))
            for source, target in ((tiny, tiny), (smollm2_folder(), folder)):
                quantize(source, target, config)
            row = watch([sys.executable, "-W", "ignore", "-m", "benchmarks.reload", "--child", str(tiny), str(folder)])
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        measured[config] = {"checkpoint": size, "held": row["resident after"], "peak": row["resident peak"]}
    table = markdown(measured) + f"\n{environment()['cpu']}.\n"
    print(table)
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "rows": measured}, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(table)
    return int(any(row["held"] > BOUND * row["checkpoint"] for row in measured.values()))


def quantize(source: Path, target: Path, config: str) -> None:
    """Quantize ``source`` with a data-free preset and save it to ``target``."""
    import torch
    from transformers import AutoModelForCausalLM

    import hfquant

    options = {"quantization_config": hfquant.HfQuantConfig(config), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(source, **options).save_pretrained(target)


def load(folder: str) -> Any:
    """Load a saved model, run a forward over 8 tokens on one thread, and return the model."""
    import torch
    from transformers import AutoModelForCausalLM

    import hfquant  # noqa: F401  (registers itself)

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(torch.arange(8)[None])
    return model


def markdown(measured: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table in MB (10^6 bytes), with the ratio to the checkpoint."""
    lines = ["| MB | checkpoint | held | held / checkpoint | peak |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, row in measured.items():
        share = row["held"] / row["checkpoint"]
        lines.append(
            f"| {name} | {row['checkpoint'] / MB:.0f} | {row['held'] / MB:.0f} | {share:.2f} | {row['peak'] / MB:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
