"""How the libraries' classes store and run experts that they fuse into 3-D parameters.

Most transformers classes declare their layout (``use_experts_implementation``): whether there is a gate, and which
dimension comes first. The others are listed in :data:`LAYOUTS`. Classes whose experts are plain linears (diffusers'
HiDream) need nothing.

Still, most checkpoints have one linear per expert: transformers fuses them on load and splits them on save
(:func:`stored_linears`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfquant.experts import Experts, ExpertsLayout, route_all, route_sorted, route_tokens
from hfquant.integrations.compat import apply_gate, declares_experts, published_names


def _declared(experts: Any, number: int, rows: Tensor) -> Tensor:
    """Run one expert of a transformers class that declares its layout."""
    if experts.has_gate:
        hidden = apply_gate(experts.original, experts, experts.project("gate_up_proj", number, rows))
    else:
        hidden = experts.act_fn(experts.project("up_proj", number, rows))
    out: Tensor = experts.project("down_proj", number, hidden)
    return experts.post_expert_norm(out) if experts.has_post_expert_norm else out


def _own_gate(experts: Experts, number: int, rows: Tensor) -> Tensor:
    """Run one expert of a class that has its own gate function."""
    gated = apply_gate(experts.original, experts, experts.project("gate_up_proj", number, rows))
    return experts.project("down_proj", number, gated)


def _act_fn(experts: Any, number: int, rows: Tensor) -> Tensor:
    """Compute ``down(up * act_fn(gate))``."""
    gate, up = experts.project("gate_up_proj", number, rows).chunk(2, dim=-1)
    out: Tensor = experts.project("down_proj", number, up * experts.act_fn(gate))
    return out


def _silu(experts: Experts, number: int, rows: Tensor) -> Tensor:
    """Compute ``down(silu(gate) * up)``."""
    gate, up = experts.project("gate_up_proj", number, rows).chunk(2, dim=-1)
    return experts.project("down_proj", number, F.silu(gate) * up)


def _one_matrix(experts: Experts, number: int, rows: Tensor) -> Tensor:
    return experts.project("weight", number, rows)


_GATED = ("gate_up_proj", "down_proj")

#: (package, class) -> its layout, for classes that do not declare one.
LAYOUTS: dict[tuple[str, str], ExpertsLayout] = {
    ("transformers", "JetMoeParallelExperts"): ExpertsLayout(("weight",), route_sorted, _one_matrix),
    ("transformers", "Llama4TextExperts"): ExpertsLayout(_GATED, route_all, _act_fn, transposed=True),
    ("transformers", "Step3p7Experts"): ExpertsLayout(_GATED, route_tokens, _own_gate),
    ("diffusers", "SwiGLUExperts"): ExpertsLayout(_GATED, route_sorted, _silu, transposed=True),
}


def experts_of(model: nn.Module) -> dict[str, ExpertsLayout]:
    """Return, by name, the layout of each module of fused experts in ``model``."""
    found = ((name, layout_of(module)) for name, module in model.named_modules())
    return {name: layout for name, layout in found if layout is not None}


def layout_of(module: Any) -> ExpertsLayout | None:
    """Return the layout of a float module's experts; None if it has no fused experts, or the layout is unknown."""
    kind = type(module)
    if declares_experts(module):
        projections = _GATED if module.has_gate else ("up_proj", "down_proj")
        return ExpertsLayout(projections, route_tokens, _declared, module.is_transposed)
    return LAYOUTS.get((kind.__module__.partition(".")[0], kind.__name__))


def holds_experts(model: nn.Module, name: str) -> bool:
    """Return whether a plan entry is an expert parameter rather than a layer."""
    parent, _, own = name.rpartition(".")
    return own in model.get_submodule(parent)._parameters


class StoredLinear(NamedTuple):
    """A linear of a published checkpoint that is part of a 3-D parameter in the model.

    Attributes:
        name: name in the checkpoint.
        expert: number of its expert.
        rows: rows of that expert's matrix [out, in] that it holds, in its order.
    """

    name: str
    expert: int
    rows: Tensor


def stored_linears(
    model: Any, layouts: Mapping[str, ExpertsLayout], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, list[StoredLinear]]:
    """Return the linears that expert parameters become in published checkpoints; none if these keep experts fused.

    The result comes from transformers itself: row numbers go through its conversion in place of weights.

    Args:
        model: a transformers model.
        layouts: layouts of its expert modules, by name.
        sizes: name of a parameter -> number of its experts, and number of rows (outputs) of each.
    """
    numbers: dict[str, Tensor] = {}
    starts: list[int] = []
    total = 0
    for parameter, (experts, rows) in sizes.items():
        index = torch.arange(total, total + experts * rows, dtype=torch.int32).view(experts, rows, 1)
        transposed = layouts[parameter.rpartition(".")[0]].transposed
        numbers[parameter] = index.transpose(1, 2) if transposed else index
        starts.append(total)
        total += experts * rows
    parameters = list(sizes)
    found: dict[str, list[StoredLinear]] = {parameter: [] for parameter in parameters}
    for name, index in published_names(model, numbers).items():
        if name.endswith(".weight") and index.dim() == 2 and index.shape[1] == 1:
            which = bisect_right(starts, int(index[0, 0])) - 1
            rows, own = sizes[parameters[which]][1], index[:, 0].long() - starts[which]
            linear = StoredLinear(name.removesuffix(".weight"), int(own[0]) // rows, own % rows)
            found[parameters[which]].append(linear)
    return found
