"""Export to compressed-tensors, as read by transformers without hfquant.

All layers of a config group share one scheme: bit width, symmetric or not, scales per channel or per group of input
channels for weights, and per token or per tensor for inputs. Codes and zero points are signed; a weight is
``(code - zero_point) * scale``.

Integer weights with float inputs are stored "pack-quantized": each row is a stream of unsigned codes, low bits first,
padded to whole int32. If the inputs are quantized too, the format is "int-quantized", one byte per code. FP8 is
"float-quantized", or "naive-quantized" with float inputs. compressed-tensors itself makes the same choices (but see
:func:`storage`).

Fused experts become one linear each, named as in their published checkpoints (:mod:`hfquant.exporters.experts`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from hfquant.algorithms import Identity
from hfquant.exporters.checkpoint import Converted, ExportError, must_be_of, refuse
from hfquant.exporters.experts import alike, as_read, expert_layers, log_inputs
from hfquant.exporters.requantize import no_linear, plain, requantized
from hfquant.formats import NumberFormat
from hfquant.formats.int32_words import to_words
from hfquant.integrations.compat import replaced_when_quantized, stored_names
from hfquant.integrations.experts import StoredLinear, stored_linears
from hfquant.layer_plan import LayerPlan
from hfquant.nn.experts import plans_of
from hfquant.nn.layer import QuantLayer
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import quant_experts, quant_layers

#: Number formats that compressed-tensors also has, by hfquant's names.
_TYPES = {**{f"int{bits}": "int" for bits in range(2, 9)}, "fp8e4m3": "float"}


def convert(model: Any, requantize: bool) -> Converted:
    """Convert the quantized linears and experts of ``model`` (transformers) to compressed-tensors.

    Raises:
        ExportError: the model is from another library, or some layers cannot be expressed.
    """
    must_be_of(model, "transformers", "compressed-tensors")
    experts = quant_experts(model)
    own_plans = plans_of(experts)
    sizes = {p: (experts[p.rpartition(".")[0]].expert_count, plan.out_features) for p, plan in own_plans.items()}
    linears = stored_linears(model, {name: module.layout for name, module in experts.items()}, sizes)
    plans, problems = _plans_of_linears(model, requantize)
    expert_plans, more = _plans_of_experts(own_plans, linears, requantize)
    empty = "on loading, transformers replaces these experts with lists of linears and leaves them empty"
    more |= {n: empty for n, m in model.named_modules() if replaced_when_quantized(m, "compressed-tensors")}
    refuse(problems | more, "compressed-tensors", requantize)
    scaled = {name: plan for name, plan in plans.items() if plan.config.weight_quant.format.has_scale}
    if not scaled and not expert_plans:
        raise ExportError("no layer has a scale: call hfquant.dequantize(model) and save the float model")
    alone = len({json.dumps(arguments(plan)) for plan in scaled.values()}) == 1
    tensors: dict[str, Tensor] = {}
    groups: dict[str, list[str]] = {}
    for name, plan in plans.items():
        layer = model.get_submodule(name)
        with align_module_device(layer):
            if plan is not layer.plan:
                layer = requantized(name, layer, plan)
            tensors |= _named(name, layer_tensors(layer, storage(plan, alone), model.dtype))
        if name in scaled:
            groups.setdefault(_scheme(plan, alone), []).append(name)
    of_experts: dict[str, Tensor] = {}
    for name, plan in expert_plans.items():
        owner, _, projection = name.rpartition(".")
        with align_module_device(experts[owner]):
            layers = list(expert_layers(name, experts[owner], projection, plan))
            for linear in linears[name]:
                found = layer_tensors(layers[linear.expert], storage(plan, alone), model.dtype, linear.rows)
                of_experts |= _named(linear.name, found)
    log_inputs(own_plans)
    scheme = next((_scheme(plan, alone) for plan in expert_plans.values()), None)
    names = [linear.name for found in linears.values() for linear in found]
    return Converted(tensors, quantization_config(model, groups, scheme, names), of_experts)


def _named(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor.cpu() for key, tensor in tensors.items()}


def _plans_of_linears(model: nn.Module, requantize: bool) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    """Return the plan to export each quantized layer with, and the problems of layers that cannot be exported."""
    plans, problems = {}, {}
    for name, layer in quant_layers(model).items():
        why = obstacle(layer.plan)
        plans[name] = plain(layer.plan) if why and requantize else layer.plan
        if why := no_linear(layer) or obstacle(plans[name]):
            problems[name] = why
    return plans, problems


def _plans_of_experts(
    plans: Mapping[str, LayerPlan], linears: Mapping[str, list[StoredLinear]], requantize: bool
) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    """Do the same for the quantized parameters of experts, all of which must share one scheme.

    Args:
        plans: plans of the expert parameters in the model.
        linears: the checkpoint linears that each parameter corresponds to.
        requantize: whether they may be requantized.
    """
    read = {name: as_read(plan) for name, plan in plans.items()}
    problems = _obstacles_of_experts(read, linears)
    if problems and requantize:
        read = alike(read)
        problems = _obstacles_of_experts(read, linears)
    return read, problems


def _obstacles_of_experts(plans: Mapping[str, LayerPlan], linears: Mapping[str, list[StoredLinear]]) -> dict[str, str]:
    found: dict[str, str] = {}
    first = next(iter(plans), "")
    for name, plan in plans.items():
        weight = plan.config.weight_quant
        if not linears[name]:
            found[name] = "checkpoints of its class store experts fused, but the format has codes for linears only"
        elif why := obstacle(plan):
            found[name] = why
        elif not weight.format.has_scale:
            found[name] = f"transformers ignores {weight.type} experts, which have no scale"
        elif not weight.symmetric:
            found[name] = "transformers ignores the zero points of experts"
        elif first not in found and arguments(plan) != arguments(plans[first]):
            found[name] = (
                f"its scheme differs from that of {first!r}, but transformers reads all experts with one scheme"
            )
    return found


def obstacle(plan: LayerPlan) -> str | None:
    """Return the part of a layer's plan that compressed-tensors cannot express; None if it can express all of it."""
    weight, inputs = plan.config.weight_quant, plan.config.input_quant
    if not isinstance(plan.transform, Identity):
        stored = plan.transform.tensors(plan.in_features, plan.row_groups)
        return f"its input is transformed at run time ({', '.join(stored) or plan.transform.type})"
    if any(plan.dual):
        return "its inputs have a second scale for negative values"
    if len(plan.input_segments) > 1 and inputs is not None and inputs.format.has_scale:
        return "its input segments have separate scales"
    if len(set(plan.columns)) > 1:
        return f"its groups of columns differ in size ({plan.columns[0]} and {plan.columns[-1]})"
    if weight.format.has_scale and weight.type not in _TYPES:
        return f"{weight.type} weights are not supported, only {', '.join(_TYPES)}"
    if inputs is not None and (inputs.type not in _TYPES or not weight.format.has_scale):
        return f"{inputs.type} inputs are not supported with {weight.type} weights"
    return None


