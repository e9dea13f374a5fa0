"""Every architecture of transformers, tiny and with random weights: quantized while loading, saved and reloaded.

    python -m benchmarks.architectures --presets w8a8-dynamic w4a16 --json benchmarks/results/architectures.json

A model is made of its config class with sizes cut by :data:`SIZES`, of the class that has the most of it: a language
model, one of images and text, and so on. It passes where the reloaded model has the quantized one's tensors and, where
example inputs are known, its outputs, bit for bit, and is a float model again after `dequantize`. Configs that cannot
be cut so are counted apart, and so are float models that transformers does not load back itself. Rows that the JSON
file has are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import signal
import sys
import tempfile
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

import hfquant
from benchmarks.quality import store
from hfquant.integrations.facts import facts_of
from hfquant.nn.modules import quant_modules

#: What ints of a config become at most, by the first pattern that is found in their names.
SIZES: dict[str, int] = {
    r"vocab_size$": 256,
    r"(num_.*layers|n_layers?|depth|n_layer|encoder_layers|decoder_layers|num_blocks|^layers)$": 2,
    r"(key_value_heads|kv_heads)$": 2,
    r"(heads?|n_head)$": 4,
    r"(head_dim|d_kv|d_head|attention_head_size|kv_channels)$": 16,
    r"(intermediate|ffn|d_ff|inner_dim|n_inner|mlp_dim|feed_forward_size)": 128,
    r"(hidden_size|d_model|n_embd|dim|embedding_size|width)$": 64,
    r"(num_experts|n_routed_experts|num_local_experts)$": 4,
    r"(experts_per_tok|top_k|topk|num_experts_per_token)$": 2,
    r"image_size$": 32,
    r"patch_size$": 8,
    r"(max_position_embeddings|n_positions|max_source_positions|max_target_positions)": 128,
    r"rank$": 16,
}
#: Tasks, of which a model's first is taken.
TASKS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION")
#: Parameters of a model that is too large still; seconds that one may take.
MOST, PATIENCE = 40_000_000, 120
NOT_BUILT, FLOAT_FAILS = "config not cut", "float model not loaded back"


def main(argv: list[str] | None = None) -> int:
    """Check, print the page and store it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__.partition("\n")[0])
    parser.add_argument("--presets", nargs="+", default=["w8a8-dynamic", "w4a16"], choices=hfquant.PRESETS)
    parser.add_argument("--only", nargs="+", default=types(), metavar="TYPE", help="model types")
    parser.add_argument("--json", type=Path, help="file that rows are added to; a .md of the same name goes beside it")
    args = parser.parse_args(argv)

    transformers.logging.set_verbosity_error()
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    stored = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    rows: dict[str, dict[str, str]] = stored.get("rows", {})
    for kind in args.only:
        row = rows.setdefault(kind, {})
        for preset in args.presets:
            if preset not in row:
                row[preset] = checked(kind, preset)
                print(f"{kind}, {preset}: {row[preset]}", file=sys.stderr, flush=True)
        if args.json:
            store(args.json, rows, markdown(rows))
    print(markdown(rows))
    return 0


def checked(kind: str, preset: str) -> str:
    """Return what became of a model type, in words."""
    try:
        with at_most(PATIENCE):
            model = tiny(kind)
    except Exception as error:
        return f"{NOT_BUILT}: {_words(error)}"
    if model is None:
        return f"{NOT_BUILT}: too large"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with at_most(PATIENCE):
                model.save_pretrained(folder)
                _same(model, type(model).from_pretrained(folder))
        except Exception as error:
            return f"{FLOAT_FAILS}: {_words(error)}"
        try:
            with at_most(PATIENCE):
                return _round_trip(model, preset, folder)
        except Exception as error:
            return f"fails: {_words(error)}"


def types() -> dict[str, str]:
    """Return model types that have a class, and the name of one."""
    tasks = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in TASKS]
    names = dict(ChainMap(*tasks, modeling_auto.MODEL_MAPPING_NAMES))
    return {kind: n if isinstance(n := names[kind], str) else n[0] for kind in CONFIG_MAPPING if kind in names}


