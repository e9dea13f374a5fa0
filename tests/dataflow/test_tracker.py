"""Following features: every pattern in every spelling, on toy modules."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hfquant.dataflow.trace import trace
from hfquant.enums import SegPattern as P
from tests.dataflow.toys import Toy, X, of, two, used

SPLITS = {
    "chunk": (lambda y: y.chunk(3, -1), (8, 8, 8), P.LINEAR2CHUNK),
    "torch.chunk, dim positive": (lambda y: torch.chunk(y, 2, 2), (12, 12), P.LINEAR2CHUNK),
    "chunk by keywords": (lambda y: torch.chunk(input=y, chunks=4, dim=-1), (6, 6, 6, 6), P.LINEAR2CHUNK),
    "chunk with a rest": (lambda y: y.chunk(5, dim=-1), (5, 5, 5, 5, 4), P.LINEAR2CHUNK),
    "split by size": (lambda y: y.split(10, dim=-1), (10, 10, 4), P.LINEAR2SPLIT),
    "split by list": (lambda y: torch.split(y, [4, 20], -1), (4, 20), P.LINEAR2SPLIT),
    "split by keywords": (
        lambda y: torch.split(tensor=y, split_size_or_sections=[1, 23], dim=2),
        (1, 23),
        P.LINEAR2SPLIT,
    ),
    "split_with_sizes": (lambda y: y.split_with_sizes([3, 5, 16], -1), (3, 5, 16), P.LINEAR2SPLIT),
    "tensor_split by count": (lambda y: y.tensor_split(3, -1), (8, 8, 8), P.LINEAR2CHUNK),
    "tensor_split by positions": (lambda y: torch.tensor_split(y, (6, 10), dim=-1), (6, 4, 14), P.LINEAR2SPLIT),
    "narrow": (lambda y: [y.narrow(-1, 0, 9), y.narrow(2, 9, 15)], (9, 15), P.LINEAR2SPLIT),
    "slices": (lambda y: [y[..., :7], y[:, :, 7:]], (7, 17), P.LINEAR2SPLIT),
    "a slice and an unused rest": (lambda y: [y[..., 4:20]], (4, 16, 4), P.LINEAR2SPLIT),
    "index with a list": (
        lambda y: [v[..., [2], :] if i else v[..., :2, :] for i, v in enumerate([y.view(2, 5, 3, 8)] * 2)],
        (16, 8),
        P.LINEAR2SPLIT,
    ),
    "view and unbind": (lambda y: y.view(2, 5, 3, 8).unbind(2), (8, 8, 8), P.LINEAR2CHUNK),
    "unpacking": (lambda y: list(y.view(2, 5, 3, 8).permute(2, 0, 1, 3)), (8, 8, 8), P.LINEAR2CHUNK),
    "view, permute, index": (
        lambda y: [y.reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)[i] for i in range(3)],
        (8, 8, 8),
        P.LINEAR2SPLIT,
    ),
    "select": (lambda y: [y.unflatten(-1, (2, 12)).select(2, i) for i in (0, 1)], (12, 12), P.LINEAR2SPLIT),
    "index_select": (
        lambda y: [y.index_select(-1, torch.arange(9)), torch.index_select(y, 2, torch.arange(9, 24))],
        (9, 15),
        P.LINEAR2SPLIT,
    ),
    "index_select by keywords": (
        lambda y: [torch.index_select(dim=-1, index=torch.arange(a, a + 12), input=y) for a in (0, 12)],
        (12, 12),
        P.LINEAR2SPLIT,
    ),
    "index_select of a given list": (
        lambda y: [y.index_select(-1, torch.tensor([1, 0, 2])), y.index_select(-1, torch.arange(3, 24))],
        (3, 21),
        P.LINEAR2SPLIT,
    ),
    "gather": (
        lambda y: [y.gather(-1, torch.arange(*r).expand(2, 5, -1)) for r in ((0, 8), (8, 24))],
        (8, 16),
        P.LINEAR2SPLIT,
    ),
    "take_along_dim": (
        lambda y: [torch.take_along_dim(y, torch.arange(*r)[None, None], dim=2) for r in ((0, 8), (8, 24))],
        (8, 16),
        P.LINEAR2SPLIT,
    ),
    "index with a range": (lambda y: [y[..., torch.arange(8)], y[..., torch.arange(8, 24)]], (8, 16), P.LINEAR2SPLIT),
    "two pieces added": (lambda y: [y[..., :12] + y[..., 12:]], (12, 12), P.LINEAR2SPLIT),
    "vsplit and dsplit": (lambda y: [y.dsplit(2)[0], y[0].mT.vsplit(2)[1]], (12, 12), None),
    "hsplit": (lambda y: y.flatten(0, 1).hsplit([6]), (6, 18), P.LINEAR2SPLIT),
    "unsafe_chunk": (lambda y: torch.unsafe_chunk(y, 2, -1), (12, 12), P.LINEAR2CHUNK),
    "after index_select on leading dims": (
        lambda y: y.index_select(1, torch.ones(3, dtype=torch.long)).chunk(2, -1),
        (12, 12),
        P.LINEAR2CHUNK,
    ),
    "after an activation spelled out": (lambda y: (y * torch.sigmoid(y)).chunk(2, -1), (12, 12), P.LINEAR2CHUNK),
    "after merging leading dims": (lambda y: y.reshape(10, 24).chunk(2, 1), (12, 12), P.LINEAR2CHUNK),
    "after transposing": (lambda y: y.transpose(1, 2).chunk(2, dim=1), (12, 12), P.LINEAR2CHUNK),
    "after a cast": (lambda y: y.to(torch.bfloat16).chunk(2, -1), (12, 12), P.LINEAR2CHUNK),
    "after float and dropout": (
        lambda y: F.dropout(y.double(), 0.5).contiguous().chunk(2, -1),
        (12, 12),
        P.LINEAR2CHUNK,
    ),
    "after getitem on leading dims": (lambda y: y[:, 0].chunk(2, -1), (12, 12), P.LINEAR2CHUNK),
    "after an unknown index on leading dims": (
        lambda y: y[:, torch.ones(3, dtype=torch.long)].chunk(2, -1),
        (12, 12),
        P.LINEAR2CHUNK,
    ),
    "after a pointwise function": (lambda y: F.silu(y * 2 + 1).chunk(2, -1), (12, 12), P.LINEAR2CHUNK),
    "after an in-place function": (lambda y: F.relu(y.mul_(2), inplace=True).chunk(2, -1), (12, 12), P.LINEAR2CHUNK),
    "nested": (lambda y: [y[..., :8], *y[..., 8:].chunk(2, -1)], (8, 8, 8), None),
    "never used": (lambda y: y.chunk(3, -1) and y, (24,), None),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SPLITS)
def test_output_segments(name):
    split, sizes, pattern = SPLITS[name]
    found = of(lambda m, x: used(split(m.a(x))), "a")
    assert found.output_segments == sizes
    assert found.input_segments == (8,)
    if pattern is not None:
        assert found.patterns == (pattern,)
        assert "output ->" in found.evidence[0]


def test_pieces_that_are_returned_count_as_used():
    assert of(lambda m, x: m.a(x).chunk(2, -1), "a").output_segments == (12, 12)


def test_output_reshaped_added_to_a_table_and_split_along_another_dim():
    """Adaptive norm of PixArt and Sana: ``(table + linear(t).reshape(b, 6, -1)).chunk(6, dim=1)``."""
    found = of(lambda m, x: used((m.table[None][0] + m.a(x[:, 0]).reshape(2, 3, -1)).chunk(3, dim=1)), "a")
    assert (found.output_segments, found.patterns) == ((8, 8, 8), (P.LINEAR2CHUNK,))


WHOLE = {
    "the whole is used too": lambda m, x: (y := m.a(x), used(y.chunk(2, -1)), y.cumsum(0)),
    "rotary halves beside the whole": lambda m, x: (
        (y := m.a(x).view(2, 5, 3, 8)) * 2 + torch.cat([-y[..., 4:], y[..., :4]], -1)
    ),
    "heads of fused qkv interleaved": lambda m, x: used(m.a(x).view(2, 5, 2, 12).chunk(3, -1)),
    "features picked by unknown numbers": lambda m, x: used([m.a(x).index_select(-1, torch.ones(12).long())]),
    "even and odd features by index_select": lambda m, x: used(
        [(y := m.a(x)).index_select(-1, torch.arange(0, 24, 2)), y.index_select(-1, torch.arange(1, 24, 2))]
    ),
    "even and odd features": lambda m, x: used([m.a(x)[..., ::2], m.a(x)[..., 1::2]]),
    "tokens, not features": lambda m, x: used(m.a(x).split([2, 3], dim=1)),
    "batch": lambda m, x: used(m.a(x).chunk(2)),
    "norm before": lambda m, x: used(m.norm(m.a(x)).chunk(2, -1)),
    "handwritten norm before": lambda m, x: used(
        ((y := m.a(x)) * y.pow(2).mean(-1, keepdim=True).rsqrt()).chunk(2, -1)
    ),
    "sum of two linears": lambda m, x: used((m.a(x) + m.c(x)).chunk(2, -1)),
    "softmax before": lambda m, x: used(m.a(x).softmax(-1).chunk(2, -1)),
    "another bit width": lambda m, x: used(m.a(x).view(torch.int16).chunk(2, -1)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_output_left_whole(name):
    found = of(WHOLE[name], "a")
    assert (found.output_segments, found.patterns) == ((24,), ())


def test_interleaved_split_says_why_it_is_left_whole():
    assert "not contiguous features" in of(WHOLE["heads of fused qkv interleaved"], "a").evidence[0]


def test_partial_rotary_does_not_hide_fused_qkv():
    """The rotated and passed-through parts of each head interleave, but stay within q."""

    def run(m, x):
        q, k, v = m.a(x).split([12, 6, 6], -1)
        q, k = q.view(2, 5, 2, 6), k.view(2, 5, 1, 6)
        return used([q[..., :2], q[..., 2:], k, v])

    assert of(run, "a").output_segments == (12, 6, 6)


JOINS = {
    "cat": (lambda m, x: torch.cat(two(x), -1), (12, 12), P.CONCAT2LINEAR),
    "cat, unequal, dim positive": (lambda m, x: torch.cat(two(x, 5), 2), (5, 19), P.CONCAT2LINEAR),
    "cat by keywords": (lambda m, x: torch.cat(tensors=two(x, 7), dim=2), (7, 17), P.CONCAT2LINEAR),
    "concat": (lambda m, x: torch.concat(two(x, 5), dim=-1), (5, 19), P.CONCAT2LINEAR),
    "concatenate along axis": (lambda m, x: torch.concatenate(two(x, 5), axis=-1), (5, 19), P.CONCAT2LINEAR),
    "hstack": (lambda m, x: torch.hstack([t[:, 0] for t in two(x, 5)]), (5, 19), P.CONCAT2LINEAR),
    "hstack of one token": (lambda m, x: torch.hstack(tensors=[t[0, 0] for t in two(x, 5)]), (5, 19), P.CONCAT2LINEAR),
    "column_stack": (lambda m, x: torch.column_stack([t[:, 0] for t in two(x, 5)]), (5, 19), P.CONCAT2LINEAR),
    "dstack": (lambda m, x: torch.dstack(two(x, 5)), (5, 19), P.CONCAT2LINEAR),
    "vstack of columns": (lambda m, x: torch.vstack([t[:, 0].mT for t in two(x, 5)]).mT, (5, 19), P.CONCAT2LINEAR),
    "row_stack of columns": (
        lambda m, x: torch.row_stack([t[:, 0].mT for t in two(x, 5)]).mT,
        (5, 19),
        P.CONCAT2LINEAR,
    ),
    "cat of a list of three": (lambda m, x: torch.cat([x.cumsum(0), x.cumsum(1), x], -1), (8, 8, 8), P.CONCAT2LINEAR),
    "nested cat": (
        lambda m, x: torch.cat([torch.cat([x, x[..., :4]], -1), two(x)[0]], -1),
        (8, 4, 12),
        P.CONCAT2LINEAR,
    ),
    "cast, dropout, contiguous": (
        lambda m, x: F.dropout(torch.cat(two(x, 5), -1).double().float(), 0.1).contiguous(),
        (5, 19),
        P.CONCAT2LINEAR,
    ),
    "leading dims merged": (lambda m, x: torch.cat(two(x, 5), -1).flatten(0, 1), (5, 19), P.CONCAT2LINEAR),
    "first token": (lambda m, x: torch.cat(two(x, 5), -1)[:, 0], (5, 19), P.CONCAT2LINEAR),
    "cat on dim 1, then transposed": (
        lambda m, x: torch.cat([t.mT for t in two(x, 5)], 1).transpose(1, 2),
        (5, 19),
        P.CONCAT2LINEAR,
    ),
    "scaled by a parameter": (lambda m, x: torch.cat(two(x, 5), -1) * m.norm.weight + 1, (5, 19), P.CONCAT2LINEAR),
    "layer norm between": (lambda m, x: m.norm(torch.cat(two(x, 5), -1)), (5, 19), P.CONCAT2LINEAR),
    "cat of heads, then merged": (
        lambda m, x: torch.cat([t.view(2, 5, -1, 3) for t in two(x, 9)], 2).flatten(2),
        (9, 15),
        P.CONCAT2LINEAR,
    ),
    "stack and flatten": (lambda m, x: torch.stack(two(x), dim=2).flatten(2), (12, 12), P.STACK2LINEAR),
    "stack, dim negative, reshape": (
        lambda m, x: torch.stack([x, x, x], -2).reshape(2, 5, 24),
        (8, 8, 8),
        P.STACK2LINEAR,
    ),
    "stack by keywords, view": (
        lambda m, x: torch.stack(tensors=two(x), dim=-2).view(10, 24),
        (12, 12),
        P.STACK2LINEAR,
    ),
    "stack in front, permuted": (
        lambda m, x: torch.stack(two(x)).permute(1, 2, 0, 3).flatten(-2),
        (12, 12),
        P.STACK2LINEAR,
    ),
    "heads": (lambda m, x: x.repeat(1, 1, 3).view(2, 5, 6, 4).cumsum(0).reshape(2, 5, 24), (4,) * 6, P.RESHAPE2LINEAR),
    "heads, flatten": (
        lambda m, x: x.repeat(1, 1, 3).view(2, 5, 3, 8).transpose(1, 2).cumsum(0).transpose(1, 2).flatten(2),
        (8,) * 3,
        P.RESHAPE2LINEAR,
    ),
    "heads, tokens last": (
        lambda m, x: x.mT.repeat(1, 3, 1).view(2, 4, 6, 5).cumsum(0).flatten(1, 2).mT,
        (6,) * 4,
        P.RESHAPE2LINEAR,
    ),
    "heads of one token": (lambda m, x: x[:, :3].cumsum(0).view(2, 1, 3, 8).reshape(2, 24), (8,) * 3, P.RESHAPE2LINEAR),
    "heads joined to something": (
        lambda m, x: torch.cat([x.view(2, 5, 2, 4).cumsum(0).flatten(2), x, x], -1),
        (8, 8, 8),
        P.CONCAT2LINEAR,
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", JOINS)
def test_input_segments(name):
    join, sizes, pattern = JOINS[name]
    found = of(lambda m, x: m.b(join(m, x)), "b")
    assert found.input_segments == sizes
    assert found.patterns == (pattern,)
    assert found.activations == (None,) * len(sizes)
    assert found.output_segments == (8,)
    assert found.evidence[0].startswith("input = ")


NOT_JOINED = {
    "tokens": lambda m, x: torch.cat([x.repeat(1, 1, 3), x.repeat(1, 1, 3)], 1),
    "stack on the last dim": lambda m, x: torch.stack(two(x), -1).flatten(2),
    "a residual stream": lambda m, x: torch.cat(two(x), -1) + x.repeat(1, 1, 3),
    "a joined position code added": lambda m, x: (
        x.repeat(1, 1, 3) + torch.cat([m.norm.weight[:4], m.norm.weight[4:]])[None]
    ),
    "tokens by hstack": lambda m, x: torch.hstack([x.repeat(1, 1, 3), x.repeat(1, 1, 3)]),
    "batch by vstack": lambda m, x: torch.vstack([x.repeat(1, 1, 3), x.repeat(1, 1, 3)]),
    "single features by column_stack": lambda m, x: torch.column_stack([x[0, :, 0].cumsum(0)] * 24),
    "one operand": lambda m, x: torch.cat([x.repeat(1, 1, 3)], -1),
    "leading dims merged": lambda m, x: x.repeat(1, 1, 3).reshape(-1, 24),
    "a convolution between": lambda m, x: F.conv1d(torch.cat(two(x), -1).mT, torch.ones(24, 24, 1)).mT,
    "written over": lambda m, x: torch.cat(two(x), -1).copy_(x.repeat(1, 1, 3)),
}


@pytest.mark.parametrize("name", NOT_JOINED)
def test_input_left_whole(name):
    found = of(lambda m, x: m.b(NOT_JOINED[name](m, x)), "b")
    assert (found.input_segments, found.patterns, found.evidence) == ((24,), (), ())


def test_picks_by_a_buffer():
    toy = Toy(lambda m, x: used([m.a(x).index_select(-1, m.low), m.a(x)[..., m.high]]))
    toy.register_buffer("low", torch.arange(9))
    toy.register_buffer("high", torch.arange(9, 24))
    assert trace(toy, X)["a"].output_segments == (9, 15)
    assert trace(toy.to("meta"), X)["a"].output_segments == (24,)  # index values are unknown on the meta device


def test_glu_splits_its_linear():
    found = of(lambda m, x: m.b(F.glu(m.a(x), dim=-1)), "a", b=12)
    assert (found.output_segments, found.patterns) == ((12, 12), (P.LINEAR2CHUNK,))


def test_one_tensor_feeds_two_linears():
    def run(m, x):
        joined = torch.cat([F.silu(m.a(x)), x], -1)
        return m.b(joined), m.d(joined)

    toy = Toy(run, b=32)
    toy.d = nn.Linear(32, 4)
    found = trace(toy, X)
    assert found["b"].input_segments == found["d"].input_segments == (24, 8)
    assert found["b"].activations == found["d"].activations == ("silu", None)


def test_linear_used_twice_agreeing():
    found = of(lambda m, x: [m.b(torch.cat(two(x, 5), -1)) for _ in range(2)], "b")
    assert (found.calls, found.input_segments) == (2, (5, 19))
    assert not any("differ" in e for e in found.evidence)


def test_linear_used_twice_differing_gets_the_common_refinement():
    def run(m, x):
        used(m.a(x).chunk(2, -1))
        used(m.a(x).split([8, 16], -1))
        return m.b(torch.cat([F.silu(m.a(x)[..., :5]), two(x, 5)[1]], -1)), m.b(F.silu(torch.cat(two(x, 9), -1)))

    found = trace(Toy(run), X)
    assert (found["a"].calls, found["a"].output_segments) == (3, (5, 3, 4, 12))
    assert found["b"].input_segments == (5, 4, 15)
    assert found["b"].activations == ("silu", None, None)
    assert "the cuts of all are used" in found["b"].evidence[-1]


def test_order_and_calls():
    found = trace(Toy(lambda m, x: m.b(m.c(m.b(m.a(x))))), X)
    assert [(t.name, t.order, t.calls) for t in found.values()] == [("a", 0, 1), ("b", 1, 2), ("c", 2, 1)]
    assert "c" not in trace(Toy(lambda m, x: m.b(m.a(x))), X)


def test_only_the_patterns_asked_for():
    def run(m, x):
        half, gate = m.a(x).chunk(2, -1)
        return m.b(torch.cat([half * F.gelu(gate), x[..., :4], x], -1))

    def names(patterns):
        found = trace(Toy(run), X, patterns=patterns)
        return found["a"].output_segments, found["b"].input_segments, found["b"].activations

    assert names(None) == ((12, 12), (12, 4, 8), ("gelu", None, None))
    assert names(P.all()) == names(None)
    assert names([]) == ((24,), (24,), (None,))
    assert names([P.LINEAR2SPLIT]) == names([])
    assert names([P.LINEAR2CHUNK]) == ((12, 12), (24,), (None,))
    assert names(P.seg()) == ((12, 12), (12, 4, 8), (None, None, None))
    assert names([P.CONCAT2LINEAR]) == ((24,), (12, 4, 8), (None, None, None))
    assert names([P.ACTIVATION2LINEAR]) == ((24,), (24,), (None,))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(["split", "cat"]))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_partition_is_found(sizes, kind):
    total = sum(sizes)
    if kind == "split":
        assert of(lambda m, x: used(m.a(x).split(sizes, -1)), "a", a=total).output_segments == tuple(sizes)
    else:
        parts = functools.partial(map, lambda n: torch.zeros(2, 5, n))
        assert of(lambda m, x: m.b(torch.cat(list(parts(sizes)), -1)), "b", b=total).input_segments == tuple(sizes)
