"""GPTQ's column order, and zero points that borrow from their neighbors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import hfquant
from hfquant.importers import gptq
from hfquant.integrations.checkpoint import CheckpointError
from hfquant.nn.modules import quant_layers
from tests.importers import written
from tests.importers.written import GPTQ, Layer


def test_groups_in_another_order_are_put_in_order(tmp_path: Path) -> None:
    def change(name: str, layer: Layer) -> None:
        layer.index = (layer.codes.shape[1] // layer.group - 1) - layer.index

    layers = written.write(tmp_path, GPTQ | {"desc_act": True}, written.gptq, change=change)
    for name, layer in quant_layers(hfquant.import_checkpoint(tmp_path)).items():
        assert np.array_equal(layer.effective_weight().double().numpy(), layers[name].weight())


def test_groups_of_columns_from_all_over_the_row_are_refused(tmp_path: Path) -> None:
    def change(name: str, layer: Layer) -> None:
        if name.endswith("0.mlp.up_proj"):
            layer.index = np.random.default_rng(0).permutation(layer.index)

    written.write(tmp_path, GPTQ | {"desc_act": True}, written.gptq, change=change)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.up_proj': act_order \(desc_act\)"):
        hfquant.import_checkpoint(tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_every_pair_of_neighboring_zero_points(bits: int, version: int) -> None:
    layer = Layer(64, 32, 16, bits, False, np.random.default_rng(0))
    largest = 2**bits - 1
    layer.zeros[:, 0] = np.tile([0, 0, largest, 0, largest, largest, 0, 1], 8)
    stored = {f"x.{key}": tensor for key, tensor in written.gptq(layer, version).items()}
    section = {"bits": bits, "group_size": 16, "checkpoint_format": f"gptq{'_v2' if version == 2 else ''}"}
    found = dict(gptq.take_layers(section, stored))["x"]
    assert not stored
    assert found.zero_point is not None
    assert np.array_equal(found.zero_point.numpy(), layer.zeros - 2 ** (bits - 1))


def test_without_an_index_columns_are_in_order() -> None:
    layer = Layer(16, 40, 32, 4, False, np.random.default_rng(0))
    stored = {f"x.{key}": tensor for key, tensor in written.gptq(layer).items() if key != "g_idx"}
    found = dict(gptq.take_layers({"bits": 4, "group_size": 32}, stored))["x"]
    assert np.array_equal(found.codes.numpy(), layer.codes - 8)
    assert found.group == 32
