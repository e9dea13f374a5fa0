"""Names of torch functions, grouped by their effect on the features of a tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hfquant.enums import SegPattern


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CHUNKS = _words("chunk unbind unsafe_chunk")
SPLITS = _words("split split_with_sizes unsafe_split unsafe_split_with_sizes tensor_split narrow select __getitem__")
SPLITS |= _words("hsplit vsplit dsplit index_select take_along_dim gather")
MOVES = _words("transpose permute squeeze unsqueeze movedim moveaxis swapaxes swapdims t adjoint T mT H mH")
EXPANDS = _words("expand expand_as broadcast_to")
RESHAPES = _words("view reshape flatten unflatten view_as reshape_as ravel")
COPIES = _words(
    "to type type_as float half bfloat16 double contiguous clone detach dropout dropout1d dropout2d dropout3d "
    "alpha_dropout feature_alpha_dropout cpu cuda data requires_grad alias"
)
VIEWS = CHUNKS | SPLITS | MOVES | EXPANDS | RESHAPES | COPIES
#: Joins whose dimension is implied by the function; the others take it as an argument.
JOIN_DIMS = {"hstack": 1, "column_stack": 1, "vstack": 0, "row_stack": 0, "dstack": 2}
JOINS = dict.fromkeys(("cat", "concat", "concatenate", *JOIN_DIMS), SegPattern.CONCAT2LINEAR)
JOINS["stack"] = SegPattern.STACK2LINEAR
NORMS = _words("layer_norm rms_norm group_norm batch_norm instance_norm normalize")
# Activations with a small or no negative output range, and functions that preserve this property.
ACTIVATIONS = _words("silu gelu relu relu6 leaky_relu elu selu celu mish softplus hardswish sigmoid")
PRODUCTS = _words("mul multiply div divide true_divide")
SIGN_KEEPING = PRODUCTS | _words("square pow clamp clip clamp_min clamp_max nan_to_num rms_norm")

# Matched by exact name, since __rtruediv__ takes its arguments in reverse order.
TIMES = _words("mul multiply __mul__ __rmul__")
OVER = _words("div divide true_divide __truediv__ __div__")
SUMS = _words("add __add__ __radd__")
MATMULS = _words("matmul bmm __matmul__")
#: f(s x) = s f(x) for every s > 0.
HOMOGENEOUS = _words("relu leaky_relu")
#: Functions that read no tensor values (BLIND), or only those of their first argument (LIKE).
BLIND = _words("size dim ndimension numel nelement stride storage_offset is_floating_point is_complex is_contiguous")
BLIND |= _words("element_size get_device __len__ __hash__ is_inference requires_grad_")
LIKE = _words("to type_as view_as reshape_as expand_as")


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of a torch function, or of the property if it gets a tensor's property (``mT``, ``dtype``)."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name


@functools.cache
def base_name(kind: str) -> str | None:
    """Return the operator behind a function (``mul`` for ``mul_`` and ``__rmul__``), or None if there is none."""
    kind = kind.strip("_")
    names = (kind, kind.removeprefix("r"), kind.removeprefix("i"))
    return next((name for name in names if getattr(torch.ops.aten, name, None) is not None), None)


@functools.cache
def is_pointwise(kind: str) -> bool:
    """Return whether torch tags a function's operator (``mul``, ``__rsub__``, ``silu``) as pointwise."""
    name = base_name(kind)
    if name is None:
        return False
    packet = getattr(torch.ops.aten, name)
    tagged = any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())
    return tagged or kind.strip("_") in ACTIVATIONS
