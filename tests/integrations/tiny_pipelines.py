"""Pipelines of diffusers' own classes with tiny random models, called with text embeddings instead of prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn

SIZE, TEXT, POOLED = 16, 12, 6


class Case(NamedTuple):
    """A pipeline to build, the arguments of a call except the data, and one sample of the data.

    Attributes:
        build: builds the pipeline, identical each time.
        call: arguments that are the same for each call.
        row: draws one sample, without a batch dimension.
        parts: the components to quantize.
    """

    build: Callable[[], Any]
    call: dict[str, Any]
    row: Callable[[torch.Generator], dict[str, Any]]
    parts: tuple[str, ...]


def unet(**overrides: Any) -> nn.Module:
    torch.manual_seed(40)
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": TEXT,
        "attention_head_dim": 4,
    }
    return diffusers.UNet2DConditionModel(**sizes | overrides).eval()


#: What SDXL adds to a UNet: a pooled text embedding and six numbers for sizes and crops.
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": POOLED + 6 * 4,
}


def trained(controlnet: nn.Module) -> nn.Module:
    """Fill the zero layers at the end of a new ControlNet, which would make everything before them irrelevant."""
    generator = torch.Generator().manual_seed(41)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1, generator=generator)
    return controlnet.eval()


def unet_controlnet(model: nn.Module) -> nn.Module:
    return trained(diffusers.ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(4, 8)))


def sd3_transformer(channels: int = 4) -> nn.Module:
    torch.manual_seed(42)
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED,
        out_channels=channels,
        pos_embed_max_size=8,
    ).eval()


def flux_transformer(channels: int = 16) -> nn.Module:
    torch.manual_seed(43)
    return diffusers.FluxTransformer2DModel(
        in_channels=channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()


def image_vae(channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(44)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        latent_channels=channels,
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.0,
    ).eval()


def assembled(name: str, **parts: Any) -> Any:
    """Return a pipeline of the class, with None for components that are not given."""
    cls = getattr(diffusers, name)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    missing = {p.name: None for p in parameters if p.default is p.empty and p.name not in parts}
    pipe = cls(**missing, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reloaded(pipe: Any, folder: Path, **parts: Any) -> Any:
    """Save a pipeline and load it again, leaving out missing components."""
    pipe.save_pretrained(folder)
    lacking = {name: None for name, part in pipe.components.items() if part is None}
    again = type(pipe).from_pretrained(folder, **lacking, **parts)
    again.set_progress_bar_config(disable=True)
    return again


def ddim() -> DDIMScheduler:
    return DDIMScheduler(steps_offset=1, clip_sample=False)


def stable_diffusion(name: str, channels: int = 4, controlnet: bool = False, xl: bool = False) -> Any:
    model = unet(in_channels=channels, **(XL if xl else {}))
    parts = {"controlnet": unet_controlnet(model)} if controlnet else {}
    checker = {} if xl else {"requires_safety_checker": False}
    return assembled(name, vae=image_vae(), unet=model, scheduler=ddim(), **parts, **checker)


def sd3(name: str, channels: int = 4, controlnet: bool = False) -> Any:
    model, parts = sd3_transformer(channels), {}
    if controlnet:
        # It writes to the config of the model that it is built from.
        other = sd3_transformer(channels)
        made = diffusers.SD3ControlNetModel.from_transformer(other, num_layers=1, num_extra_conditioning_channels=0)
        parts = {"controlnet": trained(made)}
    scheduler = FlowMatchEulerDiscreteScheduler()
    return assembled(name, transformer=model, vae=image_vae(channels), scheduler=scheduler, **parts)


def flux(name: str, channels: int = 16, controlnet: bool = False) -> Any:
    model, parts = flux_transformer(channels), {}
    if controlnet:
        made = diffusers.FluxControlNetModel.from_transformer(model, num_layers=1, num_single_layers=1,
                                                              attention_head_dim=16, num_attention_heads=2)  # fmt: skip
        parts = {"controlnet": trained(made)}
    return assembled(name, transformer=model, vae=image_vae(), scheduler=FlowMatchEulerDiscreteScheduler(), **parts)


def with_ip_adapter(pipe: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Add an IP-Adapter to SD: image tokens enter each cross-attention through linears of their own.

    Args:
        pipe: the pipeline.
        dtype: the dtype of the adapter's weights.
        **options: of diffusers' ``load_ip_adapter``.
    """
    generator = torch.Generator().manual_seed(45)

    def noise(*shape: int) -> Tensor:
        return (0.3 * torch.randn(shape, generator=generator)).to(dtype)

    keys: dict[str, Tensor] = {}
    for i, (name, _) in enumerate(n for n in pipe.unet.attn_processors.items() if "attn2" in n[0]):
        inner = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        keys |= {f"{2 * i + 1}.to_k_ip.weight": noise(inner, TEXT), f"{2 * i + 1}.to_v_ip.weight": noise(inner, TEXT)}
    tokens = 4  # tokens per image in the first IP-Adapter
    projection = {
        "proj.weight": noise(tokens * TEXT, POOLED),
        "proj.bias": noise(tokens * TEXT),
        "norm.weight": 1 + noise(TEXT),
        "norm.bias": noise(TEXT),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}], **options)
    pipe.set_ip_adapter_scale(0.7)
    return pipe


