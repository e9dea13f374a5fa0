"""Contents of a quantized folder, read from its configs and file headers without loading weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hfquant.algorithms import Strength
from hfquant.integrations import library
from hfquant.integrations.checkpoint import CheckpointError, stored_plans
from hfquant.integrations.compat import names_in_model
from hfquant.integrations.config import HfQuantConfig
from hfquant.integrations.experts import holds_experts
from hfquant.integrations.facts import facts_of
from hfquant.integrations.skeleton import MODEL, Skeleton, skeleton, subfolder
from hfquant.layer_plan import LayerPlan
from hfquant.nn.experts import tensor_name
from hfquant.report.layers import sqnr_of

#: The report of a quantization, stored next to its weights.
REPORT_FILE = "quant_report.json"


@dataclass(frozen=True)
class StoredLayer:
    """One quantized layer.

    Attributes:
        name: name of the module.
        shape: (out, in); for a parameter that holds experts, out is the sum over all of them.
        weight, input: formats in words, such as "int4 g64"; "-" for an input that is not quantized.
        method: transform and rounding method, such as "smooth/gptq".
        segments: sizes of the input segments and of the output segments.
        dual: for each input segment, whether it has a second scale for its negative side.
        bytes: bytes of all its tensors except the bias; 0 if it shares those of the layer that it is tied to.
        sqnr: signal-to-noise ratio of its output in dB on calibration rows; None if it was not measured. For experts,
            the worst.
        plain_sqnr: the same for the same formats with round-to-nearest.
        alphas: smoothing strengths, None for no smoothing.
        rank: rank of the low-rank branch.
    """

    name: str
    shape: tuple[int, int]
    weight: str
    input: str
    method: str
    segments: tuple[tuple[int, ...], tuple[int, ...]]
    dual: tuple[bool, ...]
    bytes: int
    sqnr: float | None = None
    plain_sqnr: float | None = None
    alphas: tuple[Strength, ...] = ()
    rank: int = 0

    @property
    def bits(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.bytes / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class StoredModel:
    """One quantized component of a folder.

    Attributes:
        kind: name of its class.
        config: its quantization config.
        layers: its quantized layers.
        skipped: layers in full precision -> the reason.
        bytes: bytes of all its tensors.
        full_bytes: bytes if the quantized layers were stored in the dtype of the float tensors.
        report: report of the quantization, if it was saved.
    """

    kind: str
    config: HfQuantConfig
    layers: tuple[StoredLayer, ...]
    skipped: dict[str, str]
    bytes: int
    full_bytes: int
    report: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def bits(self) -> float:
        """Stored bits per weight of the quantized layers, scales included."""
        stored = [layer for layer in self.layers if layer.bytes]
        weights = sum(layer.shape[0] * layer.shape[1] for layer in stored)
        return 8 * sum(layer.bytes for layer in stored) / weights if weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the description as JSON."""
        return {
            "class": self.kind,
            "bytes": self.bytes,
            "bytes_in_full_precision": self.full_bytes,
            "bits_per_weight": round(self.bits, 3),
            "config": self.config.to_dict()["config"],
            "layers": [asdict(layer) | {"bits": round(layer.bits, 3)} for layer in self.layers],
            "skipped": self.skipped,
        }


def read_folder(folder: str | Path) -> tuple[Skeleton, dict[str, StoredModel]]:
    """Return the contents of a model's or pipeline's folder, and its quantized components by name.

    Raises:
        FileNotFoundError: the folder contains neither a model nor a pipeline.
        ValueError: nothing in it is quantized by hfquant.
        CheckpointError: weights are missing or damaged.
    """
    found = skeleton(str(folder))
    models = {}
    for name, model in found.models.items():
        path = Path(folder) if name == MODEL else Path(folder) / subfolder(name)
        config = json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        if isinstance(config, Mapping) and config.get("quant_method") == "hfquant":
            models[name] = _stored_model(path, model, HfQuantConfig.from_dict(config))
    if not models:
        raise ValueError(f"{folder}: nothing in it was quantized by hfquant")
    return found, models


def _stored_model(path: Path, model: Any, config: Any) -> StoredModel:
    sizes = _tensor_bytes(path)
    if library(model) == "transformers":  # some classes store tensors under other names
        names = names_in_model(model, sorted(sizes))
        sizes = {names[key]: size for key, size in sizes.items()}
    plans = stored_plans(model, config, facts_of(model), set(sizes))
    report = _report(path)
    errors = {layer.get("name"): layer for layer in report.get("layers", ())}
    floats = _float_size(path)
    layers, full = [], sum(sizes.values())
    aliases = facts_of(model).aliases
    for name, plan in plans.items():
        experts = len(model.get_parameter(name)) if holds_experts(model, name) else 0
        measured = errors.get(name, {})
        if experts:
            found = [entry for i in range(experts) if (entry := errors.get(f"{name}.{i}"))]
            measured = max(found, key=lambda entry: entry.get("error") or 0.0, default={})
        keys = [tensor_name("", key) if experts else f".{key}" for key in plan.tensors()]
        taken = max(sum(sizes.get(f"{n}{key}", 0) for key in keys) for n in aliases(name))
        if not plan.tied:
            full += floats * max(experts, 1) * plan.in_features * plan.out_features - taken
        layers.append(_layer(name, plan, taken, measured, max(experts, 1)))
    return StoredModel(
        type(model).__name__, config, tuple(layers), dict(config.skipped), sum(sizes.values()), full, report
    )


def _layer(name: str, plan: LayerPlan, taken: int, measured: Mapping[str, Any], experts: int) -> StoredLayer:
    return StoredLayer(
        name,
        (experts * plan.out_features, plan.in_features),
        plan.weight_in_words + ("" if plan.config.weight_quant.symmetric else " asymmetric"),
        plan.input_in_words,
        plan.method,
        (plan.input_segments, plan.output_segments),
        plan.dual,
        taken,
        sqnr_of(measured.get("error")),
        sqnr_of(measured.get("plain_error")),
        tuple(measured.get("alphas", ())),
        measured.get("rank", 0),
    )


def _tensor_bytes(path: Path) -> dict[str, int]:
    """Return the size in bytes of each tensor in a component's files, from their headers."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} has no safetensors file")
    sizes: dict[str, int] = {}
    for file in files:
        for name, entry in _header(file).items():
            start, end = entry["data_offsets"]
            sizes[name] = end - start
    return sizes


def _header(file: Path) -> dict[str, Any]:
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(file.stat().st_size, 100_000_000):
            raise CheckpointError(f"{file} is damaged: its header is longer than the file")
        try:
            header = json.loads(opened.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from None
    header.pop("__metadata__", None)
    return dict(header)


def _float_size(path: Path) -> int:
    """Return the bytes per float of the model's own dtype, taken to be that of most of its float tensors."""
    counts: dict[int, int] = {}
    for file in path.glob("*.safetensors"):
        for name, entry in _header(file).items():
            if entry["dtype"] in ("F32", "F16", "BF16") and "scale" not in name.rpartition(".")[2]:
                size = 4 if entry["dtype"] == "F32" else 2
                counts[size] = counts.get(size, 0) + 1
    return max(counts, key=lambda size: counts[size], default=4)


def _report(path: Path) -> dict[str, Any]:
    file = path / REPORT_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
