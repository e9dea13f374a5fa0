"""Export INT4 SVDQuant as loaded by diffusers' "nunchaku_lite".

``Y = (Q(X / s) Q(R)^T) + (X down^T) up^T + bias`` with codes of R in groups of 64 along the input, as in hfquant. The
kernels quantize activations themselves, to INT4 with one scale per token and 64 channels.

Tensors are stored in the order in which the 32 lanes of a warp load them as operands of the tensor cores' ``mma``
instructions (PTX ISA, "Matrix Fragments for mma.m16n8k64" and "mma.m16n8k16"), in tiles of 128 output channels.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from torch.nn.functional import pad

from hfquant.exporters.checkpoint import Converted, must_be_of, refuse
from hfquant.exporters.requantize import no_linear, plain, requantized
from hfquant.formats import NumberFormat
from hfquant.layer_plan import LayerPlan
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import quant_experts, quant_layers

#: The only format of its SVDQuant weights and activations, and their group size.
_FORMAT, _GROUP = "int4", 64
#: Channels per tile; both dimensions of a weight must be multiples.
_TILE = 128
#: The rank must be a multiple of this.
_RANK = 16


def convert(model: Any, requantize: bool) -> Converted:
    """Convert the quantized linears of ``model`` (diffusers) to the layout of nunchaku's kernels.

    All get the rank of the largest low-rank branch; smaller branches, and layers without one, are padded with zeros.

    Raises:
        ExportError: the model is from another library, or some layers cannot be expressed.
    """
    must_be_of(model, "diffusers", "nunchaku-lite")
    layers, problems = quant_layers(model), {}
    for name, layer in layers.items():
        why = obstacle(layer.plan)
        if why and requantize:
            why = obstacle(_grouped(layer.plan))
        if why := no_linear(layer) or why:
            problems[name] = why
    fused = "it is not a linear but fused experts"
    problems |= dict.fromkeys(quant_experts(model), fused)
    refuse(problems, "nunchaku-lite", requantize)
    dtype = model.dtype if model.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    rank = max(_RANK, *(-(-_rank(layer.plan) // _RANK) * _RANK for layer in layers.values()))
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        assert isinstance(layer, QuantLinear)
        with align_module_device(layer):
            if obstacle(layer.plan):
                layer = requantized(name, layer, _grouped(layer.plan))
            tensors |= {f"{name}.{key}": t.cpu() for key, t in layer_tensors(layer, rank, dtype).items()}
    section = {"precision": _FORMAT, "group_size": _GROUP, "rank": rank, "targets": list(layers)}
    compute_dtype = str(dtype).removeprefix("torch.")
    return Converted(tensors, {"quant_method": "nunchaku_lite", "compute_dtype": compute_dtype, "svdq_w4a4": section})


def obstacle(plan: LayerPlan) -> str | None:
    """Return what keeps a layer from running on nunchaku's kernels; None if nothing does."""
    weight, inputs = plan.config.weight_quant, plan.config.input_quant
    if inputs is None or inputs.type != _FORMAT or not inputs.dynamic:
        return f"its inputs are not dynamic {_FORMAT}"
    if weight.type != _FORMAT or not weight.symmetric or set(plan.columns) != {_GROUP}:
        return f"its weights are not symmetric {_FORMAT} in groups of {_GROUP}"
    if plan.in_features % _TILE or plan.out_features % _TILE:
        return f"its sizes are not multiples of {_TILE} ({plan.in_features} x {plan.out_features})"
    if plan.transform.rotation:
        return "its inputs are rotated at run time"
    if len(plan.row_groups) > 1:
        return "its output segments have separate transforms (seglinear: False gives them a single one)"
    return None


def _grouped(plan: LayerPlan) -> LayerPlan:
    """Return a plain plan with weights in the kernels' format; the number format of the inputs does not change."""
    plan = plain(plan)
    weight = plan.config.weight_quant.model_copy(update={"group_size": _GROUP, "symmetric": True})
    return LayerPlan(
        plan.config.model_copy(update={"weight_quant": weight}),
        *(plan.in_features, plan.out_features, plan.input_segments, plan.output_segments, plan.dual),
    )


