"""A quantized linear from another program's checkpoint, in hfquant's conventions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfquant.formats import FORMATS, Grid, NumberFormat, expand_columns, split_columns
from hfquant.formats.int32_words import from_words
from hfquant.integrations.checkpoint import CheckpointError


class LayerKind(NamedTuple):
    """The kind of a layer: everything but its tensors.

    Attributes:
        shape: shape of the weight, [out, in].
        weight_quant: the config section of such a layer, as pairs.
    """

    shape: tuple[int, ...]
    weight_quant: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class ImportedLayer:
    """``W = (codes - zero_point) * scale``, with one scale per group of input channels.

    Attributes:
        bits: 4 or 8.
        group: input channels that share a scale; the last group may have fewer. None: one scale per row.
        codes: [out, in] int8, signed.
        scale: [out, G], any float dtype.
        zero_point: [out, G] int8, signed; None if all are 0.
    """

    bits: int
    group: int | None
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @property
    def form(self) -> NumberFormat:
        """The number format of the codes."""
        return number_format(self.bits)

    def kind(self) -> LayerKind:
        """Return what a plan needs to know about the layer."""
        section = {"type": self.form.name, "symmetric": self.zero_point is None, "axis": -1}
        section |= {"group_size": self.group, "scale": "float32"}
        return LayerKind(tuple(self.codes.shape), tuple(section.items()))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors as stored in hfquant checkpoints."""
        columns = split_columns((self.codes.shape[1],), self.group)
        grid = Grid(self.form, columns, self.scale.float(), self.zero_point)
        return {"weight": self.form.pack(self.codes).unsqueeze(0).contiguous(), **grid.tensors()}


def number_format(bits: Any) -> NumberFormat:
    """Return the integer format of the given bit width.

    Raises:
        CheckpointError: this bit width cannot be imported.
    """
    if bits not in (4, 8):
        raise CheckpointError(f"weights of {bits!r} bits cannot be imported, only 4 and 8")
    return FORMATS[f"int{bits}"]


def checked(name: str, layer: ImportedLayer) -> ImportedLayer:
    """Return the layer with nonzero float32 scales, and without zero points if all of them are 0.

    Raises:
        CheckpointError: shapes do not match, or a scale is negative or not finite.
    """
    rows, columns = layer.codes.shape
    sizes = split_columns((columns,), layer.group)
    for what, tensor in (("scales", layer.scale), ("zero points", layer.zero_point)):
        if tensor is not None and tuple(tensor.shape) != (rows, len(sizes)):
            raise CheckpointError(
                f"layer {name!r}: expected {what} of shape {(rows, len(sizes))}, got {tuple(tensor.shape)}"
            )
    scale, zero_point = layer.scale.float(), layer.zero_point
    if not (scale.isfinite() & (scale >= 0)).all():
        raise CheckpointError(f"layer {name!r}: scales must be finite and positive")
    codes, nothing = layer.codes, scale == 0
    if nothing.any():
        # The scale was lost in half precision: the weights are 0, whatever the codes.
        zeros = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point
        codes = torch.where(expand_columns(nothing, sizes), expand_columns(zeros, sizes), codes)
        scale = torch.where(nothing, torch.ones_like(scale), scale)
    if zero_point is not None and not zero_point.any():
        zero_point = None
    return ImportedLayer(layer.bits, layer.group, codes, scale, zero_point)


def in_order(name: str, groups: Tensor, group: int | None, values: Tensor) -> Tensor:
    """Return scales or zero points in the order of the columns.

    With act_order, GPTQ may quantize groups in a different order than the columns', or form groups from columns all
    over the row. The latter are not supported here.

    Args:
        name: name of the layer.
        groups: ``g_idx``, the group number of each column, [in].
        group: columns per group; None for a single group.
        values: [out, G].

    Raises:
        CheckpointError: the columns of a group are not contiguous.
    """
    size = group or len(groups)
    order = groups[::size].long()
    if not torch.equal(order.repeat_interleave(size)[: len(groups)], groups.long()):
        raise CheckpointError(
            f"layer {name!r}: act_order (desc_act) made groups of non-adjacent columns (g_idx), which cannot be "
            "represented exactly: use a checkpoint quantized with desc_act=False"
        )
    if order.min() < 0 or order.max() >= values.shape[1]:
        raise CheckpointError(f"layer {name!r}: g_idx names groups that have no scale")
    return values[:, order]


def take(tensors: dict[str, Tensor], name: str, keys: Mapping[str, torch.dtype | None]) -> dict[str, Tensor]:
    """Remove a layer's tensors from those of a checkpoint and return them.

    Args:
        tensors: tensors of the checkpoint, by full name.
        name: name of the layer.
        keys: names of its tensors with their dtypes; None for any float.

    Raises:
        CheckpointError: a tensor is missing or has another dtype.
    """
    found = {}
    for key, dtype in keys.items():
        tensor = tensors.pop(f"{name}.{key}", None)
        if tensor is None:
            raise CheckpointError(f"the checkpoint lacks {name}.{key}")
        if not (tensor.is_floating_point() if dtype is None else tensor.dtype == dtype):
            raise CheckpointError(f"{name}.{key}: expected {dtype or 'floats'}, got {tensor.dtype}")
        found[key] = tensor
    return found


def words(name: str, tensor: Tensor, form: NumberFormat, columns: int) -> Tensor:
    """Return signed codes [rows, columns] from int32 words [rows, ...]; see :mod:`hfquant.formats.int32_words`.

    Raises:
        CheckpointError: the tensor, called ``name``, is too wide or too narrow.
    """
    try:
        return from_words(tensor, form, columns)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None


def option(section: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """Return an option of a quantization config under the first of several spellings that is set."""
    return next((section[name] for name in names if section.get(name) is not None), default)


def group_size(value: Any) -> int | None:
    """Return the group size of a config, in which -1 means one group per row.

    Raises:
        CheckpointError: it is not a positive number.
    """
    if value == -1:
        return None
    if type(value) is not int or value < 1:
        raise CheckpointError(f"group_size={value!r} in the checkpoint's quantization config is not a valid group size")
    return value
