"""What both libraries' checkpoints share: the shape of codes on disk, empty modules to load into, completeness.

A model loaded without hfquant imported must fail, not run on garbage. transformers merely logs an unknown method and
goes on, and takes any tensor named ``weight`` of the right shape; so codes have a leading dimension of 1 on disk,
which no plain ``nn.Linear`` accepts.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from hfquant.integrations.config import HfQuantConfig
from hfquant.nn.linear import QuantLinear, log_real_quant, quant_linears, replace_modules
from hfquant.planner import LayerPlan, Plan, aliases, layer_plan

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A quantized checkpoint that does not fit its config. The message names the tensors."""


def to_disk(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state_dict`` with codes as they are stored: integer ``weight`` tensors get a leading dimension of 1."""
    return {
        key: value.unsqueeze(0) if key.endswith(".weight") and _is_codes(value) and value.dim() == 2 else value
        for key, value in state_dict.items()
    }


def _is_codes(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int8, torch.int16)


def stored_plans(
    model: nn.Module, config: HfQuantConfig, stored_names: Collection[str] | None = None
) -> dict[str, LayerPlan]:
    """The plan of each quantized linear of ``model`` (still float, perhaps on meta) by what its checkpoint stored.

    Args:
        model: the model to load into.
        config: as read from the checkpoint's config.json.
        stored_names: of the checkpoint's tensors; a linear with none among them is left out. None: all must be there.

    Raises:
        ConfigError: the stored plan does not fit the model.
    """
    skipped = set(config.modules_to_not_convert or ())
    plans = {}
    for name, linear in model.named_modules():
        if type(linear) is not nn.Linear:
            continue
        names = aliases(name, model)
        if stored_names is not None and not any(f"{n}.weight" in stored_names for n in names):
            continue
        rule = config.rules.resolve(*names)
        if rule.enable and not skipped.intersection(names):
            stored = next((config.layers[n] for n in names if n in config.layers), None)
            plans[name] = layer_plan(name, linear, rule, stored)
    return plans


def warn_if_empty(model: nn.Module, plan: Plan) -> None:
    """One line where loading has nothing to quantize: no error, since a pipeline may load all parts with one config."""
    if not plan.layers:
        why = plan.skipped or "no nn.Linear"
        logger.warning("%s has nothing to quantize (%s): it stays in full precision", type(model).__name__, why)


def install_empty(model: nn.Module, plans: Mapping[str, LayerPlan], on_disk: bool) -> None:
    """Replace linears by empty QuantLinears on the meta device.

    Args:
        model: changed in place.
        plans: name -> plan.
        on_disk: whether the codes take the shape they have on disk, so that a loader's own shape check is exact.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    for name, plan in plans.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = QuantLinear(plan, linear.bias is not None, "meta", linear.weight.dtype)
        if on_disk:
            layer.weight = nn.Parameter(layer.weight.unsqueeze(0), requires_grad=False)
        # transformers initializes what is not marked, and a codes tensor has no random initialization.
        layer._is_hf_initialized = True  # type: ignore[assignment]
        replacements[linear] = layer
    replace_modules(model, replacements)


def check_loaded(model: nn.Module, on_disk: bool) -> None:
    """Check that every tensor of every QuantLinear came from the checkpoint, with the shape and dtype of its plan.

    transformers fills missing tensors with garbage and casts to the dtype it expects.

    Args:
        model: as loaded by transformers.
        on_disk: whether codes still have the shape that they have on disk.

    Raises:
        CheckpointError: naming the tensors.
    """
    missing: list[str] = []
    for name, layer in quant_linears(model).items():
        # float64 stands for "the model's dtype".
        spec = layer.plan.tensors(torch.float64) | {"bias": ((layer.out_features,), torch.float64)}
        for key, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            if tensor.device.type == "meta":  # offloaded to disk
                continue
            if not getattr(tensor, "_is_hf_initialized", False):
                missing.append(f"{name}.{key}")
                continue
            shape, dtype = spec[key]
            shape = (1, *shape) if key == "weight" and on_disk else shape
            fits = tensor.is_floating_point() if dtype == torch.float64 else tensor.dtype == dtype
            if not fits or tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{name}.{key}: expected shape {shape} of {'floats' if dtype == torch.float64 else dtype}, "
                    f"got {tuple(tensor.shape)} of {tensor.dtype}"
                )
    if missing:
        raise missing_tensors(missing)


def missing_tensors(names: Sequence[str]) -> CheckpointError:
    """The error that says which tensors of quantized linears a checkpoint lacks."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return CheckpointError(f"the checkpoint lacks {len(names)} tensors of quantized linears: {shown}")


def finish_loading(model: nn.Module) -> None:
    """Bring codes to their in-memory shape, freeze parameters, and log once how real execution runs."""
    for layer in quant_linears(model).values():
        # Offloaded weights stay as they are on disk; forward takes both shapes.
        if layer.weight.device.type != "meta" and layer.weight.dim() == 3:
            layer.set_tensor("weight", layer.weight.data)
        for param in layer.parameters(recurse=False):
            param.requires_grad_(False)
    log_real_quant(model)


def dequantized(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Every QuantLinear of ``model`` replaced by a plain ``nn.Linear`` of ``dtype``, in place."""
    linears: dict[nn.Module, nn.Module] = {}
    for layer in quant_linears(model).values():
        # Offloaded weights are fetched for the moment.
        with align_module_device(layer):
            linears[layer] = layer.to_linear(dtype).requires_grad_()
    replace_modules(model, linears)
    return model