def wan(name: str = "WanPipeline", channels: int = 4) -> Any:
    def transformer(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=4,
            text_dim=TEXT, freq_dim=32, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
        ).eval()  # fmt: skip

    torch.manual_seed(46)
    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4,
                           latents_std=[1.0] * 4, temperal_downsample=[False, True, True])  # fmt: skip
    return assembled(
        name, vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=transformer(47),
        transformer_2=transformer(48), boundary_ratio=0.8,
    )  # fmt: skip


def ltx() -> Any:
    torch.manual_seed(49)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=TEXT,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    return assembled("LTXPipeline", transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler)


def cogvideox() -> Any:
    torch.manual_seed(50)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=TEXT, num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=5,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler()
    return assembled("CogVideoXPipeline", transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler)


def hunyuan_video() -> Any:
    torch.manual_seed(51)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=TEXT,
        pooled_projection_dim=POOLED, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1,
                                    norm_num_groups=2, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
                                    up_block_types=("HunyuanVideoUpBlock3D",) * 4)  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    return assembled("HunyuanVideoPipeline", transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler)


def texts(*extra: str) -> Callable[[torch.Generator], dict[str, Any]]:
    """Return a function that draws prompt embeddings and the other arguments named."""
    shapes = {
        "prompt_embeds": (5, TEXT),
        "negative_prompt_embeds": (5, TEXT),
        "pooled_prompt_embeds": (POOLED,),
        "negative_pooled_prompt_embeds": (POOLED,),
        "image": (3, SIZE, SIZE),
        "control_image": (3, SIZE, SIZE),
        "mask_image": (1, SIZE, SIZE),
        "prompt_attention_mask": (5,),
        "negative_prompt_attention_mask": (5,),
    }

    def row(generator: torch.Generator) -> dict[str, Any]:
        made = {name: torch.randn(shapes[name], generator=generator) for name in ("prompt_embeds", *extra)}
        for name in made:
            if name.endswith("image"):
                made[name] = made[name].sigmoid()
            if name.endswith("_mask"):
                made[name] = torch.ones(5)
            if name == "mask_image":
                made[name] = (made[name] > 0.5).float()
        return made

    return row


NEGATIVE, POOLS = ("negative_prompt_embeds",), ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
MASKS = ("prompt_attention_mask", "negative_prompt_attention_mask")
IMAGE = {"height": SIZE, "width": SIZE, "output_type": "latent", "num_inference_steps": 3}
CHANGED = {"strength": 1.0, "output_type": "latent", "num_inference_steps": 3}
VIDEO = {"height": SIZE, "width": SIZE, "num_frames": 5, "output_type": "latent", "num_inference_steps": 3}


