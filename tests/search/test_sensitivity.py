"""Inputs and gradients against closed forms, on nets with known derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hfquant.search.sensitivity import ROWS, watch
from tests.report.conftest import small_llama
from tests.search.nets import Net, inputs


def test_squares_of_gradients():
    net = Net()
    found = watch(net, {"loud": net.loud, "quiet": net.quiet}, inputs())
    # The output's gradient has a random direction and unit variance, and is scaled by each layer's factor.
    loud, quiet = torch.cat(found["loud"].squares), torch.cat(found["quiet"].squares)
    assert loud.shape == quiet.shape == (32, 64)
    assert loud.mean().item() == pytest.approx(100, rel=0.1)
    assert quiet.mean().item() == pytest.approx(1e-4, rel=0.1)
    assert (found["loud"].kept, found["loud"].rows) == (32, 32)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_harm_is_the_squared_change_of_the_output():
    net, data = Net(), [torch.randn(4 * ROWS, 64)]
    found = watch(net, {"loud": net.loud}, data)["loud"]
    assert (found.kept, found.rows) == (ROWS, 4 * ROWS)
    other = copy.deepcopy(net.loud)
    with torch.no_grad():
        other.weight += 0.01 * torch.randn(64, 64)
        moved = (10 * (other(data[0]) - net.loud(data[0])).double()).square().sum().item()
        size = net.loud(data[0]).double().square().sum().item()
    harm, relative = found.errors(net.loud, other)
    assert harm == pytest.approx(moved, rel=0.1)
    assert relative == pytest.approx(moved / 100 / size, rel=0.1)
    assert found.errors(net.loud, net.loud) == (0.0, 0.0)


def test_an_input_without_leading_dimensions_is_one_row():
    linear, x = nn.Linear(6, 4), torch.randn(6)
    found = watch(linear, {"": linear}, [x])[""]
    assert (found.kept, found.rows) == (1, 1)
    other = copy.deepcopy(linear)
    with torch.no_grad():
        other.weight += 0.01
    assert found.errors(linear, other)[0] > 0


class Masked(nn.Module):
    """A net whose first row is a thousand times as large as the others and reaches no output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([1000 * x[:1], x[1:]])
        return self.outer(torch.cat([0 * x[:1], self.inner(x)[1:]]))


def test_rows_without_a_gradient_do_no_harm():
    net, x = Masked(), torch.randn(50, 8)
    found = watch(net, {"inner": net.inner}, [x])["inner"]
    other = copy.deepcopy(net.inner)
    with torch.no_grad():
        other.weight += 0.01 * torch.randn(8, 8)
        first = (other(1000 * x[:1]) - net.inner(1000 * x[:1])).square().sum().item()
    assert found.errors(net.inner, other)[0] < 0.01 * first


class Twice(nn.Module):
    """One layer that is called twice; only the second call affects the output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return 0 * self.layer(x) + self.layer(x + 1)


def test_calls_keep_their_own_gradients():
    net, x = Twice(), torch.randn(5, 4)
    found = watch(net, {"layer": net.layer}, [x])["layer"]
    assert not found.squares[0].any()
    assert found.squares[1].any()
    order = torch.cdist(found.inputs[1], x + 1).argmin(1)
    assert torch.equal(found.inputs[1], (x + 1)[order])


@pytest.mark.parametrize("channels", [6, 3])
def test_layers_that_do_not_map_rows_to_rows_are_kept_whole(channels):
    """Also layers whose outputs have the shape of their inputs."""
    net = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Flatten(), nn.Linear(channels * 25, 2))
    found = watch(net, {"0": net[0], "2": net[2]}, [torch.randn(3, 3, 5, 5), torch.randn(2, 3, 5, 5)])
    assert [tuple(x.shape) for x in found["0"].inputs] == [(1, 3, 5, 5)] * 2
    assert [tuple(s.shape) for s in found["0"].squares] == [(1, channels, 5, 5)] * 2
    assert (found["0"].kept, found["0"].rows) == (2, 5)
    assert sum(len(x) for x in found["2"].inputs) == 5


def test_a_language_model():
    model = small_llama()
    names = ["model.embed_tokens", "model.layers.0.mlp.up_proj", "lm_head"]
    layers = {name: model.get_submodule(name) for name in names}
    found = watch(model, layers, [{"input_ids": torch.randint(50, (2, 12))}])
    assert set(found) == set(names[1:])
    # At the head, the expected square of a logit's gradient is p (1 - p), over labels drawn from p.
    with torch.no_grad():
        p = model.lm_head(torch.cat(found["lm_head"].inputs)).double().softmax(-1)
    squares = torch.cat(found["lm_head"].squares).double()
    assert squares.sum().item() == pytest.approx((p * (1 - p)).sum().item(), rel=0.05)


class NoGradient(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_without_a_gradient_there_are_inputs(caplog):
    net = NoGradient()
    found = watch(net, {"loud": net.loud}, inputs())["loud"]
    assert "no gradient" in caplog.text
    assert found.inputs
    assert not found.squares
    harm, relative = found.errors(net.loud, nn.Linear(64, 64))
    assert harm == relative > 0


class Aside(Net):
    """A net with a layer that runs but that the output does not depend on, as the last one of LLaVA's vision tower."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return super().forward(x)


def tiny_scale() -> nn.Module:
    """A model without a head whose residual stream is so small that normalizing it has huge gradients."""
    model = small_llama().model
    for norm in (module for module in model.modules() if hasattr(module, "variance_epsilon")):
        norm.variance_epsilon = 1e-12
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
                parameter.mul_(1e-3)
    return model


def test_gradients_that_overflow_in_float16_are_scaled():
    model, data = tiny_scale(), [torch.arange(12).view(2, 6) for _ in range(2)]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found, half = (
        watch(each, {name: each.get_submodule(name) for name in names}, data)
        for each in (model, copy.deepcopy(model).half())
    )
    squares = {name: torch.cat(seen.squares).sum().item() for name, seen in found.items()}
    assert max(torch.cat(seen.squares).max().item() for seen in found.values()) > 65504**2
    assert {name: torch.cat(seen.squares).sum().item() for name, seen in half.items()} == pytest.approx(
        squares, rel=0.05
    )


def test_gradients_that_are_not_finite_are_left_out(caplog):
    class Steep(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (0 * self.loud(x)).sqrt()

    net = Steep()
    found = watch(net, {"loud": net.loud, "quiet": net.quiet}, inputs())
    assert not any(seen.squares for seen in found.values())
    assert all(seen.inputs for seen in found.values())
    assert caplog.text.count("gradients of the model's output are not finite: using forward differences") == 1


def test_a_layer_that_no_gradient_reaches_does_no_harm(caplog):
    net = Aside()
    found = watch(net, {name: net.get_submodule(name) for name in ("loud", "quiet", "aside")}, inputs())
    assert not caplog.records
    assert {name: seen.is_reached for name, seen in found.items()} == {"loud": True, "quiet": True, "aside": False}
    assert all(seen.has_gradients for seen in found.values())
    harm, relative = found["aside"].errors(net.aside, nn.Linear(64, 64))
    assert harm == 0 < relative
    assert found["loud"].errors(net.loud, nn.Linear(64, 64))[0] > 0


def test_layers_called_by_keyword_and_changed_in_place(caplog):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(torch.relu_(self.a(input=x)))

    net, data = Inner(), [torch.randn(6, 8) for _ in range(3)]
    seen = watch(net, {"a": net.a, "b": net.b}, data)
    assert not caplog.records
    assert all(found.has_gradients for found in seen.values())
    assert seen["a"].rows == seen["b"].rows == 18
