"""Activations before a linear: as functions, as modules, and written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hfquant.dataflow.trace import trace
from hfquant.enums import SegPattern as P
from tests.dataflow.toys import X, of, two


def quick_gelu():
    from transformers.activations import ACT2FN

    return ACT2FN["quick_gelu"]


def new_gelu():
    from transformers.activations import ACT2FN

    return ACT2FN["gelu_new"]


ACTIVATIONS = {
    "nn.SiLU": (lambda m, x: nn.SiLU()(m.a(x)), "silu"),
    "nn.GELU tanh": (lambda m, x: nn.GELU("tanh")(m.a(x)), "gelu"),
    "nn.ReLU in place": (lambda m, x: nn.ReLU(inplace=True)(m.a(x)), "relu"),
    "F.silu": (lambda m, x: F.silu(m.a(x)), "silu"),
    "F.gelu by keywords": (lambda m, x: F.gelu(input=m.a(x), approximate="tanh"), "gelu"),
    "torch.relu": (lambda m, x: torch.relu(m.a(x)), "relu"),
    "method relu_": (lambda m, x: m.a(x).relu_(), "relu"),
    "relu squared": (lambda m, x: F.relu(m.a(x)).square(), "relu"),
    "leaky_relu": (lambda m, x: F.leaky_relu(m.a(x), 0.1), "leaky_relu"),
    "elu": (lambda m, x: F.elu(m.a(x)), "elu"),
    "mish": (lambda m, x: F.mish(m.a(x)), "mish"),
    "hardswish": (lambda m, x: F.hardswish(m.a(x)), "hardswish"),
    "softplus": (lambda m, x: F.softplus(m.a(x)), "softplus"),
    "SwiGLU": (lambda m, x: F.silu(m.c(x)) * m.a(x), "silu"),
    "SwiGLU, gate second, cast": (lambda m, x: m.a(x) * F.silu(m.c(x).float()).to(x.dtype), "silu"),
    "GEGLU of one linear": (lambda m, x: (h := torch.cat([m.a(x), m.c(x)], -1).chunk(2, -1))[0] * F.gelu(h[1]), "gelu"),
    "F.glu": (lambda m, x: F.glu(torch.cat([m.a(x), m.c(x)], -1)), "sigmoid"),
    "quick gelu": (lambda m, x: quick_gelu()(m.a(x)), "quick_gelu"),
    "dropout, cast, leading dims": (lambda m, x: F.dropout(F.silu(m.a(x)), 0.1).double().float().flatten(0, 1), "silu"),
    "first token": (lambda m, x: F.silu(m.a(x))[:, 0], "silu"),
    "scaled by a parameter": (lambda m, x: F.silu(m.a(x)) * m.norm.weight, "silu"),
    "rms norm": (lambda m, x: m.rms(F.silu(m.a(x))), "silu"),
    "tokens joined": (lambda m, x: torch.cat([F.silu(m.a(x)), F.silu(m.c(x))], 1), "silu"),
    "tokens of two kinds joined": (lambda m, x: torch.cat([F.silu(m.a(x)), m.c(x)], 1), None),
    "layer norm": (lambda m, x: m.norm(F.silu(m.a(x))), None),
    "shifted": (lambda m, x: F.silu(m.a(x)) + 1, None),
    "residual": (lambda m, x: F.silu(m.a(x)) + m.c(x), None),
    "another linear": (lambda m, x: m.a(F.silu(x)), None),
    "tanh": (lambda m, x: torch.tanh(m.a(x)), None),
    "SiLU spelled out": (lambda m, x: (y := m.a(x)) * torch.sigmoid(y), "silu"),
    "SiLU spelled out, gate first, in float": (
        lambda m, x: (y := m.a(x)).float().sigmoid().to(y.dtype).mul(y),
        "silu",
    ),
    "SiLU in place": (lambda m, x: (y := m.a(x)).mul_(y.sigmoid()), "silu"),
    "quick GELU spelled out": (lambda m, x: (y := m.a(x)) * torch.sigmoid(1.702 * y), "quick_gelu"),
    "GELU by erf": (lambda m, x: (y := m.a(x)) * 0.5 * (1.0 + torch.erf(y / math.sqrt(2.0))), "gelu"),
    "GELU by erf, cdf first": (lambda m, x: 0.5 * (1 + ((y := m.a(x)) * 0.7071).erf()) * y, "gelu"),
    "GELU by tanh": (
        lambda m, x: 0.5 * (y := m.a(x)) * (1 + torch.tanh(0.7979 * (y + 0.044715 * torch.pow(y, 3)))),
        "gelu",
    ),
    "GELU by tanh, factored": (
        lambda m, x: (y := m.a(x)) * 0.5 * (1.0 + torch.tanh(0.7979 * y * (1 + 0.044715 * y * y))),
        "gelu",
    ),
    "Mish spelled out": (lambda m, x: (y := m.a(x)) * torch.tanh(F.softplus(y)), "mish"),
    "GEGLU with a GELU spelled out": (
        lambda m, x: m.a(x) * ((y := m.c(x)) * 0.5 * (1.0 + torch.erf(y / math.sqrt(2.0)))),
        "gelu",
    ),
    "a gate of another tensor": (lambda m, x: m.a(x) * (1 + torch.tanh(m.c(x))), None),
    "a modulation": (lambda m, x: (y := m.a(x)) * (1 + y), None),
    "tanh of itself": (lambda m, x: (y := m.a(x)) * torch.tanh(y), None),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    run, activation = ACTIVATIONS[name]
    found = of(lambda m, x: m.b(run(m, x)), "b")
    assert found.activations == (activation,)
    assert found.patterns == ((P.ACTIVATION2LINEAR,) if activation else ())


def test_activation_modules_of_transformers_written_as_formulas():
    class Model(nn.Sequential):
        pass

    assert trace(Model(nn.Linear(8, 4), new_gelu(), nn.Linear(4, 2)), X)["2"].activations == ("gelu",)
    assert trace(Model(nn.Linear(8, 4), quick_gelu(), nn.Linear(4, 2)), X)["2"].activations == ("quick_gelu",)


@pytest.mark.parametrize("name", ["GEGLU", "SwiGLU", "GELU"])
def test_feed_forwards_of_diffusers(name):
    from diffusers.models import activations

    gated = name != "GELU"
    block = nn.Sequential(getattr(activations, name)(8, 12), nn.Dropout(0.1), nn.Linear(12, 8))
    found = trace(block, X)
    assert found["0.proj"].output_segments == ((12, 12) if gated else (12,))
    assert found["2"].activations == ("silu" if name == "SwiGLU" else "gelu",)


def test_gelu_that_bloom_spells_out():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=2))
    found = trace(model, torch.zeros(2, 3, dtype=torch.long))
    assert found["transformer.h.0.mlp.dense_4h_to_h"].activations == ("gelu",)


def test_gelu_that_esm_spells_out():
    from transformers import EsmConfig, EsmModel

    config = EsmConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, pad_token_id=1
    )
    found = trace(EsmModel(config), torch.full((2, 3), 4))
    assert found["encoder.layer.0.output.dense"].activations == ("gelu",)


def test_gelu_that_diffusers_spells_out():
    from diffusers.models.attention import FeedForward

    found = trace(FeedForward(8, activation_fn="geglu-approximate"), X)
    assert found["net.2"].activations == ("quick_gelu",)


def test_each_segment_has_its_own_activation():
    """FLUX's single blocks concatenate attention and MLP."""
    found = of(lambda m, x: m.b(torch.cat([x, F.gelu(m.a(x))], 2)), "b", a=16)
    assert found.input_segments == (8, 16)
    assert found.activations == (None, "gelu")
    assert found.patterns == (P.CONCAT2LINEAR, P.ACTIVATION2LINEAR)
    assert found.evidence == ("input = cat: 8, 16 gelu",)


def test_activation_of_joined_features_keeps_the_parts():
    found = of(lambda m, x: m.b(F.silu(torch.cat(two(x, 5), -1))), "b")
    assert (found.input_segments, found.activations) == ((5, 19), ("silu", "silu"))
