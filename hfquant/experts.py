"""Mixtures of experts that store their weights in 3-D parameters, one matrix per expert, unfused for quantization.

:func:`unfused` replaces each of them with an :class:`UnfusedExperts`, whose children are plain linears that share the
storage of the slices: ``experts.gate_up_proj.3`` belongs to expert 3. To the plan, the statistics and the solver, an
expert is a linear like any other and sees only its own rows. Once all are solved, they are stacked again
(:class:`hfquant.nn.experts.QuantExperts`).

An :class:`ExpertsLayout` describes how the experts of a class are stored and run. Its two functions only use
:meth:`Experts.project`, so they work for both float and quantized experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.config import ConfigError
from hfquant.dataflow import LinearTrace
from hfquant.dataflow.twin import shapes_only
from hfquant.offload import fetches_weights, forget_hook
from hfquant.replacing import replace_modules


@dataclass(frozen=True)
class ExpertsLayout:
    """How a class stores and runs its experts.

    Attributes:
        projections: names of the 3-D parameters; ``name + "_bias"``, [experts, out], is the bias of ``name``.
        route: the ``forward``: given an :class:`Experts` and the arguments, routes rows to experts and combines their
            outputs.
        expert: given an :class:`Experts`, an expert's index and rows [n, in], returns its output [n, out].
        transposed: whether parameters are [experts, in, out] rather than [experts, out, in], the order of a linear's
            weight.
    """

    projections: tuple[str, ...]
    route: Callable[..., Tensor]
    expert: Callable[[Any, int, Tensor], Tensor]
    transposed: bool = False


class Experts(nn.Module):
    """A module of experts with different storage for some weights; it shares everything else with the original.

    Args:
        original: the experts module of the model's own class.
        layout: layout of that class.
    """

    def __init__(self, original: nn.Module, layout: ExpertsLayout) -> None:
        super().__init__()
        _share(original, self)
        self.layout, self.original = layout, type(original)
        self.expert_count = len(original.get_parameter(layout.projections[0]))

    def project(self, name: str, expert: int, rows: Tensor) -> Tensor:
        """Return ``rows`` [n, in] times an expert's matrix of projection ``name``, plus its bias, [n, out]."""
        raise NotImplementedError

    def run(self, expert: int, rows: Tensor) -> Tensor:
        """Return an expert's output for ``rows``."""
        return self.layout.expert(self, expert, rows)

    def counted(self, index: Tensor) -> Tensor:
        """Return the expert of each row, [tokens, choices]; an index past the last expert means none."""
        return index

    def alone(self, rows: Tensor) -> bool:
        """Return whether the first expert stands in for all: if there are no values to route rows by."""
        return shapes_only(rows)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run with the arguments of the original's ``forward``."""
        return self.layout.route(self, *args, **kwargs)


class UnfusedExperts(Experts):
    """Experts as lists of plain linears, one per projection; weights and biases are views of the original's.

    Attributes:
        real: [batch, tokens] bool, true for tokens that are not padding, set while statistics are collected; None if no
            token is padding.
        only_first: whether only the first expert is present and takes all rows.
    """

    real: Tensor | None = None
    only_first = False

    def __init__(self, original: nn.Module, layout: ExpertsLayout) -> None:
        super().__init__(original, layout)
        for name in layout.projections:
            del self._parameters[name]
            bias = self._parameters.pop(f"{name}_bias", None)
            weights = original.get_parameter(name).detach()
            linears = [
                _linear(w.T if layout.transposed else w, None if bias is None else bias.detach()[i])
                for i, w in enumerate(weights)
            ]
            self.add_module(name, nn.ModuleList(linears))

    def project(self, name: str, expert: int, rows: Tensor) -> Tensor:
        """Run the linear of that expert."""
        y: Tensor = self.get_submodule(name)[expert](rows)  # type: ignore[index]
        return y

    def alone(self, rows: Tensor) -> bool:
        """Return whether the first expert stands in for all, as it does within :func:`first_alone`."""
        return self.only_first or super().alone(rows)

    def counted(self, index: Tensor) -> Tensor:
        """Route padding to no expert."""
        if self.real is None or self.real.numel() != len(index):
            return index
        return torch.where(self.real.reshape(-1, 1).to(index.device), index, self.expert_count)


