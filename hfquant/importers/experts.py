"""Mixtures of experts from checkpoints with one linear per expert, stacked as hfquant's fused experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfquant.formats import FORMATS
from hfquant.importers.layers import LayerKind
from hfquant.integrations.checkpoint import CheckpointError
from hfquant.integrations.experts import StoredLinear, experts_of, stored_linears
from hfquant.nn.experts import tensor_name


def expert_sizes(model: Any) -> dict[str, tuple[int, int, int]]:
    """Return (experts, outputs, inputs) of each expert parameter in a float model, by name."""
    found = {}
    for name, layout in experts_of(model).items():
        for projection in layout.projections:
            experts, *matrix = model.get_submodule(name).get_parameter(projection).shape
            rows, columns = matrix[::-1] if layout.transposed else matrix
            found[f"{name}.{projection}".lstrip(".")] = (experts, rows, columns)
    return found


def fuse(model: Any, kinds: dict[str, LayerKind], tensors: dict[str, Tensor]) -> dict[str, LayerKind]:
    """Replace the linears of experts with their form in hfquant checkpoints.

    Args:
        model: a float transformers model, possibly on the meta device.
        kinds: kinds of the imported linears, by their names in the checkpoint; those of experts are removed.
        tensors: tensors of the imported linears, as in hfquant checkpoints; modified accordingly.

    Returns:
        Name of an expert parameter -> the kind of each of its matrices.

    Raises:
        CheckpointError: some experts of a parameter are missing, or they are of different kinds.
    """
    sizes = expert_sizes(model)
    found = {}
    stored = stored_linears(model, experts_of(model), {name: size[:2] for name, size in sizes.items()})
    for parameter, linears in stored.items():
        if any(linear.name in kinds for linear in linears):
            kind = _common_kind(parameter, sizes[parameter], linears, kinds)
            found[parameter] = kind
            owner, _, projection = parameter.rpartition(".")
            for key, tensor in _stacked(sizes[parameter][0], linears, kind, tensors).items():
                tensors[f"{owner}.{tensor_name(projection, key)}"] = tensor
    return found


def _common_kind(
    parameter: str, size: tuple[int, int, int], linears: Sequence[StoredLinear], kinds: dict[str, LayerKind]
) -> LayerKind:
    """Remove the kinds of a parameter's linears and return the common one, with zero points if any linear has them."""
    sections: dict[str, dict[str, Any]] = {}
    for linear in linears:
        kind = kinds.pop(linear.name, None)
        if kind is None:
            raise CheckpointError(
                f"experts {parameter!r}: {linear.name!r} is not quantized, but others are; "
                "the experts of one parameter must have the same format"
            )
        if kind.shape != (len(linear.rows), size[2]):
            raise CheckpointError(
                f"layer {linear.name!r}: expected {size[2]} inputs and {len(linear.rows)} outputs, "
                f"got {kind.shape[1]} and {kind.shape[0]}"
            )
        sections[linear.name] = dict(kind.weight_quant)
    symmetric = all(section["symmetric"] for section in sections.values())
    first = sections[linears[0].name] | {"symmetric": symmetric}
    for name, section in sections.items():
        if section | {"symmetric": symmetric} != first:
            raise CheckpointError(
                f"experts {parameter!r}: {name!r} and {linears[0].name!r} have different formats; "
                "the experts of one parameter must have the same format"
            )
    return LayerKind(size[1:], tuple(first.items()))


def _stacked(
    experts: int, linears: Sequence[StoredLinear], kind: LayerKind, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Take the tensors of a parameter's linears and return them joined, [experts, out, ...]; codes get a leading 1."""
    section = dict(kind.weight_quant)
    keys = ["weight", "weight_scale"] + ([] if section["symmetric"] else ["weight_zero_point"])
    joined: dict[str, Tensor] = {}
    for linear in linears:
        taken = {key: tensors.pop(f"{linear.name}.{key}", None) for key in keys}
        for key, tensor in taken.items():
            if tensor is None:  # zero points that are all 0
                scale = taken["weight_scale"]
                assert scale is not None
                tensor = FORMATS[section["type"]].pack(torch.zeros_like(scale, dtype=torch.int8))
            tensor = tensor.view(tensor.shape[-2:])
            shape = (experts, kind.shape[0], tensor.shape[-1])
            joined.setdefault(key, tensor.new_empty(shape))[linear.expert, linear.rows] = tensor
    return joined | {"weight": joined["weight"].unsqueeze(0)}
