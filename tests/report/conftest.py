"""Quantized folders to report on: the digits pipeline with calibration, a tiny Llama without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hfquant
from hfquant.demo import load_digits_pipeline
from hfquant.recipes.run import save
from tests.schemes import SVDQUANT


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits pipeline with a calibrated denoiser: segments, dual scales, low rank."""
    folder = tmp_path_factory.mktemp("report") / "digits"
    pipe = load_digits_pipeline()
    labels = [{"class_labels": [i, i + 5]} for i in range(3)]
    hfquant.quantize_pipeline(pipe, labels, SVDQUANT, num_inference_steps=4)
    save(pipe, folder)
    return folder


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, vocab_size=50, **heads)).eval()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama quantized without data."""
    folder = tmp_path_factory.mktemp("report") / "llama"
    save(hfquant.quantize(small_llama(), None, "w4a16"), folder)
    return folder