def _share(module: nn.Module, new: nn.Module, leave: Collection[str] = ()) -> None:
    """Give ``new`` all attributes, tensors and children of ``module``, except hooks and ``leave``."""
    own = vars(new).keys() | set(leave)
    vars(new).update({key: value for key, value in vars(module).items() if key not in own})
    forget_hook(new)
    new._parameters.update(module._parameters)
    new._buffers.update(module._buffers)
    new._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    new._modules.update(module._modules)
    new.training = module.training


def fused_like(experts: Experts, leave: Collection[str]) -> nn.Module:
    """Return a module of the original's class with everything in ``experts`` except the attributes ``leave``."""
    new = experts.original.__new__(experts.original)
    nn.Module.__init__(new)
    _share(experts, new, leave=("layout", "original", "expert_count", *leave))
    return new


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    # nn.Linear.__init__ would initialize a random weight each time, tens of thousands of times.
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return linear


def first_linear(experts: nn.Module, layout: ExpertsLayout, name: str) -> nn.Linear:
    """Return the linear of a projection's first expert, on the meta device: sizes only."""
    weight = experts.get_parameter(name)[0].to("meta")
    return _linear(weight.T if layout.transposed else weight, None)


@dataclass
class Unfused:
    """The unfused experts of a model.

    Attributes:
        modules: name -> the unfused module now in the model.
        originals: name -> the module that it replaced.
        parameters: name of an expert's linear -> name of the parameter that it is a slice of.
        skipped: names of parameters that are left fused -> the reason.
    """

    modules: dict[str, UnfusedExperts] = field(default_factory=dict)
    originals: dict[str, nn.Module] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@contextmanager
def unfused(model: nn.Module, layouts: Mapping[str, ExpertsLayout]) -> Iterator[Unfused]:
    """Unfuse the experts of ``model``; on exit, restore the modules that are still unfused.

    Args:
        model: changed in place; it may be on the meta device. Weights are not copied.
        layouts: name of a module -> its layout.
    """
    found = Unfused()
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, layout in layouts.items():
        original = model.get_submodule(name)
        parameters = [original.get_parameter(p) for p in layout.projections]
        why = ""
        if fetches_weights(original):
            why = "its weights are offloaded: quantize before the model is dispatched, or while it is loaded"
        elif any(owners[id(p)] > 1 for p in parameters):
            why = "it shares its weights with another module"
        elif any(type(p) is not nn.Parameter for p in parameters):
            why = f"its weights are {type(parameters[0]).__name__}, not plain parameters"
        names = [f"{name}.{p}" if name else p for p in layout.projections]
        if why:
            found.skipped.update(dict.fromkeys(names, why))
            continue
        found.originals[name], found.modules[name] = original, UnfusedExperts(original, layout)
        count = found.modules[name].expert_count
        found.parameters.update({f"{fused}.{i}": fused for fused in names for i in range(count)})
    try:
        replace_modules(model, {found.originals[n]: m for n, m in found.modules.items()})
        yield found
    finally:
        replace_modules(model, {m: found.originals[n] for n, m in found.modules.items()})


@contextmanager
def first_alone(experts: Unfused) -> Iterator[None]:
    """Keep only the first expert of each module, for a traced forward: the surroundings of all experts are the same."""
    lists = [(m, name, m.get_submodule(name)) for m in experts.modules.values() for name in m.layout.projections]
    try:
        for module, name, linears in lists:
            module.only_first = True
            module._modules[name] = nn.ModuleList([linears[0]])  # type: ignore[index]
        yield
    finally:
        for module, name, linears in lists:
            module.only_first = False
            module._modules[name] = linears


