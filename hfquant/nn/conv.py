"""Convolutions: linears on unfolded rows, columns ordered [kernel positions, input channels].

Those with quantized inputs unfold tile by tile into the product that linears run on. Weight-only ones do so where that
is faster (:meth:`QuantConv._unfolds`), else they dequantize block by block into torch's convolution. Groups, and
transposed convolutions, stay in float.
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
from hfquant.nn.checked import See
from hfquant.nn.float_modules import overridden
from hfquant.nn.layer import QuantLayer
from hfquant.nn.unfold import channels_first, channels_last, draw, ranges, tiles, windows

if TYPE_CHECKING:
    from hfquant.layer_config import LayerConfig
    from hfquant.layer_plan import LayerPlan

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Values of unfolded rows that are there at once: 32 MB of float32.
TILE = 1 << 23
#: Values of dequantized weights that are there at once, likewise.
BLOCK = 1 << 23
#: Output channels from which on unfolding an input into a weight-only product pays.
FEWEST = 192
#: Rows of one input that calibration looks at, at most, and values in them (128 MB of float32).
ROWS, VALUES = 4096, 1 << 25


class QuantConv(QuantLayer):
    """A quantized convolution. Its class is made for each class of float ones, which it is a subclass of.

    What such a class does before it convolves (pad with earlier frames, cut into chunks) it goes on doing: torch's own
    ``_conv_forward`` is what is replaced.
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
        """Return whether ``module`` is a convolution of one, two or three dimensions."""
        return isinstance(module, CONVS)

    @staticmethod
    def refuses(module: nn.Module) -> str:
        """Return why it stays in float: groups, or a subclass that does not leave its weight to torch."""
        assert isinstance(module, CONVS)
        if module.groups != 1:
            return f"a convolution in {module.groups} groups"
        if not _leaves_its_weight_alone(cast(Any, type(module))):
            return f"a convolution whose class, {type(module).__name__}, uses the weight by itself"
        return ""

    @staticmethod
    def optional(module: nn.Module) -> str:
        """Return "edge_convs" for one between a model and its images or latents: small, and hard to quantize."""
        assert isinstance(module, CONVS)
        few, many = sorted((module.in_channels, module.out_channels))
        patches = module.kernel_size == module.stride and math.prod(module.kernel_size) > 1
        return "edge_convs" if few < 32 and (few * 4 <= many or patches) else ""

    @staticmethod
    def fitted(config: LayerConfig) -> LayerConfig:
        """Return the config with one scale a row in place of a dynamic one a tensor: no tile knows all the rows.

        Nor is the input cut: parts of a row are positions of the kernel, each with all channels. And channels are not
        mixed, which would be done again at each position.
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
        # Through one dimension: strides of dimensions of 1 make torch take a weight for a channels-last one.
        return matrix.view(out, *kernel, channels).movedim(-1, 1).reshape(-1).view(shape)

    @staticmethod
    def watch(module: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Have ``see`` called with what is convolved, which a subclass may have made of the module's input."""
        convolve = cast(Any, module)._conv_forward

        def watched(input: Tensor, *args: Any) -> Tensor:
            see(input)
            return cast(Tensor, convolve(input, *args))

        return overridden(module, "_conv_forward", watched)

    @staticmethod
    def rows(module: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return unfolded rows [rows, in], drawn by chance where there are many, and the ranges of the others."""
        conv = cast(QuantConv, module)
        padded = _padded(conv, _batched(conv, x))
        seen = windows(padded, conv.kernel_size, conv.stride, conv.dilation)
        positions, spatial = math.prod(conv.kernel_size), len(conv.kernel_size)
        count = min(ROWS, max(VALUES // (positions * conv.in_channels), 1))
        rows = draw(seen, spatial, count, seed)
        return rows, ranges(padded, positions) if len(rows) < seen.shape[: 1 + spatial].numel() else None

    @classmethod
    def replacing(cls, module: nn.Module, plan: LayerPlan) -> Self:
        """Return an empty layer on the meta device to take the place of a float module, and to know its way back."""
        layer = cast(Self, object.__new__(quantized_class(cast(Any, type(module)))))
        weight = module.get_parameter("weight")
        QuantLayer.__init__(layer, plan, cast(Any, module).bias is not None, "meta", weight.dtype)
        layer._remember(module)
        for key, value in vars(layer._float).items():
            vars(layer).setdefault(key, value)
        return layer

    def listen(self, see: See) -> RemovableHandle:
        """Have ``see`` called with what is convolved, which a subclass may have made of the module's input."""
        convolve = self._conv_forward

        def watched(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = convolve(input, weight, bias)
            other = see("", input, y)
            return y if other is None else other

        return overridden(self, "_conv_forward", watched)

    def float_output(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the float convolution gives for an input that :meth:`listen` saw, in float32."""
        weight = self.float_weight(matrix.float(), self.float_shape)
        return self._convolve(x.float(), weight, None if bias is None else bias.float())

    def output_rows(self, y: Tensor) -> Tensor:
        """Return an output [batch, out, *spatial], or one without a batch, as rows [positions, out]."""
        return y.movedim(-1 - len(self.kernel_size), -1).reshape(-1, self.plan.out_features)

    def input_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Return the windows of an input from which rows ``index`` of the output were made, [n, in]."""
        padded = _padded(self, _batched(self, x))
        seen = windows(padded, self.kernel_size, self.stride, self.dilation)
        return seen[torch.unravel_index(index, seen.shape[: 1 + len(self.kernel_size)])].flatten(1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Its class is found by the float one's, since no module holds it."""
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
        """Return whether the transform's action on the input can be said of the weight."""
        kind = type(self._transform)
        return kind.input is Transform.input and kind.output is Transform.output

    def _unfolds(self, x: Tensor) -> bool:
        """Return whether ``x`` is unfolded and multiplied: where it has to be, and where that is faster.

        It is in half precision on a CPU, by kernels that widen the codes as they read them: torch's own convolutions
        take longer for it than for float32 (docs/measured.md). Not where a gradient is wanted, since all rows would be
        kept for it.
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
        """Multiply unfolded rows, a tile of the output at a time."""
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
    """Return the class of the quantized convolutions that were of ``float_class``."""

    def new(cls: type, *args: Any, **kwargs: Any) -> nn.Module:
        """Make a float module: an adapter builds its own convolutions by ``type(base_layer)``."""
        return float_class(*args, **kwargs)

    name = f"Quant{float_class.__name__}"
    return cast(type[QuantConv], type(name, (QuantConv, float_class), {"__new__": new, "__doc__": QuantConv.__doc__}))


def _new(float_class: Any) -> QuantConv:
    return object.__new__(quantized_class(float_class))


@cache
def _leaves_its_weight_alone(kind: Any) -> bool:
    """Return whether a subclass adds to torch's convolution only what goes before and after it."""
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
    """Return the attributes and globals that a function names, and those within it."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _batched(conv: Any, x: Tensor) -> Tensor:
    """Return an input of ``conv`` [channels, *spatial] with a dimension before it, where it has none."""
    return x if x.dim() == 2 + len(conv.kernel_size) else x.unsqueeze(0)


def _is_channels_last(x: Tensor) -> bool:
    """Return whether torch's convolution would give channels last for ``x`` [batch, channels, *spatial]."""
    if x.dim() == 3 or x.shape[1] == 1 or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def _padded(conv: Any, x: Tensor) -> Tensor:
    """Return ``x`` [batch, channels, *spatial] padded as ``conv`` pads it."""
    # "same" is worked out by torch; sizes may have been set since.
    given = conv.padding
    sizes = conv._reversed_padding_repeated_twice if isinstance(given, str) else [p for p in given[::-1] for _ in "lr"]
    if not any(sizes):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, list(sizes), mode)
