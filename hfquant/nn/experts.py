"""QuantExperts, the replacement for a module of fused experts, which stores its 3-D parameters as codes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfquant.algorithms import TensorSpec, block_slices
from hfquant.experts import Experts, ExpertsLayout, Unfused, fused_like
from hfquant.nn.base import QuantModule, See
from hfquant.nn.casts import cast_by
from hfquant.nn.float_modules import overridden
from hfquant.nn.layer import QuantLayer
from hfquant.nn.linear import QuantLinear

if TYPE_CHECKING:  # circular: layer_plan imports the kinds of layers
    from hfquant.layer_plan import LayerPlan


def tensor_name(projection: str, key: str) -> str:
    """Return the name of the stacked tensor ``key`` of a QuantLinear; the codes keep the float parameter's name."""
    return projection if key == "weight" else f"{projection}_{key.removeprefix('weight_')}"


class QuantExperts(Experts, QuantModule):
    """Fused experts with quantized weights: each expert's QuantLinear tensors, stacked along a new first dimension.

    A projection ``p`` keeps its name: ``p`` holds the codes [experts, out, ...] regardless of the float parameter's
    layout, next to ``p_scale``, ``p_smooth`` and so on, and ``p_bias`` is unchanged. A projection that is not in
    ``plans`` stays a float parameter. On disk, codes have a leading dimension of 1, like those of QuantLinear.

    Args:
        original: the float experts, possibly on the meta device.
        layout: layout of their class.

    Attributes:
        plans: projection -> plan of each expert; :attr:`LayerPlan.rounded` lists the experts that saw too few rows.
    """

    def __init__(self, original: nn.Module, layout: ExpertsLayout) -> None:
        super().__init__(original, layout)
        self.plans: dict[str, LayerPlan] = {}
        #: Projection -> QuantLinear tensor name -> tensor name here.
        self._names: dict[str, dict[str, str]] = {}
        #: Modules that run the products. They own no tensors; each expert's tensors are slices of the stacks.
        self._linears: dict[str, QuantLinear] = {}
        self._model_floats = set()

    def hold(self, projection: str, plan: LayerPlan, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Replace a float projection with codes.

        Args:
            projection: name of the projection.
            plan: plan of each expert.
            tensors: stacked tensors, by their QuantLinear names; None creates empty ones on the meta device.
        """
        dtype = self.get_parameter(projection).dtype
        self.plans[projection] = plan
        self._linears[projection] = QuantLinear(plan, False, "meta", dtype)
        self._names[projection] = {key: tensor_name(projection, key) for key in plan.tensors()}
        for key, spec in plan.tensors().items():
            name = self._names[projection][key]
            shape = (self.expert_count, *spec.shape)
            value = torch.empty(shape, dtype=spec.dtype or dtype, device="meta") if tensors is None else tensors[key]
            if key == "weight":
                setattr(self, name, nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(name, value)
            if spec.dtype is None:
                self._model_floats.add(name)
        self._model_floats.add(f"{projection}_bias")
        bias = self._parameters.get(f"{projection}_bias")
        if bias is not None:
            setattr(self, f"{projection}_bias", nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def real_quant(self) -> bool:
        """Whether products run on low-bit kernels."""
        return any(linear.real_quant for linear in self._linears.values())

    @real_quant.setter
    def real_quant(self, value: bool) -> None:
        for linear in self._linears.values():
            linear.real_quant = value

    @property
    def code_names(self) -> tuple[str, ...]:
        """Names of the tensors that hold codes."""
        return tuple(self.plans)

    def sizes(self) -> dict[str, int]:
        """Return the number of quantized weights of each projection."""
        return {name: self.expert_count * p.in_features * p.out_features for name, p in self.plans.items()}

    def held(self) -> list[tuple[LayerPlan, int, dict[str, Tensor]]]:
        """Return for each projection its plan, number of matrices, and tensors by their QuantLinear names."""
        found = []
        for projection, plan in self.plans.items():
            tensors = {key: getattr(self, name) for key, name in self._names[projection].items()}
            bias = self._parameters.get(f"{projection}_bias")
            found.append((plan, self.expert_count, tensors if bias is None else {**tensors, "bias": bias}))
        return found

    def specs(self, on_disk: bool = False) -> dict[str, TensorSpec]:
        """Return shape and dtype (None for floats) of each tensor of the quantized projections, including biases."""
        found = {}
        for projection, plan in self.plans.items():
            for key, (shape, dtype) in plan.tensors().items():
                found[tensor_name(projection, key)] = TensorSpec((self.expert_count, *shape), dtype)
            if on_disk:
                shape, _ = found[projection]
                found[projection] = TensorSpec((1, *shape), plan.config.weight_quant.format.disk_dtype)
            if self._parameters.get(f"{projection}_bias") is not None:
                found[f"{projection}_bias"] = TensorSpec((self.expert_count, plan.out_features), None)
        return found

    def in_memory(self, name: str, value: Tensor) -> Tensor:
        """Return a solved or stored tensor in its in-memory form; offloaded codes come straight from disk."""
        return self._codes(name, value) if name in self.plans else value

    def _codes(self, projection: str, codes: Tensor) -> Tensor:
        form = self.plans[projection].config.weight_quant.format
        codes = codes.squeeze(0) if codes.dim() == 4 and len(codes) == 1 else codes
        return codes.view(form.code_dtype) if codes.dtype == form.disk_dtype else codes

    def tensors_of(self, projection: str, expert: int) -> dict[str, Tensor]:
        """Return one expert's tensors by their QuantLinear names, without the bias."""
        parameters, buffers = self._parameters, self._buffers
        names = self._names[projection].items()
        found = {key: tensor[expert] for key, name in names if (tensor := buffers.get(name)) is not None}
        codes = parameters[projection]
        assert codes is not None
        return found | {"weight": self._codes(projection, codes)[expert]}

    def project(self, name: str, expert: int, rows: Tensor) -> Tensor:
        """Multiply ``rows`` [n, in] by one expert's matrix."""
        biases = self._parameters.get(f"{name}_bias")
        bias = None if biases is None else biases[expert]
        if name in self.plans:
            tensors = self.tensors_of(name, expert)
            return self._linears[name].multiply_by(rows, tensors, tensors.pop("weight"), bias)
        weight = self.get_parameter(name)[expert]
        return F.linear(rows, weight.T if self.layout.transposed else weight, bias)

    def parts(self) -> dict[str, QuantLayer]:
        """Return each expert of each quantized projection as a linear, by name: "gate_up_proj.3"."""
        return {f"{name}.{i}": self._linear(name, i) for name in self.plans for i in range(self.expert_count)}

    def _linear(self, projection: str, expert: int) -> QuantLinear:
        biases = self._parameters.get(f"{projection}_bias")
        bias = None if biases is None else nn.Parameter(biases.detach()[expert], requires_grad=False)
        return QuantLinear.from_tensors(self.plans[projection], self.tensors_of(projection, expert), bias)

    def listen(self, see: See) -> RemovableHandle:
        """Call ``see`` with the rows that each expert multiplies and its output until the handle is removed."""
        project = self.project

        def watched(name: str, expert: int, rows: Tensor) -> Tensor:
            y = project(name, expert, rows)
            other = see(f"{name}.{expert}", rows, y) if name in self.plans else None
            return y if other is None else other

        return overridden(self, "project", watched)

    def with_parts(self, parts: Mapping[str, QuantLayer | None], original: nn.Module) -> nn.Module:
        """Return the replacement for this module with other experts.

        Args:
            parts: experts by name, all or none of each projection. A projection whose experts are all None becomes
                float; one without entries is kept.
            original: the float module.
        """
        new = QuantExperts(original, self.layout)
        for projection, plan in self.plans.items():
            experts = [parts.get(f"{projection}.{i}") for i in range(self.expert_count)]
            if quantized := [layer for layer in experts if layer is not None]:
                new.hold(projection, *stacked(quantized, plan.rounded))
            elif f"{projection}.0" not in parts:
                tensors = {key: getattr(self, name).detach() for key, name in self._names[projection].items()}
                new.hold(projection, plan, tensors)
        return new if new.plans else original

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a module of the original class with the original's parameters in ``dtype`` (default: that of each)."""
        float_experts = fused_like(self, leave=("plans", "_names", "_linears", "_model_floats"))
        for name in self.specs():
            float_experts._buffers.pop(name, None)
            float_experts._parameters.pop(name, None)
        for name, plan in self.plans.items():
            shape, wanted = (self.expert_count, plan.out_features, plan.in_features), dtype or self._linears[name].dtype
            weight = torch.empty(shape, dtype=wanted, device=self.get_parameter(name).device)
            for i in range(self.expert_count):
                weight[i] = self._linear(name, i).effective_weight()
            weight = weight.transpose(1, 2).contiguous() if self.layout.transposed else weight
            float_experts.register_parameter(name, nn.Parameter(weight))
            bias = self._parameters.get(f"{name}_bias")
            if bias is not None:
                float_experts.register_parameter(f"{name}_bias", nn.Parameter(bias.detach().to(wanted)))
        return float_experts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantExperts:
        for name, linear in self._linears.items():
            linear.dtype = cast_by(fn, linear.dtype, self.get_parameter(name))
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Return the number of experts and a description of each projection."""
        lines = [f"{self.original.__name__}, experts={self.expert_count}"]
        for name, linear in self._linears.items():
            few = f", rounded to nearest: {list(plan.rounded)}" if (plan := self.plans[name]).rounded else ""
            lines.append(f"({name}): {linear.described()}{few}")
        return "\n".join(lines)


def stacked(layers: Sequence[QuantLayer], rounded: Collection[int]) -> tuple[LayerPlan, dict[str, Tensor]]:
    """Return one plan for the solved experts of a projection, and their stacked tensors.

    Experts may differ in decisions made from data: if one expert needs two scales for a segment, all get two, equal
    ones if a single scale would do. An expert solved without data has no transform or input scale; it gets a transform
    without effect and the largest input scale of the other experts.

    Args:
        layers: one layer per expert.
        rounded: indices of the experts that needed data but were solved without it.
    """
    solved = [layer for i, layer in enumerate(layers) if i not in rounded] or layers
    dual = tuple(any(ds) for ds in zip(*(layer.plan.dual for layer in solved), strict=True))
    plan = replace(solved[0].plan, dual=dual, rounded=tuple(sorted(rounded)))
    largest = torch.stack([_raw_input_scale(layer) for layer in solved]).amax(0) if plan.static_input else None

    def tensor(layer: QuantLayer, key: str, spec: TensorSpec) -> Tensor:
        has = layer.solved_tensors()
        if key in has:
            return has[key]
        if key == "input_scale_neg" and "input_scale" in has:
            return has["input_scale"]
        if key.startswith("input_scale"):
            assert largest is not None
            return largest
        dtype = spec.dtype or next(t.dtype for t in (getattr(other, key, None) for other in solved) if t is not None)
        return plan.transform.idle(key).to(layer.weight.device, dtype).expand(spec.shape)

    return plan, {
        key: torch.stack([tensor(layer, key, spec) for layer in layers]) for key, spec in plan.tensors().items()
    }


def plans_of(experts: Mapping[str, QuantExperts]) -> dict[str, LayerPlan]:
    """Return the plans of expert modules, by parameter name."""
    return {f"{n}.{p}".lstrip("."): plan for n, module in experts.items() for p, plan in module.plans.items()}


def fuse(experts: Unfused, layers: dict[str, QuantLayer], fallbacks: Collection[str]) -> dict[str, QuantExperts]:
    """Return the replacements for a model's expert modules by name, except those with no solved projection.

    Args:
        experts: the unfused experts.
        layers: name -> solved linear; experts are removed as they are stacked, so that few exist twice in memory.
        fallbacks: names of the layers that needed data but were solved without it.
    """
    found = {}
    for name, apart in experts.modules.items():
        module = QuantExperts(experts.originals[name], apart.layout)
        for projection in apart.layout.projections:
            names = [f"{name}.{projection}.{i}".lstrip(".") for i in range(apart.expert_count)]
            if names[0] in layers:
                few = [i for i, n in enumerate(names) if n in fallbacks]
                module.hold(projection, *stacked([layers.pop(n) for n in names], few))
        if module.plans:
            found[name] = module
    return found


def _raw_input_scale(layer: QuantLayer) -> Tensor:
    """Return static scales [row groups * segments] for the raw input that clip no more than the layer did."""
    scales: Tensor = layer.get_buffer("input_scale")
    parts = []
    for group, part in enumerate(scales.view(len(layer.plan.row_groups), -1)):
        divisor = layer.plan.transform.divisor(layer._buffers, group)
        if divisor is not None:
            part = part * torch.stack([divisor[c].amax() for c in block_slices(layer.plan.input_segments)])
        parts.append(part)
    return torch.cat(parts)
