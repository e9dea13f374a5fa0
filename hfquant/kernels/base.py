"""What a kernel has to say of itself, and what it is given: a product, and the tensors of the product."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from itertools import accumulate, chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from hfquant.formats import Grid, InputRule, NumberFormat, number_format
from hfquant.formats.rotation import MOST_ROTATED, rotated


@dataclass(frozen=True)
class Product:
    """A product of a quantized input and a quantized weight, apart from its tensors.

    Attributes:
        weight: format of the weight's codes.
        columns: sizes of the blocks of columns that have a weight scale of their own, summing to in.
        segments: sizes of the input segments; no block of columns straddles two.
        input: how the input is quantized; None where it is not.
        symmetric: whether the weight has no zero points.
        rotation: size of the blocks of the divided input's channels that are rotated; 0 for none.
        in_features: columns of the weight.
        unrotated: the product of an input that is rotated already.
        key: the product as text (JSON), what the op takes: a traced graph then says what it computes.
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
        # Plain attributes: read at each call, and torch.compile cannot follow a property that caches.
        object.__setattr__(self, "in_features", sum(self.segments))
        object.__setattr__(self, "key", self._key())
        object.__setattr__(self, "unrotated", replace(self, rotation=0) if self.rotation else self)

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
    """Return the product that :attr:`Product.key` names; equal texts give one object.

    Raises:
        ValueError: the text is not a product's.
    """
    try:
        spec = json.loads(key)
        segments = tuple(int(s) for s in spec["segments"])
        runs = [(int(size), int(count)) for size, count in spec["columns"]]
        # Looked at before columns are spread out: a wrong count could be of any size.
        if min(*segments, *chain(*runs)) < 1 or sum(size * count for size, count in runs) != sum(segments):
            raise ValueError("columns and segments do not fit")
        columns = tuple(chain.from_iterable([size] * count for size, count in runs))
        if not set(accumulate(segments)) <= set(accumulate(columns)):
            raise ValueError("a block of columns straddles two segments")
        rule = None
        if "input" in spec:
            dual = tuple(bool(d) for d in spec.get("dual", [False] * len(segments)))
            if len(dual) != len(segments):
                raise ValueError("dual and segments do not fit")
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
        divisor: [in] float32, what the input is divided by before it is quantized.
        down, up: [r, in] and [out, r], the float branch that acts on the raw input.
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
        """Return the operands of some output rows."""
        per_row = ("weight", "scale", "scale_row", "zero_point", "up", "bias")
        parts = {name: tensor[rows] for name in per_row if (tensor := getattr(self, name)) is not None}
        return self._replace(**parts)

    def grid(self, product: Product) -> Grid:
        """Return the grid of the weight's codes."""
        stored = {
            "weight_scale": self.scale,
            "weight_scale_row": self.scale_row,
            "weight_zero_point": self.zero_point,
        }
        return Grid.from_tensors(product.weight, product.columns, stored)

    def codes(self, product: Product) -> Tensor:
        """Return the weight's unpacked codes [out, in]."""
        return product.weight.unpack(self.weight, product.in_features)

    def quantized_input(self, x: Tensor, product: Product) -> tuple[Tensor, Tensor | None]:
        """Return the values of the codes of ``x`` [..., in] float32, and their scale; see ``InputRule.quantize``."""
        if self.divisor is not None:
            x = x / self.divisor
        x = rotated(x, product.rotation)
        if product.input is None:
            return x, None
        return product.input.quantize(x, self.input_scale, self.input_scale_neg)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the product ``y`` [..., out] float32 plus the float branch of ``x`` [..., in] and the bias."""
        if self.down is not None and self.up is not None:
            y = y + (x @ self.down.float().T) @ self.up.float().T
        return y if self.bias is None else y + self.bias.float()


Run = Callable[[Tensor, Operands, Product], Tensor]


def over_tokens(run: Run) -> Run:
    """Return a kernel's ``run`` that takes [tokens, in] as one that takes [..., in]."""

    @wraps(run)
    def flattened(x: Tensor, operands: Operands, product: Product) -> Tensor:
        if x.dim() == 2:
            return run(x, operands, product)
        y = run(x.reshape(-1, product.in_features), operands, product)
        # Nobody else has y, and what autograd takes for a view cannot be added to in place, as Falcon does.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    return flattened


@dataclass(frozen=True)
class Kernel:
    """A way to compute a product. A new one is one file and one line in :mod:`hfquant.kernels`.

    Attributes:
        name: what ``HFQUANT_KERNEL`` and ``hfquant kernels`` call it.
        device: type of the devices that it runs on; "" for any.
        missing: returns what this machine lacks to run it, "" where nothing.
        refuses: returns why it cannot compute a product exactly, "" where it can.
        pays: whether it is to be preferred to the kernels after it, for a number of tokens and of output rows.
        run: computes [..., in] of any float dtype, with at least one token, to [..., out] of the same dtype.
        rotates: whether ``run`` rotates inputs where the product says so; else it gets them divided and rotated.
    """

    name: str
    device: str
    missing: Callable[[], str]
    refuses: Callable[[Product], str]
    pays: Callable[[Product, torch.dtype, int, int], bool]
    run: Run
    rotates: bool = True
