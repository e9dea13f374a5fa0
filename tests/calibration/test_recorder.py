"""Every kind of recorded argument is restored as it was: type, value, dtype, shape, bit for bit."""

import json
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding, DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from hfquant.calibration.recorder import Recording, Target, decode, encode, find_layer, record
from tests.calibration.tiny_models import tiny_llama

Pair = namedtuple("Pair", "left right")


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
    *(torch.complex64, torch.complex128),
]


def identical(a, b) -> bool:
    """Return whether two values are equal in type, structure and bits (NaN equals NaN, 0.0 does not equal -0.0)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and a.contiguous().reshape(-1).view(torch.uint8).tolist() == (
            b.contiguous().reshape(-1).view(torch.uint8).tolist()
        )
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):  # Python cannot tell which NaN a Python float is
        return (np.isnan(a) and np.isnan(b)) or np.float64(a).tobytes() == np.float64(b).tobytes()
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[k], b[k]) for k in a)
    return a == b


def round_trip(value):
    tensors: dict[str, torch.Tensor] = {}
    structure = json.loads(json.dumps(encode(value, tensors, "x"), allow_nan=False))
    return decode(structure, tensors)


def random_tensor(dtype: torch.dtype, shape, seed: int = 0) -> torch.Tensor:
    """Return random bits, which include NaNs, infinities and subnormals; 0 or 1 for bool."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    bits = torch.randint(0, 256, (int(np.prod(shape)) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(shape)


tensors = st.builds(
    random_tensor,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(0, 1000),
)
scalars = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    *(st.sampled_from(DTYPES), st.just(torch.device("cpu")), st.just(np.float32(0.1)), tensors),
)
keys = st.one_of(st.text(max_size=3), st.integers(), st.tuples(st.integers(), st.text(max_size=2)))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(values)
def test_any_nesting_round_trips(value):
    assert identical(round_trip(value), value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 3)], ids=str)
def test_tensors_of_every_dtype_and_shape(dtype, shape):
    tensor = random_tensor(dtype, shape)
    assert identical(round_trip(tensor), tensor)


@pytest.mark.parametrize(
    "value",
    [
        {"$tensor": [1, 2], "$unknown": None},  # keys that look like the recorder's own tags
        {1: {2: {3: (None, [True, 1, 1.0])}}},
        np.arange(6).reshape(2, 3)[:, ::2],
        1 << 200,
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_round_trip(value):
    assert identical(round_trip(value), value)


def test_mappings_and_sizes_become_plain():
    assert round_trip(OrderedDict(a=1)) == {"a": 1}
    assert type(round_trip(BatchEncoding({"ids": [1]}))) is dict
    assert round_trip(torch.Size([1, 2])) == (1, 2)


def test_unusual_tensors():
    base = torch.arange(12.0).reshape(3, 4)
    for tensor in (base.T, base[:, 1::2], base[1].expand(5, 4), torch.randn(2, 2, dtype=torch.complex64).conj()):
        assert torch.equal(round_trip(tensor), tensor.detach())
    leaf = torch.randn(3, requires_grad=True)
    for tensor in (leaf, leaf * 2, nn.Parameter(torch.ones(2))):
        back = round_trip(tensor)
        assert type(back) is torch.Tensor
        assert not back.requires_grad
        assert torch.equal(back, tensor.detach())


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 3), (2, 1)])
def test_expanded_tensors(shape):
    """A timestep expanded to a batch of one has stride 0, and still counts as contiguous."""
    tensor = torch.tensor(1.5).expand(shape)
    assert identical(round_trip(tensor), torch.full(shape, 1.5))
    assert identical(round_trip(torch.full((2, 3), 1.5).expand(1, 2, 3)), torch.full((1, 2, 3), 1.5))


def test_samples_are_snapshots_and_copies():
    recording, tensor = Recording(), torch.zeros(4)
    view = tensor[1:3]
    recording.add((tensor, view, tensor))
    tensor += 1  # what an in-place layer does after the call
    first = recording[0]
    assert [part.tolist() for part in first] == [[0.0] * 4, [0.0] * 2, [0.0] * 4]
    first[0].fill_(7)
    assert first[2].tolist() == [0.0] * 4, "two arguments must not share memory"
    assert recording[0][0].tolist() == [0.0] * 4