def arguments(plan: LayerPlan) -> dict[str, Any]:
    """Return the config group of such layers, without the storage format."""
    weight, inputs = plan.config.weight_quant, plan.config.input_quant
    grouped = len(plan.columns) > 1 or plan.columns[0] == plan.config.group_size
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


def _scheme(plan: LayerPlan, alone: bool) -> str:
    """Return the config group of such layers, as JSON."""
    return json.dumps({**arguments(plan), "format": storage(plan, alone)})


def _number(form: NumberFormat) -> dict[str, Any]:
    return {"num_bits": form.bits, "type": _TYPES[form.name]}


def storage(plan: LayerPlan, alone: bool) -> str:
    """Return the name of the storage format of a layer's codes.

    transformers cannot hold packed zero points (llm-compressor's issue 1618). The workaround, dequantizing on load,
    needs one scheme for all layers. If there are other schemes, such layers are stored with one byte per code.

    Args:
        plan: plan of the layer.
        alone: whether all layers except experts share one scheme.
    """
    quant = plan.config.weight_quant
    if plan.config.input_quant is not None:
        return "int-quantized" if quant.format.is_integer else "float-quantized"
    return "pack-quantized" if quant.format.is_integer and (alone or quant.symmetric) else "naive-quantized"


def layer_tensors(
    layer: QuantLinear, storage: str, dtype: torch.dtype, rows: slice | Tensor = slice(None)
) -> dict[str, Tensor]:
    """Return the tensors of a layer that passes :func:`obstacle`, by the names they are stored under.

    Args:
        layer: a layer of the model.
        storage: see :func:`storage`.
        dtype: dtype of a weight that is a float without a scale.
        rows: which of its outputs to store, for a layer without a bias.
    """
    form, codes, grid = layer.format, layer.codes(rows), layer.grid(rows)
    bias = {} if layer.bias is None else {"bias": layer.bias.detach()}
    if grid.scale is None:  # just a cast: store a float weight like any other
        return {"weight": form.values(codes).to(dtype), **bias}
    zero_point = grid.zero_point
    if storage == "pack-quantized":
        shape = torch.tensor(codes.shape)
        stored = {"weight_packed": to_words(codes, form), "weight_shape": shape}
        if zero_point is not None:
            # Packed along the rows: an int32 holds several codes of one column.
            zero_point = to_words(zero_point.T, form).T
    else:
        # FP8 codes are unsigned bytes; store the floats that they represent.
        stored = {"weight": codes if form.is_integer else form.values(codes).to(torch.float8_e4m3fn)}
    stored["weight_scale"] = grid.scale
    if zero_point is not None:
        stored["weight_zero_point"] = zero_point
    if layer.plan.static_input:
        stored["input_scale"] = layer.get_buffer("input_scale")
    return {name: tensor.contiguous() for name, tensor in {**stored, **bias}.items()}


