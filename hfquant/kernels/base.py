"""The kernel interface: what a kernel declares, and what it receives (a product and its tensors)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from itertools import accumulate, chain, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfquant.formats import Grid, InputRule, NumberFormat, number_format
from hfquant.formats.rotation import MOST_ROTATED, rotated


@dataclass(frozen=True)
class Product:
    """Description of a product of an input and a quantized weight, without the tensors.

    Attributes:
        weight: format of the weight codes.
        columns: sizes of the column blocks, each with its own weight scale; they sum to in.
        segments: sizes of the input segments; no column block straddles two.
        input: how the input is quantized; None if it is not.
        symmetric: whether the weight has no zero points.
        rotation: size of the blocks of input channels that are rotated, after the division; 0 for none.
        in_features: columns of the weight.
        unrotated: the same product for an input that is already rotated.
        key: the product as text (JSON), passed to the op so that a traced graph shows what it computes.
    """

    weight: NumberFormat
    columns: tuple[int, ...]
    segments: tuple[int, ...]
    input: InputRule | None
    symmetric: bool = True
    rotation: int = 0
    in_features: int = field(init=False, compare=False)
    unrotated: Product = field(init=False, compare=False, repr=False)
    key: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Plain attributes: they are read at each call, and torch.compile cannot trace a cached property.
        object.__setattr__(self, "in_features", sum(self.segments))
        object.__setattr__(self, "key", self._key())
        object.__setattr__(self, "unrotated", replace(self, rotation=0) if self.rotation else self)

    def __hash__(self) -> int:
        # A text keeps its hash; that of thousands of columns would be computed anew for each cached function.
        return hash(self.key)

    def _key(self) -> str:
        rule = self.input
        spec: dict[str, object] = {
            "weight": self.weight.name,
            "columns": [[size, len(list(run))] for size, run in groupby(self.columns)],
            "segments": list(self.segments),
        }
        if not self.symmetric:
            spec["symmetric"] = False
        if self.rotation:
            spec["rotation"] = self.rotation
        if rule is not None:
            spec |= {"input": rule.format.name, "dynamic": rule.dynamic, "per_token": rule.per_token}
            spec |= {"dual": list(rule.dual)} if any(rule.dual) else {}
        return json.dumps(spec, separators=(",", ":"))


@cache
def product_of(key: str) -> Product:
    """Return the product described by a :attr:`Product.key`; equal keys return the same object.

    Raises:
        ValueError: the text does not describe a product.
    """
    try:
        spec = json.loads(key)
        segments = tuple(int(s) for s in spec["segments"])
        runs = [(int(size), int(count)) for size, count in spec["columns"]]
        # Checked before the runs are expanded: a wrong count could be arbitrarily large.
        if min(*segments, *chain(*runs)) < 1 or sum(size * count for size, count in runs) != sum(segments):
            raise ValueError("columns and segments do not match")
        columns = tuple(chain.from_iterable([size] * count for size, count in runs))
        if not set(accumulate(segments)) <= set(accumulate(columns)):
            raise ValueError("a block of columns straddles two segments")
        rule = None
        if "input" in spec:
            dual = tuple(bool(d) for d in spec.get("dual", [False] * len(segments)))
            if len(dual) != len(segments):
                raise ValueError("dual and segments do not match")
            form = number_format(spec["input"])
            rule = InputRule(form, bool(spec["dynamic"]), bool(spec["per_token"]), segments, dual)
        rotation = int(spec.get("rotation", 0))
        if rotation & (rotation - 1) or not 0 <= rotation <= MOST_ROTATED:
            raise ValueError(f"blocks of {rotation} channels cannot be rotated")
        symmetric = bool(spec.get("symmetric", True))
        return Product(number_format(spec["weight"]), columns, segments, rule, symmetric, rotation)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a quantized product: {key[:1000]!r} ({error!r})") from None


class Operands(NamedTuple):
    """Tensors of a product for one group of output rows; see ``LayerPlan.tensors`` for shapes and dtypes.

    Attributes:
        weight: packed codes, [out, ...].
        scale, scale_row, zero_point: of the weight, as stored.
        input_scale, input_scale_neg: [segments] float32; static inputs only.
        divisor: [in] float32, the smoothing vector by which the input is divided before it is quantized.
        down, up: [r, in] and [out, r], the low-rank branch, which acts on the raw input.
        bias: [out].
    """

    weight: Tensor
    scale: Tensor | None = None
    scale_row: Tensor | None = None
    zero_point: Tensor | None = None
    input_scale: Tensor | None = None
    input_scale_neg: Tensor | None = None
    divisor: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None

    def rows(self, rows: slice) -> Operands:
        """Return the operands for a slice of output rows."""
        per_row = ("weight", "scale", "scale_row", "zero_point", "up", "bias")
        parts = {name: tensor[rows] for name in per_row if (tensor := getattr(self, name)) is not None}
        return self._replace(**parts)

    def grid(self, product: Product) -> Grid:
        """Return the grid of the weight codes."""
        stored = {
            "weight_scale": self.scale,
            "weight_scale_row": self.scale_row,
            "weight_zero_point": self.zero_point,
        }
        return Grid.from_tensors(product.weight, product.columns, stored)

    def codes(self, product: Product) -> Tensor:
        """Return the unpacked weight codes [out, in]."""
        return product.weight.unpack(self.weight, product.in_features)

    def quantized_input(self, x: Tensor, product: Product) -> tuple[Tensor, Tensor | None]:
        """Return the code values of ``x`` [..., in] float32 and their scale; see ``InputRule.quantize``."""
        if self.divisor is not None:
            x = x / self.divisor
        x = rotated(x, product.rotation)
        if product.input is None:
            return x, None
        return product.input.quantize(x, self.input_scale, self.input_scale_neg)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the product ``y`` [..., out] float32 plus the low-rank branch of ``x`` [..., in] and the bias."""
        if self.down is not None and self.up is not None:
            y = y + (x @ self.down.float().T) @ self.up.float().T
        return y if self.bias is None else y + self.bias.float()


