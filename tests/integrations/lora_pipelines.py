"""Tiny random diffusers pipelines that accept LoRA adapters; they contain nothing but a denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
)
from torch import nn

from tests.integrations import small_models


def sdxl() -> nn.Module:
    torch.manual_seed(26)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(12, 24),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=36,
        attention_head_dim=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=30,
    ).eval()


def sana() -> nn.Module:
    torch.manual_seed(27)
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=12,
        num_cross_attention_heads=3,
        cross_attention_head_dim=12,
        cross_attention_dim=36,
        caption_channels=20,
        sample_size=8,
    ).eval()


def qwen_image() -> nn.Module:
    torch.manual_seed(28)
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=3,
        joint_attention_dim=28,
        axes_dims_rope=(4, 4, 4),
    ).eval()


#: The pipeline's class and its denoiser.
PIPELINES: dict[str, tuple[type[DiffusionPipeline], Callable[[], nn.Module]]] = {
    "sd": (StableDiffusionPipeline, small_models.unet),
    "sdxl": (StableDiffusionXLPipeline, sdxl),
    "sd3": (StableDiffusion3Pipeline, small_models.sd3),
    "flux": (FluxPipeline, small_models.flux),
    "sana": (SanaPipeline, sana),
    "qwen_image": (QwenImagePipeline, qwen_image),
    "wan": (WanPipeline, small_models.wan),
}


def pipeline(name: str, denoiser: nn.Module | None = None) -> DiffusionPipeline:
    """Return a pipeline that has nothing but a denoiser, by default its own."""
    cls, make = PIPELINES[name]
    accepted = inspect.signature(cls.__init__).parameters.items()
    empty = {k: None for k, p in accepted if p.default is inspect.Parameter.empty and k != "self"}
    role = "unet" if "unet" in empty else "transformer"
    options = {"requires_safety_checker": False} if name == "sd" else {}
    return cls(**{k: v for k, v in empty.items() if k not in ("args", "kwargs")} | {role: denoiser or make()} | options)


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer
