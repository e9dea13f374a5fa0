"""QuantLayer, the base class of all quantized layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfquant.algorithms import TensorSpec, block_slices
from hfquant.formats import Grid, NumberFormat
from hfquant.kernels.base import Operands, Product
from hfquant.kernels.op import linear
from hfquant.nn.base import QuantModule
from hfquant.nn.casts import cast_by
from hfquant.nn.checked import Checked
from hfquant.nn.float_modules import first, hollow

if TYPE_CHECKING:  # circular: layer_plan imports the kinds of layers
    from hfquant.layer_config import LayerConfig
    from hfquant.layer_plan import LayerPlan


class QuantLayer(Checked, QuantModule):
    """A layer with quantized weights and, if its plan says so, quantized activations.

    Any such layer multiplies rows [..., in] by a matrix [out, in]. A subclass is a kind of layer
    (:mod:`hfquant.nn.kinds`); its static methods define which float modules it takes and what their matrix and rows
    are.

    ``weight`` holds codes ([out, in] int8 or int16, or [out, ceil(in * bits / 8)] packed int8, with trailing dimensions
    of 1 up to the rank of the float weight), so do not use it in a matmul: :meth:`dequantize` returns the float matrix.
    ``weight`` and ``bias`` are frozen parameters; scales and the rest are buffers (see :meth:`LayerPlan.tensors` for
    shapes). On disk, ``weight`` has a leading dimension of 1, which is accepted here too because offloaded weights come
    straight from disk.

    Args:
        plan: plan of the layer.
        bias: whether the layer has a bias.
        device, dtype: where to create the (uninitialized) tensors; ``dtype`` applies to bias and low-rank branch.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    #: Whether another layer shares its codes.
    lends = False
    #: The replaced float module without its weights; see :meth:`to_float`.
    _float: nn.Module

    def __init__(
        self,
        plan: LayerPlan,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # The float class's own __init__ would allocate and initialize a float weight.
        nn.Module.__init__(self)
        self.plan = plan
        self.real_quant = plan.config.real_quant
        self._transform, self._code_dtype = plan.transform, self.format.code_dtype
        how = (plan.config.weight_quant.symmetric, self._transform.rotation)
        self.product = Product(self.format, plan.columns, plan.input_segments, plan.input_rule, *how)
        # Cached, because a plan's properties are recomputed on each access.
        self._row_sizes = plan.row_groups
        self._row_groups = block_slices(self._row_sizes)
        #: Dtype of the float weight that it would have; casting the model changes it.
        self.dtype = dtype = dtype or torch.get_default_dtype()
        # Created first, since some models take `next(module.parameters()).dtype` for their dtype (Swin v2's tables).
        bias_tensor = torch.empty(plan.out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if bias_tensor is None else nn.Parameter(bias_tensor, requires_grad=False)
        self._model_floats = {"bias"}
        for name, spec in plan.tensors().items():
            tensor = torch.empty(spec.shape, dtype=spec.dtype or dtype, device=device)
            if spec.dtype is None:
                self._model_floats.add(name)
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Return whether ``module`` is of this kind."""
        raise NotImplementedError

    @staticmethod
    def refuses(module: nn.Module) -> str:
        """Return why a module of this kind cannot be quantized exactly; "" if it can."""
        return ""

    @staticmethod
    def optional(module: nn.Module) -> str:
        """Return the ``include`` entry that a config needs to have ``module`` quantized; "" if it needs none."""
        return ""

    @staticmethod
    def fitted(config: LayerConfig) -> LayerConfig:
        """Return the config with the settings adjusted that do not apply to this kind."""
        return config

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """Return a float weight as the matrix [out, in]."""
        return weight

    @staticmethod
    def float_weight(matrix: Tensor, shape: torch.Size) -> Tensor:
        """Return a matrix [out, in] as the float weight of ``shape``, the inverse of :meth:`matrix`."""
        return matrix

    @staticmethod
    def watch(module: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Call ``see`` with each input of a float module, before its use, until the handle is removed."""
        return module.register_forward_pre_hook(lambda m, args, kwargs: see(first(args, kwargs)), with_kwargs=True)

    @staticmethod
    def rows(module: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the rows [..., in] that a float module multiplies, given an input seen by :meth:`watch`.

        Args:
            module: a float module of this kind.
            x: its input.
            seed: seed for sampling, if there are too many rows to return all.

        Returns:
            The rows, and the minimum and maximum of each column for the rows left out, [2, in] each; None if none are.
        """
        return x, None

    @classmethod
    def replacing(cls, module: nn.Module, plan: LayerPlan) -> Self:
        """Return an empty layer on the meta device that replaces a float module and can be converted back to it."""
        layer = cls(plan, getattr(module, "bias", None) is not None, "meta", module.get_parameter("weight").dtype)
        layer._remember(module)
        return layer

    @classmethod
    def from_tensors(
        cls,
        plan: LayerPlan,
        tensors: Mapping[str, Tensor],
        bias: nn.Parameter | None,
        module: nn.Module | None = None,
    ) -> Self:
        """Build a layer from its solved tensors.

        Args:
            plan, bias: of the layer.
            tensors: ``weight`` packed or unpacked, everything else as stored.
            module: the float module to replace; None for a layer that replaces nothing.
        """
        device = tensors["weight"].device
        if module is None:
            floats = [tensors[name].dtype for name, spec in plan.tensors().items() if spec.dtype is None]
            layer = cls(plan, False, "meta", floats[0] if floats else None if bias is None else bias.dtype)
        else:
            layer = cls.replacing(module, plan)
        for name in plan.tensors():
            layer.set_tensor(name, tensors[name])
        layer.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)
        return layer

    def _remember(self, module: nn.Module) -> None:
        # Bypass __setattr__: it is not part of the model.
        vars(self)["_float"] = hollow(module)

    def borrow(self, owner: QuantLayer | None) -> None:
        """Share the codes and weight scales of ``owner``, which has the same matrix, or release them (None)."""
        if owner is not None:
            owner.lends = True
        for name in self.plan.tensors():
            if name.startswith("weight"):
                table: dict[str, Any] = self._parameters if name in self._parameters else self._buffers
                table[name] = None if owner is None else getattr(owner, name)

    @property
    def format(self) -> NumberFormat:
        """The weight's number format."""
        return self.plan.config.weight_quant.format

    def solved_tensors(self) -> dict[str, Tensor]:
        """Return all tensors except the bias, by name, as :meth:`from_tensors` takes them."""
        return {name: getattr(self, name) for name in self.plan.tensors()}

    def in_memory(self, name: str, value: Tensor) -> Tensor:
        """Return a solved or stored tensor in its in-memory form: codes that fit are packed, with the right rank."""
        if name != "weight":
            return value
        form, shape = self.format, self.plan.tensors()["weight"].shape
        if (value.dim() == 1 + self.plan.rank and value.shape[0] == 1) or value.dim() == 3:
            value = value.squeeze(0)
        if form.disk_dtype != form.code_dtype and value.dtype == form.disk_dtype:
            value = value.view(form.code_dtype)
        if value.dtype == form.code_dtype and value.shape == (self.plan.out_features, self.plan.in_features):
            value = form.pack(value)
        return value.view(shape) if tuple(value.shape) == shape[:2] else value

    @property
    def float_shape(self) -> torch.Size:
        """Shape of the replaced float weight."""
        return self._float.get_parameter("weight").shape

    def held(self) -> list[tuple[LayerPlan, int, dict[str, Tensor]]]:
        """Return the quantized content: plan, number of matrices, and all tensors by name, including the bias."""
        return [(self.plan, 1, dict([*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]))]

    @property
    def code_names(self) -> tuple[str, ...]:
        """Names of the tensors that hold the layer's own codes."""
        return () if self.plan.tied else ("weight",)

    def specs(self, on_disk: bool = False) -> dict[str, TensorSpec]:
        """Return shape and dtype (None for floats) of each tensor, in memory or on disk, including the bias."""
        found = self.plan.tensors() | {"bias": TensorSpec((self.plan.out_features,), None)}
        if on_disk:
            found["weight"] = TensorSpec((1, *found["weight"].shape), self.format.disk_dtype)
        there = {**self._parameters, **self._buffers}
        return {name: spec for name, spec in found.items() if there.get(name) is not None}

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply rows ``x`` [..., in] of any float dtype by the matrix and add the bias; [..., out] in that dtype."""
        # Reading the dicts takes a tenth of the time of attribute access, which adds up in small layers.
        return self.multiply_by(x, self._buffers, self._stored_codes(), self._parameters.get("bias"))

    def multiply_by(
        self, x: Tensor, tensors: Mapping[str, Tensor | None], codes: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Run :meth:`multiply` with the matrix of another source that has the same plan.

        Args:
            x: rows.
            tensors: scales and the transform's tensors, by name.
            codes: packed, [out, ...].
            bias: [out].
        """
        transform, parts = self._transform, []
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            y = self.multiply_by(x, tensors, codes, None)
            return y + bias.to(y.dtype)  # the op has no gradient for it
        for i, rows in enumerate(self._row_groups):
            operands = self._operands(i, rows, tensors, codes, bias)
            parts.append(linear(transform.input(x, tensors, i), operands, self.product, self.real_quant))
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        extra = transform.output(x, tensors, self._row_sizes)
        return y if extra is None else (y + extra).to(x.dtype)

    def operands(self, group: int, rows: slice) -> Operands:
        """Return the kernel operands for row group ``group``, which covers ``rows`` of the layer's own matrix."""
        return self._operands(group, rows, self._buffers, self._stored_codes(), self._parameters.get("bias"))

    def _operands(
        self, group: int, rows: slice, tensors: Mapping[str, Tensor | None], codes: Tensor, bias: Tensor | None
    ) -> Operands:
        """Return the kernel operands for one row group."""
        get, transform = tensors.get, self._transform
        divisor = transform.divisor(tensors, group)
        down, up = transform.branch(tensors, group, rows) or (None, None)
        scale, scale_row, zero = get("weight_scale"), get("weight_scale_row"), get("weight_zero_point")
        pos, neg = get("input_scale"), get("input_scale_neg")
        if len(self._row_groups) == 1:
            return Operands(codes, scale, scale_row, zero, pos, neg, divisor, down, up, bias)
        part = Operands(codes, scale, scale_row, zero, bias=bias).rows(rows)
        pos, neg = (None if s is None else s.view(len(self._row_groups), -1)[group] for s in (pos, neg))
        return part._replace(input_scale=pos, input_scale_neg=neg, divisor=divisor, down=down, up=up)

    def _stored_codes(self) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        if weight.dim() == 2 and weight.dtype == self._code_dtype:
            return weight
        if weight.dtype not in (self._code_dtype, self.format.disk_dtype):
            raise TypeError(
                f"{self._get_name()}({self._sizes()}) has a weight of {weight.dtype} in the place of "
                f"{self._code_dtype} codes: something wrote floats to it, such as merging an adapter other than LoRA"
            )
        # More than two dimensions, or offloaded and straight from disk, where FP8 codes are unsigned bytes.
        return weight.view(self.plan.out_features, -1).view(self._code_dtype)

    def codes(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Return unpacked codes [out, in]."""
        return self.format.unpack(self._stored_codes()[rows], self.plan.in_features)

    def grid(self, rows: slice | Tensor = slice(None)) -> Grid:
        """Return the grid of the codes."""
        stored = {name: tensor for name, tensor in self._buffers.items() if name.startswith("weight_")}
        return Grid.from_tensors(
            self.format, self.plan.columns, {k: None if v is None else v[rows] for k, v in stored.items()}
        )

    def dequantize(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Return the dequantized float32 weight [out, in] (transformed, without the low-rank branch)."""
        return self.grid(rows).dequantize(self.codes(rows))

    def effective_weight(self) -> Tensor:
        """Return the float32 weight [out, in] that applies to the raw input."""
        return self.plan.transform.restored(self.dequantize(), self._buffers, self.plan.row_groups)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the replaced float module with the effective weight in ``dtype`` (default: :attr:`dtype`).

        Its activations are not quantized.
        """
        dtype, module = dtype or self.dtype, hollow(self._float)
        weight = self.float_weight(self.effective_weight(), module.get_parameter("weight").shape)
        # Make it contiguous, like a float module's weight.
        module.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = cast_by(fn, self.dtype, self._parameters["weight"])
        return super()._apply(fn, recurse)

    def reset_parameters(self) -> None:
        """Do nothing: codes have no random initialization."""

    def extra_repr(self) -> str:
        """Return sizes, formats and the other decisions of the plan."""
        return f"{self._sizes()}, {self.described()}"

    def _sizes(self) -> str:
        plan = self.plan
        return f"in_features={plan.in_features}, out_features={plan.out_features}, bias={self.bias is not None}"

    def described(self) -> str:
        """Return formats and the other decisions of the plan as text."""
        config = self.plan.config
        words = [
            f"weight={config.weight_quant.type}",
        ]
        if config.group_size:
            words.append(f"group_size={config.group_size}")
        if config.input_quant is not None:
            words.append(f"input={config.input_quant.type}{' dynamic' if config.input_quant.dynamic else ''}")
        if len(self.plan.input_segments) > 1:
            words.append(f"input_segments={list(self.plan.input_segments)}")
        if len(self.plan.output_segments) > 1:
            words.append(f"output_segments={list(self.plan.output_segments)}")
        if any(self.plan.dual):
            words.append("dual")
        if described := self.plan.transform.describe():
            words.append(described)
        return ", ".join(words)
