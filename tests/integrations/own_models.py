"""Folders of a model, a tokenizer and a pipeline that come with code of their own."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler

MODEL = """
from transformers import LlamaForCausalLM

from .own_config import OwnConfig

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
CONFIG = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
DENOISER = """
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

class OwnDenoiser(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width=32):
        super().__init__()
        self.up = nn.Linear(4, width)
        self.down = nn.Linear(width, 4)

    def forward(self, hidden_states, timestep):
        return self.down(nn.functional.silu(self.up(hidden_states)))
"""
PIPELINE = """
import torch
from diffusers import DiffusionPipeline

class OwnPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, num_inference_steps=2):
        latents = torch.ones(1, 3, 4)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.transformer(latents, t), t, latents).prev_sample
        return latents
"""


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def own_model(folder: Path) -> Path:
    """Give a saved Llama a class and a config of its own."""
    (folder / "own_model.py").write_text(MODEL)
    (folder / "own_config.py").write_text(CONFIG)
    names = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    edit(folder / "config.json", model_type="own_llama", architectures=["OwnModel"], auto_map=names)
    return folder


def own_tokenizer(folder: Path) -> Path:
    """Give a saved tokenizer a class of its own."""
    (folder / "own_tokenizer.py").write_text(TOKENIZER)
    names = {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=names)
    return folder


def own_pipeline(folder: Path) -> Path:
    """Write a pipeline with a class of its own, and a denoiser of one."""
    (folder / "transformer").mkdir()
    (folder / "own_pipeline.py").write_text(PIPELINE)
    (folder / "transformer" / "own_denoiser.py").write_text(DENOISER)
    sys.path.insert(0, str(folder / "transformer"))
    try:
        import_module("own_denoiser").OwnDenoiser().save_pretrained(folder / "transformer")
    finally:
        sys.path.pop(0)
        sys.modules.pop("own_denoiser", None)
    DDIMScheduler(num_train_timesteps=10).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": ["own_pipeline", "OwnPipeline"],
        "transformer": ["own_denoiser", "OwnDenoiser"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
