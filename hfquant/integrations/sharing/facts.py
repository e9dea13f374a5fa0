"""Facts for an object's card, derived from the object itself, as plain values."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash
from torch import nn

from hfquant.calibration import BaseCalibSet
from hfquant.calibration.provenance import shareable
from hfquant.denoisers import models_of as parts_of
from hfquant.denoisers import module_names
from hfquant.integrations import library
from hfquant.integrations.apply import described
from hfquant.integrations.config import HfQuantConfig
from hfquant.integrations.sharing.origin import is_own_class
from hfquant.layer_config import InputQuant, WeightQuant
from hfquant.nn.modules import quant_modules
from hfquant.presets import PRESETS
from hfquant.report.layers import LayerReport, QuantReport, worst

if TYPE_CHECKING:
    from hfquant.affiner import BlockwiseAffiner


class Row(NamedTuple):
    """The quantized layers that share a pair of weight and input formats."""

    weights: str
    inputs: str
    layers: int
    #: Number of weight elements; ``parameters`` also counts biases.
    elements: int
    parameters: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, counting all tensors of the layers; 0 if they share their codes with others."""
        return 8 * self.bytes / self.elements if self.elements else 0.0


class Left(NamedTuple):
    """What stays in full precision for a given reason."""

    why: str
    parameters: int
    names: list[str]


class MeasuredErrors(NamedTuple):
    """Median SQNR of layer outputs on sampled calibration rows, in dB: as solved, and with plain rounding."""

    sqnr: float
    plain_sqnr: float
    worst: list[LayerReport]
    never_ran: list[str]
    #: Layers that the guard moved to a safer format.
    guarded: list[LayerReport]


@dataclass(frozen=True)
class Component:
    """One quantized model."""

    name: str
    class_name: str
    library: str
    config: HfQuantConfig
    rows: list[Row]
    left: list[Left]
    float_bytes: int
    measured: MeasuredErrors | None

    @property
    def preset(self) -> str | None:
        """Name of the preset that equals the config; None if there is none."""
        return preset_of(self.config)

    @property
    def recipe_json(self) -> str:
        """The recipe that reproduces the model, as JSON."""
        stored = self.config.to_dict()
        kept = {key: stored[key] for key in ("config", "modules_to_not_convert", "per_layer_mode") if stored[key]}
        return json.dumps(kept, indent=2)

    @property
    def data(self) -> dict[str, Any]:
        """Description of the calibration data; empty if none was needed or it is unknown."""
        return {key: value for key, value in self.config.provenance.items() if key != "distilled"}

    @property
    def distilled(self) -> dict[str, Any]:
        """How the model was distilled after quantization; empty if it was not."""
        return dict(self.config.provenance.get("distilled", {}))

    @property
    def float_parameters(self) -> int:
        """Number of parameters that stay in full precision."""
        return sum(left.parameters for left in self.left)

    @property
    def parameters(self) -> int:
        """Number of parameters of the model, counted as in full precision."""
        return sum(row.parameters for row in self.rows) + self.float_parameters

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(row.bytes for row in self.rows) + self.float_bytes


@dataclass(frozen=True)
class Facts:
    """The content of a card.

    Attributes:
        class_name: class of the object.
        library_name: library name on the hub.
        tags: tags on the hub.
        recipe: digest of everything that determines the result; while it does not change, earlier measurements still
            apply.
        components: quantized models.
        values: further values that the template needs.
    """

    class_name: str
    library_name: str
    tags: list[str]
    recipe: str
    components: list[Component] = field(default_factory=list)
    values: Mapping[str, Any] = field(default_factory=dict)


def models_of(thing: Any) -> dict[str, nn.Module]:
    """Return the models of a pipeline by name (each of several ControlNets), or ``{"": thing}``."""
    if isinstance(thing, nn.Module):
        return {"": thing}
    return {name: model for component in module_names(thing) for name, model in parts_of(thing, component).items()}


def of_models(thing: Any) -> Facts:
    """Return the facts of a quantized model, or of a pipeline with quantized components."""
    quantized = {name: model for name, model in models_of(thing).items() if quant_modules(model)}
    tags = dict.fromkeys(tag for model in quantized.values() for tag in tags_of(model))
    recipe = _digest({name: config_of(model).to_dict() for name, model in quantized.items()})
    components = [_component(name, model) for name, model in quantized.items()]
    affiner = affiner_of(thing)
    values: dict[str, Any] = {} if affiner is None else dict(of_affiner(affiner).values)
    # transformers sets the first where it loads a class that comes with the model.
    values["loader"] = getattr(thing, "_auto_class", None) or type(thing).__name__
    values["remote_code"] = any(is_own_class(part) for part in (thing, *models_of(thing).values()))
    return Facts(type(thing).__name__, library(thing) or "diffusers", list(tags), recipe, components, values)


def affiner_of(thing: Any) -> BlockwiseAffiner | None:
    """Return the affiner of a pipeline, its attribute of that name; None if it has none."""
    found = getattr(thing, "affiner", None)
    if found is None:
        return None
    from hfquant.affiner import BlockwiseAffiner

    return found if isinstance(found, BlockwiseAffiner) else None


def of_affiner(affiner: BlockwiseAffiner) -> Facts:
    """Return the facts of an affiner."""
    errors = list(affiner.errors.values())
    before, after = (sum(pair[i] for pair in errors) / len(errors) for i in (0, 1)) if errors else (None, None)
    config = affiner.config.to_json()
    values = {"affiner": affiner, "config": config, "before": before, "after": after}
    return Facts(type(affiner).__name__, "diffusers", ["hfquant", "affiner"], _digest(config), values=values)


