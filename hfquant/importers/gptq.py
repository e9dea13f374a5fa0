"""Checkpoints of GPTQ (AutoGPTQ, GPTQModel).

Of each linear: ``qweight`` int32 [in b / 32, out], words along the input; ``qzeros`` int32 [G, out b / 32], words along
the output; ``scales`` [G, out]; ``g_idx`` int32 [in], each column's group. ``checkpoint_format`` "gptq" stores zero
points minus 1, "gptq_v2" as they are.
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

#: ``checkpoint_format`` -> what its stored zero points lack.
_ZERO_OFFSET = {"gptq": 1, "gptq_v2": 0}
_KEYS = {"qweight": torch.int32, "qzeros": torch.int32, "scales": None}


def take_layers(section: Mapping[str, Any], tensors: dict[str, Tensor]) -> Iterator[tuple[str, ImportedLayer]]:
    """Take the tensors of quantized linears out of ``tensors``, and yield the linears with their names.

    Args:
        section: the checkpoint's quantization config.
        tensors: of the whole checkpoint.

    Raises:
        CheckpointError: what the checkpoint holds is not known, not complete, or cannot be held exactly.
    """
    form = number_format(section.get("bits"))
    group = group_size(section.get("group_size"))
    convention = str(option(section, "checkpoint_format", "format", default="gptq")).lower()
    if convention not in _ZERO_OFFSET:
        raise CheckpointError(f"GPTQ's checkpoint_format {convention!r} is none of {', '.join(_ZERO_OFFSET)}")
    if option(section, "pack_dtype", default="int32") != "int32":
        raise CheckpointError(f"GPTQ's pack_dtype is {section['pack_dtype']!r}, not 'int32'")
    # Patterns that start with "-:" leave layers out, the others change their bits or groups.
    if other := [p for p in section.get("dynamic") or () if not str(p).startswith("-")]:
        raise CheckpointError(f"GPTQ's dynamic overrides some layers ({other[0]!r}): only one setting for all is read")
    # One code of so many more in each place of a word; GPTQModel adds to whole words as well, carries included.
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
