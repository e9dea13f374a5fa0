"""GPT-2's Conv1D."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import hfquant
from hfquant.nn.conv1d import QuantConv1D
from hfquant.nn.kinds import find_kind, kind_of, size_of
from hfquant.nn.modules import quant_layers


def tiny() -> GPT2LMHeadModel:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def test_it_is_known_by_what_it_stores() -> None:
    assert kind_of(Conv1D(6, 4)) is QuantConv1D
    assert size_of(Conv1D(6, 4)) == (4, 6)
    assert not QuantConv1D.takes(nn.Conv1d(4, 4, 1))
    other = Conv1D(6, 4)
    other.nf = 5
    assert find_kind(other) is None
    other = type("Conv1D", (nn.Module,), {})()
    assert find_kind(other) is None


@pytest.mark.parametrize("preset", ["w8a8-dynamic", "w4a16", "w4a16-gptq", "w8a8"])
@torch.no_grad()
def test_gpt2(preset, tmp_path) -> None:
    model, ids = tiny(), {"input_ids": torch.randint(0, 50, (2, 9))}
    weights = {name: m.weight.clone() for name, m in model.named_modules() if isinstance(m, Conv1D)}
    exact = model(**ids).logits
    hfquant.quantize(model, [ids], preset)
    layers = quant_layers(model)
    assert layers.keys() == weights.keys()
    for name, layer in layers.items():
        assert type(layer) is QuantConv1D
        relative = (layer.effective_weight() - weights[name].T).norm() / weights[name].norm()
        assert relative < (0.2 if preset.startswith("w4") else 0.03)
    output = model(**ids).logits
    assert 0 < (output - exact).norm() < 0.3 * exact.norm()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["transformer.h.0.attn.c_attn.weight"].shape[:2] == (1, 96)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**ids).logits, output)
    # Dequantized it is a Conv1D again, so a plain GPT-2 can load its checkpoint.
    hfquant.dequantize(loaded)
    assert type(loaded.transformer.h[0].attn.c_attn) is Conv1D
    loaded.save_pretrained(tmp_path / "float")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "float")
    assert torch.equal(again(**ids).logits, loaded(**ids).logits)
    assert all(m.weight.is_contiguous() for m in again.modules() if isinstance(m, Conv1D))