Run = Callable[[Tensor, Operands, Product], Tensor]
Op = Callable[..., Tensor]


def over_tokens(run: Run) -> Run:
    """Wrap a kernel's ``run`` that takes [tokens, in] so that it takes [..., in]."""

    @wraps(run)
    def flattened(x: Tensor, operands: Operands, product: Product) -> Tensor:
        if x.dim() == 2:
            return run(x, operands, product)
        y = run(x.reshape(-1, product.in_features), operands, product)
        # Not a regular view: autograd rejects in-place additions to those (Falcon does one). Nothing else references y.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    return flattened


@dataclass(frozen=True)
class Kernel:
    """A way to compute a product. To add one, write one file and add one line to :mod:`hfquant.kernels.table`.

    Attributes:
        name: its name in ``HFQUANT_KERNEL`` and ``hfquant kernels``.
        device: device type it runs on; "" for any.
        missing: returns what this machine lacks to run it, "" if nothing.
        refuses: returns why it cannot compute a product exactly, "" if it can.
        pays: whether to prefer it to the kernels after it, for an input dtype and numbers of tokens and output rows.
        run: maps [..., in] of any float dtype, with at least one token, to [..., out] of the same dtype.
        rotates: whether ``run`` applies the product's rotation; if not, it receives inputs already divided and rotated.
        direct: returns the op that ``run`` calls with a contiguous input and the operands as they are, and its last
            arguments; None if ``run`` does more for this product and dtype.
    """

    name: str
    device: str
    missing: Callable[[], str]
    refuses: Callable[[Product], str]
    pays: Callable[[Product, torch.dtype, int, int], bool]
    run: Run
    rotates: bool = True
    direct: Callable[[Product, torch.dtype], tuple[Op, tuple[Any, ...]] | None] = lambda product, dtype: None