def test_equal_tensors_are_kept_once():
    recording = Recording()
    embedding = torch.randn(4, 8)
    for step in range(10):
        recording.add({"context": embedding.clone(), "t": torch.tensor(step)})
    assert len(recording.tensors) == 11
    recording.add((torch.zeros(4, dtype=torch.int32), torch.zeros(2, 2), torch.zeros(4)))  # equal bytes, other dtypes
    assert [t.shape for t in recording[10]] == [(4,), (2, 2), (4,)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, object()]}, r"x\['a'\]\[1\]: a builtins.object"),
        (torch.ones(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.empty(2, device="meta"), "on meta"),
        (np.array(["a"]), "numpy array"),
        (lambda: None, "function cannot be recorded"),
        (DynamicCache(), "use_cache=False"),
        ({1, 2}, "set cannot be recorded"),
        (Pair(1, 2), "Pair cannot be recorded"),
        (BaseModelOutput(last_hidden_state=torch.ones(2)), "BaseModelOutput cannot be recorded"),
    ],
)
def test_what_cannot_be_stored_is_refused(value, message):
    with pytest.raises(TypeError, match=message):
        encode(value, {}, "x")


@pytest.mark.parametrize(
    "structure",
    [
        {"$tensor": ["missing", "float32", [1]]},
        {"$tensor": ["k", "float32", [1 << 60]]},
        {"$tensor": ["k", "float32", [-2, -2]]},
        {"$tensor": ["empty", "float32", [0, 1 << 70]]},
        {"$tensor": ["k", "float32", [True, 4]]},
        {"$tensor": ["k", "float32"]},
        {"$tensor": ["k", "load", [4]]},
        {"$tensor": None},
        {"$dtype": "nn"},
        {"$device": "nowhere"},
        {"$float": "ten"},
        {"$array": 3},
        {"$dict": [[{"$dict": []}, 1]]},
        {"$unknown": 1},
        {"$tuple": 1},
        {},
        {"$tuple": [], "$dict": []},
        {"$object": ["os:system", []]},
    ],
)
def test_malformed_structures_are_refused(structure):
    with pytest.raises(ValueError):
        decode([structure], {"k": torch.zeros(16, dtype=torch.uint8), "empty": torch.empty(0)})


class Recorded(nn.Module):
    def forward(self, x, y=None, *rest, scale=1.0):
        return x


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1, 2, 3), {}, (1, 2, 3)),
        ((), {"x": 1, "scale": 2.0}, {"x": 1, "scale": 2.0}),
        ((1,), {"scale": 2.0}, {"x": 1, "scale": 2.0}),
        ((1, 2), {"scale": 2.0}, {"x": 1, "y": 2, "scale": 2.0}),
    ],
)
def test_calls_become_samples(args, kwargs, expected):
    layer, recording = Recorded(), Recording()
    with record(Target(layer, "layer", layer), recording, lambda: True):
        layer(*args, **kwargs)
    assert recording[0] == expected


def test_call_that_has_no_names():
    layer = Recorded()
    with (
        pytest.raises(TypeError, match=r"called with 3 positional .* names only \['x', 'y'\]"),
        record(Target(layer, "layer", layer), Recording(), lambda: True),
    ):
        layer(1, 2, 3, scale=2.0)
    assert not layer._forward_pre_hooks


def test_arguments_are_those_of_the_caller():
    """Other hooks that change the input run again when the sample is replayed, so their effect must not be recorded."""
    layer, recording = Recorded(), Recording()
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with record(Target(layer, "layer", layer), recording, lambda: True):
        assert layer(3) == 6
    assert recording[0] == (3,)


def test_finding_layers():
    model = tiny_llama()
    assert find_layer(model, "").layer is model
    assert find_layer(model, "model.layers.1").layer is model.model.layers[1]
    assert find_layer(model, model.model.layers[1].mlp).name == "model.layers.1.mlp"
    with pytest.raises(ValueError, match=r"no layer 'model.layer.1'; did you mean .*'model.layers.1'"):
        find_layer(model, "model.layer.1")
    with pytest.raises(ValueError, match="a Linear, is not part of this LlamaForCausalLM"):
        find_layer(model, nn.Linear(1, 1))
    with pytest.raises(TypeError, match="got dict"):
        find_layer({}, "x")