CASES: dict[str, Case] = {
    "sd-controlnet": Case(
        lambda: stable_diffusion("StableDiffusionControlNetPipeline", controlnet=True),
        IMAGE, texts(*NEGATIVE, "image"), ("unet", "controlnet"),
    ),
    "sdxl": Case(
        lambda: stable_diffusion("StableDiffusionXLPipeline", xl=True), IMAGE, texts(*NEGATIVE, *POOLS), ("unet",)
    ),
    "sdxl-controlnet": Case(
        lambda: stable_diffusion("StableDiffusionXLControlNetPipeline", controlnet=True, xl=True),
        IMAGE, texts(*NEGATIVE, *POOLS, "image"), ("unet", "controlnet"),
    ),
    "sd3-controlnet": Case(
        lambda: sd3("StableDiffusion3ControlNetPipeline", controlnet=True),
        IMAGE, texts(*NEGATIVE, *POOLS, "control_image"), ("transformer", "controlnet"),
    ),
    "flux-controlnet": Case(
        lambda: flux("FluxControlNetPipeline", controlnet=True),
        IMAGE, texts(POOLS[0], "control_image"), ("transformer", "controlnet"),
    ),
    "sd-img2img": Case(
        lambda: stable_diffusion("StableDiffusionImg2ImgPipeline"),
        CHANGED | {"strength": 0.7}, texts(*NEGATIVE, "image"), ("unet",),
    ),
    "sdxl-img2img": Case(
        lambda: stable_diffusion("StableDiffusionXLImg2ImgPipeline", xl=True),
        CHANGED | {"strength": 0.7}, texts(*NEGATIVE, *POOLS, "image"), ("unet",),
    ),
    "sd3-img2img": Case(
        lambda: sd3("StableDiffusion3Img2ImgPipeline"),
        CHANGED | {"height": SIZE, "width": SIZE}, texts(*NEGATIVE, *POOLS, "image"), ("transformer",),
    ),
    "flux-img2img": Case(
        lambda: flux("FluxImg2ImgPipeline"),
        CHANGED | {"height": SIZE, "width": SIZE}, texts(POOLS[0], "image"), ("transformer",),
    ),
    "sd-inpaint": Case(
        lambda: stable_diffusion("StableDiffusionInpaintPipeline", channels=9),
        IMAGE, texts(*NEGATIVE, "image", "mask_image"), ("unet",),
    ),
    "sdxl-inpaint": Case(
        lambda: stable_diffusion("StableDiffusionXLInpaintPipeline", channels=9, xl=True),
        IMAGE, texts(*NEGATIVE, *POOLS, "image", "mask_image"), ("unet",),
    ),
    "sd3-inpaint": Case(
        lambda: sd3("StableDiffusion3InpaintPipeline", channels=16),
        IMAGE | {"strength": 1.0}, texts(*NEGATIVE, *POOLS, "image", "mask_image"), ("transformer",),
    ),
    "flux-inpaint": Case(
        lambda: flux("FluxInpaintPipeline"),
        IMAGE | {"strength": 1.0}, texts(POOLS[0], "image", "mask_image"), ("transformer",),
    ),
    "ip-adapter": Case(
        lambda: with_ip_adapter(stable_diffusion("StableDiffusionPipeline")),
        IMAGE | {"ip_adapter_image_embeds": [torch.linspace(-1, 1, 2 * POOLED).view(2, 1, POOLED)]},
        texts(*NEGATIVE), ("unet",),
    ),
    "wan": Case(wan, VIDEO, texts(*NEGATIVE), ("transformer", "transformer_2")),
    "wan-i2v": Case(
        lambda: wan("WanImageToVideoPipeline", 12), VIDEO, texts(*NEGATIVE, "image"), ("transformer", "transformer_2")
    ),
    "ltx": Case(
        ltx, VIDEO | {"height": 64, "width": 64, "num_frames": 9}, texts(*NEGATIVE, *MASKS), ("transformer",)
    ),
    "cogvideox": Case(cogvideox, VIDEO, texts(*NEGATIVE), ("transformer",)),
    "hunyuan-video": Case(
        hunyuan_video, VIDEO, texts(POOLS[0], MASKS[0]), ("transformer",)
    ),
}  # fmt: skip


def rows(case: Case, count: int, seed: int = 60) -> list[dict[str, Any]]:
    """Return samples of the pipeline's data."""
    generator = torch.Generator().manual_seed(seed)
    return [case.row(generator) for _ in range(count)]


def batches(case: Case, count: int, seed: int = 60) -> list[dict[str, Any]]:
    """Return samples as batches of one."""
    return [{k: v[None] for k, v in row.items()} for row in rows(case, count, seed)]


@torch.no_grad()
def run(pipe: Any, case: Case) -> Tensor:
    """Return the latents of a call with data of its own."""
    (batch,) = batches(case, 1, seed=61)
    torch.manual_seed(63)  # SD3's ControlNet encodes its image without the generator
    made = pipe(**batch, **case.call, generator=torch.Generator().manual_seed(62))
    return made[0] if isinstance(made[0], Tensor) else torch.stack(list(made[0]))
