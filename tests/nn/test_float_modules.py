"""Which subclasses of ``nn.Linear`` count as linears, and what is remembered of a float module."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from hfquant.nn.float_modules import first, hollow, is_plain_linear


class Matmul(nn.Linear):
    def forward(self, input):
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Inherited(Matmul):
    pass


class Scaled(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 1.001


class Forgets(nn.Linear):
    """Correct only without a bias."""

    def forward(self, input):
        return input @ self.weight.T


class Grouped(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(-1, 5)).view(-1)


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Fails(nn.Linear):
    def forward(self, x):
        raise KeyError(x)


class Second(nn.Linear):
    def forward(self, x, scale=1.0):
        return super().forward(x)


class Stateful(Matmul):
    def __init__(self, *args):
        super().__init__(*args)
        self.gain = 2.0


@pytest.mark.parametrize("kind", [nn.Linear, Matmul, Inherited])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_linears(kind, device) -> None:
    before = torch.get_rng_state()
    with torch.device(device):
        module = kind(7, 3)
    after = torch.get_rng_state()
    assert is_plain_linear(module) == (kind is not nn.Linear)  # torch's own classes are not checked
    assert torch.equal(torch.get_rng_state(), after)
    assert device == "cpu" or torch.equal(before, after)


@pytest.mark.parametrize("kind", [Scaled, Forgets, Grouped, Router, Fails, Second, Stateful])
def test_others(kind) -> None:
    assert not is_plain_linear(kind(7, 3))


def test_a_buffer_or_a_child_is_more_than_a_linear() -> None:
    module = Matmul(4, 4)
    module.register_buffer("extra", torch.ones(1))
    assert not is_plain_linear(module)
    module = Matmul(4, 4)
    module.child = nn.Identity()
    assert not is_plain_linear(module)


def test_torch_s_own_subclass_is_there_to_be_left_alone() -> None:
    assert not is_plain_linear(nn.MultiheadAttention(4, 1).out_proj)


def test_hollow() -> None:
    module = Matmul(4, 3).half().eval()
    module.note = [1]
    module.register_forward_hook(lambda *args: None)
    add_hook_to_module(module, ModelHook())
    found = hollow(module)
    assert type(found) is Matmul
    assert found.weight.is_meta
    assert found.bias.is_meta
    assert (found.weight.shape, found.weight.dtype, found.in_features) == ((3, 4), torch.float16, 4)
    assert found.note is module.note
    assert not found.training
    assert not found._forward_hooks
    assert "forward" not in vars(found)
    assert not module.weight.is_meta
    assert hollow(nn.Embedding(3, 2)).weight.is_meta


@pytest.mark.parametrize("names", [["weight", "bias"], ["bias", "weight"]])
def test_hollow_keeps_the_order_of_parameters(names: list[str]) -> None:
    linear = nn.Linear(3, 2)
    linear._parameters = {name: linear._parameters[name] for name in names}
    assert list(hollow(linear)._parameters) == names


def test_first() -> None:
    assert first((1, 2), {}) == 1
    assert first((), {"hidden": 3, "other": 4}) == 3
