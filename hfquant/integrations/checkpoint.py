"""What both libraries' checkpoints share: codes on disk, empty modules to load into, completeness, values.

A model loaded without hfquant imported must fail, not run on garbage. diffusers refuses a method that it does not know.
transformers merely logs it and goes on; config.json stops it (:data:`hfquant.integrations.compat.NEEDS_HFQUANT`), and
behind that the weights: it takes any tensor named ``weight`` of the right shape, so codes have a leading dimension of 1
on disk, one more than the weight of the float module has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hfquant.config import ConfigError
from hfquant.console import counted
from hfquant.experts import ExpertsLayout, first_linear
from hfquant.integrations.compat import is_marked_initialized, mark_initialized
from hfquant.integrations.config import HfQuantConfig
from hfquant.layer_plan import LayerPlan, layer_plan
from hfquant.nn.experts import QuantExperts, stacked
from hfquant.nn.kinds import kind_of, layers_in
from hfquant.nn.layer import QuantLayer
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import quant_modules, tie
from hfquant.planner import ModelFacts, Plan, matches
from hfquant.replacing import replace_modules
from hfquant.solver import solve


class CheckpointError(ValueError):
    """A quantized checkpoint that does not fit its config. The message names the tensors."""


def stored_plans(
    model: nn.Module, config: HfQuantConfig, facts: ModelFacts, stored_names: Collection[str] | None = None
) -> dict[str, LayerPlan]:
    """Return the plan of each quantized layer, or parameter of experts, of ``model`` by its checkpoint's config.

    Args:
        model: the model to load into, still float, perhaps on the meta device.
        config: as read from the checkpoint's config.json.
        facts: of the model.
        stored_names: of the checkpoint's tensors; a layer with none among them is left out. None: all must be there.

    Raises:
        ConfigError: the stored plan does not fit the model.
    """
    plans = {}
    layers = {name: (model.get_submodule(name), ".weight") for name in layers_in(model)}
    for name, layout in facts.experts.items():
        experts = model.get_submodule(name)
        layers |= {f"{name}.{p}".lstrip("."): (first_linear(experts, layout, p), "") for p in layout.projections}
    for name, (module, suffix) in layers.items():
        names = facts.aliases(name)
        tied = any("tied" in config.layers.get(n, ()) for n in names)
        if stored_names is not None and not tied and not any(n + suffix in stored_names for n in names):
            continue
        left = config.skipped.keys() & set(names) or matches(names, config.modules_to_not_convert or ())
        rule = config.rules.resolve(*names)
        if rule.enable and not left:
            stored = next((config.layers[n] for n in names if n in config.layers), None)
            plan = layer_plan(name, module, rule, stored)
            plans[name] = replace(plan, tied=next((n for n in facts.aliases(plan.tied) if n in layers), plan.tied))
    for name, plan in plans.items():
        if plan.tied and plan.tied not in plans:
            raise ConfigError(f"layer {name!r}: it is tied to {plan.tied!r}, which is not quantized")
    return plans


def install_empty(
    model: nn.Module, plans: Mapping[str, LayerPlan], layouts: Mapping[str, ExpertsLayout], on_disk: bool
) -> dict[str, nn.Module]:
    """Replace float layers, and modules of experts, by empty quantized ones on the meta device.

    Args:
        model: changed in place.
        plans: name -> plan.
        layouts: name of a module of experts -> how it keeps them.
        on_disk: whether the codes take the form they have on disk, so that a loader's own checks are exact.

    Returns:
        What they replaced, by name.
    """
    replaced: dict[str, nn.Module] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in _empty_modules(model, plans, layouts):
        for key in layer.code_names if on_disk else ():
            setattr(layer, key, nn.Parameter(layer.codes_on_disk(key), requires_grad=False))
        # transformers initializes what is not marked, modules and tensors that stay on disk alike, and codes have no
        # random initialization. A tensor that is missing is replaced by one without the mark.
        if isinstance(layer, QuantLayer) and layer.plan.tied:
            layer.borrow(None)  # until :func:`finish_loading`
        for marked in (layer, *layer.parameters(), *layer.buffers()):
            mark_initialized(marked)
        # Classes may initialize a layer where they do the module that holds it, by shapes that codes have not got.
        holder = model.get_submodule(name.rpartition(".")[0])
        if not (holder._parameters or holder._buffers):
            mark_initialized(holder)
        replaced[name] = model.get_submodule(name)
        replacements[replaced[name]] = layer
    replace_modules(model, replacements)
    return replaced


def _empty_modules(
    model: nn.Module, plans: Mapping[str, LayerPlan], layouts: Mapping[str, ExpertsLayout]
) -> Iterator[tuple[str, QuantLayer | QuantExperts]]:
    """Yield names of what is to be replaced, each with its replacement."""
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
        kind = kind_of(module)
        assert kind is not None
        yield name, kind.replacing(module, plans[name])


def tensor_names(files: Iterable[str | Path]) -> set[str]:
    """Return the names of the tensors in safetensors files; others are passed over.

    Raises:
        CheckpointError: a file is damaged.
    """
    names: set[str] = set()
    for file in files:
        if str(file).endswith(".safetensors"):
            try:
                with safe_open(file, framework="pt") as opened:
                    names.update(opened.keys())
            except SafetensorError as error:
                raise CheckpointError(f"{file} is damaged: {error}") from error
    return names


def check_names(model: nn.Module, names: Iterable[str]) -> None:
    """Check that a checkpoint has no tensor of a quantized layer that the linear's plan does not explain.

    Args:
        model: with its QuantLinears in place.
        names: of the checkpoint's tensors, as the model spells them.

    Raises:
        CheckpointError: naming the tensors.
    """
    layers = quant_modules(model)
    left = []
    for name in names:
        parent, _, tensor = name.rpartition(".")
        layer = layers.get(parent)
        if layer is not None and {**layer._parameters, **layer._buffers}.get(tensor) is None:
            left.append(name)
    if left:
        raise CheckpointError(
            f"the checkpoint has {_listed(sorted(left))} of quantized layers that its config does not explain: "
            "another config wrote these weights"
        )


def check_loaded(model: nn.Module, on_disk: bool) -> None:
    """Check that every tensor of every quantized layer came from the checkpoint, with the shape and dtype of its plan.

    transformers fills missing tensors with garbage and casts to the dtype it expects.

    Args:
        model: as loaded by transformers.
        on_disk: whether codes still have the form that they have on disk.

    Raises:
        CheckpointError: naming the tensors.
    """
    missing: list[str] = []
    for name, layer in quant_modules(model).items():
        for key, (shape, dtype) in layer.specs(on_disk).items():
            tensor = getattr(layer, key)
            if tensor.device.type == "meta":  # offloaded to disk
                continue
            if not is_marked_initialized(tensor):
                missing.append(f"{name}.{key}")
                continue
            fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
            if not fits or tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{name}.{key}: expected shape {shape} of {dtype or 'floats'}, "
                    f"got {tuple(tensor.shape)} of {tensor.dtype}"
                )
    if missing:
        raise missing_tensors(missing)


def check_values(name: str, layer: QuantLayer | QuantExperts) -> None:
    """Check that a loaded layer's scales are finite and positive, and its other floats finite.

    Codes, zero points and the bytes of scales in two levels have no value that is out of range.

    Raises:
        CheckpointError: naming the tensor.
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
    """Return the error that says which tensors of quantized layers a checkpoint lacks."""
    return CheckpointError(f"the checkpoint lacks {_listed(names)} of quantized layers")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{counted(len(names), 'tensor')} ({shown})"