def of_set(calibration_set: BaseCalibSet) -> Facts:
    """Return the facts of a calibration set."""
    provenance = shareable(calibration_set.provenance)
    values = {
        "samples": len(calibration_set),
        "provenance": provenance,
        "recorded_from": _recorded_from(provenance),
    }
    return Facts("BaseCalibSet", "hfquant", ["hfquant", "calibration"], _digest(provenance), values=values)


def _recorded_from(provenance: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the library of a set's model, and code that loads the layer that was recorded; None if it is unknown."""
    model, layer = provenance.get("model") or {}, str(provenance.get("layer", ""))
    class_name, name = str(model.get("class", "")), str(model.get("name", ""))
    for package in ("transformers", "diffusers"):
        kind = getattr(import_module(package), class_name, None) if find_spec(package) else None
        # A modular pipeline loads its components in a further step.
        if not name or not hasattr(kind, "from_pretrained") or hasattr(kind, "load_components"):
            continue
        code = f"{class_name}.from_pretrained({json.dumps(name)})"
        if hasattr(kind, "components"):
            component, _, layer = layer.partition(".")
            code += f".{component}"
        return package, code + (f".get_submodule({json.dumps(layer)})" if layer else "")
    return None


def preset_of(config: HfQuantConfig) -> str | None:
    """Return the name of the preset that equals a config; None if there is none."""
    return next((name for name, preset in PRESETS.items() if preset == config.rules.raw), None)


def tags_of(model: nn.Module) -> list[str]:
    """Return the hub tags of a quantized model: hfquant, the bit widths of its weights, the preset."""
    plans = [plan for layer in quant_modules(model).values() for plan, _, _ in layer.held()]
    bits = sorted({plan.config.weight_quant.format.bits for plan in plans})
    preset = preset_of(config_of(model))
    return ["hfquant", *(f"{n}-bit" for n in bits), *([preset] if preset else [])]


def config_of(model: Any) -> HfQuantConfig:
    """Return the config that a quantized model of either library carries; a part of one is described by its layers."""
    if getattr(model, "hf_quantizer", None) is None:
        return described(model)
    # In diffusers, the item of this name is a dict once the model has been saved.
    stored: HfQuantConfig = model.config.quantization_config
    return stored


def _component(name: str, model: nn.Module) -> Component:
    config, layers = config_of(model), quant_modules(model)
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for plan, number, tensors in (held for layer in layers.values() for held in layer.held()):
        rule = plan.config
        # A tied layer shares its codes and their scales with one that is counted.
        elements = 0 if plan.tied else number * plan.in_features * plan.out_features
        own = {name: tensor for name, tensor in tensors.items() if not (plan.tied and name.startswith("weight"))}
        bias = own.get("bias")
        parameters = elements + (0 if bias is None else bias.numel())
        added = number, elements, parameters, sum(tensor.nbytes for tensor in own.values())
        key = _weights(rule.weight_quant), _inputs(rule.input_quant)
        counts[key] = [a + b for a, b in zip(counts[key], added, strict=True)]
    left: dict[str, dict[str, list[nn.Parameter]]] = defaultdict(lambda: defaultdict(list))
    seen: set[int] = set()
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False) if path not in layers else ():
            # A tied parameter is counted where it first appears.
            new = [] if id(parameter) in seen else [parameter]
            left[config.skipped.get(path) or f"{type(module).__name__}, not quantized"][path] += new
            seen.add(id(parameter))
    stored = model.state_dict().keys()
    buffers = [b for n, b in model.named_buffers() if n in stored and n.rpartition(".")[0] not in layers]
    kept = [p for found in left.values() for new in found.values() for p in new]
    return Component(
        name,
        type(model).__name__,
        library(model) or "",
        config,
        [Row(*key, *counted) for key, counted in sorted(counts.items())],
        [
            Left(why, sum(p.numel() for new in found.values() for p in new), list(found))
            for why, found in sorted(left.items())
        ],
        sum(tensor.nbytes for tensor in (*kept, *buffers)),
        _measured(getattr(model, "quant_report", None)),
    )


def _weights(rule: WeightQuant) -> str:
    if rule.group_size is not None:
        scale = f"groups of {rule.group_size}"
    else:
        scale = "one scale per tensor" if rule.axis is None else "one scale per channel"
    points = "" if rule.symmetric else ", zero points"
    return f"{rule.type}, {scale}{points}" if rule.format.has_scale else rule.type


def _inputs(rule: InputQuant | None) -> str:
    if rule is None:
        return "float"
    if not rule.format.has_scale:
        return rule.type
    scale = f"one scale per {'tensor' if rule.axis is None else 'token'}"
    return f"{rule.type}, {scale}, {'static' if rule.static else 'dynamic'}"


def _measured(report: QuantReport | None) -> MeasuredErrors | None:
    if report is None or not (layers := [layer for layer in report.layers if layer.sqnr is not None]):
        return None
    sqnr, plain = (median(getattr(layer, key) for layer in layers) for key in ("sqnr", "plain_sqnr"))
    never_ran = [layer.name for layer in report.layers if layer.fallback]
    return MeasuredErrors(sqnr, plain, worst(layers), never_ran, [layer for layer in report.layers if layer.guard])


def _digest(value: Any) -> str:
    return xxhash.xxh3_64(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
