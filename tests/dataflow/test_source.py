"""Uses of a weight found in source code, for models that cannot be run."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hfquant.dataflow import obstacles_in_source
from hfquant.dataflow.weights import CAST, READ


class Model(nn.Module):
    """Uses the weights of ``b``, ``c`` and ``inner.d`` directly, and reads attributes of others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.e = (nn.Linear(8, 8) for _ in range(4))
        self.inner = nn.ModuleDict({"d": nn.Linear(8, 8)})
        self.conv = nn.Conv1d(8, 8, 1)
        self.c.weight.data.zero_()

    def forward(self, x):
        x = self.a(x.to(self.a.weight.device)) + self.a.weight.shape[0]
        x = F.linear(x, self.b.weight) + self.conv.weight.sum()
        plain = isinstance(self.e.weight, torch.Tensor) and self.e.weight is not None
        return self.e(self.helper(x)) if plain and self.e.weight.is_floating_point() else x

    def helper(self, x):
        return self.c(x.to(dtype=self.c.weight.dtype)) @ self.inner.d.weight.T

    def not_called(self):
        return self.e.weight.sum()


def test_uses_in_forward_and_in_the_methods_it_calls():
    assert obstacles_in_source(Model()) == {"b": READ, "c": CAST, "inner.d": READ, "conv": READ}
    nested = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"block": Model()}))
    found = {"1.block.b": READ, "1.block.c": CAST, "1.block.inner.d": READ, "1.block.conv": READ}
    assert obstacles_in_source(nested) == found


def test_fused_layers_of_torch():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert obstacles_in_source(layer) == {"linear1": READ, "linear2": READ}


def test_a_class_without_source():
    made = type("Made", (nn.Module,), {"forward": functools.partial(lambda x: x)})
    assert obstacles_in_source(made()) == {}


def test_real_classes_without_inputs():
    from diffusers.models.embeddings import HunyuanDiTAttentionPool, ImageProjection
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel

    with torch.device("meta"):
        pool, projection = HunyuanDiTAttentionPool(4, 8, 2, output_dim=6), ImageProjection(8, 12, 4)
        t5 = T5EncoderModel(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2))
        llama = LlamaForCausalLM(
            LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
        )
    assert obstacles_in_source(pool) == dict.fromkeys(("q_proj", "k_proj", "v_proj", "c_proj"), READ)
    assert obstacles_in_source(projection) == {"image_embeds": CAST}
    assert obstacles_in_source(t5) == obstacles_in_source(llama) == {}


@pytest.mark.parametrize("kind", ["BLIP-2", "Mamba"])
def test_what_a_run_sees_is_in_the_source_too(kind):
    from transformers import Blip2Config, Blip2ForImageTextRetrieval, MambaConfig, MambaForCausalLM

    with torch.device("meta"):
        if kind == "Mamba":
            found = obstacles_in_source(
                MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4))
            )
            assert found["backbone.layers.0.mixer.dt_proj"] == READ
        else:
            config = Blip2Config()
            config.vision_config.num_hidden_layers = config.qformer_config.num_hidden_layers = 1
            found = obstacles_in_source(Blip2ForImageTextRetrieval(config))
            names = ("vision_projection", "text_projection", "itm_head", "vision_model.embeddings.patch_embedding")
            assert found == dict.fromkeys(names, CAST)
