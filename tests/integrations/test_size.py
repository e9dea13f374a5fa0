"""The reported size of a quantized model: bytes as stored, and one parameter per byte of codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from hfquant import HfQuantConfig
from hfquant.nn.modules import quant_layers
from tests.integrations import small_models

CASES = [
    ("llama", "w8a8-dynamic"),
    ("llama", "w4a16"),
    ("bert", "w6a16"),
    ("dit", "w4a16"),
    ("sd3", "fp8-dynamic"),
    ("flux", "w6a16"),
]
BITS = {"w8a8-dynamic": 8, "w6a16": 6, "w4a16": 4, "fp8-dynamic": 8}


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all tensors in a folder's safetensors files, from their headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as opened:
            slices = [opened.get_slice(key) for key in opened.keys()]  # noqa: SIM118
        widths = {"F32": 4, "I16": 2, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
        total += sum(math.prod(s.get_shape()) * widths[s.get_dtype()] for s in slices)
    return total


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> tuple[str, str, Any, Any]:
    name, preset = request.param
    original = getattr(small_models, name)()
    model = type(original).from_pretrained(checkpoint(name), quantization_config=HfQuantConfig(preset))
    return name, preset, original, model


def test_the_footprint_is_the_bytes_that_are_stored(case: tuple[str, str, Any, Any], tmp_path: Path) -> None:
    _, _, original, model = case
    model.save_pretrained(tmp_path)
    persistent = set(model.state_dict())
    computed = sum(b.nbytes for n, b in model.named_buffers() if n not in persistent)
    assert model.get_memory_footprint() == stored_bytes(tmp_path) + computed
    assert original.get_memory_footprint() / model.get_memory_footprint() >= 1.2
    assert type(original).from_pretrained(tmp_path).get_memory_footprint() == model.get_memory_footprint()


def test_parameters_are_counted_as_the_bytes_of_codes(case: tuple[str, str, Any, Any]) -> None:
    _, preset, original, model = case
    weights = {name: original.get_submodule(name).weight for name in quant_layers(model)}
    assert weights
    bits = {name: layer.format.bits for name, layer in quant_layers(model).items()}
    assert set(bits.values()) <= {BITS[preset], 8}
    packed = sum(w.shape[0] * math.ceil(w.shape[1] * bits[name] / 8) for name, w in weights.items())
    others = original.num_parameters() - sum(w.numel() for w in weights.values())
    assert model.num_parameters() == others + packed
    if BITS[preset] == 8:
        assert model.num_parameters() == original.num_parameters()
    assert model.num_parameters(only_trainable=True) <= others
