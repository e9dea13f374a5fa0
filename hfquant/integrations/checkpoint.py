"""Code shared by both libraries' checkpoints: codes on disk, empty modules to load into, checks of names and values.

A model loaded without importing hfquant must fail instead of running on garbage. diffusers rejects unknown quantization
methods. transformers only logs them and continues; config.json stops it
(:data:`hfquant.integrations.compat.NEEDS_HFQUANT`). The weights are a second safeguard: transformers accepts any tensor
named ``weight`` with the right shape, so codes on disk have a leading dimension of 1, one more than the float module's
weight. A state dict that was saved as it is, without ``save_pretrained``, lacks that dimension, and is read as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hfquant.config import ConfigError, QuantRules
from hfquant.console import counted
from hfquant.experts import ExpertsLayout, first_linear
from hfquant.integrations.compat import is_marked_initialized, mark_initialized
from hfquant.integrations.config import HfQuantConfig
from hfquant.layer_config import LayerConfig
from hfquant.layer_plan import LayerPlan, layer_plan
from hfquant.nn.base import QuantModule
from hfquant.nn.experts import QuantExperts, stacked, tensor_name
from hfquant.nn.kinds import kind_of, layers_in
from hfquant.nn.layer import QuantLayer
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import quant_modules, tie
from hfquant.planner import ModelFacts, Plan, matches
from hfquant.replacing import replace_modules
from hfquant.solver import solve

#: Why a layer stays in float that the checkpoint of another class does not have.
NOT_STORED = "the checkpoint has no weight for it"

#: Why a checkpoint has floats in place of codes, and what to do.
ARE_FLOATS = (
    "the checkpoint's weights are float, but its config says that they are quantized: remove quantization_config from "
    "the config (config.json, or the object passed as config=) and, to load one part of a model, from that of the part "
    "(text_config, vision_config, ...)"
)


class CheckpointError(ValueError):
    """A quantized checkpoint that does not match its config. The message names the tensors."""


def stored_plans(
    model: nn.Module, config: HfQuantConfig, facts: ModelFacts, stored_names: Collection[str] | None = None
) -> dict[str, LayerPlan]:
    """Return the plan of each quantized layer or expert parameter of ``model``, from its checkpoint's config.

    Args:
        model: the model to load into, still float, possibly on the meta device.
        config: the config from the checkpoint's config.json. Layers without a tensor are added to those it skips, so
            that the model can be saved.
        facts: facts about the model.
        stored_names: names of the checkpoint's tensors; layers without any stay float. None: all must be present.

    Raises:
        ConfigError: the stored plan does not match the model.
    """
    plans = {}
    layers = {name: (model.get_submodule(name), ".weight") for name in layers_in(model)}
    for name, layout in facts.experts.items():
        experts = model.get_submodule(name)
        layers |= {f"{name}.{p}".lstrip("."): (first_linear(experts, layout, p), "") for p in layout.projections}
    for name, (module, suffix) in layers.items():
        names = facts.aliases(name)
        tied = any("tied" in config.layers.get(n, ()) for n in names)
        if not _is_left(config, names):
            if stored_names is not None and not tied and not any(n + suffix in stored_names for n in names):
                config.skipped[name] = NOT_STORED
                continue
            plan = layer_plan(name, module, config.rules.resolve(*names), _stored(config, names))
            plans[name] = replace(plan, tied=next((n for n in facts.aliases(plan.tied) if n in layers), plan.tied))
    for name, plan in plans.items():
        if plan.tied and plan.tied not in plans:
            raise ConfigError(f"layer {name!r}: it is tied to {plan.tied!r}, which is not quantized")
    return plans


def stored_config(config: HfQuantConfig, names: Sequence[str]) -> LayerConfig | None:
    """Return how a model's own config says that a layer is quantized; None if it says that the layer is in float.

    Args:
        config: the model's own config.
        names: the layer's name and its aliases.
    """
    if _is_left(config, names):
        return None
    stored = _stored(config, names) or {}
    return QuantRules({"default": stored["config"]}).default if "config" in stored else config.rules.resolve(*names)


def _is_left(config: HfQuantConfig, names: Sequence[str]) -> bool:
    """Return whether a model's own config says that a layer with these names is in float."""
    left = config.skipped.keys() & set(names) or matches(names, config.rules.excluded)
    return bool(left) or not config.rules.resolve(*names).enable


