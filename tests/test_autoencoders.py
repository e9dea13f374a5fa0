"""Autoencoders are recognized by their class, both as whole models and as parts of other models."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DModel
from torch import nn
from transformers import EncodecConfig, EncodecModel

import hfquant
from hfquant.autoencoders import autoencoder_convs
from hfquant.nn.kinds import layers_in


def convs(model: nn.Module) -> set[str]:
    return autoencoder_convs(model, layers_in(model))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.linear = nn.Conv2d(32, 32, 3), nn.ConvTranspose2d(32, 32, 2), nn.Linear(8, 8)


@pytest.mark.parametrize("name", ["MyVAE", "VAE", "VQModel", "AutoencoderX", "AutoEncoder", "MoVQ", "SpeechCodec"])
def test_by_name(name) -> None:
    class Derived(type(name, (Block,), {})):
        pass

    assert convs(type(name, (Block,), {})()) == {"conv"}
    assert convs(Derived()) == {"conv"}
    part = nn.ModuleDict({"vae": Derived(), "vaes": Block(), "conv": nn.Conv2d(32, 32, 3)})
    assert convs(part) == {"vae.conv"}
    found = hfquant.plan(part, {"default": {"opt": {"type": "default"}, "input_quant": None}})
    assert list(found.layers) == ["vae.linear", "vaes.conv", "vaes.linear", "conv"]
    assert found.skipped["vae.conv"] == "a convolution of an autoencoder"


@pytest.mark.parametrize("name", ["Net", "VQA", "Encoder", "VitMAE", "Decoder"])
def test_others(name) -> None:
    assert convs(type(name, (Block,), {})()) == set()


def test_real_classes() -> None:
    with torch.device("meta"):
        tiny, encodec = AutoencoderTiny(), EncodecModel(EncodecConfig(num_filters=8, hidden_size=16))
        unet = UNet2DModel(sample_size=8, block_out_channels=(32, 32, 32, 32))
    assert len(convs(tiny)) == sum(isinstance(m, nn.Conv2d) for m in tiny.modules())
    assert convs(encodec) == {n for n in layers_in(encodec) if type(encodec.get_submodule(n)) is nn.Conv1d}
    assert convs(unet) == set()
