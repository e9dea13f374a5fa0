"""What both libraries' checkpoints share: codes on disk, empty modules to load into, completeness, values.

A model loaded without hfquant imported must fail, not run on garbage. diffusers refuses a method that it does not know.
transformers merely logs it and goes on; config.json stops it (:data:`hfquant.integrations.compat.NEEDS_HFQUANT`), and
behind that the weights: it takes any tensor named ``weight`` of the right shape, so codes have a leading dimension of 1
on disk, which no plain ``nn.Linear`` accepts.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hfquant.console import counted
from hfquant.experts import ExpertsLayout, first_linear
from hfquant.integrations.compat import is_marked_initialized, mark_initialized
from hfquant.integrations.config import HfQuantConfig
from hfquant.nn.experts import QuantExperts, stacked
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import quant_modules
from hfquant.planner import LayerPlan, ModelFacts, Plan, layer_plan, matches
from hfquant.replacing import replace_modules
from hfquant.solver import solve

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A quantized checkpoint that does not fit its config. The message names the tensors."""


def stored_plans(
    model: nn.Module, config: HfQuantConfig, facts: ModelFacts, stored_names: Collection[str] | None = None
) -> dict[str, LayerPlan]:
    """Return the plan of each quantized linear, or parameter of experts, of ``model`` by its checkpoint's config.

    Args:
        model: the model to load into, still float, perhaps on the meta device.
        config: as read from the checkpoint's config.json.
        facts: of the model.
        stored_names: of the checkpoint's tensors; a linear with none among them is left out. None: all must be there.

    Raises:
        ConfigError: the stored plan does not fit the model.
    """
    linears = {name: (module, ".weight") for name, module in model.named_modules() if type(module) is nn.Linear}
    for name, layout in facts.experts.items():
        experts = model.get_submodule(name)
        linears |= {f"{name}.{p}".lstrip("."): (first_linear(experts, layout, p), "") for p in layout.projections}
    plans = {}
    for name, (linear, suffix) in linears.items():
        names = facts.aliases(name)
        if stored_names is not None and not any(n + suffix in stored_names for n in names):
            continue
        left = config.skipped.keys() & set(names) or matches(names, config.modules_to_not_convert or ())
        rule = config.rules.resolve(*names)
        if rule.enable and not left:
            stored = next((config.layers[n] for n in names if n in config.layers), None)
            plans[name] = layer_plan(name, linear, rule, stored)
    return plans


def warn_if_empty(model: nn.Module, plan: Plan) -> None:
    """Log one line where loading has nothing to quantize: a pipeline may load all parts with one config."""
    if not plan.layers:
        why = plan.skipped or "no nn.Linear"
        logger.warning("%s has nothing to quantize (%s): it stays in full precision", type(model).__name__, why)


def install_empty(
    model: nn.Module, plans: Mapping[str, LayerPlan], layouts: Mapping[str, ExpertsLayout], on_disk: bool
) -> None:
    """Replace linears by empty QuantLinears on the meta device, and modules of experts by empty QuantExperts.

    Args:
        model: changed in place.
        plans: name -> plan.
        layouts: name of a module of experts -> how it keeps them.
        on_disk: whether the codes take the form they have on disk, so that a loader's own checks are exact.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    for old, layer in _empty_modules(model, plans, layouts):
        for key in layer.code_names if on_disk else ():
            setattr(layer, key, nn.Parameter(layer.codes_on_disk(key), requires_grad=False))
        # transformers initializes what is not marked, modules and tensors that stay on disk alike, and codes have no
        # random initialization. A tensor that is missing is replaced by one without the mark.
        for marked in (layer, *layer.parameters(), *layer.buffers()):
            mark_initialized(marked)
        replacements[old] = layer
    replace_modules(model, replacements)


def _empty_modules(
    model: nn.Module, plans: Mapping[str, LayerPlan], layouts: Mapping[str, ExpertsLayout]
) -> Iterator[tuple[nn.Module, QuantLinear | QuantExperts]]:
    """Yield what is to be replaced, each with its replacement."""
    parameters = {}
    for name, layout in layouts.items():
        old = model.get_submodule(name)
        experts = QuantExperts(old, layout)
        for projection in layout.projections:
            parameters[f"{name}.{projection}".lstrip(".")] = experts
            if (plan := plans.get(f"{name}.{projection}".lstrip("."))) is not None:
                experts.hold(projection, plan)
        if experts.plans:
            yield old, experts
    for name in plans.keys() - parameters.keys():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        yield linear, QuantLinear(plans[name], linear.bias is not None, "meta", linear.weight.dtype)


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
    """Check that a checkpoint has no tensor of a quantized linear that the linear's plan does not explain.

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
            f"the checkpoint has {_listed(sorted(left))} of quantized linears that its config does not explain: "
            "another config wrote these weights"
        )


def check_loaded(model: nn.Module, on_disk: bool) -> None:
    """Check that every tensor of every QuantLinear came from the checkpoint, with the shape and dtype of its plan.

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


def check_values(name: str, layer: QuantLinear | QuantExperts) -> None:
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
    """Return the error that says which tensors of quantized linears a checkpoint lacks."""
    return CheckpointError(f"the checkpoint lacks {_listed(names)} of quantized linears")


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


class CodesOnDisk(NamedTuple):
    """The form of a tensor of codes on disk: of one dimension more, the first, than in memory."""

    dims: int
    dtype: torch.dtype


def codes_on_disk(state_dict: Mapping[str, Tensor], forms: Mapping[str, CodesOnDisk]) -> dict[str, Tensor]:
    """Return ``state_dict`` with codes as they are stored: with a leading dimension of 1, of the disk's dtype.

    Args:
        state_dict: of the model.
        forms: the codes' names in it, and their form.
    """
    changed = {
        key: state_dict[key].view(1, *state_dict[key].shape[1 - form.dims :]).view(form.dtype)
        for key, form in forms.items()
        if key in state_dict
    }
    return {**state_dict, **changed}


def disk_forms(model: nn.Module) -> dict[str, CodesOnDisk]:
    """Return the form on disk of all codes of a model, by the tensor's name."""
    return {
        f"{name}.{key}".lstrip("."): CodesOnDisk(len(layer.specs()[key].shape) + 1, layer.disk_dtype(key))
        for name, layer in quant_modules(model).items()
        for key in layer.code_names
    }
