"""What both libraries' checkpoints share: the shape of codes on disk, empty modules to load into, completeness.

A model loaded without hfquant imported must fail, not run on garbage. transformers merely logs an unknown method and
goes on, and takes any tensor named ``weight`` of the right shape; so codes have a leading dimension of 1 on disk,
which no plain ``nn.Linear`` accepts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hfquant.integrations.config import HfQuantConfig
from hfquant.linear import QuantLinear, log_real_quant, quant_linears, replace_modules
from hfquant.planner import LayerPlan, aliases, layer_plan

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


def stored_plans(model: nn.Module, config: HfQuantConfig) -> dict[str, LayerPlan]:
    """The plan of each quantized linear of ``model`` (still float, perhaps on meta) by what its checkpoint stored.

    Raises:
        ConfigError: the stored plan does not fit the model.
    """
    skipped = set(config.modules_to_not_convert or ())
    plans = {}
    for name, linear in model.named_modules():
        if type(linear) is not nn.Linear:
            continue
        names = aliases(name, model)
        rule = config.rules.resolve(*names)
        if rule.enable and not skipped.intersection(names):
            stored = next((config.layers[n] for n in names if n in config.layers), None)
            plans[name] = layer_plan(name, linear, rule, stored)
    return plans


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
    replace_modules(model, {layer: layer.to_linear(dtype) for layer in quant_linears(model).values()})
    return model
