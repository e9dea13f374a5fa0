"""compressed-tensors, as transformers reads it without hfquant.

A group of layers has one scheme: number of bits, symmetric or not, for weights one scale a channel or a group of input
channels, for inputs one scale a token or a tensor. Codes and zero points are signed: ``(code - zero_point) * scale``.

Weights of integers with float inputs are "pack-quantized": each row a stream of unsigned codes, low bits first, padded
to whole int32. Where the inputs are quantized too they are "int-quantized", a byte a code; FP8 is "float-quantized", or
"naive-quantized" with float inputs. That is what compressed-tensors itself chooses for each (but see :func:`storage`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from hfquant.exporters.checkpoint import Converted, ExportError, must_be_of, refuse
from hfquant.exporters.requantize import no_linear, plain, requantized
from hfquant.formats import NumberFormat
from hfquant.formats.words import to_words
from hfquant.layer_plan import LayerPlan
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import quant_linears

#: Number formats that it has as well, by our names.
_TYPES = {**{f"int{bits}": "int" for bits in range(2, 9)}, "fp8e4m3": "float"}


def convert(model: Any, requantize: bool) -> Converted:
    """Return the quantized linears of ``model`` (transformers) as compressed-tensors stores them.

    Raises:
        ExportError: the model is of another library, or layers cannot be expressed.
    """
    must_be_of(model, "transformers", "compressed-tensors")
    layers, plans, problems = quant_linears(model), {}, {}
    for name, layer in layers.items():
        why = obstacle(layer.plan)
        plans[name] = plain(layer.plan) if why and requantize else layer.plan
        if why := no_linear(layer) or obstacle(plans[name]):
            problems[name] = why
    refuse(problems, "compressed-tensors", requantize)
    scaled = {name: plan for name, plan in plans.items() if plan.config.weight_quant.format.has_scale}
    if not scaled:
        raise ExportError("no layer has a scale: hfquant.dequantize(model), then save it as it is")
    alone = len({json.dumps(arguments(plan)) for plan in scaled.values()}) == 1
    tensors: dict[str, Tensor] = {}
    groups: dict[str, list[str]] = {}
    for name, layer in layers.items():
        plan = plans[name]
        assert isinstance(layer, QuantLinear)
        with align_module_device(layer):
            if plan is not layer.plan:
                layer = requantized(name, layer, plan)
            found = layer_tensors(layer, storage(plan, alone), model.dtype)
            tensors |= {f"{name}.{key}": tensor.cpu() for key, tensor in found.items()}
        if name in scaled:
            groups.setdefault(json.dumps({**arguments(plan), "format": storage(plan, alone)}), []).append(name)
    return Converted(tensors, quantization_config(model, groups))


def obstacle(plan: LayerPlan) -> str | None:
    """Return what of a layer's plan compressed-tensors has no means for; None where it can express it all."""
    weight, inputs = plan.config.weight_quant, plan.config.input_quant
    if stored := plan.transform.tensors(plan.in_features, plan.row_groups):
        return f"its input is transformed at run time ({', '.join(stored)})"
    if any(plan.dual):
        return "its inputs have a second scale for negative values"
    if len(plan.input_segments) > 1 and inputs is not None and inputs.format.has_scale:
        return "segments of its input have scales of their own"
    if len(set(plan.columns)) > 1:
        return f"its groups of columns are not of one size ({plan.columns[0]} and {plan.columns[-1]})"
    if weight.format.has_scale and weight.type not in _TYPES:
        return f"no {weight.type} weights (there are {', '.join(_TYPES)})"
    if inputs is not None and (inputs.type not in _TYPES or not weight.format.has_scale):
        return f"no {inputs.type} inputs beside {weight.type} weights"
    return None


