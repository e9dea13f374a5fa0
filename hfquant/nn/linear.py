"""QuantLinear: the one module that a quantized linear becomes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfquant import formats
from hfquant.activations import quantize_input
from hfquant.algorithms.rounding import dequantize_weight
from hfquant.formats.packing import pack, unpack
from hfquant.kernels.reference import scaled_matmul
from hfquant.planner import LayerPlan

logger = logging.getLogger(__name__)

#: Tensors of the model's float dtype. Codes, zero points and (float32) scales keep theirs whatever it is cast to.
_MODEL_FLOATS = ("svd_down", "svd_up", "bias")


class QuantLinear(nn.Linear):
    """A linear with quantized weights and, where its plan says so, quantized activations.

    ``weight`` holds codes ([out, in] int8 or int16, or [out, ceil(in * bits / 8)] packed int8), so it is not what a
    matmul wants: :meth:`dequantize` gives the float weight. ``weight`` and ``bias`` are frozen parameters, scales and
    the rest are buffers (see :meth:`LayerPlan.tensors` for shapes). On disk ``weight`` has a leading dimension of 1
    (:mod:`hfquant.integrations.checkpoint`), and is accepted with it here, since offloaded weights come straight from
    disk.

    Args:
        plan: what the layer is.
        bias: whether there is one.
        device, dtype: where to create the (uninitialized) tensors; ``dtype`` is that of bias and low-rank branch.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None  # type: ignore[assignment]
    svd_down: Tensor
    svd_up: Tensor

    def __init__(
        self,
        plan: LayerPlan,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # nn.Linear's own __init__ would allocate and initialize a float weight.
        nn.Module.__init__(self)
        self.plan = plan
        self.in_features, self.out_features = plan.in_features, plan.out_features
        self.real_quant = plan.config.real_quant
        dtype = dtype or torch.get_default_dtype()
        for name, (shape, tensor_dtype) in plan.tensors(dtype).items():
            tensor = torch.empty(shape, dtype=tensor_dtype, device=device)
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)
        bias_tensor = torch.empty(self.out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if bias_tensor is None else nn.Parameter(bias_tensor, requires_grad=False)

    @classmethod
    def from_tensors(cls, plan: LayerPlan, tensors: Mapping[str, Tensor], bias: nn.Parameter | None) -> QuantLinear:
        """Build a layer from its solved tensors; ``weight`` unpacked or packed, everything else as it is stored."""
        device, dtype = tensors["weight"].device, bias.dtype if bias is not None else None
        layer = cls(plan, bias is not None, "meta", tensors["svd_down"].dtype if "svd_down" in tensors else dtype)
        for name in plan.tensors(torch.float32):
            layer.set_tensor(name, tensors[name])
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(device), requires_grad=False)
        return layer

    def solved_tensors(self) -> dict[str, Tensor]:
        """All but the bias, by name: what :meth:`from_tensors` takes."""
        return {name: getattr(self, name) for name in self.plan.tensors(torch.float32)}

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Put ``value`` in place of parameter or buffer ``name``.

        Codes may come packed or not, with or without the leading dimension they have on disk.

        Raises:
            ValueError: there is no such tensor in the plan, or shape or dtype do not fit.
        """
        current = self._parameters.get(name, self._buffers.get(name))
        if current is None:
            there = [*self._parameters, *self._buffers]
            raise ValueError(f"{self._get_name()} has no tensor {name!r}; there are {', '.join(there)}")
        if name == "weight":
            value = value.squeeze(0) if value.dim() == 3 and value.shape[0] == 1 else value
            bits = self.plan.config.weight_quant.type.bits
            if bits < 8 and value.dtype == torch.int8 and value.shape == (self.out_features, self.in_features):
                value = pack(value, bits)
        expected = current.reshape(current.shape[-2:]).shape if name == "weight" else current.shape
        if value.shape != expected or (value.dtype != current.dtype and not _both_model_floats(name, value, current)):
            raise ValueError(
                f"tensor {name!r}: expected shape {tuple(expected)} of {current.dtype}, "
                f"got {tuple(value.shape)} of {value.dtype}"
            )
        if name in self._parameters:
            setattr(self, name, nn.Parameter(value, requires_grad=False))
        else:
            self._buffers[name] = value

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in] of any float dtype to [..., out] of the same dtype; computed in float32.

        Raises:
            TypeError: ``input`` is not floating point (it was cast to the dtype of the codes).
            ValueError: its last dimension is not ``in_features``.
        """
        if not input.is_floating_point():
            raise TypeError(
                f"QuantLinear({self.in_features}, {self.out_features}) got an input of {input.dtype}: code that casts "
                f"to `linear.weight.dtype` sees the dtype of the codes here; cast to the model's dtype instead"
            )
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"QuantLinear({self.in_features}, {self.out_features}) got an input of shape {tuple(input.shape)}"
            )
        with _without_autocast(input.device.type):
            x = input.float()
            product = self._real if self.real_quant else self._fake
            parts = [product(self._smoothed(x, i), rows, i) for i, rows in enumerate(self._row_groups())]
            y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
            if self.plan.rank:
                y = y + self._low_rank(x)
            if self.bias is not None:
                y = y + self.bias.float()
            return y.to(input.dtype)

    def _row_groups(self) -> Iterator[slice]:
        start = 0
        for size in self.plan.row_groups:
            yield slice(start, start + size)
            start += size

    def _smoothed(self, x: Tensor, group: int) -> Tensor:
        smooth = self._buffers.get("smooth")
        if smooth is None:
            return x
        return x / (smooth if smooth.dim() == 1 else smooth[group])

    def _activations(self, x: Tensor, group: int) -> tuple[Tensor, Tensor | None]:
        quant, segments = self.plan.config.input_quant, self.plan.input_segments
        if quant is None:
            return x, None
        static = [self._buffers.get(name) for name in ("input_scale", "input_scale_neg")]
        scale, negative = (None if s is None else s.view(-1, len(segments))[group] for s in static)
        return quantize_input(x, quant, segments, self.plan.dual, scale, negative)

    def _fake(self, x: Tensor, rows: slice, group: int) -> Tensor:
        values, scale = self._activations(x, group)
        if scale is not None:
            values = values * formats.expand_columns(scale, self.plan.input_segments)
        return F.linear(values, self.dequantize(rows))

    def _real(self, x: Tensor, rows: slice, group: int) -> Tensor:
        values, scale = self._activations(x, group)
        weights = formats.code_values(self._codes(rows), self.plan.config.weight_quant.type)
        weight_scale, zero_point = self._grid(rows)
        return scaled_matmul(
            values, scale, weights, weight_scale, zero_point, self.plan.columns, self.plan.input_segments
        )

    def _low_rank(self, x: Tensor) -> Tensor:
        down = F.linear(x, self.svd_down.float()).unflatten(-1, (-1, self.plan.rank))
        parts = [F.linear(down[..., i, :], self.svd_up[rows].float()) for i, rows in enumerate(self._row_groups())]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _codes(self, rows: slice = slice(None)) -> Tensor:
        bits = self.plan.config.weight_quant.type.bits
        # Offloaded weights come straight from disk, where they have a leading 1.
        stored = self.weight.view(self.weight.shape[-2:])[rows]
        return unpack(stored, bits, self.in_features) if bits < 8 else stored

    def _grid(self, rows: slice = slice(None)) -> tuple[Tensor | None, Tensor | None]:
        scale, zero_point = (self._buffers.get(name) for name in ("weight_scale", "weight_zero_point"))
        return (None if scale is None else scale[rows]), (None if zero_point is None else zero_point[rows])

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        """The float32 weight [out, in] that the codes stand for (smoothed, and without the low-rank branch)."""
        scale, zero_point = self._grid(rows)
        dtype = self.plan.config.weight_quant.type
        return dequantize_weight(self._codes(rows), scale, zero_point, dtype, self.plan.columns)

    def effective_weight(self) -> Tensor:
        """The float32 weight [out, in] in terms of the raw input: unsmoothed, low-rank branch added."""
        weight = self.dequantize()
        for group, rows in enumerate(self._row_groups()):
            weight[rows] = self._smoothed(weight[rows], group)
            if self.plan.rank:
                down = self.svd_down.view(-1, self.plan.rank, self.in_features)[group]
                weight[rows] += self.svd_up[rows].float() @ down.float()
        return weight

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A plain ``nn.Linear`` of ``dtype`` with the effective weight; activations are no longer quantized."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(self.effective_weight().to(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return linear

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        tensors = {**self._parameters, **self._buffers}
        fixed = {id(tensor) for name, tensor in tensors.items() if name not in _MODEL_FLOATS}

        def move_only(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in fixed and new.dtype != tensor.dtype else new

        return super()._apply(move_only, recurse)

    def reset_parameters(self) -> None:
        """Nothing: there is no random initialization for codes."""

    def extra_repr(self) -> str:
        """Sizes, formats and what else the plan decided."""
        config = self.plan.config
        words = [
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}",
            f"weight={config.weight_quant.type}",
        ]
        if config.group_size:
            words.append(f"group_size={config.group_size}")
        if config.input_quant is not None:
            words.append(f"input={config.input_quant.type}{' dynamic' if config.input_quant.dynamic else ''}")
        if len(self.plan.input_segments) > 1:
            words.append(f"input_segments={list(self.plan.input_segments)}")
        if len(self.plan.output_segments) > 1:
            words.append(f"output_segments={list(self.plan.output_segments)}")
        if any(self.plan.dual):
            words.append("dual")
        if self.plan.rank:
            words.append(f"rank={self.plan.rank}")
        return ", ".join(words)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    """No autocast within; devices that have none (meta) need no switching off."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _both_model_floats(name: str, value: Tensor, current: Tensor) -> bool:
    return name in _MODEL_FLOATS and value.is_floating_point() and current.is_floating_point()


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized linears of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def set_real_quant(model: nn.Module, real_quant: bool = True) -> None:
    """Run every quantized linear on codes (True) or on dequantized floats (False); the results agree.

    Raises:
        ValueError: ``model`` has no quantized linear.
    """
    layers = quant_linears(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized linear")
    for layer in layers.values():
        layer.real_quant = real_quant
    log_real_quant(model)


def log_real_quant(model: nn.Module) -> None:
    """One line where layers run on the reference kernel."""
    count = sum(layer.real_quant for layer in quant_linears(model).values())
    if count:
        logger.info("%d linears run on the integer-exact reference kernel (exact, not fast)", count)


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value in the place of its key, wherever ``model`` refers to it; accelerate's hooks move along."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                new = replacements[child]
                new.training = child.training
                parent._modules[name] = new
    for old, new in replacements.items():
        _copy_hook(old, new)


def _copy_hook(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the accelerate hook that ``old`` has. ``old`` keeps its own, so that it can be put back."""
    hook: Any = getattr(old, "_hf_hook", None)
    if hook is None or hasattr(new, "_hf_hook"):
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    if isinstance(hook, AlignDevicesHook):
        # The old hook's weights_map has the float weights; a fresh one takes the new module's tensors.
        hook = AlignDevicesHook(
            execution_device=hook.execution_device,
            offload=hook.offload,
            io_same_device=hook.io_same_device,
            offload_buffers=hook.offload_buffers,
            place_submodules=hook.place_submodules,
            skip_keys=hook.skip_keys,
        )
    add_hook_to_module(new, hook)
