"""Tracing a forward: what is reported, which inputs work, and that the model is left unchanged."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hfquant.dataflow.trace import PatternError, trace

X = torch.zeros(2, 5, 8)


class Toy(nn.Module):
    """Linears ``a`` (8 -> 24), ``b`` (24 -> 8) and ``c`` (8 -> 24) around a function of the module and the input."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 24)
        self.table = nn.Parameter(torch.zeros(3))
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def of(forward, layer, x=X):
    return trace(Toy(forward), x)[layer]


def joined(x, n=5):
    """Concatenate two tensors, n and 24 - n wide."""
    return torch.cat([x.repeat(1, 1, 3)[..., :n].cumsum(0), x.repeat(1, 1, 3)[..., n:].cumsum(0)], -1)


def test_subclasses_that_are_no_linears_are_not_reported():
    class Custom(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.custom, self.plain = nn.MultiheadAttention(8, 2), Custom(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.plain(self.custom(self.attn(x, x, x)[0]))

    assert list(trace(Model(), X)) == ["plain"]


@pytest.mark.parametrize(
    "example",
    [X, (X,), [X], {"x": X}, X.to("meta"), {"x": X.to("meta")}],
    ids=["tensor", "tuple", "list", "dict", "meta", "meta dict"],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_forms_of_example(example, device):
    model = Toy(lambda m, x: m.b(F.silu(m.a(x)))).to(device)
    assert trace(model, example)["b"].activations == ("silu",)


def test_batch_encoding():
    from transformers import BatchEncoding

    model = Toy(lambda m, x: m.b(F.silu(m.a(x))))
    assert trace(model, BatchEncoding({"x": X}))["b"].activations == ("silu",)


def test_bf16_model():
    model = Toy(lambda m, x: m.b(joined(x))).bfloat16()
    assert trace(model, X.bfloat16())["b"].input_segments == (5, 19)


def test_no_example():
    with pytest.raises(ValueError, match="example inputs"):
        trace(Toy(lambda m, x: m.a(x)), None)


def test_a_forward_that_branches_on_numbers_runs_on_real_tensors():
    def run(m, x):
        return m.b(joined(x, 5 if x.sum() > 0 else 9))

    assert of(run, "b", x=X + 1).input_segments == (5, 19)
    assert of(run, "b", x=X).input_segments == (9, 15)
    with pytest.raises(PatternError, match="fake tensors"):
        trace(Toy(run).to("meta"), X)
    with pytest.raises(PatternError, match="fake tensors"):
        trace(Toy(run), X.to("meta"))


def test_a_forward_that_fails_says_why():
    with pytest.raises(PatternError, match=r"nor on real ones.*shapes cannot be multiplied") as caught:
        trace(Toy(lambda m, x: m.b(x)), X)
    assert isinstance(caught.value.__cause__, RuntimeError)


class Stateful(nn.Module):
    """Changes itself in every way that a forward should not, on fake or (with ``branch``) on real tensors."""

    def __init__(self, branch):
        super().__init__()
        self.a, self.c, self.norm, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(()))
        self.branch, self.cache, self.seen = branch, {}, 0

    def forward(self, x):
        self.steps += 1
        self.seen += 1
        self.cache["x"] = x
        self.register_buffer("late", x.sum())
        self.a.weight.requires_grad_(False)
        if self.branch and x.sum() > -1:
            self.a.to(torch.float64).to(torch.float32)
            self.c = self.c.to(torch.float64)
        return self.norm(self.drop(self.a(x))) + torch.randn(8)


@pytest.mark.parametrize("branch", [False, True], ids=["fake", "real"])
def test_model_is_left_as_it_was(branch):
    model = Stateful(branch).train()
    model.register_forward_hook(hook := lambda m, args, out: None)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    parameters = {n: id(p) for n, p in model.named_parameters()}
    inside = X.clone()
    trace(model, inside)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert model.training
    assert model.drop.training
    assert (model.seen, model.cache) == (0, {})
    assert list(model._forward_hooks.values()) == [hook]
    assert not model.a._forward_hooks
    assert not model.a._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())
    assert model.a.weight.requires_grad
    assert model.c.weight.dtype == torch.float32
    assert torch.equal(inside, X)
    assert model(X).shape == (2, 5, 8)


@functools.lru_cache
def positions(n):
    return torch.arange(n)


def test_no_fake_tensor_stays_in_a_cache():
    positions.cache_clear()
    model = Toy(lambda m, x: m.a(x + positions(8)))
    trace(model, X)
    assert torch.equal(positions(8), torch.arange(8))
    assert model(X).shape == (2, 5, 24)


def test_inference_mode_and_grad_mode_outside():
    model = Toy(lambda m, x: m.a(x).chunk(2, -1))
    with torch.inference_mode():
        assert trace(model, X)["a"].output_segments == (12, 12)
    with torch.enable_grad():
        assert trace(model, X)["a"].output_segments == (12, 12)
        assert torch.is_grad_enabled()


def test_offloaded_model():
    from accelerate import cpu_offload

    model = cpu_offload(Toy(lambda m, x: m.b(F.silu(m.a(x)))))
    assert model.a.weight.is_meta
    assert trace(model, X)["b"].activations == ("silu",)
    assert model.a.weight.is_meta
    assert model(X).shape == (2, 5, 8)


def test_offloaded_model_on_real_tensors():
    from accelerate import cpu_offload

    model = Toy(lambda m, x: m.b(joined(x, 5 if x.sum() > 0 else 9)))
    expected = model(X)
    cpu_offload(model)
    assert trace(model, X)["b"].input_segments == (9, 15)
    assert model.b.weight.is_meta
    assert torch.equal(model(X), expected)


def test_a_module_that_deepcopy_refuses():
    model = Toy(lambda m, x: m.b(F.silu(m.a(x)) * m.computed))
    model.computed = model.table.sum() * 2
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    assert trace(model, X)["b"].activations == ("silu",)
