"""Convolutions: linears on unfolded rows, with columns ordered [kernel positions, input channels].

With quantized inputs, they are unfolded tile by tile and multiplied as linears are. Weight-only convolutions do the
same if it is faster (:meth:`QuantConv._unfolds`); otherwise their weight is dequantized block by block and passed to
torch's convolution. Grouped and transposed convolutions stay in float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType
from typing import TYPE_CHECKING, Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfquant.algorithms import Transform
from hfquant.kernels import dequantize
from hfquant.kernels.table import pick
from hfquant.nn.base import See
from hfquant.nn.float_modules import overridden
from hfquant.nn.layer import QuantLayer
from hfquant.nn.unfold import channels_first, channels_last, draw, ranges, tiles, windows

if TYPE_CHECKING:
    from hfquant.layer_config import LayerConfig
    from hfquant.layer_plan import LayerPlan

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Maximum number of unfolded values in memory at once: 32 MB of float32.
TILE = 1 << 23
#: Maximum number of dequantized weights in memory at once, also 32 MB.
BLOCK = 1 << 23
#: Minimum number of output channels for which unfolding a weight-only convolution pays off.
FEWEST = 192
#: Maximum number of rows that calibration samples from one input, and of values in them (128 MB of float32).
ROWS, VALUES = 4096, 1 << 25


class QuantConv(QuantLayer):
    """A quantized convolution; each float class gets its own quantized subclass.

    Whatever the float class does before it convolves (pad with earlier frames, split into chunks) still happens: only
    torch's ``_conv_forward`` is replaced.
    """

    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Return whether ``module`` is a 1-D, 2-D or 3-D convolution."""
        return isinstance(module, CONVS)

    @staticmethod
    def refuses(module: nn.Module) -> str:
        """Return why it stays in float: it has groups, or its class accesses the weight outside torch's own code."""
        assert isinstance(module, CONVS)
        if module.groups != 1:
            return f"a convolution in {module.groups} groups"
        if not _leaves_its_weight_alone(cast(Any, type(module))):
            return f"a convolution whose class, {type(module).__name__}, uses the weight directly"
        return ""

    @staticmethod
    def optional(module: nn.Module) -> str:
        """Return "edge_convs" for small convolutions next to images or latents, which are hard to quantize."""
        assert isinstance(module, CONVS)
        few, many = sorted((module.in_channels, module.out_channels))
        patches = module.kernel_size == module.stride and math.prod(module.kernel_size) > 1
        return "edge_convs" if few < 32 and (few * 4 <= many or patches) else ""

    @staticmethod
    def fitted(config: LayerConfig) -> LayerConfig:
        """Return the config with dynamic scales per row instead of per tensor, since no tile sees all the rows.

        The input is not split into segments either, because parts of a row are kernel positions, each with all
        channels. And channels are not mixed, since that would be repeated at each position.
        """
        quant, transform = config.input_quant, config.opt.unmixed()
        if quant is not None:
            quant = quant.model_copy(update={"segments": 1, "axis": -1 if quant.dynamic else quant.axis})
        return config.model_copy(update={"input_quant": quant, "opt": transform})

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """Return [out, in, *kernel] as [out, kernel positions * in]."""
        return weight.movedim(1, -1).flatten(1)

    @staticmethod
    def float_weight(matrix: Tensor, shape: torch.Size) -> Tensor:
        """Return [out, kernel positions * in] as [out, in, *kernel]."""
        out, channels, *kernel = shape
        # Via one dimension: with the strides of size-1 dimensions, torch would take the weight for channels-last.
        return matrix.view(out, *kernel, channels).movedim(-1, 1).reshape(-1).view(shape)

    @staticmethod
    def watch(module: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Call ``see`` with the convolution's own input, which a subclass may derive from the module's input."""
        convolve = cast(Any, module)._conv_forward

        def watched(input: Tensor, *args: Any) -> Tensor:
            see(input)
            return cast(Tensor, convolve(input, *args))

        return overridden(module, "_conv_forward", watched)

    @staticmethod
    def rows(module: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return unfolded rows [rows, in], a random sample if there are many, and bounds on the rows left out."""
        conv = cast(QuantConv, module)
        padded = _padded(conv, _batched(conv, x))
        seen = windows(padded, conv.kernel_size, conv.stride, conv.dilation)
        positions, spatial = math.prod(conv.kernel_size), len(conv.kernel_size)
        count = min(ROWS, max(VALUES // (positions * conv.in_channels), 1))
        rows = draw(seen, spatial, count, seed)
        return rows, ranges(padded, positions) if len(rows) < seen.shape[: 1 + spatial].numel() else None

    @classmethod
    def replacing(cls, module: nn.Module, plan: LayerPlan) -> Self:
        """Return an empty layer on the meta device that replaces a float module and can be converted back to it."""
        layer = cast(Self, object.__new__(quantized_class(cast(Any, type(module)))))
        weight = module.get_parameter("weight")
        QuantLayer.__init__(layer, plan, cast(Any, module).bias is not None, "meta", weight.dtype)
        layer._remember(module)
        for key, value in vars(layer._float).items():
            vars(layer).setdefault(key, value)
        return layer

    def listen(self, see: See) -> RemovableHandle:
        """Call ``see`` with the convolution's own input, which a subclass may derive from the module's input."""
        convolve = self._conv_forward

        def watched(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = convolve(input, weight, bias)
            other = see("", input, y)
            return y if other is None else other

        return overridden(self, "_conv_forward", watched)

    def float_output(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """Return the float convolution's output, in float32, for an input seen by :meth:`listen`."""
        weight = self.float_weight(matrix.float(), self.float_shape)
        return self._convolve(x.float(), weight, None if bias is None else bias.float())

    def output_rows(self, y: Tensor) -> Tensor:
        """Return an output [batch, out, *spatial], or one without a batch dimension, as rows [positions, out]."""
        return y.movedim(-1 - len(self.kernel_size), -1).reshape(-1, self.plan.out_features)

    def input_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Return the input windows from which rows ``index`` of the output were computed, [n, in]."""
        padded = _padded(self, _batched(self, x))
        seen = windows(padded, self.kernel_size, self.stride, self.dilation)
        return seen[torch.unravel_index(index, seen.shape[: 1 + len(self.kernel_size)])].flatten(1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the float class, since the generated class is not an attribute of any module."""
        return _new, (type(self._float),), vars(self)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not input.is_floating_point():
            raise TypeError(
                f"{self._get_name()} got an input of {input.dtype}: code that casts to `conv.weight.dtype` sees the "
                "dtype of the codes here; cast to the model's dtype instead"
            )
        x = _batched(self, input)
        y = self._unfolded(x) if self._unfolds(x) else self._weight_only(x)
        return y if x is input else y.squeeze(0)

    def _is_plain(self) -> bool:
        """Return whether the transform's effect on the input can be expressed in the weight."""
        kind = type(self._transform)
        return kind.input is Transform.input and kind.output is Transform.output

    def _unfolds(self, x: Tensor) -> bool:
        """Return whether to unfold ``x`` and multiply: if this is required, or faster.

        It is faster in half precision on a CPU with kernels that widen the codes as they read them, because torch's own
        convolutions are slower in half precision than in float32 (docs/measured.md). It is avoided if a gradient is
        needed, since all rows would have to be kept for it.
        """
        if self.product.input is not None or not self._is_plain():
            return True
        elsewhere = x.device.type != "cpu" or not self.real_quant or torch.compiler.is_compiling()
        if elsewhere or x.dtype.itemsize > 2 or (x.requires_grad and torch.is_grad_enabled()):
            return False
        points, out = x.numel() // (self.in_channels * math.prod(self.stride)), self.plan.out_features
        return out >= FEWEST and pick(self.product, "cpu", x.dtype, points, out) is not dequantize.KERNEL

    def _weight_only(self, x: Tensor) -> Tensor:
        parts = [self._convolve(x, weight, bias) for weight, bias in self._blocks(x.dtype)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        float_class: Any = type(self._float)
        return cast(Tensor, float_class._conv_forward(self, x, weight, bias))

    def _blocks(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield blocks of output channels: their weight [channels, in, *kernel] and bias."""
        out, columns = self.plan.out_features, self.plan.in_features
        count = max(BLOCK // columns, 1)
        divisor = self._transform.divisor(self._buffers, 0)
        branch = self._transform.branch(self._buffers, 0, slice(None))
        for start in range(0, out, count):
            rows = slice(start, min(start + count, out))
            matrix = self.dequantize(rows)
            if divisor is not None:
                matrix = matrix / divisor
            if branch is not None:
                down, up = branch
                matrix = matrix + up[rows].float() @ down.float()
            shape = torch.Size((len(matrix), self.in_channels, *self.kernel_size))
            bias = None if self.bias is None else self.bias[rows].to(dtype)
            yield self.float_weight(matrix.to(dtype), shape), bias

    def _unfolded(self, x: Tensor) -> Tensor:
        """Multiply unfolded rows, one tile of the output at a time."""
        padded = channels_last(_padded(self, x)).movedim(-1, 1)
        seen = windows(padded, self.kernel_size, self.stride, self.dilation)
        sizes = seen.shape[: 1 + len(self.kernel_size)]
        y = x.new_empty(*sizes, self.plan.out_features)
        for tile in tiles(sizes, max(TILE // self.plan.in_features, 1)):
            y[tile] = self.multiply(seen[tile].flatten(len(sizes)))
        return y.movedim(-1, 1) if _is_channels_last(x) else channels_first(y)

    def _sizes(self) -> str:
        plan = self.plan
        return (
            f"{self.in_channels}, {plan.out_features}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias is not None}"
        )


@cache
def quantized_class(float_class: Any) -> type[QuantConv]:
    """Return the class of quantized convolutions that replace those of ``float_class``."""

    def new(cls: type, *args: Any, **kwargs: Any) -> nn.Module:
        """Create a float module, because adapters build their own convolutions with ``type(base_layer)``."""
        return float_class(*args, **kwargs)

    name = f"Quant{float_class.__name__}"
    return cast(type[QuantConv], type(name, (QuantConv, float_class), {"__new__": new, "__doc__": QuantConv.__doc__}))


def _new(float_class: Any) -> QuantConv:
    return object.__new__(quantized_class(float_class))


@cache
def _leaves_its_weight_alone(kind: Any) -> bool:
    """Return whether a subclass only adds code before and after torch's convolution."""
    for base in kind.__mro__[: next(i for i, base in enumerate(kind.__mro__) if base in CONVS)]:
        if "_conv_forward" in vars(base) or "weight" in vars(base):
            return False
        methods = {name: f.__code__ for name, f in vars(base).items() if hasattr(f, "__code__") and name != "__init__"}
        if any("weight" in _names(code) for code in methods.values()):
            return False
        if "forward" in methods and "forward" not in methods["forward"].co_names:
            return False
    return True


def _names(code: CodeType) -> set[str]:
    """Return the attributes and globals used by a function and its inner functions."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _batched(conv: Any, x: Tensor) -> Tensor:
    """Return an input of ``conv`` with a batch dimension, adding one if it is missing."""
    return x if x.dim() == 2 + len(conv.kernel_size) else x.unsqueeze(0)


def _is_channels_last(x: Tensor) -> bool:
    """Return whether torch's convolution would return channels-last for ``x`` [batch, channels, *spatial]."""
    if x.dim() == 3 or x.shape[1] == 1 or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def _padded(conv: Any, x: Tensor) -> Tensor:
    """Return ``x`` [batch, channels, *spatial] with the padding of ``conv``."""
    # torch computes the sizes for "same"; explicit sizes may have been changed since construction.
    given = conv.padding
    sizes = conv._reversed_padding_repeated_twice if isinstance(given, str) else [p for p in given[::-1] for _ in "lr"]
    if not any(sizes):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, list(sizes), mode)
