"""Index maps against data that encodes its own positions, through random chains of views."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hfquant.dataflow.index_map import cuts_of
from hfquant.dataflow.tracker import FeatureTracker
from hfquant.enums import SegPattern as P


@st.composite
def views(draw, shape):
    """Draw a chain of view operations, as functions, on a tensor of ``shape``."""
    chain, shape = [], list(shape)
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(
            st.sampled_from(["permute", "flatten", "unflatten", "slice", "chunk", "select", "unsqueeze", "expand"])
        )
        d = draw(st.integers(0, len(shape) - 1))
        if kind == "permute":
            order = draw(st.permutations(range(len(shape))))
            chain.append(lambda t, o=order: t.permute(o))
            shape = [shape[i] for i in order]
        elif kind == "flatten" and d + 1 < len(shape):
            chain.append(lambda t, d=d: t.flatten(d, d + 1))
            shape[d : d + 2] = [shape[d] * shape[d + 1]]
        elif kind == "unflatten" and shape[d] % 2 == 0 and len(shape) < 6:
            chain.append(lambda t, d=d, n=shape[d]: t.unflatten(d, (2, n // 2)))
            shape[d : d + 1] = [2, shape[d] // 2]
        elif kind == "slice" and shape[d] > 2:
            chain.append(lambda t, d=d: t[(slice(None),) * d + (slice(1, None),)])
            shape[d] -= 1
        elif kind == "chunk" and shape[d] > 1:
            chain.append(lambda t, d=d: t.chunk(2, d)[1])
            shape[d] -= (shape[d] + 1) // 2
        elif kind == "select" and len(shape) > 2:
            chain.append(lambda t, d=d: t.select(d, 0))
            del shape[d]
        elif kind == "unsqueeze" and len(shape) < 6:
            chain.append(lambda t, d=d: t.unsqueeze(d))
            shape.insert(d, 1)
        elif kind == "expand" and shape[d] == 1:
            sizes = [-1] * d + [3] + [-1] * (len(shape) - d - 1)
            chain.append(lambda t, s=sizes: t.expand(s))
            shape[d] = 3
    return chain


@given(views((2, 3, 24)))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_maps_agree_with_data_that_names_itself(chain):
    """The data's values are its feature numbers (and part numbers), so the maps must agree with the data."""
    linear = nn.Linear(24, 24, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(24))
    x = torch.arange(24.0).expand(2, 3, 24).contiguous()
    watch = FeatureTracker(P.all())
    with torch.no_grad(), watch:
        y = linear(x)
        watch.call_linear("linear", (linear.in_features, linear.out_features), x, y)
        parts = torch.cat([torch.full((2, 3, n), float(n)) for n in (5, 12, 7)], -1)
        for view in chain:
            y, parts = view(y), view(parts)
    assert torch.equal(watch._slices[y].index.float(), y)
    labels = watch._labels[parts]
    value_of = {int(i): float(v) for i, v in zip(labels.flatten(), parts.flatten(), strict=True)}
    assert torch.equal(torch.tensor([value_of[int(i)] for i in labels.flatten()]).view_as(parts), parts)


def test_cuts_of():
    assert cuts_of([(0, 4), (4, 9)], 9) == {4}
    assert cuts_of([(0, 9), (0, 4), (4, 9)], 9) == frozenset()
    assert cuts_of([(0, 6), (3, 8), (9, 10)], 12) == {8, 9, 10}
    assert cuts_of([], 9) == frozenset()
