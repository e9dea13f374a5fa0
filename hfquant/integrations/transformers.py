"""The quantizer that transformers' ``from_pretrained`` and ``save_pretrained`` call."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from hfquant import ptq
from hfquant.integrations.checkpoint import (
    CheckpointError,
    dequantized,
    finish_loading,
    install_empty,
    stored_plans,
    to_disk,
)
from hfquant.integrations.config import HfQuantConfig
from hfquant.linear import QuantLinear, quant_linears
from hfquant.planner import Plan, plan_layers
from hfquant.solver import solve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class HfQuantTransformersQuantizer(HfQuantizer):
    """Quantizes while loading (data-free configs), after loading (configs with data), or loads quantized weights."""

    requires_calibration = False
    quantization_config: HfQuantConfig

    def __init__(self, quantization_config: HfQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan: Plan | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, before any weight is read, a config that needs data and has none."""
        if not self.pre_quantized:
            ptq.check_data(self.quantization_config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            install_empty(model, stored_plans(model, config), on_disk=True)
        elif not config.needs_data:
            self.plan = plan_layers(model, config.rules, config.modules_to_not_convert or ())
            install_empty(model, self.plan.layers, on_disk=False)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a checkpoint tensor is a float weight to be quantized as it arrives."""
        if self.plan is None:
            return False
        name, _, tensor = param_name.rpartition(".")
        return tensor == "weight" and name in self.plan.layers

    def get_quantize_ops(self) -> ConversionOps:
        """The operation run on each weight that :meth:`param_needs_quantization` claims."""
        return QuantizeWeight()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        if not self.pre_quantized and self.plan is None:
            return ptq.quantize_loaded(model, config)
        _require_loaded(model)
        finish_loading(model)
        if self.plan is not None:
            attach(model, ptq.own_config(model, config, self.plan))
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors as they are stored."""
        return to_disk(model.state_dict()), {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantized(model, dtype or model.dtype)

    def is_serializable(self) -> bool:
        """Yes, as safetensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: rounding has no gradient."""
        return False


class QuantizeWeight(ConversionOps):
    """One float weight of a checkpoint to the tensors of its QuantLinear (already in the model, on meta)."""

    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """``{"x.weight": float}`` to ``{"x.weight": codes, "x.weight_scale": ...}``."""
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        assert model is not None
        assert full_layer_name is not None
        name = full_layer_name.removesuffix(".weight")
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        if tuple(weight.shape) != (layer.out_features, layer.in_features):
            expected = (layer.out_features, layer.in_features)
            raise CheckpointError(f"{full_layer_name}: expected shape {expected}, got {tuple(weight.shape)}")
        tensors = solve(name, weight, layer.plan, None).tensors
        solved = QuantLinear.from_tensors(layer.plan, tensors, None)
        return {f"{name}.{key}": getattr(solved, key) for key in tensors}


def attach(model: PreTrainedModel, config: HfQuantConfig) -> None:
    """Make ``model`` one that transformers knows as quantized by ``config`` (its own copy)."""
    model.hf_quantizer = HfQuantTransformersQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
    model.config._is_quantized = True


def _require_loaded(model: nn.Module) -> None:
    """Every tensor of every QuantLinear must come from the checkpoint: transformers fills missing ones with garbage."""
    missing = [
        f"{name}.{key}"
        for name, layer in quant_linears(model).items()
        for key, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False)
    ]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckpointError(f"the checkpoint lacks {len(missing)} tensors of quantized linears: {shown}")
