"""Planned sizes equal those of the files written by that plan."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import hfquant
from hfquant.report.sizes import planned_size


@pytest.mark.sampled(2)
@pytest.mark.parametrize("preset", ["w8a8-dynamic", "w4a16", "w6a16", "fp8-dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_is_that_of_the_file(preset, dtype, tmp_path):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=100, vocab_size=50, num_attention_heads=4, num_hidden_layers=2
    )
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    sizes = planned_size(empty, hfquant.plan(empty, preset), dtype.itemsize)
    model = LlamaForCausalLM(config).to(dtype)
    assert sizes.before == sum(p.nbytes for p in model.parameters())
    hfquant.quantize(model, None, preset).save_pretrained(tmp_path)
    assert sizes.after == sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    assert sizes.share == 1
