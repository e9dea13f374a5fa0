"""Methods of the libraries that copy or concatenate float weights; they refuse quantized ones, before any change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from functools import partial, wraps
from inspect import isfunction
from typing import Any

from torch import nn

from hfquant.nn.base import QuantModule
from hfquant.nn.modules import quant_layers

__all__ = [
    "refuse_averages",
    "refuse_copying",
    "refuse_copying_motion",
    "refuse_free_noise",
    "refuse_fusing",
    "refuse_resizing",
    "refuse_training",
]

#: Attributes of an attention that diffusers concatenates when it fuses projections.
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def refuse_fusing() -> None:
    """Make diffusers refuse to fuse quantized projections, before it changes anything.

    It concatenates weights without looking at their kind. A model whose projections stay in float is fused as usual.
    """
    from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    @contextmanager
    def unless_quantized(module: nn.Module, *_: Any) -> Iterator[None]:
        for name, attention in module.named_modules():
            if _fuses(attention) and _holds(attention):
                raise ValueError(
                    f"{type(module).__name__}: the projections of {name or 'this attention'} are quantized, so they "
                    "cannot be fused: fuse the projections before quantizing, or dequantize first"
                )
        yield

    for kind in (Attention, AttentionModuleMixin):
        _run_within(kind, ["fuse_projections"], unless_quantized)
    _run_within(AttentionMixin, ["fuse_qkv_projections"], unless_quantized)


def _fuses(module: nn.Module) -> bool:
    able = hasattr(module, "fuse_projections") and getattr(module, "_supports_qkv_fusion", True)
    return able and not getattr(module, "fused_projections", False)


def _holds(attention: nn.Module) -> bool:
    found = (getattr(attention, name, None) for name in _PROJECTIONS)
    return any(isinstance(part, QuantModule) for layer in found if layer is not None for part in layer.modules())


def refuse_copying() -> None:
    """Make diffusers refuse to copy weights from quantized layers into a new float model.

    Class methods such as ``ControlNetModel.from_unet`` do that with state dicts, partly with ``strict=False``, so that
    codes might pass for floats. Those that only read a config, or share the modules themselves, work as usual.
    """
    from diffusers.utils import PushToHubMixin

    @contextmanager
    def unless_quantized(made: type, *given: Any) -> Iterator[None]:
        copying = True

        def refuse(layer: nn.Module, *_: Any) -> None:
            if copying:  # a layer that is itself copied keeps this hook
                raise ValueError(
                    f"a {made.__name__} copies float weights, and {names[layer]} of the model that it is to be made "
                    "from is quantized: make it from the float model and quantize it afterwards, for instance with "
                    "hfquant.quantize_pipeline, or dequantize first"
                )

        sources = (model for model in given if isinstance(model, nn.Module))
        layers = [item for model in sources for item in model.named_modules() if isinstance(item[1], QuantModule)]
        names = defaultdict(lambda: "a layer", {layer: name for name, layer in layers})
        handles = [layer.register_state_dict_pre_hook(refuse) for _, layer in layers]
        try:
            yield
        finally:
            copying = False
            for handle in handles:
                handle.remove()

    _run_within(PushToHubMixin, ["from_unet*", "from_transformer*"], unless_quantized)  # a base of all models


def refuse_copying_motion() -> None:
    """Make diffusers refuse to load or save motion modules on their own if they are quantized.

    It copies one state dict of floats after the other, so an error halfway would leave some modules changed.
    """
    from diffusers.models.unets.unet_motion_model import UNetMotionModel

    @contextmanager
    def unless_quantized(*given: Any) -> Iterator[None]:
        for model in (each for each in given if isinstance(each, nn.Module)):
            for name, module in model.named_modules():
                if "motion_modules" in name and isinstance(module, QuantModule):
                    raise ValueError(
                        f"{type(model).__name__}: {name} is quantized, and motion modules are loaded and saved as "
                        "floats: load or save them before quantizing, or dequantize first"
                    )
        yield

    _run_within(UNetMotionModel, ["load_motion_modules", "save_motion_modules"], unless_quantized)


def refuse_free_noise() -> None:
    """Make AnimateDiff refuse to enable or disable FreeNoise if it would replace blocks with quantized layers.

    It puts in a new block with random weights, and only then copies the old block's state dict of floats.
    """
    from diffusers.models.attention import BasicTransformerBlock, FreeNoiseTransformerBlock
    from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin

    @contextmanager
    def unless_quantized(verb: str, replaced: type[nn.Module], pipe: Any, *_: Any) -> Iterator[None]:
        for name, block in pipe.unet.named_modules():
            copied = "motion_modules" in name and isinstance(block, replaced)
            if copied and any(isinstance(layer, QuantModule) for layer in block.modules()):
                raise ValueError(
                    f"cannot {verb} FreeNoise: it copies the float weights of motion modules, and {name} is quantized: "
                    f"{verb} it before quantizing, or call hfquant.dequantize(pipe.unet) first"
                )
        yield

    for verb, replaced in (("enable", BasicTransformerBlock), ("disable", FreeNoiseTransformerBlock)):
        _run_within(AnimateDiffFreeNoiseMixin, [f"{verb}_free_noise"], partial(unless_quantized, verb, replaced))


def refuse_averages() -> None:
    """Make diffusers refuse to mix an average of a quantized model's parameters with those of a float one.

    ``EMAModel`` knows parameters only by their order and copies them whatever their dtype: codes would pass for floats,
    and floats would be truncated to codes. Its ``save_pretrained`` copies the average into a new float model.
    """
    from diffusers.training_utils import EMAModel

    for name, kept in (("step", "shadow_params"), ("copy_to", "shadow_params"), ("restore", "temp_stored_params")):
        setattr(EMAModel, name, _unless_mixed(getattr(EMAModel, name), kept))


def _unless_mixed(method: Callable[..., None], kept: str) -> Callable[..., None]:
    @wraps(method)
    def unless_mixed(self: Any, parameters: Any) -> None:
        if not isinstance(parameters, nn.Module):  # which is deprecated
            parameters = list(parameters)
        given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
        for own, other in zip(getattr(self, kept) or (), given, strict=False):
            if own.is_floating_point() == other.is_floating_point():
                continue
            if other.is_floating_point():
                raise ValueError(
                    f"EMAModel.{method.__name__}: this average belongs to a quantized model, and its codes are not "
                    "float weights: copy it to that model (ema.copy_to(model.parameters())) and save the model with "
                    "save_pretrained, or call hfquant.dequantize(model) before training"
                )
            raise ValueError(
                f"EMAModel.{method.__name__}: this average belongs to a float model, and the parameters are those of a "
                "quantized one: make an EMAModel of the quantized model, or call hfquant.dequantize(model) first"
            )
        method(self, parameters)

    return unless_mixed


def refuse_resizing(base: type) -> None:
    """Make models of transformers refuse to resize quantized embeddings or heads, before it changes anything.

    It copies rows of weights into new float ones. Subclasses that override the method call that of ``base`` first.

    Args:
        base: transformers' class of all models.
    """
    resize: Callable[..., Any] = base.resize_token_embeddings  # type: ignore[attr-defined]

    @wraps(resize)
    def resize_token_embeddings(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        found = (getattr(self, get, lambda: None)() for get in _WITH_VOCABULARY)
        # A decoder of audio has a list of embeddings.
        for part in (part for layer in found if layer is not None for part in quant_layers(layer).values()):
            rows = len(part.weight)
            if rows != _rounded_up(new_num_tokens, pad_to_multiple_of, rows):
                name = next((name for name, module in self.named_modules() if module is part), "its embedding")
                raise ValueError(
                    f"{type(self).__name__}: {name} is quantized, so it cannot be resized: resize before quantizing, "
                    "or call hfquant.dequantize(model) first, or leave it out of `include`"
                )
        return resize(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    base.resize_token_embeddings = resize_token_embeddings  # type: ignore[attr-defined]


#: Methods that return layers with a row for each token, of which a model has some.
_WITH_VOCABULARY = ("get_input_embeddings", "get_per_layer_input_embeddings", "get_output_embeddings")


def _rounded_up(wanted: int | None, multiple: int | None, present: int) -> int:
    count = present if wanted is None else wanted
    return count if multiple is None else -(-count // multiple) * multiple


def refuse_training() -> None:
    """Make peft refuse to train quantized weights themselves, instead of an adapter next to them."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils import ModulesToSaveWrapper

    for wrapper, option in ((ModulesToSaveWrapper, "modules_to_save"), (TrainableTokensLayer, "trainable tokens")):
        wrapper.__init__ = _unless_quantized(wrapper.__init__, option)