def tiny(kind: str) -> PreTrainedModel | None:
    """Return a small model of a type; None where it stays too large."""
    cls = getattr(transformers, types()[kind])
    config_class = CONFIG_MAPPING[kind]
    try:
        config = config_class(**cuts(config_class()))
        with torch.device("meta"):
            size = cls(config).num_parameters()
    except Exception:  # some sizes can only be changed afterwards
        config = cut(config_class())
        with torch.device("meta"):
            size = cls(config).num_parameters()
    torch.manual_seed(0)
    return None if size > MOST else cls(config).eval().float()


def cuts(config: PreTrainedConfig) -> dict[str, Any]:
    """Return arguments for a smaller config."""
    found: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found[key] = {"model_type": value.model_type, **cuts(value)}
        elif (small := _smaller(key, value)) is not None:
            found[key] = small
    return found


def cut(config: PreTrainedConfig) -> PreTrainedConfig:
    """Make a config smaller in place; lists of layers' kinds become as short as there are layers."""
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            cut(value)
        elif (small := _smaller(key, value)) is not None:
            setattr(config, key, small)
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(kinds := getattr(config, key, None), list):
            setattr(config, key, kinds[: config.num_hidden_layers])
    return config


def _smaller(key: str, value: Any) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if key.endswith(("token_id", "token_index")):
        return 3 + sum(key.encode()) % 200 if value >= 250 else None
    size = next((size for pattern, size in SIZES.items() if re.search(pattern, key)), value)
    return size if size < value else None


def _round_trip(model: PreTrainedModel, preset: str, folder: str) -> str:
    inputs = facts_of(model).example()
    cls = type(model)
    quantized = cls.from_pretrained(folder, quantization_config=hfquant.HfQuantConfig(preset))
    layers = len(quant_modules(quantized))
    quantized.save_pretrained(f"{folder}/quantized")
    again = cls.from_pretrained(f"{folder}/quantized")
    _same(quantized, again)
    if inputs is not None:
        expected, found = outputs(quantized, inputs), outputs(again, inputs)
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(expected, found, strict=True)):
            raise ValueError("the reloaded model has other outputs")
    if quant_modules(again.dequantize()):
        raise ValueError("dequantized, it still has quantized layers")
    return f"equal, {layers} layers{'' if inputs is not None else ', not run'}"


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return every float tensor that a model gives."""
    torch.manual_seed(0)
    with torch.no_grad():
        given = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return [t for t in _tensors(given) if t.is_floating_point()]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _same(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    if ours.keys() != theirs.keys():
        raise ValueError(f"other tensors: {sorted(ours.keys() ^ theirs.keys())[:2]}")
    for name, tensor in ours.items():
        if not torch.equal(tensor, theirs[name]) and not (tensor.is_floating_point() and tensor.isnan().any()):
            raise ValueError(f"{name} differs")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError where the block takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def markdown(rows: Mapping[str, Mapping[str, str]]) -> str:
    """How many model types came to what with each preset, and every failure."""
    presets = list(dict.fromkeys(preset for row in rows.values() for preset in row))
    counts = {p: Counter(re.split(r"[:,]", row[p])[0] for row in rows.values() if p in row) for p in presets}
    unrun = {p: sum("not run" in row.get(p, "") for row in rows.values()) for p in presets}
    lines = [f"| of {len(rows)} model types | {' | '.join(presets)} |", "| --- |" + " ---: |" * len(presets)]
    outcomes = ("equal", "fails", FLOAT_FAILS, NOT_BUILT)
    lines += [f"| {outcome} | {' | '.join(str(counts[p][outcome]) for p in presets)} |" for outcome in outcomes]
    lines.append(f"| of the equal ones, without known inputs | {' | '.join(str(unrun[p]) for p in presets)} |")
    failures = [f"- `{k}`, {p}: {w}" for k, row in rows.items() for p, w in row.items() if w.startswith("fails")]
    apart = [f"- `{k}`: {next(iter(row.values()))}" for k, row in rows.items() if _apart(row)]
    parts = [lines, failures and ["Failures:", "", *failures], apart and ["Not counted:", "", *apart]]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _apart(row: Mapping[str, str]) -> bool:
    return any(words.startswith((NOT_BUILT, FLOAT_FAILS)) for words in row.values())


if __name__ == "__main__":
    sys.exit(main())
