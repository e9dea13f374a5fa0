"""Each quantized layer next to its float layer: the error, and the rows that are kept."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import hfquant
from hfquant.layer_errors import ROWS, part_name, relative_error, row_errors, watch
from hfquant.nn.kinds import kind_of
from hfquant.nn.modules import quant_layers


def test_errors_are_relative_and_see_the_median_row():
    right = torch.tensor([[1e4, 0.0], [1.0, 1.0], [3.0, 4.0]])
    output = right.clone()
    output[1:] = 0
    errors = row_errors(output, right)
    assert errors.tolist() == [0, 1, 1]
    # Over all rows, the huge one hides the others' errors.
    assert float((output - right).norm() / right.norm()) < 1e-3
    assert relative_error(output, right, errors) == 1


def test_what_the_float_layer_cannot_do_is_no_fault():
    right = torch.tensor([[torch.inf, 1.0], [1.0, 1.0]])
    output = torch.tensor([[torch.nan, 1.0], [1.0, 1.0]])
    assert relative_error(output, right, row_errors(output, right)) == 0
    assert relative_error(right, output.nan_to_num(2.0), row_errors(right, output.nan_to_num(2.0))) == torch.inf
    empty = torch.zeros(0, 2)
    assert relative_error(empty, empty, row_errors(empty, empty)) == 0


class Net(nn.Module):
    """A convolution and a linear, one of which is spoiled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).movedim(1, -1))


def watched(spoilt: str, factor: float, batches: list[Tensor]):
    net = Net()
    model = copy.deepcopy(net)
    config = {"opt": {"type": "default"}, "weight_quant": {"type": "int8", "axis": -1}, "input_quant": None}
    hfquant.quantize(model, None, {"default": config, "conv": {"enable": True}})
    layers = quant_layers(model)
    assert [*layers] == ["conv", "linear"]
    layers[spoilt].weight_scale *= factor

    def exact(name: str) -> tuple[Tensor, Tensor | None]:
        module = net.get_submodule(name)
        kind = kind_of(module)
        return kind.matrix(module.get_parameter("weight").detach()), module.bias

    return net, watch(model, layers, exact, batches)


@torch.no_grad()
def test_a_layer_answers_for_itself_alone():
    """The linear is not blamed for the convolution's error, only for the error of its own rows."""
    batches = [torch.randn(2, 8, 9, 7), torch.randn(1, 8, 12, 12)]
    net, seen = watched("conv", 3.0, batches)
    assert 1.9 < seen["conv"].error < 2.1
    assert seen["linear"].error < 0.02
    assert not len(seen["linear"].rows)
    rows, right = seen["conv"].rows, seen["conv"].right
    assert ROWS // 2 < len(rows) <= ROWS
    kind = kind_of(net.conv)
    torch.testing.assert_close(rows @ kind.matrix(net.conv.weight).T, right, rtol=1e-4, atol=1e-5)
    _, seen = watched("linear", 3.0, batches)
    assert seen["conv"].error < 0.02
    assert 1.5 < seen["linear"].error < 2.5


@torch.no_grad()
def test_the_worst_of_several_samples_counts_and_few_rows_are_kept_whole():
    x = torch.randn(1, 8, 3, 3)
    _, seen = watched("conv", float("nan"), [x])
    assert seen["conv"].error == torch.inf
    assert seen["conv"].rows.shape == (9, 72)
    _, seen = watched("conv", 1.0, [0 * x])
    assert "conv" not in seen, "without error"


def test_names():
    assert part_name("a.b", "c.3") == "a.b.c.3"
    assert part_name("a.b", "") == "a.b"
    assert part_name("", "c.3") == "c.3"
