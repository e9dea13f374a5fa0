"""LoRA on quantized linears as peft runs it: merging on the layer's own recipe, DoRA, and what is refused.

Running and training an adapter need nothing of this, since the op has a gradient. But peft takes a
:class:`~hfquant.QuantLinear` for a plain linear and would add floats to its codes. Imported once peft is.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from hfquant.integrations.compat import register_lora_layer
from hfquant.nn.linear import QuantLinear
from hfquant.solver import requantize

logger = logging.getLogger(__name__)

#: ``init_lora_weights`` that leave the base weight as it is; the others move a part of it into the adapter.
INITIAL = (True, False, "gaussian", "eva", "orthogonal")


class LoraQuantLinear(Linear):
    """LoRA on a :class:`QuantLinear`.

    To merge, the layer is dequantized, peft adds to it what it would add to a float linear, and the sum is rounded to
    nearest on the layer's recipe. Unmerging puts the tensors of before back.
    """

    base_layer: Any
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, target_name: str = "", **kwargs: Any) -> None:
        #: The layer's name in its model.
        self.target_name = target_name
        #: The base layer's tensors from before anything was merged; empty while nothing is.
        self.unmerged: dict[str, Any] = {}
        super().__init__(base_layer, adapter_name, target_name=target_name, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """The kinds of LoRA that work on codes, by the options that ask for them."""
        plain: tuple[str, ...] = ()
        return {plain: None, ("use_dora",): QuantDora}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ValueError: its initial values are a part of the base weight, which would have to change.
        """
        initial, quantized = config.init_lora_weights, isinstance(self.base_layer, QuantLinear)
        if quantized and initial not in INITIAL:
            raise ValueError(
                f"{self.target_name}: init_lora_weights={initial!r} moves a part of the base weight into the adapter, "
                f"which a quantized weight cannot give; choose one of {', '.join(map(repr, INITIAL))}"
            )
        reads_weight = config.use_dora or initial == "orthogonal"
        with self._on_floats(_tensors(self.base_layer)) if quantized and reads_weight else nullcontext():
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (default: the active ones) into the codes, and log what rounding costs.

        Adapters that are merged already are merged again together with them, so that nothing is rounded twice.

        Raises:
            ValueError: the sum has NaN or Inf, or the base weight is offloaded. The layer is as it was then.
        """
        layer = self.base_layer
        if not isinstance(layer, QuantLinear):
            # peft takes merged adapters out of the floats and puts them back while it merges others (DoRA).
            super().merge(safe_merge, adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        stored = self.unmerged or _tensors(layer)
        if stored["weight"].is_meta:
            raise ValueError(f"{self.target_name}: its weight is offloaded; load the model without offloading to merge")
        before, self.merged_adapters = self.merged_adapters, []
        names = before + names
        try:
            with torch.no_grad(), self._on_floats(stored) as floats:
                base = floats.weight.clone()
                super().merge(safe_merge, names)
            made = requantize(f"{self.target_name} + {' + '.join(names)}", floats.weight, layer.plan, stored)
        except BaseException:
            self.merged_adapters = before
            raise
        self.unmerged = stored
        _put(layer, made if layer.bias is None else made | {"bias": floats.bias.to(layer.bias.dtype)})
        error = layer.effective_weight() - floats.weight
        kept = _decibels(floats.weight - base, error)
        logger.info(
            "%s: merged %s; SQNR of the weight %.1f dB, of what the adapters change %.1f dB",
            self.target_name,
            ", ".join(names),
            _decibels(floats.weight, error),
            kept,
        )
        if kept < 0:
            # One text, so that Python shows it once.
            warnings.warn(
                "rounding merged adapters to codes changes some layers more than the adapters do (hfquant's INFO log "
                "has the figures): unmerge them, or quantize to more bits",
                stacklevel=2,
            )

    def unmerge(self) -> None:
        """Put the base layer's tensors back as they were before anything was merged, to the bit."""
        if not isinstance(self.base_layer, QuantLinear) or not self.merged:
            super().unmerge()
            return
        _put(self.base_layer, self.unmerged)
        self.unmerged, self.merged_adapters = {}, []

    @contextmanager
    def _on_floats(self, tensors: Mapping[str, Any]) -> Iterator[nn.Linear]:
        """Have a plain linear in the place of the base layer, with the float32 weight that ``tensors`` stand for."""
        layer = self.base_layer
        linear: Any = QuantLinear.from_tensors(layer.plan, tensors, tensors.get("bias")).to_float(torch.float32)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.clone(), requires_grad=False)
        self.base_layer = linear
        try:
            yield linear
        finally:
            self.base_layer = layer


class Floats(NamedTuple):
    """What DoRA reads of a linear."""

    weight: Tensor
    bias: Tensor | None


class QuantDora(DoraLinearVariant):
    """DoRA (arXiv 2402.09353) over codes: the norms of its columns are those of the dequantized weight."""

    @staticmethod
    def forward(module: LoraQuantLinear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Return ``result`` plus what the adapter adds for the input ``x``."""
        layer, dropout = module.base_layer, module.lora_dropout[active_adapter]
        if not isinstance(layer, QuantLinear):
            result = DoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)
            return result
        base_result = result
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            # By the codes: the float weight would be kept for the backward pass.
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


def _tensors(layer: QuantLinear) -> dict[str, Any]:
    return layer.solved_tensors() | ({} if layer.bias is None else {"bias": layer.bias})


def _put(layer: QuantLinear, tensors: Mapping[str, Tensor]) -> None:
    device = layer.weight.device
    for name, tensor in tensors.items():
        layer.set_tensor(name, tensor.to(device))


def _decibels(signal: Tensor, noise: Tensor) -> float:
    return float(10 * torch.log10(signal.double().square().sum() / noise.double().square().sum()))


register_lora_layer(QuantLinear, LoraQuantLinear)
