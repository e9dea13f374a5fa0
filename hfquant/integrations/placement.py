"""Where the tensors of a quantized model go: the sizes that a device map is inferred from, and linears kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from hfquant.console import counted
from hfquant.integrations.compat import mark_initialized
from hfquant.nn.kinds import kind_of
from hfquant.nn.layer import QuantLayer
from hfquant.nn.modules import quant_modules
from hfquant.offload import forget_weights, on_disk
from hfquant.planner import Plan
from hfquant.replacing import replace_modules
from hfquant.solver import solve

#: How many float32 copies of a weight quantizing it takes at once.
COPIES = 3


def device_for(name: str, device_map: Mapping[str, Any]) -> Any:
    """Return where a device map puts a module or tensor; None where it says nothing of it."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map.get(name)


def put_back(model: nn.Module, linears: Mapping[str, nn.Module], device_map: Mapping[str, Any] | None = None) -> None:
    """Put linears back in the place of the empty QuantLinears that they were replaced by.

    Args:
        model: changed in place.
        linears: name -> the original.
        device_map: only of those that it sends to disk; default: of all.
    """
    back = [name for name in linears if device_map is None or device_for(name, device_map) == "disk"]
    replace_modules(model, {model.get_submodule(name): linears[name] for name in back})


def without_working_memory(max_memory: Mapping[Any, Any], plan: Plan | None) -> dict[Any, Any]:
    """Return what a device map may fill of each device where its largest linear is to be quantized on it as well."""
    sizes = [4 * layer.in_features * layer.out_features for layer in plan.layers.values()] if plan else []
    needed = COPIES * max(sizes, default=0)
    return {device: max(0, size - needed) for device, size in max_memory.items()}


def tensor_bytes(model: nn.Module, plan: Plan | None = None) -> int:
    """Return the bytes that a model's parameters and buffers take, with the linears of ``plan`` quantized."""
    layers = plan.layers if plan else {}
    total = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            total += tensor.nbytes
            continue
        experts = tensor.numel() // (layer.in_features * layer.out_features) if name in layers else 1
        for shape, dtype in layer.tensors().values():
            total += experts * torch.Size(shape).numel() * (dtype or tensor.dtype).itemsize
    return total


def exact_floats(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of each float tensor of the quantized linears that keeps its own in a model of any dtype."""
    return {
        f"{name}.{key}": spec.dtype
        for name, layer in quant_modules(model).items()
        for key, spec in layer.specs().items()
        if spec.dtype is not None and spec.dtype.is_floating_point
    }


def check_offload_folder(model: nn.Module) -> None:
    """Raise where linears are read from a checkpoint's own files, so that there is no folder to write codes to.

    Raises:
        ValueError: there is no offload folder.
    """
    places = [on_disk(module) for module in model.modules() if isinstance(module, QuantLayer) or kind_of(module)]
    lacking = sum(place is not None and place.folder is None for place in places)
    if lacking:
        raise ValueError(
            f'device_map: it sends {counted(lacking, "linear")} to "disk", whose codes have to be written somewhere: '
            "pass offload_folder=..."
        )


def quantize_left(model: nn.Module, plan: Plan) -> None:
    """Quantize the linears whose weights loading has left in float, one at a time; of those on disk the codes go there.

    Left are those that are offloaded to disk, tied ones, and some that come fused with others.

    Raises:
        ValueError: a weight has NaN or Inf, there is no folder for the codes, or fused experts are on disk.
    """
    check_offload_folder(model)
    parameters = dict(model.named_parameters())
    for name, layer_plan in plan.layers.items():
        if name in parameters:  # of experts, which are quantized as they are read
            if parameters[name].is_floating_point():
                raise ValueError(f'device_map: it sends {name!r} to "disk", and fused experts are not quantized there')
            continue
        module = model.get_submodule(name)
        if not module.get_parameter("weight").is_floating_point():
            continue
        original = module._float if isinstance(module, QuantLayer) else module
        kind = kind_of(original)
        assert kind is not None
        with align_module_device(module):
            bias, weight = module._parameters.get("bias"), module.get_parameter("weight").detach()
            solved = solve(name, kind.matrix(weight), layer_plan, None)
            layer = kind.from_tensors(solved.plan, solved.tensors, bias, original)
        for tensor in [*layer.parameters(), *layer.buffers()]:
            mark_initialized(tensor)
        replace_modules(model, {module: layer})
        forget_weights(module)
