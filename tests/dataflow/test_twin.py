"""Running a copy of a model: what torch must provide, and what is reported if the model fails."""

import contextlib
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hfquant.dataflow import failure, twin
from hfquant.dataflow.functions import name_of

X = torch.zeros(2, 5, 8)

PRIVATE = {
    "torch._C.DisableTorchFunction": lambda: torch._C.DisableTorchFunction,
    "torch._subclasses.fake_tensor.FakeTensor": lambda: torch._subclasses.fake_tensor.FakeTensor,
    "torch._subclasses.fake_tensor.FakeTensorMode": lambda: torch._subclasses.fake_tensor.FakeTensorMode,
    "torch._subclasses.fake_tensor.unset_fake_temporarily": lambda: (
        torch._subclasses.fake_tensor.unset_fake_temporarily
    ),
    "torch.utils._pytree.tree_map_only": lambda: torch.utils._pytree.tree_map_only,
    "torch.utils.weak.WeakTensorKeyDictionary": lambda: torch.utils.weak.WeakTensorKeyDictionary,
    "torch.overrides.TorchFunctionMode": lambda: torch.overrides.TorchFunctionMode,
    "torch.Tag.pointwise": lambda: torch.Tag.pointwise,
    "torch.ops.aten.mul.overloads": lambda: torch.ops.aten.mul.overloads,
}


@pytest.mark.parametrize("name", PRIVATE)
def test_torch_has_what_dataflow_uses(name):
    try:
        PRIVATE[name]()
    except AttributeError as error:
        pytest.fail(f"torch {torch.__version__} has no {name}, which hfquant.dataflow needs: {error}")


def test_torch_logs_what_it_cannot_fake_where_it_is_kept_from_it():
    assert torch._subclasses.fake_tensor.log is logging.getLogger(twin.FAKE_TENSOR_LOG)


def test_function_modes_see_properties_by_name():
    """Reading ``weight.dtype`` arrives as ``__get__`` of a descriptor named ``dtype``."""
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(name_of(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        _ = X.dtype, X.is_floating_point()
    assert seen == ["dtype", "is_floating_point"]


class Picky(nn.Module):
    """Rejects inputs that are not floating point, as a quantized linear does."""

    def forward(self, x):
        if not x.is_floating_point():
            raise TypeError(f"Picky got {x.dtype}\nand more")
        return x


class Caught(nn.Module):
    """Catches an error raised by its submodule."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"picky": Picky()})

    def forward(self, x):
        try:
            self.inner["picky"](x.to(torch.int8))
        except TypeError:
            return x


class Outer(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.caught, self.block, self.dtype = Caught(), nn.Sequential(nn.Linear(8, 8), Picky()), dtype

    def forward(self, x):
        return self.block[1](self.block[0](self.caught(x)).to(self.dtype))


def test_failure_names_the_error_and_the_innermost_module():
    assert failure(Outer(torch.float32), X) is None
    said = failure(Outer(torch.int8), X)
    assert "TypeError: Picky got torch.int8" in said
    assert said.endswith("(in block.1)")
    assert "\n" not in said


def test_failure_on_the_meta_device():
    assert failure(Outer(torch.float32).to("meta"), X) is None
    assert failure(Outer(torch.int8).to("meta"), X) == (
        "Outer does not run on fake tensors: TypeError: Picky got torch.int8 (in block.1)"
    )


def test_failure_in_the_model_itself():
    class Model(nn.Module):
        def forward(self, x):
            return F.linear(x, torch.ones(3, 4))

    said = failure(Model(), X)
    assert said.startswith("Model runs neither on fake tensors (RuntimeError: ")
    assert "(in " not in said


def test_functions_that_a_forward_compiles_run_uncompiled():
    """The code that inductor generates would read the data pointers of fake tensors, and crash the process."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.double = torch.compile(lambda x: 2 * x, backend=backend)

        def forward(self, x):
            return torch.compile(F.relu, backend=backend)(self.double(self.linear(x)))

    model = Model()
    for fake in (True, False):
        watched = twin.run_twin(model, X, lambda copy: contextlib.nullcontext(copy), [fake])
        assert watched[1] is fake
    assert not compiled
    model(X)
    assert len(compiled) == 2, "and only the twin's run is kept from compiling"


class Holding(nn.Module):
    """Multiplies by tensors that are neither parameters nor buffers."""

    def __init__(self, hold):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.held = hold(self.linear.weight)

    def forward(self, x):
        y = self.linear(x)
        for scale in tensors_in(self.held):
            y = y * scale
        return y


class Box:
    def __init__(self, held):
        self.held = held


def tensors_in(held):
    return torch.utils._pytree.tree_leaves(held.held if isinstance(held, Box) else held)


HELD = {
    "attribute": lambda w: torch.full((8,), 2.0),
    "computed": lambda w: w.sum(0) * 2,
    "list": lambda w: [torch.full((8,), 2.0), torch.full((8,), 3.0)],
    "computed in a list": lambda w: [w.sum(0)],
    "dict of tuples of dicts": lambda w: {"a": ({"b": torch.full((8,), 2.0)}, torch.ones(()))},
    "parameter in a list": lambda w: [nn.Parameter(torch.full((8,), 2.0))],
    "object": lambda w: Box([torch.full((8,), 2.0)]),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("fake", [True, False])
@pytest.mark.parametrize("held", HELD)
def test_tensors_are_copied_wherever_a_module_holds_them(held, fake):
    model = Holding(HELD[held])
    seen = []

    def watch(copied):
        copied.register_forward_hook(lambda module, args, output: seen.append((module, output)))
        return contextlib.nullcontext()

    assert twin.run_twin(model, X + 1, watch, [fake])[1] == fake
    ((copied, output),) = seen
    assert isinstance(output, twin.FakeTensor) == fake
    if not fake:
        assert torch.equal(output, model(X + 1))
    for ours, theirs in zip(tensors_in(copied.held), tensors_in(model.held), strict=True):
        assert isinstance(ours, twin.FakeTensor) == fake
        assert ours is not theirs
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        assert fake or ours.data_ptr() != theirs.data_ptr()


def test_a_tensor_held_twice_is_one_in_the_twin():
    """A buffer that a list holds too is written through one name and read through the other."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(8))
            self.held = [self.scale]

        def forward(self, x):
            assert self.held[0] is self.scale
            self.scale.mul_(3)
            return x * self.held[0]

    model = Twice()
    for fake in (True, False):
        assert twin.run_twin(model, X, lambda copied: contextlib.nullcontext(), [fake])[1] == fake
    assert torch.equal(model.scale, torch.ones(8))
