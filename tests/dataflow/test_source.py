"""Uses of a weight found in source code, for models that cannot be run."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hfquant
from hfquant.dataflow import obstacles_in_source, trace
from hfquant.dataflow.source import obstacles_in_training
from hfquant.dataflow.weights import CAST, READ
from hfquant.nn.modules import quant_layers


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


class Clamping(nn.Module):
    """Works on the weight of ``a`` in training, and passes on or inspects those of others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        if self.training and x.numel():
            x = F.linear(x.to(self.b.weight.dtype), self.a.weight.clamp(-1, 1))
            x = F.linear(x, self.b.weight)
        if not self.training:
            x = x + self.c.weight.sum()
        return self.d(x)


def test_weights_that_are_worked_on_in_training_alone():
    assert obstacles_in_training(nn.Sequential(Clamping())) == {"0.a": READ}
    assert trace(Clamping(), {"x": torch.ones(1, 8)})["a"].obstacle == READ


def test_gemma3n_trains_with_quantized_linears():
    """In training, it clamps two of its weights in place or as a tensor."""
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, hidden_size_per_layer_input=16,
        intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        laurel_rank=8, num_kv_shared_layers=0, altup_num_inputs=2, activation_sparsity_pattern=[0.9, 0.0],
        layer_types=["sliding_attention", "full_attention"], sliding_window=8,
    )  # fmt: skip
    model = hfquant.quantize(Gemma3nForCausalLM(config), None, "w4a16")
    names = {name.rpartition(".")[2] for name in quant_layers(model)}
    assert "q_proj" in names
    assert not names & {"prediction_coefs", "correction_coefs"}
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)).train()
    ids = torch.arange(5, 13)[None]
    tuned(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert gradients
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
