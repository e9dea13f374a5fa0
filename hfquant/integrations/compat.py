"""Private names of transformers, diffusers and accelerate that this package needs, in one place.

``tests/smoke/test_compat.py`` checks each against the installed versions, including the oldest allowed ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel

with suppress(ImportError):  # either library may be absent
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        ConversionOps,
        Transpose,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
        revert_weight_conversion,
    )
    from transformers.integrations.accelerate import load_offloaded_parameter
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

__all__ = [
    "NEEDS_HFQUANT",
    "ConversionOps",
    "Transpose",
    "WeightConverter",
    "accept_own_dtype",
    "allow_needs_hfquant",
    "apply_gate",
    "before_quantizer",
    "cast_ip_adapters",
    "check_before_merging",
    "config_of_floats",
    "declares_experts",
    "drop_needs_hfquant",
    "is_marked_initialized",
    "is_of",
    "keep_in_fp32",
    "load_offloaded_parameter",
    "mark_initialized",
    "names_in_model",
    "published_names",
    "register_lora_base",
    "register_lora_layers",
    "replaced_when_quantized",
    "save_as_named",
    "saving_within",
    "set_quantization_config",
    "set_quantized",
    "stored_names",
]


#: Experts implementation named in the config.json of a quantized transformers model.
#:
#: transformers only warns about an unknown quantization method and continues. But it stops at an implementation that is
#: not registered, before it reads any weight, and shows its name. So users who have not imported hfquant are told what
#: to do. This also works for models without experts.
NEEDS_HFQUANT = "hfquant: pip install hfquant, and import hfquant before loading"


def keep_in_fp32(model: nn.Module) -> list[str]:
    """Return the keys of modules that either library keeps in float32."""
    lists = (getattr(model, f"_keep_in_fp32_modules{strict}", None) for strict in ("", "_strict"))
    return [key for keys in lists for key in keys or ()]


def declares_experts(module: nn.Module) -> bool:
    """Return whether a module is of a class that transformers' ``use_experts_implementation`` decorates."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def apply_gate(kind: type, experts: nn.Module, gate_up: Any) -> Any:
    """Apply the gate of a transformers class ``kind`` to both halves, with the attributes of ``experts``."""
    return kind._apply_gate(experts, gate_up)  # type: ignore[attr-defined]


def mark_initialized(holder: Any) -> None:
    """Tell transformers that a module, parameter or buffer needs no random initialization."""
    holder._is_hf_initialized = True


def is_marked_initialized(tensor: Any) -> bool:
    """Return whether transformers has loaded a tensor or was told that it is initialized."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def set_quantized(model: PreTrainedModel, quantized: bool) -> None:
    """Record in a transformers model's config whether it is quantized, and so needs hfquant to load its checkpoints."""
    model.config._is_quantized = quantized
    # A config that is loaded stores this field under another name, so a value set here only affects what is saved.
    if quantized:
        model.config.experts_implementation = NEEDS_HFQUANT
    else:
        drop_needs_hfquant(model.config)


def drop_needs_hfquant(config: Any) -> None:
    """Let the library choose how to run experts, for a config from a quantized checkpoint or from a model."""
    if config._experts_implementation == NEEDS_HFQUANT:
        config._experts_implementation = None
    vars(config).pop("experts_implementation", None)


def allow_needs_hfquant() -> None:
    """Allow float models to be created from the config of a quantized one; their experts run as by default."""
    ALL_EXPERTS_FUNCTIONS.register(NEEDS_HFQUANT, ALL_EXPERTS_FUNCTIONS["grouped_mm"])


def set_quantization_config(model: Any, config: Any) -> None:
    """Set a quantization config in a diffusers model's frozen config, or remove it (None)."""
    from diffusers.configuration_utils import FrozenDict

    old = model.config
    items = {k: v for k, v in old.items() if k != "quantization_config"}
    new = FrozenDict(items if config is None else items | {"quantization_config": config})
    # An IP-Adapter changes an attribute of the config but not the item; the model reads the attribute.
    for key in items.keys() & vars(old).keys():
        setattr(new, key, vars(old)[key])
    model._internal_dict = new


