"""Small random models, and a pipeline around them, for the tests of calibration data."""

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def tiny_dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ).eval()


class ConvDenoiser(nn.Module):
    """A minimal, fast denoiser."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True):
        noise = self.inner(sample) + encoder_hidden_states.mean() + timestep / 1000
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)


class TinyTextEncoder(nn.Module):
    """Turns prompts into embeddings [batch, 3, 12] that depend on the lengths of the words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(16, 12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids)


class TinyPipeline(DiffusionPipeline):
    """Turns text into latents the way diffusers' pipelines do: batched guidance, any scheduler."""

    def __init__(self, text_encoder, unet, scheduler) -> None:
        super().__init__()
        self.register_modules(text_encoder=text_encoder, unet=unet, scheduler=scheduler)
        self.runs = 0

    def encode(self, prompts: list[str]) -> torch.Tensor:
        words = [[*prompt.split(), "", "", ""][:3] for prompt in prompts]
        return self.text_encoder(torch.tensor([[len(word) % 16 for word in row] for row in words]))

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=10, guidance_scale=3.0, strength=1.0, twice=False, generator=None):
        self.runs += 1
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        context = self.encode(prompts)
        guided = guidance_scale > 1
        if guided:
            context = torch.cat([self.encode([""] * len(prompts)), context])
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(len(prompts), 2, 8, 8, generator=generator) * self.scheduler.init_noise_sigma
        skipped = int(len(self.scheduler.timesteps) * (1 - strength))
        for t in self.progress_bar(self.scheduler.timesteps[skipped:]):
            inputs = self.scheduler.scale_model_input(latents, t)
            if guided:
                inputs = torch.cat([inputs, inputs])
            noise = self.unet(inputs, t, encoder_hidden_states=context, return_dict=False)[0]
            if twice:  # a second call in the same step, as perturbed-attention guidance and similar methods do
                noise = noise + 0.1 * self.unet(inputs * 0.5, t, encoder_hidden_states=context).sample
            if guided:
                unconditional, conditional = noise.chunk(2)
                noise = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(noise, t, latents).prev_sample
        return latents


def tiny_pipeline(scheduler, denoiser=None) -> TinyPipeline:
    pipe = TinyPipeline(TinyTextEncoder(), denoiser or ConvDenoiser(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe
