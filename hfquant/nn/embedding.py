"""Embeddings: rows of the matrix are looked up and dequantized; nothing is multiplied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from hfquant.formats import Grid
from hfquant.nn.layer import QuantLayer

if TYPE_CHECKING:
    from hfquant.layer_config import LayerConfig
    from hfquant.layer_plan import LayerPlan


class QuantEmbedding(QuantLayer, nn.Embedding):  # type: ignore[misc]
    """A quantized ``nn.Embedding`` with scales per row or per group; its only input is indices.

    Attributes:
        scale: factor applied to the rows (as in the embeddings of Gemma and Bart), or None.
        scale_in_dtype: whether the factor is first rounded to ``dtype``.
    """

    bias: None
    scale: float | None = None
    scale_in_dtype = False

    def __init__(
        self,
        plan: LayerPlan,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(plan, False, device, dtype)
        self.num_embeddings, self.embedding_dim = plan.out_features, plan.in_features
        self.padding_idx = self.max_norm = None
        # Options that adapters read to look up their own rows.
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Return whether ``module`` is an ``nn.Embedding``."""
        return isinstance(module, nn.Embedding)

    @staticmethod
    def refuses(module: nn.Module) -> str:
        """Return why it stays in float: it enforces a norm, or is a subclass that does more than scale its rows."""
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "an embedding with max_norm, which changes its weight as it runs"
        if type(module) is not nn.Embedding and not _is_scaled(module):
            return f"it is a subclass of nn.Embedding, {type(module).__name__}"
        return ""

    @staticmethod
    def optional(module: nn.Module) -> str:
        """Return "embeddings"."""
        return "embeddings"

    @staticmethod
    def fitted(config: LayerConfig) -> LayerConfig:
        """Return only the weight's format: without a product, there is no output error to reduce."""
        return config.plain().model_copy(update={"input_quant": None})

    @classmethod
    def replacing(cls, module: nn.Module, plan: LayerPlan) -> Self:
        """Return an empty layer on the meta device that replaces a float module and can be converted back to it."""
        layer = super().replacing(module, plan)
        assert isinstance(module, nn.Embedding)
        layer.padding_idx = module.padding_idx
        if type(module) is not nn.Embedding:
            layer.scale, layer.scale_in_dtype = _scale_of(module), "embed_scale" in module._buffers
        return layer

    @property
    def embed_scale(self) -> Tensor | None:
        """:attr:`scale` as a tensor, under the name that adapters expect from the float classes."""
        return None if self.scale is None else torch.tensor(self.scale, device=self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        """Return rows [..., embedding_dim] of ``dtype`` for indices [...].

        Raises:
            IndexError: an index is out of range.
        """
        index = input.reshape(-1)

        def picked(tensor: Tensor) -> Tensor:
            # Unlike tensor[index], index_select rejects negative indices.
            return tensor.index_select(0, index)

        stored = {name: picked(t) for name, t in self._buffers.items() if t is not None and name.startswith("weight_")}
        codes = self.format.unpack(picked(self._stored_codes()), self.plan.in_features)
        rows = Grid.from_tensors(self.format, self.plan.columns, stored).dequantize(codes).to(self.dtype)
        if self.scale is not None:
            rows = rows * (rows.new_tensor(self.scale) if self.scale_in_dtype else self.scale)
        return rows.view(*input.shape, self.embedding_dim)

    def multiply(self, x: Tensor) -> Tensor:
        """Look up rows: the product with vectors that are 1 at the indices ``x`` and 0 elsewhere."""
        return self.forward(x)

    def float_output(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """Return the float rows at indices ``x``, in float32."""
        rows = matrix[x].float()
        return rows if self.scale is None else rows * self.scale

    def output_rows(self, y: Tensor) -> Tensor:
        """Return rows [..., embedding_dim] as [rows, embedding_dim]."""
        return y.reshape(-1, self.embedding_dim)

    def input_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Return the indices at positions ``index``."""
        return x.reshape(-1)[index]

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the float embedding that this layer replaced, with the effective weight in ``dtype``."""
        module = super().to_float(dtype)
        if "embed_scale" in module._buffers:
            # The buffer has no value if it was recorded from a model on the meta device.
            assert self.scale is not None
            module._buffers["embed_scale"] = torch.tensor(self.scale, device=self.weight.device)
        return module

    def _sizes(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def _is_scaled(module: nn.Module) -> bool:
    """Return whether a subclass of ``nn.Embedding`` multiplies its rows by a constant and does nothing else.

    transformers has one such class per architecture; all share this name suffix and this attribute.
    """
    named = type(module).__name__.endswith("ScaledWordEmbedding")
    return named and _scale_of(module) is not None and set(module._buffers) <= {"embed_scale"}


def _scale_of(module: nn.Module) -> float | None:
    holder: Any = module
    scale = getattr(holder, "scalar_embed_scale", getattr(holder, "embed_scale", None))
    if isinstance(scale, Tensor):
        return None if scale.is_meta else scale.item()
    return None if scale is None else float(scale)
