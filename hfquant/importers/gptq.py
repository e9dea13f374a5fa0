"""GPTQ checkpoints (AutoGPTQ, GPTQModel).

Each linear has ``qweight`` int32 [in b / 32, out] for b bits, with words along the input; ``qzeros`` int32
[G, out b / 32], with words along the output; ``scales`` [G, out]; ``g_idx`` int32 [in], the group of each column.
``checkpoint_format`` "gptq" stores zero points minus 1; "gptq_v2" stores them unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hfquant.importers.layers import (
    ImportedLayer,
    checked,
    group_size,
    in_order,
    number_format,
    option,
    take,
    words,
)
from hfquant.integrations.checkpoint import CheckpointError

#: ``checkpoint_format`` -> what to add to its stored zero points.
_ZERO_OFFSET = {"gptq": 1, "gptq_v2": 0}
_KEYS = {"qweight": torch.int32, "qzeros": torch.int32, "scales": None}


def take_layers(section: Mapping[str, Any], tensors: dict[str, Tensor]) -> Iterator[tuple[str, ImportedLayer]]:
    """Take the tensors of quantized linears out of ``tensors``, and yield the linears with their names.

    Args:
        section: the checkpoint's quantization config.
        tensors: tensors of the whole checkpoint.

    Raises:
        CheckpointError: the checkpoint's content is unrecognized, incomplete, or cannot be represented exactly.
    """
    form = number_format(section.get("bits"))
    group = group_size(section.get("group_size"))
    convention = str(option(section, "checkpoint_format", "format", default="gptq")).lower()
    if convention not in _ZERO_OFFSET:
        raise CheckpointError(f"GPTQ's checkpoint_format {convention!r} is not one of {', '.join(_ZERO_OFFSET)}")
    if option(section, "pack_dtype", default="int32") != "int32":
        raise CheckpointError(f"GPTQ's pack_dtype is {section['pack_dtype']!r}, not 'int32'")
    # Patterns that start with "-:" exclude layers; the others change the bits or groups of layers.
    if other := [p for p in section.get("dynamic") or () if not str(p).startswith("-")]:
        raise CheckpointError(
            f"GPTQ's dynamic overrides the settings of some layers ({other[0]!r}): only one setting for all layers "
            "can be imported"
        )
    # The offset in every position of a word; like GPTQModel, add it to whole words, carries included.
    offset = _ZERO_OFFSET[convention] * sum(1 << shift for shift in range(0, 32, form.bits))
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        found = take(tensors, name, _KEYS)
        columns, rows = found["qweight"].shape[0] * 32 // form.bits, found["scales"].shape[-1]
        codes = words(f"{name}.qweight", found["qweight"].T, form, columns)
        scale = found["scales"].T
        zero_point = words(f"{name}.qzeros", found["qzeros"] + offset, form, rows).T
        if (groups := tensors.pop(f"{name}.g_idx", None)) is not None:
            scale, zero_point = (in_order(name, groups, group, values) for values in (scale, zero_point))
        yield name, checked(name, ImportedLayer(form.bits, group, codes, scale, zero_point))