def _rank(plan: LayerPlan) -> int:
    spec = plan.transform.tensors(plan.in_features, plan.row_groups)
    return spec["svd_up"].shape[1] if "svd_up" in spec else 0


def layer_tensors(layer: QuantLinear, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a layer that passes :func:`obstacle`, by their names in diffusers' module.

    Args:
        layer: its dimensions are multiples of 128.
        rank: rank of the low-rank branch, a multiple of 16 and at least that of the layer's own branch.
        dtype: dtype of everything but the codes, float16 or bfloat16.
    """
    transform, buffers = layer.plan.transform, layer._buffers
    scale = layer.grid().scale
    assert scale is not None
    divisor = transform.divisor(buffers, 0)
    down, up = transform.branch(buffers, 0, slice(None)) or (scale.new_zeros(0, layer.in_features), scale[:, :0])
    missing = rank - len(down)
    tensors = {
        "qweight": fragments_of_codes(layer.codes(), layer.format),
        "wscales": fragments_of_scales(scale.to(dtype)),
        "smooth_factor": fragments_of_vector(
            torch.ones(layer.in_features, dtype=dtype) if divisor is None else divisor.to(dtype)
        ),
        "proj_down": fragments_of_matrix(pad(down.to(dtype), (0, 0, 0, missing)), channels=1),
        "proj_up": fragments_of_matrix(pad(up.to(dtype), (0, missing)), channels=0),
    }
    if layer.bias is not None:
        tensors["bias"] = fragments_of_vector(layer.bias.detach().to(dtype))
    return tensors


def fragments_of_codes(codes: Tensor, form: NumberFormat) -> Tensor:
    """Return INT4 codes [out, in] as int8 [out, in / 2]: operands of two adjacent ``m16n8k64``, 16 bytes per lane.

    A tile is 128 rows by 64 columns, in 8 strips of 16 rows. Lane ``4 r + c`` of a strip holds, of rows r and r + 8,
    the columns 8 c to 8 c + 7 and the same columns plus 32.
    """
    rows, columns = codes.shape
    tiles = codes.view(rows // _TILE, 8, 2, 8, columns // 64, 2, 4, 8)
    # tile of rows, strip, half of strip, r | tile of columns, half of tile, c, element
    lanes = tiles.permute(0, 4, 1, 3, 6, 2, 5, 7).contiguous()
    return form.pack(lanes).view(rows, columns // 2)


def fragments_of_scales(scale: Tensor) -> Tensor:
    """Return scales [out, G] as [G, out] (nominally: the actual order is tile, group, lane).

    Lane ``4 s + c`` holds the four channels that it accumulates: 16 s + 2 c, the next one, and both plus 8.
    """
    rows, groups = scale.shape
    tiles = scale.view(rows // _TILE, 8, 2, 4, 2, groups)
    return tiles.permute(0, 5, 1, 3, 2, 4).contiguous().view(groups, rows)


def fragments_of_vector(values: Tensor) -> Tensor:
    """Return one value per channel in the order of :func:`fragments_of_scales`."""
    return fragments_of_scales(values[:, None]).view(-1)


def fragments_of_matrix(factor: Tensor, channels: int) -> Tensor:
    """Return a low-rank factor as [channels, rank]: operands of two adjacent ``m16n8k16``, 8 numbers per lane.

    A fragment is 16 by 16. Lane ``4 r + c`` holds, of rows r and r + 8, the columns 2 c and 2 c + 1 and the same
    columns plus 8.

    Args:
        factor: ``down`` [rank, in] or ``up`` [out, rank].
        channels: the dimension that is not the rank; fragments are ordered along the rank first.
    """
    rows, columns = factor.shape
    fragments = factor.view(rows // 16, 2, 8, columns // 16, 2, 4, 2)
    order = (0, 3) if channels == 0 else (3, 0)
    return fragments.permute(*order, 2, 5, 1, 4, 6).contiguous().view(factor.shape[channels], -1)
