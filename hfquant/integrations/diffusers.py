"""The quantizer that diffusers' ``from_pretrained`` and ``save_pretrained`` call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from safetensors import safe_open
from torch import Tensor, nn

from hfquant.console import counted
from hfquant.integrations.apply import own_config, quantize_attached
from hfquant.integrations.checkpoint import (
    CheckpointError,
    check_names,
    codes_on_disk,
    disk_forms,
    finish_loading,
    install_empty,
    missing_tensors,
    needs_no_data,
    quantized_experts,
    stored_plans,
    tensor_shapes,
)
from hfquant.integrations.compat import set_quantization_config
from hfquant.integrations.config import METHOD, HfQuantConfig
from hfquant.integrations.data import check_component_data, diffusers_batches
from hfquant.integrations.experts import layout_of
from hfquant.integrations.facts import facts_of
from hfquant.integrations.placement import (
    device_for,
    exact_floats,
    put_back,
    quantize_left,
    tensor_bytes,
    without_working_memory,
)
from hfquant.integrations.refusals import refuse_copying
from hfquant.nn.base import QuantModule
from hfquant.nn.experts import QuantExperts
from hfquant.nn.kinds import kind_of
from hfquant.nn.layer import QuantLayer
from hfquant.nn.modules import dequantized, log_share, quant_modules
from hfquant.planner import Plan, plan_layers, warn_if_empty
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
        # from_single_file does not say whether the file is quantized. It is if this is the config of its model.
        own = quantization_config.layers or quantization_config.skipped or quantization_config.provenance
        kwargs.setdefault("pre_quantized", bool(own))
        super().__init__(quantization_config, **kwargs)
        self.plan: Plan | None = None
        #: On-disk form of the quantized linears' codes, for saving.
        self.disk_forms: dict[str, tuple[tuple[int, ...], torch.dtype] | None] = {}
        #: Names of the checkpoint's tensors, and shapes of those whose files are safetensors.
        self._stored_names: set[str] = set()
        self._shapes: Mapping[str, Sequence[int]] = {}
        self._files: list[str] = []
        #: While loading: the device map, the model's dtype, and the factor that :meth:`get_cuda_warm_up_factor`
        #: returns.
        self._device_map: dict[str, Any] = {}
        self._dtype: torch.dtype | None = None
        self._warm_up_factor = 4
        #: While a device map is inferred: puts the linears back.
        self._put_back: Callable[[], None] | None = None

    def validate_environment(
        self, *args: Any, device_map: Any = None, torch_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        """Reject, before any weight is read, a config that needs data but has none.

        diffusers calls this again once the device map is final.

        Raises:
            CalibrationError: the config needs data but has none.
        """
        if not self.pre_quantized:
            check_component_data(self.quantization_config)
        self._dtype = torch_dtype or self._dtype
        if isinstance(device_map, dict):
            self._device_map = device_map
        if self._put_back is not None and not isinstance(device_map, str):
            self._put_back()
            self._put_back = None

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Reserve memory on each device for quantizing the largest linear."""
        return without_working_memory(max_memory, self.plan)

    def get_special_dtypes_update(self, model: ModelMixin, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Return the dtypes of scales, which a device map must count at their true size."""
        return exact_floats(model)

    def get_cuda_warm_up_factor(self) -> int:
        """Return the divisor of the element count that reserves half of the model's bytes, in the model's dtype."""
        return self._warm_up_factor

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Check that every tensor in a sharded checkpoint's index is in a shard, which diffusers does not check.

        Raises:
            CheckpointError: names the tensors.
        """
        self._stored_names = set(loaded_keys)
        self._files = [file for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        self._shapes = tensor_shapes(self._files)
        if self._files and len(self._files) == len(checkpoint_files):
            lacking = sorted(self._stored_names - self._shapes.keys())
            if lacking:
                some = ", ".join(lacking[:5])
                raise CheckpointError(f"the index lists {counted(len(lacking), 'tensor')} that no file has: {some}")
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: ModelMixin, device_map: Any = None, state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        config, facts = self.quantization_config, facts_of(model)
        if state_dict is not None:  # only from_single_file passes it
            self._stored_names = set(state_dict)
            self._shapes = {name: tensor.shape for name, tensor in state_dict.items()}
        if self.pre_quantized:
            install_empty(model, stored_plans(model, config, facts), facts.experts, self._shapes)
            check_names(model, self._stored_names)
        elif not config.needs_data:
            # Keep the linears until their weights arrive: the loader checks float shapes against the model.
            self.plan = plan_layers(model, config.rules, facts=facts)
            needs_no_data(self.plan)
            warn_if_empty(model, self.plan)
            if isinstance(device_map, str):
                # A device map is inferred from the sizes that the tensors will have.
                replaced = install_empty(model, self.plan.layers, facts.experts)
                self._put_back = partial(put_back, model, replaced)
        if state_dict is not None:
            # from_single_file looks for no missing tensors, and fails without naming them.
            lacking = sorted(k for k, v in model.state_dict().items() if v.is_meta and k not in state_dict)
            if lacking:
                raise missing_tensors(lacking)

    def update_missing_keys(self, model: ModelMixin, missing_keys: list[str], prefix: str) -> list[str]:
        """Raise if the checkpoint lacks a tensor of a linear that is, or will be, quantized."""
        lacking = sorted(k for k in missing_keys if self._is_quantized(model, k))
        if lacking:
            raise missing_tensors(lacking)
        for name, layer in quant_modules(model).items():
            if device_for(name, self._device_map) == "disk":
                # diffusers only offloads parameters and leaves buffers without memory: _read_buffers will fill it.
                for key, buffer in layer._buffers.items():
                    layer._buffers[key] = None if buffer is None else torch.empty_like(buffer, device="cpu")
        elements = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
        size = (self._dtype or torch.get_default_dtype()).itemsize
        self._warm_up_factor = max(1, round(2 * elements * size / max(1, tensor_bytes(model, self.plan))))
        return missing_keys

    def _read_buffers(self, model: ModelMixin) -> None:
        """Read the buffers of quantized linears from the checkpoint's files, exactly as stored.

        Everything that diffusers offloads to disk, permanently or only while loading, gets rounded to the model's
        dtype.
        """
        layers = quant_modules(model)
        for file in self._files:
            with safe_open(file, framework="pt") as opened:
                for full_name in tensor_shapes([file]):
                    name, _, tensor = full_name.rpartition(".")
                    current = layers[name]._buffers.get(tensor) if name in layers else None
                    if current is not None:
                        value = opened.get_tensor(full_name)
                        value = value.to(current) if value.is_floating_point() else value.to(current.device)
                        self._put(layers[name], name, tensor, value)

    def _is_quantized(self, model: ModelMixin, key: str) -> bool:
        name = key.rpartition(".")[0]
        if self.plan is not None:
            return name in self.plan.layers or key in self.plan.layers
        return isinstance(model.get_submodule(name), QuantModule)

    def check_if_quantized_param(
        self, model: ModelMixin, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Claim float weights to be quantized, and every tensor of a quantized linear."""
        name, _, tensor = param_name.rpartition(".")
        if self.plan is not None:
            return (tensor == "weight" and name in self.plan.layers) or param_name in self.plan.layers
        module = model.get_submodule(name)
        # diffusers handles the float tensors of experts itself.
        claimed = isinstance(module, QuantLayer) or (isinstance(module, QuantExperts) and tensor in module.specs())
        return self.pre_quantized and claimed

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Reject the tensor: codes have one exact shape.

        Raises:
            CheckpointError: always, since the shapes differ.
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
        """Quantize a float weight, or install a stored tensor."""
        name, _, tensor = param_name.rpartition(".")
        module = model.get_submodule(name)
        if self.plan is not None and param_name in self.plan.layers:
            self._hold_experts(model, module, param_name, param_value.to(target_device))
            return
        if self.plan is not None:
            kind = kind_of(module)
            solved = solve(name, kind.matrix(param_value.to(target_device)), self.plan.layers[name], None)
            layer = kind.from_tensors(solved.plan, solved.tensors, None, module)
            layer.bias = module._parameters.get("bias")  # on meta if it is still to come, perhaps from another shard
            replace_modules(model, {module: layer})
            return
        assert isinstance(module, QuantModule)
        # diffusers has cast param_value to the model's dtype; scales must keep their stored values.
        stored = state_dict[param_name]
        value = param_value if tensor in module._model_floats and stored.is_floating_point() else stored
        if tensor in module.code_names and value.shape == module.specs()[tensor].shape:
            value = value[None]  # codes of a plain state dict, in the form that is never ambiguous
        self._put(module, name, tensor, value.to(target_device))

    def _hold_experts(self, model: ModelMixin, module: nn.Module, key: str, weights: Tensor) -> None:
        """Replace the float expert parameter ``key`` by its codes."""
        assert self.plan is not None
        if not isinstance(module, QuantExperts):
            layout = layout_of(module)
            assert layout is not None
            original, module = module, QuantExperts(module, layout)
            replace_modules(model, {original: module})
        plan = self.plan.layers[key]
        module.hold(key.rpartition(".")[2], plan, quantized_experts(key, module, plan, weights))

    def _put(self, layer: nn.Module, name: str, tensor: str, value: Tensor) -> None:
        assert isinstance(layer, QuantModule)
        try:
            layer.set_tensor(tensor, value)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None

    def _process_model_after_weight_loading(self, model: ModelMixin, **kwargs: Any) -> ModelMixin:
        config, plan = self.quantization_config, self.plan
        on_disk, self._device_map = "disk" in self._device_map.values(), {}
        if not on_disk and any(tensor.is_meta for tensor in model.parameters()):
            raise ValueError(
                'diffusers has read no weights: offload_state_dict=True needs "disk" in the device_map; leave it out'
            )
        if self.pre_quantized:
            if on_disk:
                self._read_buffers(model)
            finish_loading(model)
            self.disk_forms = disk_forms(model)
            return model
        if plan is None:
            quantize_attached(model, diffusers_batches(config.calibration), config, facts_of(model), attach)
        else:
            quantize_left(model, plan)
            finish_loading(model)
            facts = facts_of(model)
            attach(model, own_config(config, plan, facts))
            if plan.layers:
                log_share(model, facts.uncounted)
        # from_pretrained makes this object model.hf_quantizer next, so it must not keep the user's config with its
        # data.
        stored = model.config.get("quantization_config")
        if stored is not None:
            self.quantization_config = stored
        self.plan, self.pre_quantized, self.disk_forms = None, True, disk_forms(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the tensors in their stored form.

        Raises:
            ValueError: a pickle is requested, or the model is offloaded.
        """
        if not safe_serialization:
            raise ValueError("quantized models are saved as safetensors only; leave safe_serialization=True")
        if offloaded := sum(tensor.is_meta for tensor in state_dict.values()):
            raise ValueError(
                f"{counted(offloaded, 'tensor')} are offloaded, and diffusers does not save those: load the model "
                "without device_map, and save that"
            )
        return codes_on_disk(state_dict, self.disk_forms), {}

    def _dequantize(self, model: ModelMixin) -> nn.Module:
        model = dequantized(model, model.dtype)
        set_quantization_config(model, None)
        return model

    @property
    def supports_parallel_loading(self) -> bool:
        """Return True only for quantized checkpoints: quantizing many weights at once would hold all of them."""
        return self.pre_quantized

    @property
    def is_serializable(self) -> bool:
        """Return True: models are saved as safetensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: adapters can be trained, with a gradient that bypasses the rounding; codes cannot."""
        return True


def attach(model: ModelMixin, config: HfQuantConfig) -> None:
    """Mark ``model`` as quantized by ``config`` (its own copy) for diffusers.

    Raises:
        ValueError: it consists of several models, each with its own config.
    """
    if not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} has no config: quantize its component models one by one")
    model.hf_quantizer = HfQuantDiffusersQuantizer(config, pre_quantized=True)
    model.hf_quantizer.disk_forms = disk_forms(model)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    set_quantization_config(model, config)


# diffusers has no public registration API.
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = HfQuantConfig
auto.AUTO_QUANTIZER_MAPPING[METHOD] = HfQuantDiffusersQuantizer
# What diffusers itself does with weights, and cannot do with codes.
refuse_copying()
