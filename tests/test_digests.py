"""Digests: equal for equal content, and different for anything that could change a result."""

import enum
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import xxhash
from accelerate import cpu_offload
from PIL import Image
from torch import nn

from hfquant.digests import digest_of, digest_of_each, update_with_weights


class Color(enum.Enum):
    RED = 1


X = torch.arange(6.0)
DIFFERENT = [
    X,
    X.double(),
    X.int(),
    X.view(2, 3),
    X.view(1, 6),
    X.flip(0),
    X[:5],
    X + torch.tensor([0, 0, 0, 0, 0, 2.0**-20]),
    X.numpy(),
    X.numpy().reshape(2, 3),
    [X],
    (X,),
    [X, X],
    {"a": X},
    {"b": X},
    [],
    (),
    {},
    None,
    0,
    1,
    True,
    1.0,
    "1",
    b"1",
    "",
    [1, 2],
    [[1], 2],
    [1, [2]],
    ["ab", "c"],
    ["a", "bc"],
    Image.new("L", (2, 3)),
    Image.new("L", (3, 2)),
    Image.new("RGB", (2, 3)),
    Color.RED,
]


def test_different_values_have_different_digests() -> None:
    digests = [digest_of(value) for value in DIFFERENT]
    assert all(len(digest) == 32 and int(digest, 16) >= 0 for digest in digests)
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (X, X.clone()),
        (X.view(2, 3).T, X.view(2, 3).T.contiguous()),
        (X, nn.Parameter(X)),
        (X.numpy()[::2], X.numpy()[::2].copy()),
        ({"a": [X, (1, "b")]}, {"a": [X.clone(), (1, "b")]}),
        (torch.empty(2, 3, device="meta"), torch.empty(2, 3, device="meta")),
        (object(), object()),
    ],
    ids=["tensor", "strides", "parameter", "array", "nested", "meta", "type"],
)
def test_equal_content_has_one_digest(one, other) -> None:
    assert digest_of(one) == digest_of(other)
    assert digest_of(one, 1) != digest_of(one, 2)


def test_every_float_s_bits_count() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64):
        zeros = torch.zeros(1000).to(dtype)
        changed = zeros.clone()
        changed[999] = 1
        assert digest_of(zeros) != digest_of(changed)
    assert digest_of(torch.zeros(1)) != digest_of(-torch.zeros(1))


def weights_digest(module: nn.Module) -> str:
    digest = xxhash.xxh3_128()
    update_with_weights(digest, module)
    return digest.hexdigest()


def test_the_digest_of_a_model_is_as_recorded() -> None:
    """Stored in calibration sets: with another one, they could not be opened for the same model."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.arange(3.0))
            self.a, self.norm, self.b = nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(2, 3)
            self.b.weight = self.a.weight
            for i, parameter in enumerate(self.parameters()):
                parameter.data.fill_(i + 0.5)

    assert weights_digest(Model()) == "b1f0e81e99530c82139a50382f9f67c0"


def test_offloaded_weights_count() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = weights_digest(module)
    cpu_offload(module, torch.device("cpu"), offload_buffers=True)
    assert module[0].weight.is_meta
    assert weights_digest(module) == before


def test_a_module_s_names_parameters_and_buffers_count() -> None:
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    before = weights_digest(module)
    assert before == weights_digest(module)
    with torch.no_grad():
        module["a"].weight[2, 2] += 1
    changed = weights_digest(module)
    module["norm"].running_mean[0] = 1
    renamed = nn.ModuleDict({"b": module["a"], "norm": module["norm"]})
    digests = {before, changed, weights_digest(module), weights_digest(renamed), weights_digest(nn.Sequential())}
    assert len(digests) == 5


def test_object_arrays_are_told_by_their_type_alone() -> None:
    assert digest_of(np.array([object()])) == digest_of(np.array([object(), 1]))


def test_values_are_taken_one_at_a_time() -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def batches(count: int) -> Iterator[torch.Tensor]:
        for number in range(count):
            assert len(alive) <= 1
            batch = torch.full((4,), float(number))
            alive.add(batch)
            yield batch
            del batch

    assert digest_of_each(batches(5)) == digest_of_each(torch.full((4,), float(number)) for number in range(5))
    assert digest_of_each(batches(5)) != digest_of_each(batches(4)) != digest_of_each(())