def _stored(config: HfQuantConfig, names: Sequence[str]) -> dict[str, Any] | None:
    """Return what a model's own config says of a layer with these names beyond its rules."""
    return next((config.layers[n] for n in names if n in config.layers), None)


def install_empty(
    model: nn.Module,
    plans: Mapping[str, LayerPlan],
    layouts: Mapping[str, ExpertsLayout],
    stored: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, nn.Module]:
    """Replace float layers and expert modules with empty quantized ones on the meta device.

    Args:
        model: modified in place.
        plans: name -> plan.
        layouts: name of an expert module -> how it stores its experts.
        stored: to load a quantized checkpoint, the shapes of its tensors as far as they are known, by name in the
            model. Codes get their on-disk shape, or their in-memory shape where the checkpoint has that, so that a
            loader's own checks are exact.

    Returns:
        The replaced modules, by name.
    """
    replaced: dict[str, nn.Module] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in _empty_modules(model, plans, layouts):
        for key in layer.code_names:
            # A plain state dict has codes in their in-memory shape.
            if stored is not None and stored.get(f"{name}.{key}") != layer.specs()[key].shape:
                setattr(layer, key, nn.Parameter(layer.codes_on_disk(key), requires_grad=False))
        # transformers initializes everything unmarked, including modules and tensors that stay on disk, and codes have
        # no random initialization. A missing tensor is replaced by one without the mark.
        if isinstance(layer, QuantLayer) and layer.plan.tied:
            layer.borrow(None)  # until :func:`finish_loading`
        for marked in (layer, *layer.parameters(), *layer.buffers()):
            mark_initialized(marked)
        # Some classes initialize a layer along with the module that holds it, using shapes that codes do not have.
        holder = model.get_submodule(name.rpartition(".")[0])
        if not (holder._parameters or holder._buffers):
            mark_initialized(holder)
        replaced[name] = model.get_submodule(name)
        replacements[replaced[name]] = layer
    replace_modules(model, replacements)
    return replaced


def _empty_modules(
    model: nn.Module, plans: Mapping[str, LayerPlan], layouts: Mapping[str, ExpertsLayout]
) -> Iterator[tuple[str, QuantModule]]:
    """Yield the names of the modules to replace, each with its replacement."""
    parameters: set[str] = set()
    for name, layout in layouts.items():
        experts = QuantExperts(model.get_submodule(name), layout)
        for projection in layout.projections:
            parameter = f"{name}.{projection}".lstrip(".")
            parameters.add(parameter)
            if parameter in plans:
                experts.hold(projection, plans[parameter])
        if experts.plans:
            yield name, experts
    for name in [n for n in plans if n not in parameters]:
        module = model.get_submodule(name)
        yield name, kind_of(module).replacing(module, plans[name])


