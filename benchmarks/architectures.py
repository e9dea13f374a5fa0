"""Every architecture of transformers and diffusers, shrunk, with random weights: quantized, saved and reloaded.

    python -m benchmarks.architectures --presets w8a8-dynamic w4a16 --json benchmarks/results/architectures.json
    python -m benchmarks.architectures --library diffusers --presets w8a8 --json benchmarks/results/diffusers.json

A transformers model is built from a config with reduced sizes (:mod:`benchmarks.tiny_transformers`), in the most
complete class of its type: a language model, an image-text model, and so on. A diffusers model is built from its class
with few layers (:mod:`benchmarks.tiny_diffusers`). The model is quantized while loading. If a preset needs data,
transformers models generate it themselves and diffusers models get noise. A model passes if, after saving and
reloading, its tensors and (if example inputs are known) its outputs equal those of the quantized model bit for bit, and
if `dequantize` turns it back into a float model. Counted separately: configs that cannot be reduced this way, and float
models that their own library does not reload. Reduced models that do not run in float are not run here either. Rows
that the JSON file already has are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import hfquant
from benchmarks import tiny_diffusers, tiny_transformers
from benchmarks.quality import store
from hfquant.integrations.facts import facts_of
from hfquant.nn.modules import quant_modules

#: Seconds that building and loading a model may take, and again quantizing and reloading it.
PATIENCE = 240
NOT_BUILT, FLOAT_FAILS, NO_DATA = "config not cut", "float model not loaded back", "no data to calibrate on"
NOTHING = "nothing to quantize"
#: What transformers models generate: enough to run every layer, since the weights are random.
SELF_MADE = {"source": "self", "samples": 4, "seqlen": 64}


class Library(NamedTuple):
    """Source of the models."""

    kinds: Callable[[], Iterable[str]]
    small: Callable[[str, int], Iterator[nn.Module]]  # kind, most parameters -> models, the preferred one first
    most: int  # most parameters of a model that is not too large


LIBRARIES = {
    "transformers": Library(tiny_transformers.types, tiny_transformers.small, 150_000_000),
    "diffusers": Library(tiny_diffusers.exported, tiny_diffusers.small, 160_000_000),
}


def main(argv: list[str] | None = None) -> int:
    """Check, print the page and store it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__.partition("\n")[0])
    parser.add_argument("--library", default="transformers", choices=LIBRARIES)
    parser.add_argument("--presets", nargs="+", default=["w8a8-dynamic", "w4a16"], choices=hfquant.PRESETS)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="model types, or diffusers' classes")
    parser.add_argument("--json", type=Path, help="file that rows are added to; a .md of the same name goes beside it")
    args = parser.parse_args(argv)

    transformers.logging.set_verbosity_error()
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    library = LIBRARIES[args.library]
    stored = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    rows: dict[str, dict[str, str]] = stored.get("rows", {})
    for kind in args.only or library.kinds():
        row = rows.setdefault(kind, {})
        for preset in args.presets:
            if preset not in row:
                row[preset] = checked(library, kind, preset)
                print(f"{kind}, {preset}: {row[preset]}", file=sys.stderr, flush=True)
        if args.json:
            store(args.json, rows, markdown(rows))
    print(markdown(rows))
    return 0


