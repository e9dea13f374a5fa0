"""torch.compile on both libraries' transformer blocks with quantized linears: one graph, and the same output."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from transformers import LlamaConfig, LlamaModel

import hfquant
from hfquant.presets import PRESETS


@pytest.mark.slow
@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("preset", ["w8a8-dynamic", "w4a8-dynamic", "w4a16"])
def test_a_llama_block(preset, real) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=100)).eval()
    hfquant.quantize(model, [torch.randint(0, 100, (1, 8))], PRESETS[preset])
    hfquant.set_real_quant(model, real)
    hidden, positions = torch.randn(1, 8, 64), torch.arange(8)[None]
    assert_same_compiled(model.layers[0], hidden, position_embeddings=model.rotary_emb(hidden, positions))


@pytest.mark.slow
@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("preset", ["w8a8-dynamic", "w4a8-dynamic", "w4a16"])
def test_a_dit_block(preset, real) -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8, "sample_size": 8}
    model = DiTTransformer2DModel(**sizes, num_layers=1, patch_size=2, num_embeds_ada_norm=10).eval()
    labels = {"timestep": torch.tensor([5]), "class_labels": torch.tensor([1])}
    hfquant.quantize(model, [{"hidden_states": torch.randn(1, 4, 8, 8), **labels}], PRESETS[preset])
    hfquant.set_real_quant(model, real)
    assert_same_compiled(model.transformer_blocks[0], torch.randn(1, 16, 64), **labels)


@torch.no_grad()
def assert_same_compiled(block, *args, **kwargs) -> None:
    torch._dynamo.reset()
    eager, compiled = block(*args, **kwargs), torch.compile(block, fullgraph=True)(*args, **kwargs)
    eager, compiled = (y[0] if isinstance(y, tuple) else y for y in (eager, compiled))
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5 * float(eager.abs().max()))
