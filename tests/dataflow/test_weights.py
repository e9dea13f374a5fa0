"""Linears that must not be replaced: toy modules for each use of a weight, then real classes with tiny configs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hfquant.dataflow.trace import trace
from hfquant.dataflow.weights import CAST, READ, UNCLEAR

X = torch.zeros(2, 5, 8)


class Toy(nn.Module):
    """Linears ``a``, ``b`` and ``c`` (8 -> 8) around a function of the module and the input."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def obstacles(model, *example, codes=None):
    found = trace(model, example or X, codes=codes)
    return {name: t.obstacle for name, t in found.items() if t.obstacle}


# --- values of a weight ------------------------------------------------------------------------------------------


def test_weight_read_outside_its_forward():
    found = trace(Toy(lambda m, x: F.linear(x, m.a.weight) + m.c(x)), X)
    assert (found["a"].obstacle, found["a"].calls) == (READ, 0)
    assert (found["c"].obstacle, found["c"].calls) == (None, 1)
    assert obstacles(Toy(lambda m, x: x @ m.a.weight.T)) == {"a": READ}
    assert obstacles(Toy(lambda m, x: m.a(x) + torch.einsum("oi,bni->bno", m.a.weight, x))) == {"a": READ}
    assert obstacles(Toy(lambda m, x: m.a(x) + m.b.weight.to(x.dtype).sum())) == {"b": READ}


def test_tied_embedding_is_no_read():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    assert obstacles(Model(), torch.zeros(2, 3, dtype=torch.long)) == {}


def test_linears_that_torch_fuses():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = trace(nn.Sequential(nn.Linear(8, 8), layer), X)
    assert {n: t.obstacle for n, t in found.items()} == {"0": None, "1.linear1": READ, "1.linear2": READ}


# --- the dtype of a weight ---------------------------------------------------------------------------------------

CASTS = {
    "to dtype": lambda m, x: m.a(x.to(m.a.weight.dtype)),
    "to dtype by keyword": lambda m, x: m.a(x.to(dtype=m.a.weight.dtype)),
    "type": lambda m, x: m.a(x.type(m.a.weight.dtype)),
    "to the weight": lambda m, x: m.a(x.to(m.a.weight)),
    "type_as": lambda m, x: m.a(x.type_as(m.a.weight)),
    "a new tensor": lambda m, x: m.a(x + torch.ones(8, dtype=m.a.weight.dtype)),
    "softmax": lambda m, x: m.a(F.softmax(x, -1, dtype=m.a.weight.dtype)),
    "first parameter": lambda m, x: m.a(x.to(next(m.parameters()).dtype)),
    "new_zeros": lambda m, x: m.a(x) + m.a.weight.new_zeros(8),
    "zeros_like": lambda m, x: m.a(x) + torch.zeros_like(m.a.weight)[0],
    "another module": lambda m, x: m.b(x) + m.c(x.to(m.a.weight.dtype)),
    "under a condition that codes meet": lambda m, x: m.a(x.to(d) if (d := m.a.weight.dtype) != x.dtype else x),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASTS)
def test_dtype_of_a_weight_that_makes_tensors(name):
    assert obstacles(Toy(CASTS[name])) == {"a": CAST}