def checked(library: Library, kind: str, preset: str) -> str:
    """Return the outcome for a model type, in words."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with at_most(PATIENCE):
                model = _first_loaded_back(library.small(kind, library.most), folder)
        except _NotLoadedBack as error:
            return f"{FLOAT_FAILS}: {error}"
        except Exception as error:
            return f"{NOT_BUILT}: {_words(error)}"
        try:
            with at_most(PATIENCE):
                return _round_trip(model, preset, folder)
        except Exception as error:
            return f"fails: {_words(error)}"


class _NotLoadedBack(Exception):
    """No model was reloaded by its own library; the message is the first error."""


def _first_loaded_back(models: Iterator[Any], folder: str) -> Any:
    """Return the first model that its library reloads unchanged, preferably one that runs; saved in ``folder``."""
    first, found = "", None
    for model in models:
        try:
            model.save_pretrained(folder)
            _same(model, type(model).from_pretrained(folder))
        except Exception as error:
            first = first or _words(error)
            continue
        if _inputs(model) is not None:
            return model
        found = found or model
    if found is None:
        raise _NotLoadedBack(first)
    found.save_pretrained(folder)
    return found


def _round_trip(model: Any, preset: str, folder: str) -> str:
    inputs, cls = _inputs(model), type(model)
    config = hfquant.HfQuantConfig(preset)
    if config.needs_data and not isinstance(model, ModelMixin):
        config.calibration = SELF_MADE
    elif config.needs_data and inputs is not None:
        config.calibration = [_noise(inputs, seed) for seed in range(4)]
    try:
        quantized = cls.from_pretrained(folder, quantization_config=config)
    except Exception as error:
        if inputs is None and config.needs_data:  # the float model does not run on what is known of its inputs either
            return f"{NO_DATA}: {_words(error)}"
        raise
    if not quant_modules(quantized):
        return NOTHING
    layers = len(quant_modules(quantized))
    quantized.save_pretrained(f"{folder}/quantized")
    again = cls.from_pretrained(f"{folder}/quantized")
    _same(quantized, again)
    _same_beside(model, again)
    said = "not run"
    if inputs is not None:
        expected, found = outputs(_aligned(quantized), inputs), outputs(_aligned(again), inputs)
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(expected, found, strict=True)):
            raise ValueError("the reloaded model has other outputs")
        noise = _noise(inputs, seed=4)  # zeros as in an example leave tiny values, which a norm amplifies
        said = f"{_error(outputs(model, noise), outputs(again, noise)):.2g} % off"
    # A container of models, such as several ControlNets, loads each with the config and has no quantizer itself.
    if quant_modules(again.dequantize() if hasattr(again, "hf_quantizer") else hfquant.dequantize(again)):
        raise ValueError("dequantized, it still has quantized layers")
    return f"equal, {layers} layers, {said}"


def _same_beside(model: nn.Module, quantized: nn.Module) -> None:
    """Raise unless everything that was not quantized is unchanged, including what no checkpoint holds."""
    ours = dict([*quantized.named_parameters(), *quantized.named_buffers()])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        other = ours.get(name, tensor)
        alike = (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
        if alike and not torch.equal(tensor, other) and not tensor.isnan().any():
            raise ValueError(f"{name} is not the float model's")


def _error(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the relative error of outputs against the float model's in percent, averaged over tensors."""
    pairs = [(a.nan_to_num(), b.nan_to_num()) for a, b in zip(expected, found, strict=True)]
    errors = [100 * float((a - b).norm() / a.norm()) for a, b in pairs if a.norm()]
    return sum(errors) / len(errors) if errors else 0.0


def _noise(inputs: Any, seed: int) -> Any:
    """Return inputs with float tensors of two or more dimensions replaced by noise; times, masks and the like stay.

    Patches behind their row and column (Pix2Struct) stay too.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        wide = tensor.is_floating_point() and tensor.dim() > 1
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) if wide else tensor

    kept = ("mask", "flattened_patches")
    return {
        name: value if any(part in name for part in kept) else tree_map_only(Tensor, noise, value)
        for name, value in inputs.items()
    }


def _inputs(model: nn.Module) -> Any:
    """Return example inputs, or None if they are unknown or do not fit a model of this reduced size."""
    inputs = facts_of(model).example()
    try:
        return inputs if inputs is None or outputs(model, inputs) else None
    except Exception:
        return None


def _aligned(model: nn.Module) -> nn.Module:
    """Copy each tensor to its own memory: the last bit of a product may depend on where a file was mapped."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return every float tensor that a model outputs."""
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
    """Raise TimeoutError if the block takes longer."""

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
    """Return a Markdown page with the number of model types per outcome and preset, and every failure."""
    presets = list(dict.fromkeys(preset for row in rows.values() for preset in row))
    counts = {p: Counter(re.split(r"[:,]", row[p])[0] for row in rows.values() if p in row) for p in presets}
    unrun = {p: sum("not run" in row.get(p, "") for row in rows.values()) for p in presets}
    lines = [f"| of {len(rows)} kinds of model | {' | '.join(presets)} |", "| --- |" + " ---: |" * len(presets)]
    outcomes = ("equal", "fails", NOTHING, NO_DATA, FLOAT_FAILS, NOT_BUILT)
    lines += [f"| {outcome} | {' | '.join(str(counts[p][outcome]) for p in presets)} |" for outcome in outcomes]
    lines.append(f"| of the equal ones, without known inputs | {' | '.join(str(unrun[p]) for p in presets)} |")
    failures = [f"- `{k}`, {p}: {w}" for k, row in rows.items() for p, w in row.items() if w.startswith("fails")]
    apart = [f"- `{k}`: {words}" for k, row in rows.items() for words in dict.fromkeys(filter(_is_apart, row.values()))]
    parts = [lines, failures and ["Failures:", "", *failures], apart and ["Not counted:", "", *apart]]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _is_apart(words: str) -> bool:
    return words.startswith((NOT_BUILT, FLOAT_FAILS, NO_DATA))


if __name__ == "__main__":
    sys.exit(main())