def quantization_config(
    model: nn.Module, groups: Mapping[str, list[str]], experts: str | None = None, linears: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the quantization section of config.json.

    Args:
        model: the model with its quantized linears.
        groups: scheme as JSON -> names of its layers.
        experts: the scheme of experts; None if there are none.
        linears: linears of experts, by their names in the checkpoint.
    """
    prefix = getattr(model, "base_model_prefix", "")
    quantized = {name for names in groups.values() for name in names}
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in quantized]
    # Experts first: transformers takes the first group whose patterns contain "experts" as the one for all experts.
    targets = {} if experts is None else {experts: _patterns_of_experts(linears, prefix)}
    for scheme, names in groups.items():
        targets.setdefault(scheme, []).extend(_pattern(name, prefix) for name in names)
    several = len(groups) > 1
    config_groups = {}
    for i, (scheme, names) in enumerate(targets.items()):
        all_linears = len(targets) == 1 or (scheme != experts and not several)
        config_groups[f"group_{i}"] = {"targets": ["Linear"] if all_linears else names, **json.loads(scheme)}
    formats = {found["format"] for found in config_groups.values()}
    of_linears = {json.loads(scheme)["format"] for scheme in groups}
    # By default, transformers keeps packed layers packed until the first forward. But it cannot hold packed zero
    # points, and many models initialize a `weight` that packed layers lack. Dequantizing on load avoids both, but
    # applies one scheme to all linears.
    loading = {"dequantize": True} if of_linears <= {"pack-quantized"} and not several else {}
    return {
        **loading,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision",
        "config_groups": config_groups,
        "ignore": [_pattern(name, prefix) for name in [*left, *_routers(model)]],
    }


def _routers(model: nn.Module) -> list[str]:
    """Return the checkpoint names of modules that multiply with their own matrix but are not linears.

    Routers are an example; other programs use linears in their place.
    """
    found = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and not isinstance(module, (nn.Linear, nn.Embedding, QuantLayer)):
            found[f"{name}.weight"] = weight.to("meta")
    return [name.removesuffix(".weight") for name in stored_names(model, found)]


def _patterns_of_experts(names: Sequence[str], prefix: str) -> list[str]:
    """Return patterns that match linears of experts by name, one pattern for all experts of a layer.

    The patterns match anything after an expert's number: vLLM asks for the scheme of ``gate_proj`` where the checkpoint
    has ``w1``.
    """
    layers = dict.fromkeys(re.sub(r"(.*)\.\d+\..*", r"\1", name) for name in names)
    return [_pattern(layer, prefix, r"\.\d+\..*") for layer in layers]


def _pattern(name: str, prefix: str, end: str = "") -> str:
    """Return a pattern for a layer's name; it also matches in the base model on its own (AutoModel), if there is one.

    Args:
        name: name of the layer.
        prefix: prefix of the base model.
        end: a regular expression for what follows the name.
    """
    start = f"{prefix}."
    if prefix and name.startswith(start):
        return f"re:({re.escape(start)})?{re.escape(name.removeprefix(start))}{end}$"
    return f"re:{re.escape(name)}{end}$" if end else name
