"""The quantizer that diffusers' ``from_pretrained`` and ``save_pretrained`` call."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from hfquant.console import counted
from hfquant.integrations.apply import own_config, quantize_attached
from hfquant.integrations.checkpoint import (
    CheckpointError,
    CodesOnDisk,
    check_names,
    codes_on_disk,
    disk_forms,
    finish_loading,
    install_empty,
    missing_tensors,
    needs_no_data,
    quantized_experts,
    stored_plans,
    tensor_names,
    warn_if_empty,
)
from hfquant.integrations.compat import drop_quantization_config
from hfquant.integrations.config import HfQuantConfig
from hfquant.integrations.data import check_data, diffusers_batches
from hfquant.integrations.experts import layout_of
from hfquant.integrations.facts import facts_of
from hfquant.nn.experts import QuantExperts
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import dequantized, log_share
from hfquant.planner import Plan, plan_layers
from hfquant.replacing import replace_modules
from hfquant.solver import solve

if TYPE_CHECKING:
    from diffusers import ModelMixin

logger = logging.getLogger(__name__)


class HfQuantDiffusersQuantizer(DiffusersQuantizer):
    """Quantizes while loading (data-free configs), after loading (configs with data), or loads quantized weights."""

    requires_calibration = False
    use_keep_in_fp32_modules = True
    required_packages = None
    quantization_config: HfQuantConfig

    pre_quantized: bool

    def __init__(self, quantization_config: HfQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan: Plan | None = None
        #: Of the quantized linears, for saving.
        self.disk_forms: dict[str, CodesOnDisk] = {}
        self._stored_names: set[str] = set()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse, before any weight is read, a config that needs data and has none, and offloading to disk.

        Raises:
            CalibrationError: the config needs data and carries none.
            ValueError: ``device_map`` has "disk".
        """
        if isinstance(device_map, dict) and "disk" in device_map.values():
            # Float weights would be offloaded before they can be quantized; of quantized ones, the scales are buffers.
            raise ValueError(
                'device_map: diffusers cannot offload the buffers of quantized linears to "disk"; use "cpu", or load '
                "the model and call enable_group_offload(offload_to_disk_path=...)"
            )
        if not self.pre_quantized:
            check_data(self.quantization_config)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Check that each tensor that a sharded checkpoint's index lists is in a shard; diffusers does not.

        Raises:
            CheckpointError: naming the tensors.
        """
        self._stored_names = set(loaded_keys)
        files = checkpoint_files or []
        if files and all(str(file).endswith(".safetensors") for file in files):
            lacking = sorted(self._stored_names - tensor_names(files))
            if lacking:
                some = ", ".join(lacking[:5])
                raise CheckpointError(f"the index lists {counted(len(lacking), 'tensor')} that no file has: {some}")
        return loaded_keys

    def _process_model_before_weight_loading(self, model: ModelMixin, **kwargs: Any) -> None:
        config, facts = self.quantization_config, facts_of(model)
        if self.pre_quantized:
            install_empty(model, stored_plans(model, config, facts), facts.experts, on_disk=True)
            check_names(model, self._stored_names)
        elif not config.needs_data:
            # The linears stay until their weights arrive: the loader checks float shapes against the model.
            self.plan = plan_layers(model, config.rules, config.modules_to_not_convert or (), facts=facts)
            needs_no_data(self.plan)
            warn_if_empty(model, self.plan)

    def update_missing_keys(self, model: ModelMixin, missing_keys: list[str], prefix: str) -> list[str]:
        """Raise where the checkpoint lacks a tensor of a linear that is quantized, or is to be."""
        lacking = sorted(k for k in missing_keys if self._is_quantized(model, k))
        if lacking:
            raise missing_tensors(lacking)
        return missing_keys

    def _is_quantized(self, model: ModelMixin, key: str) -> bool:
        name = key.rpartition(".")[0]
        if self.plan is not None:
            return name in self.plan.layers or key in self.plan.layers
        return isinstance(model.get_submodule(name), (QuantLinear, QuantExperts))

    def check_if_quantized_param(
        self, model: ModelMixin, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Claim float weights that are to be quantized, and every tensor of a quantized linear."""
        name, _, tensor = param_name.rpartition(".")
        if self.plan is not None:
            return (tensor == "weight" and name in self.plan.layers) or param_name in self.plan.layers
        module = model.get_submodule(name)
        # The float tensors of experts are diffusers' own business.
        claimed = isinstance(module, QuantLinear) or (isinstance(module, QuantExperts) and tensor in module.specs())
        return self.pre_quantized and claimed

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Refuse: codes have one exact shape.

        Raises:
            CheckpointError: another shape.
        """
        raise CheckpointError(
            f"{param_name}: expected shape {tuple(current_param.shape)}, got {tuple(loaded_param.shape)}"
        )

    def create_quantized_param(
        self,
        model: ModelMixin,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Quantize a float weight, or put a stored tensor in its place."""
        name, _, tensor = param_name.rpartition(".")
        module = model.get_submodule(name)
        if self.plan is not None and param_name in self.plan.layers:
            self._hold_experts(model, module, param_name, param_value.to(target_device))
            return
        if self.plan is not None:
            assert isinstance(module, nn.Linear)
            solved = solve(name, param_value.to(target_device), self.plan.layers[name], None)
            layer = QuantLinear.from_tensors(solved.plan, solved.tensors, None)
            layer.bias = module.bias  # on meta where it is yet to come, perhaps from another shard
            replace_modules(model, {module: layer})
            return
        assert isinstance(module, (QuantLinear, QuantExperts))
        # diffusers has cast param_value to the model's dtype; scales must stay as they are stored.
        stored = state_dict[param_name]
        value = param_value if tensor in module._model_floats and stored.is_floating_point() else stored
        try:
            module.set_tensor(tensor, value.to(target_device))
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None

    def _hold_experts(self, model: ModelMixin, module: nn.Module, key: str, weights: Tensor) -> None:
        """Have the codes of a float parameter of experts, ``key``, in its place."""
        assert self.plan is not None
        if not isinstance(module, QuantExperts):
            layout = layout_of(module)
            assert layout is not None
            original, module = module, QuantExperts(module, layout)
            replace_modules(model, {original: module})
        plan = self.plan.layers[key]
        module.hold(key.rpartition(".")[2], plan, quantized_experts(key, module, plan, weights))

    def _process_model_after_weight_loading(self, model: ModelMixin, **kwargs: Any) -> ModelMixin:
        config, plan = self.quantization_config, self.plan
        if self.pre_quantized:
            finish_loading(model)
            self.disk_forms = disk_forms(model)
            return model
        if plan is None:
            quantize_attached(model, diffusers_batches(config.calibration), config, facts_of(model), attach)
        else:
            finish_loading(model)
            facts = facts_of(model)
            attach(model, own_config(config, plan, facts))
            if plan.layers:
                log_share(model, facts.uncounted)
        # from_pretrained makes this object model.hf_quantizer next: it must not keep the user's config and its data.
        stored = model.config.get("quantization_config")
        if stored is not None:
            self.quantization_config = stored
        self.plan, self.pre_quantized, self.disk_forms = None, True, disk_forms(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the tensors as they are stored.

        Raises:
            ValueError: asked for a pickle.
        """
        if not safe_serialization:
            raise ValueError("quantized models are saved as safetensors only; leave safe_serialization=True")
        return codes_on_disk(state_dict, self.disk_forms), {}

    def _dequantize(self, model: ModelMixin) -> nn.Module:
        model = dequantized(model, model.dtype)
        drop_quantization_config(model)
        return model

    @property
    def supports_parallel_loading(self) -> bool:
        """Return True only for quantized checkpoints: quantizing many weights at once would hold them all."""
        return self.pre_quantized

    @property
    def is_serializable(self) -> bool:
        """Return True: as safetensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: adapters train, on a gradient that passes the rounding by; codes themselves do not."""
        return True


def attach(model: ModelMixin, config: HfQuantConfig) -> None:
    """Make ``model`` one that diffusers knows as quantized by ``config`` (its own copy)."""
    model.hf_quantizer = HfQuantDiffusersQuantizer(config, pre_quantized=True)
    model.hf_quantizer.disk_forms = disk_forms(model)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.register_to_config(quantization_config=config)