def check_one_config(configs: Mapping[str, Any], experts: Unfused) -> None:
    """Check that the experts of one parameter all have the same config, or all have none.

    Raises:
        ConfigError: two of them differ; the message names both.
    """
    first: dict[str, str] = {}
    for name, parameter in experts.parameters.items():
        other = first.setdefault(parameter, name)
        if configs.get(name) != configs.get(other):
            raise ConfigError(
                f"layers {other!r} and {name!r} are slices of one parameter and need one config; "
                f"address them together as {parameter!r}"
            )


def share_traces(traces: dict[str, LinearTrace], experts: Unfused) -> None:
    """Apply what was found around one expert to the others of its parameter, which may not have run.

    No divisor is folded into the module before the experts: the router reads its output as well, and each expert would
    need a different divisor.
    """
    found = {experts.parameters[name]: seen for name, seen in traces.items() if name in experts.parameters}
    sources = {seen.source.module for seen in found.values() if seen.source is not None}
    for name, parameter in experts.parameters.items():
        if parameter in found:
            traces[name] = replace(found[parameter], name=name)
    for name, seen in traces.items():
        if seen.source is not None and seen.source.module in sources:
            traces[name] = replace(seen, source=None)


# Routing functions.


def route_tokens(experts: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Route each token to its chosen experts and return the weighted sum of their outputs.

    Rows are sorted by expert and summed per token in the weights' dtype, as in transformers' grouped matmul.

    Args:
        experts: the experts module.
        hidden_states: [tokens, in].
        top_k_index: [tokens, choices]; an index past the last expert (one of another process) chooses none.
        top_k_weights: [tokens, choices].
    """
    tokens, choices = top_k_index.shape
    if experts.alone(hidden_states):
        return (experts.run(0, hidden_states) * top_k_weights[:, :1]).to(hidden_states.dtype)
    chosen = experts.counted(top_k_index).reshape(-1)
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=experts.expert_count)[: experts.expert_count].tolist()
    order = order[: sum(counts)]
    outputs = _by_expert(experts, hidden_states[order // choices], counts)
    weighted = outputs * top_k_weights.reshape(-1)[order, None]
    width = weighted.shape[-1]
    joined = weighted.new_zeros(tokens * choices, width).index_copy(0, order, weighted)
    return joined.view(tokens, choices, width).sum(1).to(hidden_states.dtype)


def route_sorted(experts: Experts, rows: Tensor, counts: Tensor | list[int]) -> Tensor:
    """Run each expert on its rows, which are sorted by expert; rows past the last expert's are padding and give zeros.

    Args:
        experts: the experts module.
        rows: [n, in].
        counts: number of rows of each expert.
    """
    if experts.alone(rows):
        return experts.run(0, rows)
    counts = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    outputs = _by_expert(experts, rows[: sum(counts)], counts)
    padding = outputs.new_zeros(len(rows) - len(outputs), outputs.shape[-1])
    return torch.cat([outputs, padding]).to(rows.dtype)


def route_all(experts: Experts, hidden_states: Tensor) -> Tensor:
    """Route every token to every expert, except rows that the router has multiplied by zero: these give zeros.

    Args:
        experts: an experts module without biases, so that zeros give zeros.
        hidden_states: [experts * tokens, in].
    """
    if experts.alone(hidden_states):
        return experts.run(0, hidden_states)
    rows = hidden_states.view(experts.expert_count, -1, hidden_states.shape[-1])
    index = torch.arange(len(rows), device=rows.device).expand(rows.shape[1], -1)
    hit = (len(rows) > experts.counted(index).T) & (rows != 0).any(-1)
    outputs = _by_expert(experts, rows[hit], hit.sum(1).tolist())
    joined = outputs.new_zeros(*rows.shape[:2], outputs.shape[-1])
    return joined.index_put((hit,), outputs).view(-1, outputs.shape[-1])


def _by_expert(experts: Experts, rows: Tensor, counts: list[int]) -> Tensor:
    """Return the outputs for rows [n, in], which are sorted by expert."""
    parts = [experts.run(i, part) for i, part in enumerate(rows.split(counts)) if len(part)]
    # Without rows, one expert still runs on none, for the width and dtype of its output.
    return torch.cat(parts) if parts else experts.run(0, rows[:0])
