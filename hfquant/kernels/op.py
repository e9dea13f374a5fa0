"""``torch.ops.hfquant.linear``: the op that runs a quantized layer, traced, exported and differentiated as one node.

Outside a trace, and if no gradient is needed, :func:`linear` calls the kernel directly: the dispatcher and the text key
of the product would cost as much as a small layer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._mode_utils import no_dispatch

from hfquant.formats.rotation import keep, rotated
from hfquant.kernels import dequantize
from hfquant.kernels.base import Operands, Product, Run, product_of
from hfquant.kernels.table import pick
from hfquant.kernels.triton import host

_library = torch.library.Library("hfquant", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? scale, Tensor? scale_row, Tensor? zero_point, Tensor? input_scale, "
    "Tensor? input_scale_neg, Tensor? divisor, Tensor? down, Tensor? up, Tensor? bias, str product, bool real"
    ") -> Tensor"
)


def linear(x: Tensor, operands: Operands, product: Product, real: bool) -> Tensor:
    """Return the quantized product of ``x`` [..., in], any float dtype, as [..., out] of the same dtype.

    Args:
        x: the input.
        operands: tensors of the product.
        product: what to compute.
        real: whether to run on the codes if a kernel pays; otherwise run on the dequantized weight.

    Raises:
        ValueError, TypeError: an operand has a wrong shape or dtype; a forced kernel cannot compute the product.
        NotImplementedError: ``x`` has a tangent of forward-mode differentiation.
    """
    traced = torch.compiler.is_compiling()
    if not traced and forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError("quantized layers have no forward-mode derivative (jvp, jacfwd); use reverse mode")
    direct = type(x) in (Tensor, Parameter) and not x.is_meta and not traced
    if direct and not (x.requires_grad and torch.is_grad_enabled()):
        return _run(x, operands, product, real)
    y: Tensor = torch.ops.hfquant.linear(x, *operands, product.key, real)
    return y


def _run(x: Tensor, operands: Operands, product: Product, real: bool) -> Tensor:
    out, size = operands.weight.shape[0], x.numel()
    if not size:
        return x.new_zeros(*x.shape[:-1], out)
    device = "cpu" if x.is_cpu else x.device.type  # is_cpu takes a tenth of the time
    kernel = pick(product, device, x.dtype, size // product.in_features, out) if real else dequantize.KERNEL
    run = rotating(kernel.run) if product.rotation and not kernel.rotates else kernel.run
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return run(x, operands, product)
    return run(x, operands, product)


#: Devices on which kernels that do not rotate multiply in float32.
_IN_FLOAT32 = ("cpu",)


def rotating(run: Run) -> Run:
    """Wrap ``run`` so that it receives the input already divided and rotated.

    It is then float32, but on a GPU, a bfloat16 input that is not quantized afterwards stays bfloat16, as in the float
    model: products of that dtype are several times faster there. Float16 may not hold what is divided.
    """

    def of_raw(x: Tensor, operands: Operands, product: Product) -> Tensor:
        half = x.dtype == torch.bfloat16 and product.input is None and x.device.type not in _IN_FLOAT32
        divided = x if half else x.float()
        if operands.divisor is not None:
            divided = divided.float() / operands.divisor
        turned = rotated(divided, product.rotation)
        turned = turned.to(x.dtype) if half else turned
        return run(turned, operands._replace(divisor=None), product.unrotated).to(x.dtype)

    return of_raw


def _op(x: Tensor, *arguments: Any) -> Tensor:
    *tensors, key, real = arguments
    product, operands = product_of(key), Operands(*tensors)
    check(x, operands, product)
    if any(t is not None and t.numel() and not t.untyped_storage().nbytes() for t in (x, *operands)):
        raise ValueError(f"the data of a tensor was freed, for {key}")
    return _run(x, operands, product, real)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    *tensors, key, _ = arguments
    operands, product = Operands(*tensors), product_of(key)
    # Checked here too: a meta weight with a real input is dispatched here, and nothing would be computed.
    check(x, operands, product)
    if x.device.type in _KEEPING:
        _prepare(product, x.device)
    return x.new_empty(*x.shape[:-1], operands.weight.shape[0])


#: Devices whose kernels keep tensors of their own.
_KEEPING = ("cuda",)


@cache
def _prepare(product: Product, device: torch.device) -> None:
    """Create what kernels keep for a product. A call that warms up a CUDA graph would do so in the graph's memory."""
    with no_dispatch():
        host.layout(product, device)
        if product.input is not None:
            host.segments_of(product, device)
        for dtype in (torch.float32, torch.bfloat16):
            keep(product.in_features, product.rotation, device, dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.key, _ = inputs
    ctx.present = [tensor is not None for tensor in tensors]
    ctx.save_for_backward(*[tensor for tensor in tensors if tensor is not None])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    tensors = [next(saved) if present else None for present in ctx.present]
    return (torch.ops.hfquant.linear_gradient(grad, *tensors, ctx.key), *(None,) * 12)


_library.define(
    "linear_gradient(Tensor grad, Tensor weight, Tensor? scale, Tensor? scale_row, Tensor? zero_point, "
    "Tensor? input_scale, Tensor? input_scale_neg, Tensor? divisor, Tensor? down, Tensor? up, Tensor? bias, "
    "str product) -> Tensor"
)


def _gradient(grad: Tensor, *arguments: Any) -> Tensor:
    *tensors, key = arguments
    product = product_of(key)
    flat = grad.reshape(-1, grad.shape[-1])
    return dequantize.gradient(flat, Operands(*tensors), product).view(*grad.shape[:-1], product.in_features)


def _fake_gradient(grad: Tensor, *arguments: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], product_of(arguments[-1]).in_features)


