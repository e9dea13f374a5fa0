"""What compressed-tensors itself packs can be read."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

from hfquant.importers import compressed_tensors
from hfquant.integrations.checkpoint import CheckpointError
from tests.importers.written import compressed_section

# Its compressor leaves zero points of per-tensor scales unpacked, and no program writes them.
CASES = [("group", True), ("group", False), ("channel", True), ("channel", False), ("tensor", True)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("strategy", "symmetric"), CASES)
def test_its_own_compressor(bits: int, strategy: str, symmetric: bool) -> None:
    rows, columns = 40, 96
    shape = {"group": (rows, 3), "channel": (rows, 1), "tensor": (1,)}[strategy]
    weights = {"num_bits": bits, "symmetric": symmetric, "strategy": strategy}
    weights |= {"group_size": 32} if strategy == "group" else {}
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    state = {"weight": torch.randn(rows, columns), "weight_scale": torch.rand(shape) / 2**bits + 0.01}
    half = 2 ** (bits - 1)
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-half, half, shape, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    tensors = {f"x.{key}": tensor for key, tensor in stored.items()}
    found = dict(compressed_tensors.take_layers(compressed_section(symmetric), tensors))["x"]
    assert not tensors
    zero_point = 0 if found.zero_point is None else found.zero_point.repeat_interleave(found.group or columns, 1)
    scale = found.scale.repeat_interleave(found.group or columns, 1)
    assert torch.equal((found.codes.float() - zero_point) * scale, expected)


def test_another_shape_than_the_packed_one_is_an_error() -> None:
    stored = {"x.weight_packed": torch.zeros(4, 8, dtype=torch.int32), "x.weight_scale": torch.ones(4, 2)}
    with pytest.raises(CheckpointError, match=r"72 codes of 4 bits take 9 int32 words per row, got \(4, 8\)"):
        list(compressed_tensors.take_layers(compressed_section(), {**stored, "x.weight_shape": torch.tensor([4, 72])}))
    with pytest.raises(CheckpointError, match=r"weight_scale \(4, 2\) does not fit 63 columns"):
        list(compressed_tensors.take_layers(compressed_section(), {**stored, "x.weight_shape": torch.tensor([4, 63])}))