def _unless_quantized(init: Callable[..., None], option: str) -> Callable[..., None]:
    @wraps(init)
    def unless_quantized(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if found := next((part for part in module.modules() if isinstance(part, QuantModule)), None):
            raise ValueError(
                f"{option}: this would train the weight of a {type(found).__name__}, whose codes are integers: leave "
                "the layer in float (out of `include`, or in modules_to_not_convert), or train a LoRA on it by naming "
                "it in target_modules"
            )
        init(self, module, *args, **kwargs)

    return unless_quantized


def _run_within(base: type, names: Sequence[str], context: Callable[..., AbstractContextManager[None]]) -> None:
    """Run methods of a class and its subclasses within ``context(*arguments)``, also of classes that are defined later.

    Args:
        base: the class.
        names: glob patterns on the names of the methods or class methods.
        context: called with the arguments of the call, including the object or the class itself.
    """

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with context(*args, *kwargs.values()):
                return function(*args, **kwargs)

        return run

    def adapt(kind: type) -> None:
        for name, method in list(vars(kind).items()):
            if not any(fnmatchcase(name, pattern) for pattern in names):
                continue
            if isinstance(method, classmethod):
                setattr(kind, name, classmethod(wrapped(method.__func__)))
            elif isfunction(method):
                setattr(kind, name, wrapped(method))

    def init_subclass(cls: type, **kwargs: Any) -> None:
        super(base, cls).__init_subclass__(**kwargs)  # type: ignore[arg-type]
        adapt(cls)

    kinds: list[type] = [base]
    for kind in kinds:
        adapt(kind)
        kinds.extend(set(kind.__subclasses__()).difference(kinds))
    base.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment]