def save_as_named(model: PreTrainedModel) -> None:
    """Make transformers save a quantized model's tensors under names by which it finds them again.

    These are the model's own names, or plain renamings of them. Some architectures' original checkpoints fuse or split
    linears differently, which cannot be done to codes. And some renamings are only right for float tensors.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(c, WeightConverter) for c in conversions):
        model._weight_conversions = [c for c in conversions if type(c) is WeightRenaming]
    if conversions and _loses_names(model):
        model._weight_conversions = []


def _loses_names(model: PreTrainedModel) -> bool:
    """Return whether a tensor that is saved now would be loaded under another name."""
    keys = list(model.state_dict())
    # Sizes that tell them apart.
    saved = stored_names(model, {key: torch.empty(i, device="meta") for i, key in enumerate(keys)})
    found = names_in_model(model, list(saved))
    return any(found[name] != keys[len(tensor)] for name, tensor in saved.items())


def saving_within(base: type, context: Callable[[Any, Any], AbstractContextManager[None]]) -> None:
    """Make ``save_pretrained`` of a library's models run within ``context(model, state_dict)``.

    The second argument is the state dict that the caller gave, if any.
    """
    save: Callable[..., Any] = base.save_pretrained  # type: ignore[attr-defined]
    parameters = signature(save)

    @wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind_partial(self, *args, **kwargs).arguments.get("state_dict")
        with context(self, given):
            return save(self, *args, **kwargs)

    base.save_pretrained = save_pretrained  # type: ignore[attr-defined]


@contextmanager
def config_of_floats(model: Any, inner: Sequence[Any], method: str) -> Iterator[None]:
    """Within this context, no config of a float model says that it is quantized with ``method``.

    A model made from the config of a quantized checkpoint has its ``quantization_config``.

    Args:
        model: a model of either library.
        inner: the configs that a transformers model's config holds for its parts.
        method: the ``quant_method``.
    """
    config = getattr(model, "config", None)  # a few have none, such as the watermarker of DeepFloyd IF
    if isinstance(config, Mapping):  # of diffusers, whose configs are frozen
        held = config.get("quantization_config")
        if not is_of(method, held):
            yield
            return
        set_quantization_config(model, None)
        try:
            yield
        finally:
            set_quantization_config(model, held)
        return
    said = [(c, c.quantization_config) for c in (config, *inner) if is_of(method, getattr(c, "quantization_config", 0))]
    try:
        for each, _ in said:
            del each.quantization_config
        yield
    finally:
        for each, held in said:
            each.quantization_config = held


def is_of(method: str, config: Any) -> bool:
    """Return whether a quantization config, or a dict of one, has this ``quant_method``."""
    named = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return bool(named == method)


def names_in_model(model: PreTrainedModel, keys: Sequence[str]) -> dict[str, str]:
    """Return transformers' names in ``model`` for each of a checkpoint's tensors."""
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    own = model.state_dict()

    def name(key: str) -> str:
        found: str = rename_source_key(key, renamings, [], model.base_model_prefix, own)[0]
        if found not in own and key in own:  # transformers then does not rename it
            found = rename_source_key(key, [], [], model.base_model_prefix, own)[0]
        return found

    return {key: name(key) for key in keys}


def register_lora_layers(layers: Mapping[type[nn.Module], Callable[..., nn.Module]]) -> None:
    """Make peft wrap modules of these classes for LoRA with the given functions, like its own kinds of layers.

    ``LoraConfig._register_custom_module`` does this for one config. It is called here for every config that is used,
    since diffusers creates its own, out of reach of other code.

    Args:
        layers: class of the base layer -> a class of peft's layers, or a function with the same signature.
    """
    from peft.tuners.lora.model import LoraModel

    create = LoraModel._create_new_module

    def create_new_module(lora_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        lora_config._register_custom_module(dict(layers))
        return create(lora_config, *args, **kwargs)

    LoraModel._create_new_module = staticmethod(create_new_module)


def check_before_merging(check: Callable[[nn.Module], None]) -> None:
    """Make peft call ``check`` with a model before it merges any LoRA into it."""
    from peft.tuners.lora.model import LoraModel

    allowed = LoraModel._check_merge_allowed

    def check_merge_allowed(self: Any) -> None:
        check(self.model)
        allowed(self)

    LoraModel._check_merge_allowed = check_merge_allowed


def accept_own_dtype() -> None:
    """Let a diffusers model quantized by us be cast to no dtype, or to the one that it has.

    diffusers rejects that like any other cast. ``save_lora_adapter`` calls ``to(dtype=None)``, ``from_pipe`` casts to
    float32, and pipelines pass on the dtype that they are given.
    """
    from diffusers.models.modeling_utils import ModelMixin

    to = ModelMixin.to

    @wraps(to)
    def without_own(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = (None, self.dtype) if _is_ours(self) else (None,)
        kwargs = {key: value for key, value in kwargs.items() if key != "dtype" or value not in own}
        args = tuple(value for value in args if not (isinstance(value, torch.dtype) and value in own))
        return to(self, *args, **kwargs) if args or kwargs else self

    ModelMixin.to = without_own


def _is_ours(model: Any) -> bool:
    return type(getattr(model, "hf_quantizer", None)).__module__.startswith("hfquant.")


def cast_ip_adapters() -> None:
    """Make a UNet quantized by us cast an IP-Adapter that it loads to its own dtype.

    diffusers calls ``to`` with the model's own dtype to do so. :func:`accept_own_dtype` ignores that, as it must for
    modules that are deliberately in another dtype. So this only casts modules that loading has added.
    """
    from diffusers.loaders.unet import UNet2DConditionLoadersMixin

    load = UNet2DConditionLoadersMixin._load_ip_adapter_weights

    @wraps(load)
    def load_and_cast(self: Any, *args: Any, **kwargs: Any) -> None:
        dtype, present = self.dtype, set(self.modules())
        load(self, *args, **kwargs)
        if _is_ours(self):
            for module in set(self.modules()) - present:
                module.to(dtype)

    UNet2DConditionLoadersMixin._load_ip_adapter_weights = load_and_cast


def register_lora_base(kind: type[nn.Linear], floats: Callable[[Any], Tensor]) -> None:
    """Make diffusers' LoRA loader of FLUX treat modules of class ``kind`` like those of its own quantizers.

    The loader compares an adapter's shape with the module's. It expands the module if the adapter takes more features,
    and the adapter if it takes fewer. It recognizes other quantizers' modules by class name; for all others it assumes
    that the matrix has the shape of ``weight``.

    Args:
        kind: a class of linears whose ``weight`` has a different shape.
        floats: returns the matrix of such a linear.
    """
    from diffusers.loaders import lora_pipeline

    loader = lora_pipeline.FluxLoraLoaderMixin
    shape_of, padded = loader._calculate_module_shape, loader._maybe_expand_lora_state_dict.__func__
    dequantized = lora_pipeline._maybe_dequantize_weight_for_expanded_lora

    def calculate_module_shape(
        model: nn.Module, base_module: nn.Module | None = None, base_weight_param_name: str | None = None
    ) -> torch.Size:
        module = base_module
        if module is None and base_weight_param_name is not None:
            module = model.get_submodule(base_weight_param_name.removesuffix(".weight"))
        if isinstance(module, kind):
            return torch.Size((module.out_features, module.in_features))
        return shape_of(model, base_module, base_weight_param_name)

    def dequantize(model: Any, module: nn.Module) -> Tensor:
        return floats(module).to(model.dtype) if isinstance(module, kind) else dequantized(model, module)

    def expand_lora(cls: Any, transformer: nn.Module, lora_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, module in transformer.named_modules():
            key = f"{cls.transformer_name}.{name.removesuffix('.base_layer')}.lora_A.weight"
            if isinstance(module, kind) and key in lora_state_dict:
                missing = module.in_features - lora_state_dict[key].shape[1]
                lora_state_dict[key] = pad(lora_state_dict[key], (0, max(missing, 0)))
        return padded(cls, transformer, lora_state_dict)

    loader._calculate_module_shape = staticmethod(calculate_module_shape)
    loader._maybe_expand_lora_state_dict = classmethod(expand_lora)
    lora_pipeline._maybe_dequantize_weight_for_expanded_lora = dequantize


def before_quantizer(prepare: Callable[[Any], None]) -> None:
    """Make transformers call ``prepare`` with the config of a model to load, before it looks for a quantizer.

    Without a ``quantization_config`` in a composite model's config, it takes that of the text model's config. By the
    time that a quantizer is asked, it cannot be told that it is not for this model.
    """
    from transformers.quantizers import auto

    get = auto.get_hf_quantizer

    @wraps(get)
    def get_hf_quantizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        prepare(config)
        return get(config, *args, **kwargs)

    # Models' module imports the function by name, and may have done so already.
    for module in (auto, sys.modules.get("transformers.modeling_utils")):
        if hasattr(module, "get_hf_quantizer"):
            module.get_hf_quantizer = get_hf_quantizer  # type: ignore[union-attr]


def stored_names(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names that transformers' ``save_pretrained`` uses."""
    return dict(revert_weight_conversion(model, dict(state_dict)))


def published_names(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors named and split as in published checkpoints of the model's class."""
    # Conversions from loading the model, or from :func:`save_as_named`, would take precedence over the class's own.
    own = vars(model).pop("_weight_conversions", None)
    try:
        return stored_names(model, state_dict)
    finally:
        if own is not None:
            model._weight_conversions = own


def replaced_when_quantized(module: nn.Module, method: str) -> bool:
    """Return whether transformers replaces this module in checkpoints quantized with ``method``."""
    patch = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__)
    return patch is not None and method in patch["quantization_methods"]