def finish_loading(model: nn.Module) -> None:
    """Bring codes to their form in memory, check values, freeze parameters, and log how real execution runs.

    Raises:
        CheckpointError: a value is out of range.
    """
    for name, layer in quant_modules(model).items():
        for key in layer.code_names:
            codes = layer.get_parameter(key)
            # Offloaded weights stay as they are on disk; forward takes both forms.
            if codes.device.type != "meta" and codes.dim() > len(layer.specs()[key].shape):
                layer.set_tensor(key, codes.data)
        check_values(name, layer)
        for param in layer.parameters(recurse=False):
            param.requires_grad_(False)
    tie(model)


def experts_shape(layer: QuantExperts, parameter: str) -> tuple[int, int, int]:
    """Return the shape of a float parameter of experts, as the class keeps it."""
    plan = layer.plans[parameter]
    sizes = (plan.in_features, plan.out_features) if layer.layout.transposed else (plan.out_features, plan.in_features)
    return (layer.expert_count, *sizes)


def quantized_experts(name: str, layer: QuantExperts, plan: LayerPlan, weights: Tensor) -> dict[str, Tensor]:
    """Quantize a float parameter of experts without data.

    Args:
        name: of the parameter.
        layer: where it goes.
        plan: of each expert.
        weights: float, [experts, out, in] or as the class keeps it.

    Returns:
        The tensors of a QuantLinear, stacked.

    Raises:
        CheckpointError: ``weights`` have another shape than the plan.
        ValueError: they have NaN or Inf.
    """
    matrices = weights.transpose(-1, -2) if layer.layout.transposed else weights
    expected = (layer.expert_count, plan.out_features, plan.in_features)
    if tuple(matrices.shape) != expected:
        raise CheckpointError(f"{name}: expected shape {expected}, got {tuple(matrices.shape)}")
    solved = (solve(f"{name}.{i}", matrix, plan, None).tensors for i, matrix in enumerate(matrices))
    return stacked([QuantLinear.from_tensors(plan, tensors, None) for tensors in solved], ())[1]


def needs_no_data(plan: Plan) -> None:
    """Raise where a layer's merged config needs data although no entry of the config does by itself."""
    from hfquant.calibration.batches import CalibrationError

    needing = next((name for name, layer in plan.layers.items() if layer.config.needs_data), None)
    if needing is not None:
        raise CalibrationError(f"layer {needing!r} needs calibration data, which quantizing while loading has not got")


def codes_on_disk(
    state_dict: Mapping[str, Tensor], forms: Mapping[str, tuple[tuple[int, ...], torch.dtype] | None]
) -> dict[str, Tensor]:
    """Return ``state_dict`` with the codes of quantized layers as they are stored, and tied ones once.

    Args:
        state_dict: of the model.
        forms: as :func:`disk_forms` gives them.
    """
    stored = {}
    for key, tensor in state_dict.items():
        form = forms.get(key, (tensor.shape, tensor.dtype))
        if form is not None:
            stored[key] = tensor.view(form[0]).view(form[1]) if key in forms else tensor
    return stored


def disk_forms(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
    """Return shape and dtype on disk of each quantized layer's codes, by their name; None for what tied ones share."""
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
