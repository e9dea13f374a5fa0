"""Mixtures of experts that keep their weights in 3-D parameters, one matrix an expert, taken apart to be quantized.

:func:`unfused` puts an :class:`UnfusedExperts` in the place of each, whose children are plain linears that share the
storage of the slices: ``experts.gate_up_proj.3`` is expert 3's. To the plan, the statistics and the solver an expert is
a linear like any other, and sees its own rows alone. Once all are solved they are stacked again
(:class:`hfquant.nn.experts.QuantExperts`).

How the experts of a class are kept and run is said once, by an :class:`ExpertsLayout`. Its two functions are written
against :meth:`Experts.project`, so that they serve the float experts and the quantized ones.
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
    """How a class keeps and runs its experts.

    Attributes:
        projections: names of the 3-D parameters; ``name + "_bias"``, [experts, out], is the bias of one.
        route: ``forward``: given an :class:`Experts` and the arguments, sends rows to experts and joins what they give.
        expert: given an :class:`Experts`, an expert's number and rows [n, in], returns its output [n, out].
        transposed: whether parameters are [experts, in, out]; else [experts, out, in], as linears' weights are.
    """

    projections: tuple[str, ...]
    route: Callable[..., Tensor]
    expert: Callable[[Any, int, Tensor], Tensor]
    transposed: bool = False


class Experts(nn.Module):
    """A module of experts with other storage for some weights; everything else it shares with the original.

    Args:
        original: of the class that the model's code has.
        layout: of that class.
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
        """Return what an expert makes of ``rows``."""
        return self.layout.expert(self, expert, rows)

    def counted(self, index: Tensor) -> Tensor:
        """Return which expert each row goes to, [tokens, choices]; numbers past the last expert mean none."""
        return index

    def alone(self, rows: Tensor) -> bool:
        """Return whether the first expert is to stand for all: where no numbers say which row goes where."""
        return shapes_only(rows)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take what the original's ``forward`` takes."""
        return self.layout.route(self, *args, **kwargs)


class UnfusedExperts(Experts):
    """Experts as lists of plain linears, by projection; their weights and biases are views of the original's.

    Attributes:
        real: [batch, tokens] bool, the tokens that are not padding while statistics are taken; None: all are.
        only_first: whether only the first expert is there, and takes all rows.
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
        """Call the linear."""
        y: Tensor = self.get_submodule(name)[expert](rows)  # type: ignore[index]
        return y

    def alone(self, rows: Tensor) -> bool:
        """Return whether the first expert is to stand for all, as within :func:`first_alone`."""
        return self.only_first or super().alone(rows)

    def counted(self, index: Tensor) -> Tensor:
        """Send padding nowhere."""
        if self.real is None or self.real.numel() != len(index):
            return index
        return torch.where(self.real.reshape(-1, 1).to(index.device), index, self.expert_count)


def _share(module: nn.Module, new: nn.Module, leave: Collection[str] = ()) -> None:
    """Give ``new`` all attributes, tensors and children of ``module``, hooks and ``leave`` aside."""
    own = vars(new).keys() | set(leave)
    vars(new).update({key: value for key, value in vars(module).items() if key not in own})
    forget_hook(new)
    new._parameters.update(module._parameters)
    new._buffers.update(module._buffers)
    new._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    new._modules.update(module._modules)
    new.training = module.training


def fused_like(experts: Experts, leave: Collection[str]) -> nn.Module:
    """Return a module of the original's class with all that ``experts`` has, but for its attributes ``leave``."""
    new = experts.original.__new__(experts.original)
    nn.Module.__init__(new)
    _share(experts, new, leave=("layout", "original", "expert_count", *leave))
    return new


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    # nn.Linear's own __init__ would fill a weight with random numbers, tens of thousands of times.
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return linear


def first_linear(experts: nn.Module, layout: ExpertsLayout, name: str) -> nn.Linear:
    """Return the linear that the first expert of a projection is, on the meta device: sizes alone."""
    weight = experts.get_parameter(name)[0].to("meta")
    return _linear(weight.T if layout.transposed else weight, None)


@dataclass
class Unfused:
    """The experts of a model that is taken apart.

    Attributes:
        modules: name -> what stands in the model.
        originals: name -> what stood there.
        parameters: name of an expert's linear -> name of the parameter that it is a slice of.
        skipped: names of parameters that stay as they are, and why.
    """

    modules: dict[str, UnfusedExperts] = field(default_factory=dict)
    originals: dict[str, nn.Module] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@contextmanager
def unfused(model: nn.Module, layouts: Mapping[str, ExpertsLayout]) -> Iterator[Unfused]:
    """Take the experts of ``model`` apart, and put back at the end what still stands there taken apart.

    Args:
        model: changed in place, perhaps on the meta device. Weights are not copied.
        layouts: name of a module -> how it keeps its experts.
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
            why = "its weights are those of another module too"
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
    """Leave only the first expert of each module, for a forward that is watched: around the others all is the same."""
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
    """Raise where the experts of one parameter do not all have the same config, or all none.

    Raises:
        ConfigError: naming two of them.
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
    """Let what was found around one expert hold for the others of its parameter, which may not have run.

    What comes before experts takes no divisor: the router reads it as well, and each expert would ask for another.
    """
    found = {experts.parameters[name]: seen for name, seen in traces.items() if name in experts.parameters}
    sources = {seen.source.module for seen in found.values() if seen.source is not None}
    for name, parameter in experts.parameters.items():
        if parameter in found:
            traces[name] = replace(found[parameter], name=name)
    for name, seen in traces.items():
        if seen.source is not None and seen.source.module in sources:
            traces[name] = replace(seen, source=None)


# Ways to route.


def route_tokens(experts: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Send each token to its chosen experts and return the weighted sum of what they give.

    Rows are sorted by expert, and summed by token in the weights' dtype, as transformers' grouped product does it.

    Args:
        experts: which.
        hidden_states: [tokens, in].
        top_k_index: [tokens, choices]; numbers past the last expert (of another process) choose none.
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
    """Send rows that are sorted by expert to theirs; rows past the last expert's are padding and give zeros.

    Args:
        experts: which.
        rows: [n, in].
        counts: of each expert's rows.
    """
    if experts.alone(rows):
        return experts.run(0, rows)
    counts = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    outputs = _by_expert(experts, rows[: sum(counts)], counts)
    padding = outputs.new_zeros(len(rows) - len(outputs), outputs.shape[-1])
    return torch.cat([outputs, padding]).to(rows.dtype)


def route_all(experts: Experts, hidden_states: Tensor) -> Tensor:
    """Send every token to every expert, but for those that the router has multiplied by zero: they give zeros.

    Args:
        experts: which; without biases, so that zeros give zeros.
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
    """Return the outputs of rows [n, in] that are sorted by expert."""
    parts = [experts.run(i, part) for i, part in enumerate(rows.split(counts)) if len(part)]
    # Without any row an expert is asked all the same, for the width and dtype of what it gives.
    return torch.cat(parts) if parts else experts.run(0, rows[:0])