HARMLESS = {
    "device, shape": lambda m, x: m.a(x.to(m.a.weight.device)) + m.a.weight.shape[0] + m.a.weight.size(1),
    "compared with int8": lambda m, x: m.a(x.to(d) if (d := m.a.weight.dtype) not in (x.dtype, torch.int8) else x),
    "asked for a float": lambda m, x: m.a(x.to(d) if (d := m.a.weight.dtype).is_floating_point else x),
    "is_floating_point": lambda m, x: m.a(x.to(m.a.weight.dtype) if m.a.weight.is_floating_point() else x),
    "a float among the parameters": lambda m, x: m.a(
        x.to(next(p.dtype for p in m.parameters() if p.is_floating_point()))
    ),
    "new_zeros of a dtype": lambda m, x: m.a(x) + m.a.weight.new_zeros(8, dtype=x.dtype),
    "bias": lambda m, x: m.a(x.to(m.a.bias.dtype)),
    "another int8": lambda m, x: m.a(x) * (x > 0).to(torch.int8),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", HARMLESS)
def test_dtype_of_a_weight_that_is_only_looked_at(name):
    assert obstacles(Toy(HARMLESS[name])) == {}


def test_one_run_finds_every_cast_and_spares_comparisons():
    def compared(m, x):
        return m.b(x if m.b.weight.dtype == torch.int8 else x.to(m.b.weight.dtype))

    def run(m, x):
        x = compared(m, m.a(x.to(m.a.weight.dtype)))
        return m.c(x.to(m.c.weight.dtype))

    assert obstacles(Toy(run)) == {"a": CAST, "c": CAST}


def test_dtype_that_came_from_a_function_may_be_of_any_linear_asked():
    def dtype_of(module):
        return module.weight.dtype

    def run(m, x):
        first, second = dtype_of(m.a), dtype_of(m.b)
        return m.a(m.b(x.to(first).to(second)))

    assert obstacles(Toy(run)) == {"a": CAST, "b": CAST}


def test_code_that_fails_with_the_dtype_of_codes():
    found = obstacles(Toy(lambda m, x: m.b(m.a(x).clamp(max=torch.finfo(m.a.weight.dtype).max))))
    assert found == {"a": UNCLEAR}


def test_dtype_asked_on_real_tensors():
    def run(m, x):
        return m.a(x.to(m.a.weight.dtype)) if x.sum() > -1 else x

    assert obstacles(Toy(run)) == {"a": CAST}


def test_codes_are_what_the_caller_says():
    cast, compared = Toy(CASTS["to dtype"]), Toy(HARMLESS["compared with int8"])
    assert obstacles(cast, codes={}) == {}
    assert obstacles(cast, codes={"b": torch.int8}) == {}
    assert obstacles(cast, codes={"a": torch.float8_e4m3fn}) == {"a": CAST}
    assert obstacles(cast, codes={"a": torch.float32}) == {}
    assert obstacles(compared, codes={"a": torch.int16}) == {"a": CAST}
    assert obstacles(cast.bfloat16(), X.bfloat16(), codes={"a": torch.bfloat16}) == {}


def test_model_is_cast_back_after_the_second_run():
    model = Toy(CASTS["to dtype"])
    assert obstacles(model) == {"a": CAST}
    assert model.a.weight.dtype == torch.float32
    assert model(X).dtype == torch.float32


# --- real classes ------------------------------------------------------------------------------------------------


def test_t5_exempts_int8():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    found = trace(T5EncoderModel(config), {"input_ids": torch.zeros(2, 3, dtype=torch.long)})
    assert "encoder.block.1.layer.1.DenseReluDense.wo" in found
    assert not any(t.obstacle for t in found.values())


def test_t5_does_not_exempt_int16():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    model = T5EncoderModel(config)
    codes = {name: torch.int16 for name, m in model.named_modules() if type(m) is nn.Linear}
    found = obstacles(model, torch.zeros(2, 3, dtype=torch.long), codes=codes)
    assert found == {f"encoder.block.{i}.layer.1.DenseReluDense.wo": CAST for i in range(2)}


def test_wan_exempts_int8():
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    example = {
        "hidden_states": torch.zeros(1, 4, 1, 4, 4),
        "timestep": torch.ones(1),
        "encoder_hidden_states": torch.zeros(1, 3, 16),
    }
    found = trace(model, example)
    assert found["condition_embedder.time_embedder.linear_1"].calls == 1
    assert not any(t.obstacle for t in found.values())


def test_image_projection_of_diffusers():
    from diffusers.models.embeddings import ImageProjection

    assert obstacles(ImageProjection(8, 12, 4), torch.zeros(2, 8)) == {"image_embeds": CAST}


def test_blip2_matching_head():
    from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig

    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
            encoder_hidden_size=8, use_qformer_text_input=True,
        ).to_dict(),
        image_text_hidden_size=6, image_token_index=15, num_query_tokens=3,
    )  # fmt: skip
    example = {
        "pixel_values": torch.zeros(1, 3, 8, 8),
        "input_ids": torch.ones(1, 4, dtype=torch.long),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
    }
    model = Blip2ForImageTextRetrieval(config)
    found = trace(model, {**example, "use_image_text_matching_head": True})
    patches = "vision_model.embeddings.patch_embedding"
    assert {name for name, t in found.items() if t.obstacle} == {"itm_head", patches}
    assert found["itm_head"].obstacle == CAST
    found = trace(model, example)
    assert {n: t.obstacle for n, t in found.items() if t.obstacle} == {
        "vision_projection": CAST,
        "text_projection": CAST,
        patches: CAST,
    }


def test_pooler_of_hunyuan_dit():
    from diffusers.models.embeddings import HunyuanDiTAttentionPool

    found = obstacles(HunyuanDiTAttentionPool(4, 8, 2, output_dim=6), torch.zeros(2, 4, 8))
    assert found == dict.fromkeys(("q_proj", "k_proj", "v_proj", "c_proj"), READ)