_library.impl("linear", _op, "CompositeExplicitAutograd")
_library.impl("linear_gradient", _gradient, "CompositeExplicitAutograd")
torch.library.register_fake("hfquant::linear", _fake, lib=_library)
torch.library.register_fake("hfquant::linear_gradient", _fake_gradient, lib=_library)
torch.library.register_autograd("hfquant::linear", _backward, setup_context=_setup, lib=_library)


def check(x: Tensor, operands: Operands, product: Product) -> None:
    """Check that the tensors match the product, so that kernels can rely on shapes and dtypes.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or a device is wrong.
    """
    if not x.is_floating_point():
        raise TypeError(f"expected a floating-point input, got {x.dtype}")
    form, columns, segments = product.weight, product.in_features, len(product.segments)
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"expected an input of {columns} features, got one of shape {tuple(x.shape)}")
    if operands.weight.dim() != 2:
        raise ValueError(f"expected a weight of rank 2, got {tuple(operands.weight.shape)}")
    out, groups = operands.weight.shape[0], len(product.columns)
    static = product.input is not None and product.input.static
    dual = static and product.input is not None and any(product.input.dual)
    two_level = operands.scale_row is not None
    rank = -1 if operands.down is None or operands.down.dim() != 2 else operands.down.shape[0]
    any_float = None
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None, bool]] = {
        "weight": ((out, form.packed_width(columns)), form.code_dtype, True),
        "scale": ((out, groups), torch.uint8 if two_level else torch.float32, form.has_scale),
        "scale_row": ((out, 1), torch.float32, two_level and form.has_scale),
        "zero_point": ((out, form.packed_width(groups)), form.code_dtype, not product.symmetric),
        "input_scale": ((segments,), torch.float32, static),
        "input_scale_neg": ((segments,), torch.float32, dual),
        "divisor": ((columns,), torch.float32, operands.divisor is not None),
        "down": ((rank, columns), any_float, operands.up is not None),
        "up": ((out, rank), any_float, operands.down is not None),
        "bias": ((out,), any_float, operands.bias is not None),
    }
    for name, (shape, dtype, wanted) in expected.items():
        tensor: Tensor | None = getattr(operands, name)
        if tensor is None or not wanted:
            if wanted or tensor is not None:
                raise ValueError(f"{name}: expected {'a tensor' if wanted else 'none'} for {product.key}")
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != dtype if dtype is not None else not tensor.is_floating_point():
            raise TypeError(f"{name}: expected {dtype or 'a float dtype'}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, the input on {x.device}")
