"""Small quantized models with LoRA adapters of random values, and the gradients of those adapters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import (
    LoraConfig,
    inject_adapter_in_model,
)
from torch import Tensor, nn

import hfquant
from hfquant import PRESETS
from hfquant.integrations.adapters import LoraQuantLinear
from hfquant.nn.modules import quant_layers
from tests.integrations import lora_pipelines, small_models
from tests.integrations.small_models import inputs_of
from tests.schemes import SVDQUANT

MODELS = {"llama": small_models.llama, "flux": small_models.flux, "sana": lora_pipelines.sana}

CONFIGS = {**PRESETS, "svdquant": copy.deepcopy(SVDQUANT)}
# A branch of rank 32 would capture nearly all of these small weights.
CONFIGS["svdquant"]["default"]["opt"]["low_rank"] = 2


def quantized(name: str, preset: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = MODELS[name]().to(dtype)
    return hfquant.quantize(model, [inputs_of(model)], copy.deepcopy(CONFIGS[preset]))


def targets_of(model: nn.Module) -> list[str]:
    return [name.removesuffix(".base_layer") for name in quant_layers(model)]


def add_adapter(
    model: nn.Module, name: str = "default", seed: int = 5, targets: list[str] | None = None, **options: Any
) -> dict[str, nn.Parameter]:
    """Add an adapter with random values to every quantized linear, or to ``targets``; return its parameters by name."""
    config = LoraConfig(r=4, target_modules=targets or targets_of(model), **options)
    inject_adapter_in_model(config, model, adapter_name=name)
    found = {n: p for n, p in model.named_parameters() if "lora_" in n and f".{name}" in n}
    generator = torch.Generator().manual_seed(seed)
    for key, value in found.items():
        noise = torch.randn(value.shape, generator=generator)
        with torch.no_grad():
            # A DoRA magnitude is already a norm.
            value.mul_(1 + noise / 10) if "magnitude" in key else value.copy_(
                noise * (0.1 if "lora_A" in key else 0.02)
            )
    return found


def copy_adapter(source: dict[str, nn.Parameter], target: dict[str, nn.Parameter]) -> None:
    assert source.keys() == target.keys()
    for name, value in target.items():
        value.data.copy_(source[name].data)


def lora_layers(model: nn.Module) -> list[LoraQuantLinear]:
    return [module for module in model.modules() if isinstance(module, LoraQuantLinear)]


def gradients(model: nn.Module, parameters: dict[str, nn.Parameter], target: Tensor) -> Tensor:
    model.zero_grad()
    result = model(**inputs_of(model))[0]
    (result.double() - target).square().mean().backward()
    return torch.cat([p.grad.flatten().double() for p in parameters.values()])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a, b, dim=0))
