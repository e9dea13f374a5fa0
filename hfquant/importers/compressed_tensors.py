"""compressed-tensors checkpoints (llm-compressor) in the "pack-quantized" format.

Each linear has ``weight_packed`` int32 [out, in b / 32] for b bits, ``weight_scale`` [out, G] or [1], ``weight_shape``
and, if asymmetric, ``weight_zero_point`` int32 [out b / 32, G] with words along the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hfquant.importers.layers import ImportedLayer, checked, in_order, number_format, take, words
from hfquant.integrations.checkpoint import CheckpointError

FORMAT = "pack-quantized"
_KEYS = {"weight_packed": torch.int32, "weight_scale": None, "weight_shape": torch.int64}


def take_layers(section: Mapping[str, Any], tensors: dict[str, Tensor]) -> Iterator[tuple[str, ImportedLayer]]:
    """Take the tensors of quantized linears out of ``tensors``, and yield the linears with their names.

    Args:
        section: the checkpoint's quantization config.
        tensors: tensors of the whole checkpoint.

    Raises:
        CheckpointError: the checkpoint's content is unrecognized or incomplete.
    """
    forms = [number_format(bits) for bits in sorted(_bits(section))]
    for name in [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]:
        found = take(tensors, name, _KEYS)
        packed, scale = found["weight_packed"], found["weight_scale"]
        if packed.dim() != 2 or found["weight_shape"].shape != (2,):
            raise CheckpointError(f"layer {name!r}: expected a matrix, got weight_packed {tuple(packed.shape)}")
        rows, columns = found["weight_shape"].tolist()
        form = next((form for form in forms if packed.shape[1] == -(-columns * form.bits // 32)), forms[0])
        if scale.numel() == 1:
            scale = scale.reshape(1, 1).expand(rows, 1)
        groups = scale.shape[-1]
        if scale.dim() != 2 or columns % groups:
            raise CheckpointError(f"layer {name!r}: weight_scale {tuple(scale.shape)} does not fit {columns} columns")
        codes = words(f"{name}.weight_packed", packed, form, columns)
        zero_point = tensors.pop(f"{name}.weight_zero_point", None)
        if zero_point is not None:
            zero_point = words(f"{name}.weight_zero_point", zero_point.T, form, rows).T
        group = None if groups == 1 else columns // groups
        if (index := tensors.pop(f"{name}.weight_g_idx", None)) is not None:
            scale = in_order(name, index, group, scale)
            zero_point = None if zero_point is None else in_order(name, index, group, zero_point)
        yield name, checked(name, ImportedLayer(form.bits, group, codes, scale, zero_point))


def _bits(section: Mapping[str, Any]) -> set[Any]:
    """Return the bit widths of the config groups, all of which must be weight-only."""
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError("the checkpoint's quantization config has no config_groups")
    found = set()
    for key, group in groups.items():
        stored = group.get("format") or section.get("format")
        if stored != FORMAT:
            raise CheckpointError(f"compressed-tensors' format {stored!r} ({key}) cannot be imported, only {FORMAT!r}")
        if group.get("input_activations") or group.get("output_activations"):
            raise CheckpointError(f"compressed-tensors' {key} quantizes activations: only weights can be imported")
        found.add((group.get("weights") or {}).get("num_bits"))
    return found
