"""Placement of a quantized model's tensors: sizes for inferring a device map, and linears kept on disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from hfquant.console import counted
from hfquant.integrations.checkpoint import quantized_experts
from hfquant.integrations.compat import mark_initialized
from hfquant.integrations.experts import layout_of
from hfquant.layer_plan import LayerPlan
from hfquant.nn.experts import QuantExperts
from hfquant.nn.kinds import find_kind, kind_of
from hfquant.nn.layer import QuantLayer
from hfquant.nn.modules import quant_modules
from hfquant.offload import forget_weights, on_disk
from hfquant.planner import Plan
from hfquant.replacing import replace_modules
from hfquant.solver import solve

#: Number of float32 copies of a weight that quantizing it needs at once.
COPIES = 3


def device_for(name: str, device_map: Mapping[str, Any]) -> Any:
    """Return the device of a module or tensor in a device map; None if the map does not include it."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map.get(name)


def refuse_meta(device_map: Any) -> None:
    """Raise ValueError if a device map, in any form that transformers takes, sends weights to the meta device."""
    devices = device_map.values() if isinstance(device_map, Mapping) else (device_map,)
    if any(str(device) == "meta" for device in devices):
        raise ValueError(
            "device_map: on the meta device, weights have no values to quantize; hfquant.plan(model, config) says how "
            "each layer of a model on it would be quantized, and a quantized checkpoint can be loaded there"
        )


def put_back(model: nn.Module, linears: Mapping[str, nn.Module], device_map: Mapping[str, Any] | None = None) -> None:
    """Put linears back in place of the empty QuantLinears that replaced them.

    Args:
        model: modified in place.
        linears: name -> the original.
        device_map: put back only those that it sends to disk; default: all.
    """
    back = [name for name in linears if device_map is None or device_for(name, device_map) == "disk"]
    replace_modules(model, {model.get_submodule(name): linears[name] for name in back})


def without_working_memory(max_memory: Mapping[Any, Any], plan: Plan | None) -> dict[Any, Any]:
    """Return the memory that a device map may fill on each device, leaving room to quantize the largest linear."""
    sizes = [4 * layer.in_features * layer.out_features for layer in plan.layers.values()] if plan else []
    needed = COPIES * max(sizes, default=0)
    return {device: max(0, size - needed) for device, size in max_memory.items()}


def tensor_bytes(model: nn.Module, plan: Plan | None = None) -> int:
    """Return the total bytes of a model's parameters and buffers, with the linears of ``plan`` quantized."""
    layers = plan.layers if plan else {}
    total = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            total += tensor.nbytes
            continue
        experts = tensor.numel() // (layer.in_features * layer.out_features) if name in layers else 1
        total += experts * layer.nbytes(tensor.dtype.itemsize)
    return total


def exact_floats(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtypes of the quantized linears' float tensors that do not follow the model's dtype."""
    return {
        f"{name}.{key}": spec.dtype
        for name, layer in quant_modules(model).items()
        for key, spec in layer.specs().items()
        if spec.dtype is not None and spec.dtype.is_floating_point
    }


def check_offload_folder(model: nn.Module, experts: Collection[nn.Module] = ()) -> None:
    """Raise if linears are read directly from a checkpoint's files, so that there is no folder for their codes.

    Args:
        model: the model whose linears are to be quantized.
        experts: modules of fused experts that are to be quantized as well.

    Raises:
        ValueError: there is no offload folder.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantLayer) or find_kind(module)]
    lacking, several = (
        sum((place := on_disk(module)) is not None and place.folder is None for module in modules)
        for modules in (layers, experts)
    )
    if lacking or several:
        parts = [counted(n, what) for n, what in ((lacking, "linear"), (several, "module of experts")) if n]
        raise ValueError(
            f'device_map: it sends {" and ".join(parts)} to "disk", whose codes have to be written somewhere: '
            "pass offload_folder=..."
        )


def quantize_left(model: nn.Module, plan: Plan) -> None:
    """Quantize what loading has left in float, one module at a time; the codes of modules on disk go to disk.

    These modules are linears and fused experts offloaded to disk, tied linears, and some that arrive fused with others.

    Raises:
        ValueError: a weight has NaN or Inf, or there is no folder for the codes.
    """
    parameters = dict(model.named_parameters())
    experts: dict[nn.Module, dict[str, LayerPlan]] = {}
    for name in plan.layers.keys() & parameters.keys():
        parent, _, projection = name.rpartition(".")
        if parameters[name].is_floating_point():
            experts.setdefault(model.get_submodule(parent), {})[projection] = plan.layers[name]
    check_offload_folder(model, experts)
    for name, layer_plan in plan.layers.items():
        if name in parameters:
            continue
        module = model.get_submodule(name)
        if not module.get_parameter("weight").is_floating_point():
            continue
        original = module._float if isinstance(module, QuantLayer) else module
        kind = kind_of(original)
        with align_module_device(module):
            bias, weight = module._parameters.get("bias"), module.get_parameter("weight").detach()
            solved = solve(name, kind.matrix(weight), layer_plan, None)
            layer = kind.from_tensors(solved.plan, solved.tensors, bias, original)
        _put_in(model, module, layer)
    names = {module: name for name, module in model.named_modules()}
    for module, plans in experts.items():
        layout = layout_of(module)
        assert layout is not None
        with align_module_device(module):
            held = QuantExperts(module, layout)
            for projection, layer_plan in plans.items():
                name = f"{names[module]}.{projection}".lstrip(".")
                weights = module.get_parameter(projection).detach()
                held.hold(projection, layer_plan, quantized_experts(name, held, layer_plan, weights))
        _put_in(model, module, held)


def _put_in(model: nn.Module, module: nn.Module, quantized: nn.Module) -> None:
    """Replace a float module by a quantized one, on disk too."""
    for tensor in [*quantized.parameters(), *quantized.buffers()]:
        mark_initialized(tensor)
    replace_modules(model, {module: quantized})
    forget_weights(module)
