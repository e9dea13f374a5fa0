"""The quantizer that transformers' ``from_pretrained`` and ``save_pretrained`` call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from hfquant.integrations.apply import drop_other_names, inner_configs, own_config, quantize_attached
from hfquant.integrations.checkpoint import (
    NOT_STORED,
    check_loaded,
    check_names,
    codes_on_disk,
    disk_forms,
    finish_loading,
    install_empty,
    needs_no_data,
    quantized_tensors,
    stored_plans,
    tensor_shapes,
)
from hfquant.integrations.compat import (
    ConversionOps,
    WeightConverter,
    allow_needs_hfquant,
    before_quantizer,
    drop_needs_hfquant,
    is_of,
    load_offloaded_parameter,
    names_in_model,
    save_as_named,
    set_quantized,
)
from hfquant.integrations.config import METHOD, HfQuantConfig
from hfquant.integrations.conversion import transposing_floats
from hfquant.integrations.data import transformers_batches
from hfquant.integrations.facts import facts_of
from hfquant.integrations.placement import (
    check_offload_folder,
    put_back,
    quantize_left,
    refuse_meta,
    without_working_memory,
)
from hfquant.integrations.sharing.facts import tags_of
from hfquant.nn.base import QuantModule
from hfquant.nn.experts import QuantExperts
from hfquant.nn.layer import QuantLayer
from hfquant.nn.modules import dequantized, log_share, quant_modules
from hfquant.offload import lend
from hfquant.planner import Plan, plan_layers, warn_if_empty

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
        #: The first failure of :class:`QuantizeWeight`.
        self.failure: Exception | None = None
        #: Tied quantized weights, taken out of the model's list while it is loaded.
        self.ties: dict[str, str] = {}
        #: Names of the tensors whose dtype is set by the format, not by the model.
        self.exact: set[str] = set()
        #: The first file of the checkpoint that the model was loaded from, if there is one.
        self.file: str | None = None
        #: While saving: the tensors to save instead of the model's own.
        self.given: Mapping[str, Tensor] | None = None
        #: While loading: puts back the linears that a device map sends to disk.
        self._put_back: Callable[[Mapping[str, Any]], None] | None = None
        #: While loading: the layers that empty ones have replaced.
        self._replaced: dict[str, nn.Module] = {}
        #: While loading: the tensors that the checkpoint announced.
        self._arriving: set[str] = set()
        #: While loading: parts of the names of tensors that are split off from announced ones.
        self._split_off: tuple[str, ...] = ()
        self._missing_left = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Keep linears that a device map sends to disk in float; called again if the map was inferred.

        Raises:
            ValueError: float weights are to be quantized on the meta device.
        """
        if not self.pre_quantized:
            refuse_meta(device_map)
        if self._put_back is not None and isinstance(device_map, dict):
            self._put_back(device_map)

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Reserve memory on each device for quantizing the largest linear."""
        return without_working_memory(max_memory, self.plan)

    def update_attn_implementation(self, config: Any) -> Any:
        """Return the config to build the model from, without what only loading a folder needs."""
        drop_needs_hfquant(config)
        return config

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> None:
        config, facts = self.quantization_config, facts_of(model)
        self.file = next(iter(checkpoint_files or ()), None)
        if self.pre_quantized:
            shapes = tensor_shapes(checkpoint_files or ())
            names = names_in_model(model, sorted(shapes))
            stored = {names[key]: shape for key, shape in shapes.items()}
            # The checkpoint of another class has no tensors for a task head (or, without a pooler, for the pooler).
            # Such linears stay float, for transformers to initialize and warn about.
            known = None if not checkpoint_files or _is_own(model) else {*names, *stored}
            plans = stored_plans(model, config, facts, known)
            install_empty(model, plans, facts.experts, stored)
            self._forget_ties(model)
            check_names(model, stored)
            self.exact = {
                f"{name}.{tensor}"
                for name, layer in quant_modules(model).items()
                for tensor, spec in layer.specs().items()
                if spec.dtype is not None
            }
        elif not config.needs_data:
            self.plan = plan_layers(model, config.rules, facts=facts)
            needs_no_data(self.plan)
            warn_if_empty(model, self.plan)
            # A tied weight arrives under another name or not at all, so such linears are quantized after loading.
            tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
            arriving = {name: plan for name, plan in self.plan.layers.items() if name not in tied}
            self._replaced = install_empty(model, arriving, facts.experts)
            # transformers later reads offloaded tensors from the checkpoint's own file, so these linears must stay
            # float.
            self._put_back = partial(put_back, model, self._replaced)
            if isinstance(device_map, dict):
                self._put_back(device_map)

    def _forget_ties(self, model: PreTrainedModel) -> None:
        """Remove ties of quantized layers from the model's list until :meth:`_recall_ties`.

        transformers would fit a head's bias to the first dimension of its weight, which on-disk codes do not have, and
        knows nothing about scales.
        """
        tied = model.all_tied_weights_keys
        self.ties = {k: v for k, v in tied.items() if isinstance(model.get_submodule(k.rpartition(".")[0]), QuantLayer)}
        model.all_tied_weights_keys = {k: v for k, v in tied.items() if k not in self.ties}
        for key in self.ties:
            layer, _, tensor = key.rpartition(".")
            if tensor == "bias":
                model.get_submodule(layer)._parameters["bias"] = None

    def _recall_ties(self, model: PreTrainedModel) -> None:
        for key, other in self.ties.items():
            layer, _, tensor = key.rpartition(".")
            if tensor == "bias":
                module, owner = model.get_submodule(layer), model.get_submodule(other.rpartition(".")[0])
                module._parameters["bias"] = owner.get_parameter("bias")
                lend(owner, module, ["bias"])
        kept = {k: v for k, v in self.ties.items() if _still_tied(model, k, v)}
        model.all_tied_weights_keys = model.all_tied_weights_keys | kept

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Return whether a checkpoint tensor is a float weight to be quantized on arrival.

        For a quantized checkpoint, transformers only calls this if a tensor's shape differs from the model's. The
        answer decides who raises the error: :func:`check_loaded` does, naming the tensor.
        """
        name, _, tensor = param_name.rpartition(".")
        if self.pre_quantized:
            return isinstance(model.get_submodule(name), QuantModule)
        self._arriving.add(param_name)  # transformers asks about all tensors before it converts any
        module = model.get_submodule(name)
        if isinstance(module, QuantExperts):
            return tensor in module.code_names
        return tensor == "weight" and isinstance(module, QuantLayer)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Skip the cast for codes and scales, so that a wrong dtype is detected."""
        if self.exact.issuperset(getattr(converter, "target_patterns", ("",))):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Disable merging, splitting and transposing for a quantized checkpoint: it has the model's own tensors."""
        updated = super().update_weight_conversions(weight_conversions, model)
        if self.pre_quantized:
            return [c for c in updated if not isinstance(c, WeightConverter)]
        self._split_off = tuple(t for c in updated if isinstance(c, WeightConverter) for t in c.target_patterns[1:])
        return [transposing_floats(c) if isinstance(c, WeightConverter) else c for c in updated]

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation run on each weight that :meth:`param_needs_quantization` claims."""
        return QuantizeWeight(self)

    def leave_missing(self, model: PreTrainedModel, missing_keys: set[str]) -> None:
        """Leave layers in float that get no tensor from the checkpoint of another class, such as a task head."""
        if self._missing_left or _is_own(model):
            return
        self._missing_left = True
        for name in [name for name in self._replaced if self.plan is not None and name in self.plan.layers]:
            keys = {f"{name}.{key}" for key in self._replaced[name].state_dict()}
            if self._arriving.isdisjoint(keys) and not any(part in f"{name}.weight" for part in self._split_off):
                self.leave(model, name, NOT_STORED, missing_keys)

    def leave(self, model: PreTrainedModel, name: str, why: str, missing_keys: set[str]) -> None:
        """Leave a layer in float, for transformers to initialize and to warn about."""
        assert self.plan is not None
        quantized, floats = (set(layer.state_dict()) for layer in (model.get_submodule(name), self._replaced[name]))
        missing_keys -= {f"{name}.{key}" for key in quantized - floats}
        put_back(model, {name: self._replaced[name]})
        layers = {n: plan for n, plan in self.plan.layers.items() if n != name}
        self.plan = replace(self.plan, layers=layers, skipped={**self.plan.skipped, name: why})

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        self._put_back = None
        if self.failure is not None:
            raise self.failure
        if not self.pre_quantized and self.plan is None:
            check_offload_folder(model)
            loader = transformers_batches(model, config.calibration, self.file)
            quantize_attached(model, loader, config, facts_of(model), attach)
            return model
        if self.plan is not None:
            quantize_left(model, self.plan)
        check_loaded(model, self.pre_quantized)
        if self.pre_quantized and not _is_own(model):
            drop_other_names(config, model)
        finish_loading(model)
        self._recall_ties(model)
        set_quantized(model, True)
        model.add_model_tags(tags_of(model))
        if self.plan is not None:
            facts = facts_of(model)
            attach(model, own_config(config, self.plan, facts))
            if self.plan.layers:
                log_share(model, facts.uncounted)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors in their stored form."""
        state_dict = model.state_dict() if self.given is None else dict(self.given)
        forms = disk_forms(model)
        for key, form in forms.items():
            # transformers reads offloaded tensors itself, in their current shape; replace those without their on-disk
            # shape.
            tensor = state_dict.get(key)
            if form is not None and tensor is not None and tensor.is_meta and hasattr(model, "hf_device_map"):
                codes = load_offloaded_parameter(model, key)
                if codes.dim() < len(form[0]):
                    state_dict[key] = codes
        return codes_on_disk(state_dict, forms), {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> nn.Module:
        # transformers passes config.dtype, which is a string after the model has been saved.
        wanted: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        tags = tags_of(model)
        model = dequantized(model, wanted)
        set_quantized(model, False)
        model.model_tags = [tag for tag in model.model_tags or () if tag not in tags]
        return model

    def is_serializable(self) -> bool:
        """Return True: models are saved as safetensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: adapters can be trained, with a gradient that bypasses the rounding; codes cannot."""
        return True


class QuantizeWeight(ConversionOps):
    """Convert a float weight of a checkpoint to the tensors of its quantized layer (already in the model, on meta)."""

    def __init__(self, quantizer: HfQuantTransformersQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        """Turn ``{"x.weight": float}`` into ``{"x.weight": codes, "x.weight_scale": ...}``, also for experts.

        Several arrive together if the checkpoint fuses them; linears among them that stay float pass through.
        """
        self.quantizer.leave_missing(model, kwargs["missing_keys"])
        converted: dict[str, Tensor] = {}
        for key, value in input_dict.items():
            name, _, tensor = key.rpartition(".")
            weight = value[0] if isinstance(value, list) else value
            layer = model.get_submodule(name)
            if isinstance(layer, QuantLayer) and _has_other_outputs(layer, weight):
                # A head for other labels. Whether it may be initialized, as a float one, is a setting of transformers.
                why = "the checkpoint's weight has another number of outputs"
                self.quantizer.leave(model, name, why, kwargs["missing_keys"])
                layer = model.get_submodule(name)
            if not isinstance(layer, QuantModule) or tensor not in layer.code_names:
                converted[key] = weight
                continue
            try:
                if self.quantizer.failure is None:
                    converted.update(quantized_tensors(key, layer, weight))
                    continue
            except ValueError as error:
                # transformers turns exceptions into lines of its report, so store this one and raise it when loading
                # has ended.
                self.quantizer.failure = error
            # Placeholders keep that report from listing the rest as missing.
            for other, (shape, kind) in layer.specs().items():
                if other == tensor or other not in layer._parameters:
                    converted[f"{name}.{other}"] = torch.zeros((), dtype=kind or weight.dtype).expand(shape)
        return converted


def _has_other_outputs(layer: QuantLayer, weight: Tensor) -> bool:
    return weight.shape[1:] == layer.float_shape[1:] and weight.shape[:1] != layer.float_shape[:1]


def attach(model: PreTrainedModel, config: HfQuantConfig) -> None:
    """Mark ``model`` as quantized by ``config`` (its own copy) for transformers."""
    file = getattr(getattr(model, "hf_quantizer", None), "file", None)
    model.hf_quantizer = HfQuantTransformersQuantizer(config, pre_quantized=True)
    model.hf_quantizer.file = file
    model.is_quantized = True
    model.quantization_method = config.quant_method
    for inner in inner_configs(model.config):  # of parts that were quantized on their own
        vars(inner).pop("quantization_config", None)
        drop_needs_hfquant(inner)
    model.config.quantization_config = config
    set_quantized(model, True)
    model.add_model_tags(tags_of(model))
    _untie(model)
    save_as_named(model)


def _prepare(config: Any) -> None:
    """Make the config of a model to load one that transformers can read.

    A model's own config holds ours as an object. Those of its parts are for loading a part alone and are dropped:
    transformers would apply one of them to the whole model.
    """
    if isinstance(own := getattr(config, "quantization_config", None), HfQuantConfig):
        config.quantization_config = own.to_dict()
    for inner in inner_configs(config):
        if is_of(METHOD, getattr(inner, "quantization_config", None)):
            vars(inner).pop("quantization_config", None)


def _untie(model: PreTrainedModel) -> None:
    """Untie a quantized head from the embedding, so that a later ``tie_weights()`` does not tie it again."""
    tied = model.all_tied_weights_keys
    kept = {key: other for key, other in tied.items() if _still_tied(model, key, other)}
    # If other weights stay tied (an encoder's and a decoder's embedding), the switch must stay on.
    if len(kept) < len(tied) and not kept:
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = kept


def _still_tied(model: PreTrainedModel, *keys: str) -> bool:
    """Return whether tied tensors still are tied: quantizing a layer may have given it its own tensor."""
    if not any(isinstance(model.get_submodule(key.rpartition(".")[0]), QuantLayer) for key in keys):
        return True
    one, other = (model.get_parameter(key) for key in keys)
    return one is other or (not one.is_meta and one.data_ptr() == other.data_ptr())


def _is_own(model: PreTrainedModel) -> bool:
    """Return whether the checkpoint was saved by ``model``'s own class; if so, it must be complete."""
    return type(model).__name__ in (model.config.architectures or ())


if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
    auto.register_quantization_config(METHOD)(HfQuantConfig)
    auto.register_quantizer(METHOD)(HfQuantTransformersQuantizer)
    allow_needs_hfquant()
    before_quantizer(_prepare)