def arguments(plan: LayerPlan) -> dict[str, Any]:
    """Return what a config group says of such layers, storage aside."""
    weight, inputs = plan.config.weight_quant, plan.config.input_quant
    grouped = len(plan.columns) > 1
    weights = {
        **_number(weight.format),
        "symmetric": weight.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": plan.columns[0] if grouped else None,
        "dynamic": False,
    }
    activations = None
    if inputs is not None:
        token = {"symmetric": True, "strategy": "tensor" if inputs.axis is None else "token", "dynamic": inputs.dynamic}
        activations = {**_number(inputs.format), **token}
    return {"weights": weights, "input_activations": activations, "output_activations": None}


def _number(form: NumberFormat) -> dict[str, Any]:
    return {"num_bits": form.bits, "type": _TYPES[form.name]}


def storage(plan: LayerPlan, alone: bool) -> str:
    """Return the name of the way in which a layer's codes are stored.

    transformers cannot hold packed zero points (llm-compressor's issue 1618); what gets it around that, dequantizing
    while loading, needs one scheme for all layers. Beside others such layers are stored a byte a code.

    Args:
        plan: of the layer.
        alone: whether all layers have one scheme.
    """
    quant = plan.config.weight_quant
    if plan.config.input_quant is not None:
        return "int-quantized" if quant.format.is_integer else "float-quantized"
    return "pack-quantized" if quant.format.is_integer and (alone or quant.symmetric) else "naive-quantized"


def layer_tensors(layer: QuantLinear, storage: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a layer that :func:`obstacle` has nothing against, by the names they are stored under.

    Args:
        layer: of the model.
        storage: see :func:`storage`.
        dtype: of the weight where it is a float without a scale.
    """
    form, codes, grid = layer.format, layer.codes(), layer.grid()
    bias = {} if layer.bias is None else {"bias": layer.bias.detach()}
    if grid.scale is None:  # a mere cast: a float weight like any other
        return {"weight": form.values(codes).to(dtype), **bias}
    zero_point = grid.zero_point
    if storage == "pack-quantized":
        shape = torch.tensor([layer.out_features, layer.in_features])
        stored = {"weight_packed": to_words(codes, form), "weight_shape": shape}
        if zero_point is not None:
            # Along the rows, several of a column in an int32.
            zero_point = to_words(zero_point.T, form).T
    else:
        # Unsigned bytes of FP8 are its floats.
        stored = {"weight": codes if form.is_integer else form.values(codes).to(torch.float8_e4m3fn)}
    stored["weight_scale"] = grid.scale
    if zero_point is not None:
        stored["weight_zero_point"] = zero_point
    if layer.plan.static_input:
        stored["input_scale"] = layer.get_buffer("input_scale")
    return {name: tensor.contiguous() for name, tensor in {**stored, **bias}.items()}


def quantization_config(model: nn.Module, groups: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return config.json's section.

    Args:
        model: with its quantized linears.
        groups: scheme as JSON -> names of its layers.
    """
    prefix = getattr(model, "base_model_prefix", "")
    schemes = [json.loads(found) for found in groups]
    formats = {found["format"] for found in schemes}
    quantized = {name for names in groups.values() for name in names}
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in quantized]
    config_groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(groups) == 1 else [_pattern(name, prefix) for name in names],
            **found,
        }
        for i, (found, names) in enumerate(zip(schemes, groups.values(), strict=True))
    }
    # transformers would keep packed layers as they are until the first forward; but it cannot hold packed zero points,
    # and many models initialize a `weight` that packed layers have not. It takes the first scheme for that of all.
    loading = {"dequantize": True} if formats == {"pack-quantized"} and len(schemes) == 1 else {}
    return {
        **loading,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision",
        "config_groups": config_groups,
        "ignore": [_pattern(name, prefix) for name in left],
    }


def _pattern(name: str, prefix: str) -> str:
    """Return what matches a layer by name; where the model has a base model, in that alone too (AutoModel)."""
    start = f"{prefix}."
    if not prefix or not name.startswith(start):
        return name
    return f"re:({re.escape(start)})?{re.escape(name.removeprefix(start))}$"