def tensor_shapes(files: Iterable[str | Path]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in safetensors files, by name; ignore other files.

    Raises:
        CheckpointError: a file is damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if str(file).endswith(".safetensors"):
            try:
                with safe_open(file, framework="pt") as opened:
                    shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise CheckpointError(f"{file} is damaged: {error}") from error
    return shapes


def check_names(model: nn.Module, names: Iterable[str]) -> None:
    """Check that the plans of quantized layers account for all of their tensors in a checkpoint.

    Args:
        model: the model with its quantized layers in place.
        names: names of the checkpoint's tensors, as spelled in the model.

    Raises:
        CheckpointError: names the tensors, or says that the checkpoint is a float one.
    """
    layers, names = quant_modules(model), set(names)
    codes = {f"{name}.{key}" for name, layer in layers.items() for key in layer.code_names}
    others = {key for layer in layers.values() for key in layer.specs().keys() - {*layer.code_names, "bias"}}
    if others and not names.isdisjoint(codes) and others.isdisjoint(name.rpartition(".")[2] for name in names):
        raise CheckpointError(ARE_FLOATS)
    left = []
    for name in sorted(names):
        parent, _, tensor = name.rpartition(".")
        layer = layers.get(parent)
        if layer is not None and {**layer._parameters, **layer._buffers}.get(tensor) is None:
            left.append(name)
    if left:
        raise CheckpointError(
            f"the checkpoint has {_listed(left)} of quantized layers that its config does not explain: "
            "another config wrote these weights"
        )


def check_loaded(model: nn.Module, on_disk: bool) -> None:
    """Check that every tensor of each quantized layer came from the checkpoint, with the shape and dtype of its plan.

    transformers fills missing tensors with garbage and casts to the dtype it expects.

    Args:
        model: the model as loaded by transformers.
        on_disk: whether codes may have their on-disk shape.

    Raises:
        CheckpointError: names the tensors.
    """
    missing: list[str] = []
    layers = quant_modules(model)
    codes = [layer.get_parameter(key) for layer in layers.values() for key in layer.code_names]
    arrived = [tensor for tensor in codes if not tensor.is_meta and is_marked_initialized(tensor)]
    why = f": {ARE_FLOATS}" if arrived and all(tensor.is_floating_point() for tensor in arrived) else ""
    for name, layer in layers.items():
        in_memory = layer.specs()
        for key, spec in layer.specs(on_disk).items():
            tensor = getattr(layer, key)
            shape, dtype = in_memory[key] if tensor.dim() == len(in_memory[key].shape) else spec
            if tensor.device.type == "meta":  # offloaded to disk
                continue
            if not is_marked_initialized(tensor):
                missing.append(f"{name}.{key}")
                continue
            fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
            if not fits or tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{name}.{key}: expected shape {shape} of {dtype or 'floats'}, "
                    f"got {tuple(tensor.shape)} of {tensor.dtype}{why}"
                )
    if missing:
        raise missing_tensors(missing)


def check_values(name: str, layer: QuantModule) -> None:
    """Check that a loaded layer's scales are finite and positive, and its other floats finite.

    Codes, zero points and the bytes of two-level scales have no out-of-range values.

    Raises:
        CheckpointError: names the tensor.
    """
    for key, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if tensor.is_meta:
            continue
        positive = key.endswith(("smooth", "scale", "scale_row", "scale_neg"))
        if positive and tensor.is_floating_point():
            if not (tensor.isfinite() & (tensor > 0)).all():
                raise CheckpointError(f"{name}.{key}: scales must be finite and positive")
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{name}.{key}: has NaN or Inf")


