"""diffusers' own pipelines, unmodified, with tiny random weights."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

from hfquant.calibration import BaseSampler, UniformSampler, generate_calibrate_set
from tests.calibration.tiny_models import tiny_unet


def vae(channels: int) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        latent_channels=channels,
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.5,
        shift_factor=0.0,
    )


def embeds(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def stable_diffusion(cls, scheduler):
    return cls(
        vae=vae(2),
        text_encoder=None,
        tokenizer=None,
        unet=tiny_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def ddim() -> DDIMScheduler:
    return DDIMScheduler(steps_offset=1, clip_sample=False)


def lcm() -> LCMScheduler:
    return LCMScheduler(steps_offset=1)


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(2),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def sd3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        out_channels=2,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(2),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


SIZE = {"height": 16, "width": 16, "output_type": "latent"}
TEXT = {"prompt_embeds": embeds(1, 3, 12), "negative_prompt_embeds": embeds(1, 3, 12)}
POOLED = {"pooled_prompt_embeds": embeds(1, 6)}
CASES = {
    "sd-ddim": (
        lambda: stable_diffusion(StableDiffusionPipeline, DDIMScheduler(steps_offset=1, clip_sample=False)),
        "unet",
        {**TEXT, **SIZE},
        6,
        6,
    ),
    "sd-lcm": (
        lambda: stable_diffusion(StableDiffusionPipeline, LCMScheduler(steps_offset=1)),
        "unet",
        {**TEXT, **SIZE},
        4,
        4,
    ),
    "sd-img2img": (
        lambda: stable_diffusion(StableDiffusionImg2ImgPipeline, ddim()),
        "unet",
        {**TEXT, "image": embeds(1, 3, 16, 16).sigmoid(), "strength": 0.5, "output_type": "latent"},
        8,
        4,
    ),
    "flux": (flux, "transformer", {"prompt_embeds": embeds(1, 3, 12), **POOLED, **SIZE, "guidance_scale": 3.5}, 5, 5),
    "flux-true-cfg": (
        flux,
        "transformer",
        {**TEXT, **POOLED, **SIZE, "negative_pooled_prompt_embeds": embeds(1, 6), "true_cfg_scale": 2.0},
        5,
        10,
    ),
    "sd3": (sd3, "transformer", {**TEXT, **POOLED, "negative_pooled_prompt_embeds": embeds(1, 6), **SIZE}, 5, 5),
}


@pytest.mark.parametrize("case", CASES)
def test_denoiser_inputs(case, tmp_path):
    make, layer, batch, steps, calls = CASES[case]
    pipe = make()
    outputs = []
    denoiser = getattr(pipe, layer)
    handle = denoiser.register_forward_hook(lambda module, args, kwargs, out: outputs.append(out[0]), with_kwargs=True)
    everything = generate_calibrate_set(pipe, BaseSampler(None), [batch], layer, tmp_path, num_inference_steps=steps)
    handle.remove()
    assert len(everything) == calls
    with torch.no_grad():
        for sample, output in zip(everything, outputs[-calls:], strict=True):
            again = denoiser(**sample) if isinstance(sample, dict) else denoiser(*sample)
            torch.testing.assert_close(again[0], output, rtol=0, atol=0)

    some = generate_calibrate_set(pipe, UniformSampler(2), [batch] * 2, layer, num_inference_steps=steps)
    assert len(some) == 2 * 2 * calls // min(steps, calls)
    times = {float(sample["timestep"].max()) for sample in some}
    assert times <= {float(sample["timestep"].max()) for sample in everything}
    assert len(times) >= 2


def test_inner_layers_of_flux():
    """Blocks get the same rotary embeddings and guidance at every step; each is stored only once."""
    pipe = flux()
    _, _, batch, steps, _ = CASES["flux"]
    calibset = generate_calibrate_set(
        pipe, BaseSampler(None), [batch] * 2, "transformer.transformer_blocks.0", num_inference_steps=steps
    )
    assert len(calibset) == 2 * steps
    cos, sin = calibset[0]["image_rotary_emb"]
    assert cos.shape == sin.shape
    (recording,) = calibset.chunks
    tensors = sum(len(torch.utils._pytree.tree_leaves(sample)) for sample in calibset)
    assert len(recording.tensors) < tensors - 2 * (2 * steps - 1), "the two rotary tables were stored at each step"
