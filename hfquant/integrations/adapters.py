"""LoRA on quantized layers with peft: merging with the layer's own recipe, DoRA, and unsupported cases.

Running and training an adapter need none of this, since the op has a gradient. But peft treats a
:class:`~hfquant.QuantLinear` as a plain linear (and a quantized convolution or embedding as a plain one) and would add
floats to its codes. Imported once peft is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Conv2d, Conv3d, Embedding, Linear
from peft.tuners.lora.layer import Conv1d
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from hfquant.integrations.compat import check_before_merging, register_lora_layers
from hfquant.integrations.refusals import refuse_training
from hfquant.nn.conv import QuantConv
from hfquant.nn.embedding import QuantEmbedding
from hfquant.nn.experts import QuantExperts
from hfquant.nn.layer import QuantLayer
from hfquant.nn.linear import QuantLinear
from hfquant.outputs import decibels
from hfquant.solver import requantize

logger = logging.getLogger(__name__)

#: ``init_lora_weights`` values that keep the base weight; the others move a part of it into the adapter.
INITIAL = (True, False, "gaussian", "eva", "orthogonal")


class OnCodes:
    """LoRA on a :class:`QuantLayer`; the subclasses add peft's own layers.

    To merge, the layer is dequantized, peft adds to it what it would add to a float layer, and the sum is requantized
    with the layer's recipe (:func:`~hfquant.solver.requantize`). Unmerging restores the previous tensors.
    """

    base_layer: Any
    merged_adapters: list[str]
    merged: bool
    #: Rank by adapter.
    r: dict[str, int]
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, target_name: str = "", **kwargs: Any) -> None:
        #: The layer's name in its model.
        self.target_name = target_name
        #: The base layer's tensors before merging; empty while nothing is merged.
        self.unmerged: dict[str, Any] = {}
        super().__init__(base_layer, adapter_name, target_name=target_name, **kwargs)  # type: ignore[call-arg]

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """The kinds of LoRA that work on codes, by the options that request them."""
        plain: tuple[str, ...] = ()
        return {plain: None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ValueError: its initialization takes a part of the base weight, which would have to change, or it requests
                DoRA on a layer other than a linear.
        """
        initial, quantized = config.init_lora_weights, isinstance(self.base_layer, QuantLayer)
        if quantized and initial not in INITIAL:
            raise ValueError(
                f"{self.target_name}: init_lora_weights={initial!r} moves a part of the base weight into the adapter, "
                f"which needs a float base weight; choose one of {', '.join(map(repr, INITIAL))}"
            )
        if quantized and config.use_dora and ("use_dora",) not in self.lora_variants:
            raise ValueError(
                f"{self.target_name}: DoRA only works on quantized linears, and this is a "
                f"{type(self.base_layer).__name__}; take it out of target_modules, or set use_dora=False"
            )
        reads_weight = config.use_dora or initial == "orthogonal"
        with self._on_floats(_tensors(self.base_layer)) if quantized and reads_weight else nullcontext():
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # type: ignore[misc]

    def check_mergeable(self) -> None:
        """Raise if merging would change another layer's codes, or be lost when the model is saved.

        Raises:
            ValueError: the layer shares its codes with another one.
        """
        layer = self.base_layer
        if isinstance(layer, QuantLayer) and (layer.plan.tied or layer.lends):
            other = f"{layer.plan.tied!r}" if layer.plan.tied else "a layer that is tied to it"
            raise ValueError(
                f"{self.target_name}: it shares its codes with {other}, so nothing can be merged into it alone; leave "
                "the adapter unmerged, or untie the two layers before quantizing the model"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (default: the active ones) into the codes, and log the rounding error.

        Adapters that are already merged are merged again together with the new ones, so nothing is rounded twice.

        Raises:
            ValueError: the sum has NaN or Inf, the base weight is offloaded, or another layer shares the codes. The
                layer is then unchanged.
        """
        layer = self.base_layer
        peft: Any = super()
        if not isinstance(layer, QuantLayer):
            # To merge others (DoRA), peft removes merged adapters from the floats and adds them back.
            peft.merge(safe_merge, adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if not names:
            return
        self.check_mergeable()
        stored = self.unmerged or _tensors(layer)
        if stored["weight"].is_meta:
            raise ValueError(f"{self.target_name}: its weight is offloaded; load the model without offloading to merge")
        before, self.merged_adapters = self.merged_adapters, []
        names = before + names
        try:
            with torch.no_grad(), self._on_floats(stored) as floats:
                base = floats.weight.clone()
                peft.merge(safe_merge, names)
            wanted = layer.matrix(floats.weight)
            made = requantize(f"{self.target_name} + {' + '.join(names)}", wanted, layer.plan, stored)
        except BaseException:
            self.merged_adapters = before
            raise
        self.unmerged = stored
        _put(layer, made if layer.bias is None else made | {"bias": floats.bias.to(layer.bias.dtype)})
        found = layer.effective_weight()
        change = wanted - layer.matrix(base)
        logger.info(
            "%s: merged %s; SQNR of the weight %.1f dB, %.0f %% of what the adapters change kept",
            self.target_name,
            ", ".join(names),
            decibels(*(x.double().square().sum() for x in (wanted, found - wanted))).item(),
            100 * _share(found - layer.matrix(base), change),
        )

    def unmerge(self) -> None:
        """Restore the base layer's tensors from before merging, bit for bit."""
        if not isinstance(self.base_layer, QuantLayer) or not self.merged:
            super().unmerge()  # type: ignore[misc]
            return
        _put(self.base_layer, self.unmerged)
        self.unmerged, self.merged_adapters = {}, []

    @contextmanager
    def _on_floats(self, tensors: Mapping[str, Any]) -> Iterator[Any]:
        """Temporarily replace the base layer by a float one with the float32 weight that ``tensors`` represent."""
        layer = self.base_layer
        floats: Any = type(layer).from_tensors(layer.plan, tensors, tensors.get("bias"), layer._float)
        floats = floats.to_float(torch.float32)
        if layer.bias is not None:
            floats.bias = nn.Parameter(floats.bias.clone(), requires_grad=False)
        self.base_layer = floats
        try:
            yield floats
        finally:
            self.base_layer = layer


class LoraQuantLinear(OnCodes, Linear):
    """LoRA and DoRA on a :class:`QuantLinear`, including GPT-2's ``Conv1D``."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """The kinds of LoRA that work on codes, by the options that request them."""
        return {**super().lora_variants, ("use_dora",): QuantDora}

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer's weight is [in, out]: a ``Conv1D`` in float."""
        return not isinstance(self.base_layer, nn.Linear)

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, value: bool) -> None:
        """Ignore the value: a config has one for all layers, but it depends on the layer."""