def missing_tensors(names: Sequence[str]) -> CheckpointError:
    """Return the error for tensors that a checkpoint lacks."""
    return CheckpointError(f"the checkpoint lacks {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{counted(len(names), 'tensor')} ({shown})"


def finish_loading(model: nn.Module) -> None:
    """Give codes their in-memory shape, check values, freeze parameters, and tie layers.

    Raises:
        CheckpointError: a value is out of range.
    """
    for name, layer in quant_modules(model).items():
        for key in layer.code_names:
            codes = layer.get_parameter(key)
            # Offloaded weights keep their on-disk shape; forward accepts both.
            if codes.device.type != "meta" and codes.dim() > len(layer.specs()[key].shape):
                layer.set_tensor(key, codes.data)
        check_values(name, layer)
        for param in layer.parameters(recurse=False):
            param.requires_grad_(False)
    tie(model)


def experts_shape(layer: QuantExperts, parameter: str) -> tuple[int, int, int]:
    """Return the shape of a float expert parameter, as stored by the class."""
    plan = layer.plans[parameter]
    sizes = (plan.in_features, plan.out_features) if layer.layout.transposed else (plan.out_features, plan.in_features)
    return (layer.expert_count, *sizes)


def quantized_experts(name: str, layer: QuantExperts, plan: LayerPlan, weights: Tensor) -> dict[str, Tensor]:
    """Quantize a float expert parameter without data.

    Args:
        name: name of the parameter.
        layer: the module to quantize it for.
        plan: plan of each expert.
        weights: float, [experts, out, in] or as stored by the class.

    Returns:
        The tensors of a QuantLinear, stacked.

    Raises:
        CheckpointError: the shape of ``weights`` does not match the plan.
        ValueError: ``weights`` has NaN or Inf.
    """
    matrices = weights.transpose(-1, -2) if layer.layout.transposed else weights
    expected = (layer.expert_count, plan.out_features, plan.in_features)
    if tuple(matrices.shape) != expected:
        raise CheckpointError(f"{name}: expected shape {expected}, got {tuple(matrices.shape)}")
    solved = (solve(f"{name}.{i}", matrix, plan, None).tensors for i, matrix in enumerate(matrices))
    return stacked([QuantLinear.from_tensors(plan, tensors, None) for tensors in solved], ())[1]


def quantized_tensors(key: str, layer: QuantModule, weight: Tensor) -> dict[str, Tensor]:
    """Quantize a checkpoint's float tensor ``key`` without data; return the tensors of its layer, by checkpoint name.

    Raises:
        CheckpointError: its shape does not match the plan.
        ValueError: it has NaN or Inf.
    """
    name, _, tensor = key.rpartition(".")
    if isinstance(layer, QuantExperts):
        stacks = quantized_experts(key, layer, layer.plans[tensor], weight)
        return {f"{name}.{tensor_name(tensor, k)}": stack for k, stack in stacks.items()}
    assert isinstance(layer, QuantLayer)
    expected = layer.float_shape
    if weight.shape != expected:
        raise CheckpointError(f"{key}: expected shape {tuple(expected)}, got {tuple(weight.shape)}")
    tensors = solve(name, layer.matrix(weight), layer.plan, None).tensors
    return {f"{name}.{k}": layer.in_memory(k, v) for k, v in tensors.items()}


def needs_no_data(plan: Plan) -> None:
    """Raise if a layer's merged config needs data although no single entry of the config does."""
    from hfquant.calibration.batches import CalibrationError

    needing = next((name for name, layer in plan.layers.items() if layer.config.needs_data), None)
    if needing is not None:
        raise CalibrationError(
            f"layer {needing!r} needs calibration data, which is missing when quantizing while loading"
        )


def codes_on_disk(
    state_dict: Mapping[str, Tensor], forms: Mapping[str, tuple[tuple[int, ...], torch.dtype] | None]
) -> dict[str, Tensor]:
    """Return ``state_dict`` with codes of quantized layers in their stored form, and tied ones only once.

    Args:
        state_dict: state dict of the model.
        forms: the result of :func:`disk_forms`.
    """
    stored = {}
    for key, tensor in state_dict.items():
        form = forms.get(key, (tensor.shape, tensor.dtype))
        if form is not None:
            stored[key] = tensor.view(form[0]).view(form[1]) if key in forms else tensor
    return stored


def disk_forms(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
    """Return the on-disk shape and dtype of each layer's codes, by name; None for tensors that tied layers share."""
    forms: dict[str, tuple[tuple[int, ...], torch.dtype] | None] = {}
    for name, layer in quant_modules(model).items():
        on_disk = layer.specs(on_disk=True)
        for key in layer.code_names:
            shape, dtype = on_disk[key]
            assert dtype is not None
            forms[f"{name}.{key}".lstrip(".")] = shape, dtype
        if isinstance(layer, QuantLayer) and layer.plan.tied:
            forms.update({f"{name}.{tensor}": None for tensor in layer.plan.tensors() if tensor.startswith("weight")})
    return forms
