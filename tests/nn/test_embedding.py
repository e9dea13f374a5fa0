"""Quantized embeddings: rows of the dequantized table."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

import hfquant
from hfquant.nn.embedding import QuantEmbedding
from hfquant.nn.kinds import find_kind, kind_of, refusal

QUANTS = {
    "int8": {"type": "int8", "axis": -1},
    "int8, groups": {"type": "int8", "group_size": 8},
    "int4": {"type": "int4", "axis": -1},
    "int4, groups": {"type": "int4", "group_size": 8},
    "int4, short last group": {"type": "int4", "group_size": 9, "scale": "float32"},
    "int4, zero points": {"type": "int4", "group_size": 8, "symmetric": False, "clip": "mse"},
    "int6": {"type": "int6"},
    "fp8": {"type": "fp8e4m3", "axis": -1},
    "bf16": {"type": "bf16"},
}


def quantized(module: nn.Module, weight_quant=QUANTS["int8"], **fields) -> QuantEmbedding:
    model = nn.Sequential(copy.deepcopy(module))
    config = {"weight_quant": weight_quant, "include": ["embeddings"], "opt": {"type": "default"}, "input_quant": None}
    hfquant.quantize(model, [torch.arange(4)], {"default": {**config, **fields}})
    return model[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", QUANTS)
@torch.no_grad()
def test_rows_of_the_dequantized_table(case) -> None:
    embedding, ids = nn.Embedding(30, 20), torch.randint(0, 30, (2, 3, 4))
    layer = quantized(embedding, QUANTS[case])
    table = layer.dequantize()
    assert type(layer) is QuantEmbedding
    assert isinstance(layer, nn.Embedding)
    assert torch.equal(layer(ids), table[ids])
    limit = {"int4": 0.15, "int6": 0.04, "fp8": 0.04}.get(case.split(",")[0], 0.01)
    assert (table - embedding.weight).norm() < limit * embedding.weight.norm()
    assert layer(ids[:0]).shape == (0, 3, 4, 20)
    assert torch.equal(layer(ids[0, 0, 0]), table[ids[0, 0, 0]])


@torch.no_grad()
def test_int8_rows_against_float64() -> None:
    embedding = nn.Embedding(30, 20, padding_idx=3)
    rows = embedding.weight.double()
    scale = (rows.abs().amax(1, keepdim=True) / 127).float().double()
    scale[3] = 1
    expected = torch.round(rows / scale) * scale
    assert torch.equal(quantized(embedding)(torch.arange(30)).double(), expected.float().double())
    layer = quantized(embedding)
    assert layer.padding_idx == 3
    assert (layer(torch.tensor([3])) == 0).all()


def test_nothing_but_the_weight_is_quantized() -> None:
    """The config's input format, transform and rounding do not apply, since an embedding multiplies nothing."""
    fields = {"input_quant": {"type": "int8"}, "opt": {"type": "svd"}, "calib": {"type": "gptq", "group_size": 4}}
    layer = quantized(nn.Embedding(8, 8), {"type": "int4"}, **fields)
    assert layer.plan.config.input_quant is None
    assert layer.plan.config.group_size == 4
    assert not layer.plan.config.needs_data
    assert set(layer.state_dict()) == {"weight", "weight_scale", "weight_scale_row"}


def test_it_needs_to_be_asked_for() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 8), "up": nn.Linear(8, 8)})
    assert hfquant.plan(model, "w8a16").skipped == {"embed": "an embedding"}
    found = hfquant.plan(model, {"default": {}, "embed": {"enable": True}})
    assert list(found.layers) == ["embed", "up"]
    with pytest.raises(hfquant.ConfigError, match=r"include: unknown name 'embedding'; available: .*embeddings"):
        hfquant.plan(model, {"default": {"include": ["embedding"]}})
    with pytest.raises(hfquant.ConfigError, match=r"include: expected a list of names, got 'embeddings'"):
        hfquant.plan(model, {"default": {"include": "embeddings"}})


@pytest.mark.parametrize("index", [30, -1])
def test_an_index_out_of_range(index) -> None:
    with pytest.raises((IndexError, RuntimeError), match=r"out of range|out of bounds"):
        quantized(nn.Embedding(30, 20))(torch.tensor([index]))


@torch.no_grad()
def test_dtype_is_the_model_s() -> None:
    layer, ids = quantized(nn.Embedding(30, 20).bfloat16()), torch.arange(30)
    assert layer(ids).dtype == torch.bfloat16
    wide = copy.deepcopy(layer).float()
    assert wide(ids).dtype == torch.float32
    assert wide.weight_scale.dtype == torch.float32
    assert torch.equal(wide(ids).bfloat16(), layer(ids))
    assert layer.half()(ids).dtype == torch.float16
    assert layer.weight.dtype == torch.int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_scaled_embeddings(dtype) -> None:
    """Gemma's embedding rounds its scale to the weight's dtype; Bart's does not."""
    ids = torch.arange(10)
    for kind in (GemmaTextScaledWordEmbedding, BartScaledWordEmbedding):
        embedding = kind(10, 16, 0, embed_scale=3.3).to(dtype)
        layer = quantized(embedding)
        float_again = layer.to_float(dtype)
        assert type(float_again) is kind
        torch.testing.assert_close(layer(ids), float_again(ids))
        assert (layer(ids) - embedding(ids)).norm() < 0.02 * embedding(ids).norm()
    # This happens when a checkpoint is loaded into an empty model, whose buffers have no values.
    with torch.device("meta"):
        embedding = GemmaTextScaledWordEmbedding(10, 16, 0, embed_scale=3.3)
    assert kind_of(embedding) is QuantEmbedding
    assert QuantEmbedding.replacing(embedding, layer.plan).scale == 3.3


def test_what_is_no_plain_lookup() -> None:
    for other in (BartLearnedPositionalEmbedding(8, 8), nn.Embedding(8, 8, max_norm=1.0)):
        assert find_kind(other) is None
        assert refusal(other)


@torch.no_grad()
def test_to_float_and_repr() -> None:
    layer = quantized(nn.Embedding(30, 20, padding_idx=1), QUANTS["int4, groups"])
    module = layer.to_float(torch.float32)
    assert type(module) is nn.Embedding
    assert module.padding_idx == 1
    assert torch.equal(module(torch.arange(30)), layer(torch.arange(30)))
    assert repr(layer) == "QuantEmbedding(30, 20, weight=int4, group_size=8)"
    with pytest.raises(RuntimeError, match="size mismatch"):
        nn.Embedding(30, 20).load_state_dict({"weight": layer.codes_on_disk()})


@torch.no_grad()
def test_compiled_whole() -> None:
    ids = torch.arange(10).view(2, 5)
    for embedding in (nn.Embedding(10, 16), GemmaTextScaledWordEmbedding(10, 16, 0, embed_scale=3.3)):
        layer = quantized(embedding)
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(ids), layer(ids))
