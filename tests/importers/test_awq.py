"""AWQ's interleaved columns, against another implementation that reads them."""

from __future__ import annotations

import numpy as np
import torch
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

from hfquant.importers import awq
from tests.importers import written
from tests.importers.written import AWQ, Layer


def test_columns_are_where_compressed_tensors_finds_them() -> None:
    layer = Layer(48, 64, 32, 4, False, np.random.default_rng(0))
    stored = {f"x.{key}": tensor for key, tensor in written.awq(layer).items()}
    converter = AutoAWQConverter(group_size=32)
    codes, scale, zero_point = converter._convert_gemm_module(
        stored["x.qweight"], stored["x.scales"], stored["x.qzeros"]
    )
    found = dict(awq.take_layers(AWQ, stored))["x"]
    assert torch.equal(found.codes, codes)
    assert found.zero_point is not None
    assert torch.equal(found.zero_point, zero_point)
    assert torch.equal(found.scale, scale.float())