class LoraQuantConv1d(OnCodes, Conv1d):
    """LoRA on a quantized ``nn.Conv1d``."""


class LoraQuantConv2d(OnCodes, Conv2d):
    """LoRA on a quantized ``nn.Conv2d``."""


class LoraQuantConv3d(OnCodes, Conv3d):
    """LoRA on a quantized ``nn.Conv3d``."""


class LoraQuantEmbedding(OnCodes, Embedding):
    """LoRA on a :class:`QuantEmbedding`."""


class Floats(NamedTuple):
    """What DoRA reads from a linear."""

    weight: Tensor
    bias: Tensor | None


class QuantDora(DoraLinearVariant):
    """DoRA (arXiv 2402.09353) on codes; the column norms are those of the dequantized weight."""

    @staticmethod
    def forward(module: LoraQuantLinear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Return ``result`` plus the adapter's contribution for the input ``x``."""
        layer, dropout = module.base_layer, module.lora_dropout[active_adapter]
        if not isinstance(layer, QuantLinear):
            result = DoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)
            return result
        base_result = result
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            # Run on the codes: the float weight would be kept for the backward pass.
            base_result = layer(x)
        added: Tensor = module.lora_magnitude_vector[active_adapter](
            x,
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=Floats(layer.effective_weight(), layer.bias),
            base_result=base_result,
            adapter_name=active_adapter,
        )
        return result + added


def lora_convolution(target: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Return LoRA on a quantized convolution, chosen by its number of dimensions."""
    kinds: dict[type, type[nn.Module]]
    kinds = {nn.Conv1d: LoraQuantConv1d, nn.Conv2d: LoraQuantConv2d, nn.Conv3d: LoraQuantConv3d}
    return next(lora for kind, lora in kinds.items() if isinstance(target, kind))(target, *args, **kwargs)


def refuse_experts(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module:
    """Raise, because peft would add a float delta to the codes of all experts in every forward.

    Raises:
        ValueError: always, naming the parameter.
    """
    raise ValueError(
        f"{kwargs.get('target_name')}: adapter {adapter_name!r} targets the parameter of quantized experts, which do "
        "not support adapters; leave it out of target_parameters, or keep the experts in float (modules_to_not_convert)"
    )


def check_mergeable(model: nn.Module) -> None:
    """Raise before merging anything if a layer with an active adapter cannot be merged.

    Raises:
        ValueError: names the layer.
    """
    for module in model.modules():
        if isinstance(module, OnCodes) and any(name in module.r for name in module.active_adapters):
            module.check_mergeable()


def _tensors(layer: QuantLayer) -> dict[str, Any]:
    return layer.solved_tensors() | ({} if layer.bias is None else {"bias": layer.bias})


def _put(layer: QuantLayer, tensors: Mapping[str, Tensor]) -> None:
    device = layer.weight.device
    for name, tensor in tensors.items():
        layer.set_tensor(name, tensor.to(device))


def _share(found: Tensor, change: Tensor) -> float:
    """Return the fraction of ``change`` contained in ``found``: 1 if they differ only by uncorrelated noise."""
    return float((found.double() * change.double()).sum() / change.double().square().sum())


register_lora_layers(
    {
        QuantLinear: LoraQuantLinear,
        QuantConv: lora_convolution,
        QuantEmbedding: LoraQuantEmbedding,
        QuantExperts: refuse_experts,
    }
)
check_before_merging(check_mergeable)
refuse_training()
