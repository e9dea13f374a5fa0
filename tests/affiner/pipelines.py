"""Tiny random pipelines of real classes, each with a copy whose denoiser is quantized to 4 bits."""

import copy

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from hfquant import quantize
from hfquant.affiner import load_affiner
from hfquant.affiner.runs import DenoisingLoop

W4A8 = {
    "default": {
        "opt": {"type": "default"},
        "weight_quant": {"type": "int4", "axis": -1},
        "input_quant": {"type": "int8", "axis": -1, "dynamic": True},
    }
}


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def unet():
    torch.manual_seed(0)
    denoiser = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 12), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=36, attention_head_dim=4,
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(_vae(4), unet=denoiser, scheduler=scheduler, requires_safety_checker=False, **parts)
    row = {"prompt_embeds": torch.randn(5, 36), "negative_prompt_embeds": torch.randn(5, 36)}
    return pipe, row, {"guidance_scale": 4.0, "output_type": "latent"}


def sd3():
    torch.manual_seed(1)
    denoiser = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=12,
        num_attention_heads=3, joint_attention_dim=36, caption_projection_dim=36, pooled_projection_dim=30,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    parts = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    pipe = StableDiffusion3Pipeline(denoiser, FlowMatchEulerDiscreteScheduler(shift=3.0), _vae(4), **parts)
    row = {
        "prompt_embeds": torch.randn(5, 36),
        "negative_prompt_embeds": torch.randn(5, 36),
        "pooled_prompt_embeds": torch.randn(30),
        "negative_pooled_prompt_embeds": torch.randn(30),
    }
    return pipe, row, {"guidance_scale": 4.0, "output_type": "latent", "height": 16, "width": 16}


def flux():
    torch.manual_seed(2)
    denoiser = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=12, num_attention_heads=3,
        joint_attention_dim=28, pooled_projection_dim=30, axes_dims_rope=(4, 4, 4), guidance_embeds=True,
    ).eval()  # fmt: skip
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, _vae(4), transformer=denoiser, **parts)
    row = {"prompt_embeds": torch.randn(5, 28), "pooled_prompt_embeds": torch.randn(30)}
    return pipe, row, {"output_type": "latent", "height": 16, "width": 16}


def auraflow():
    """Return a pipeline that passes its denoiser a thousandth of the scheduler's timestep."""
    torch.manual_seed(4)
    denoiser = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, out_channels=4,
        pos_embed_max_size=256,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe = AuraFlowPipeline(None, None, vae=_vae(4), transformer=denoiser, scheduler=scheduler)
    row = {f"{kind}prompt_embeds": torch.randn(5, 32) for kind in ("", "negative_")}
    row |= {f"{kind}prompt_attention_mask": torch.ones(5) for kind in ("", "negative_")}
    return pipe, row, {"guidance_scale": 4.0, "output_type": "latent", "height": 16, "width": 16}


BUILDERS = {"unet": unet, "sd3": sd3, "flux": flux, "auraflow": auraflow}


def real_and_quant(name):
    """Return the two pipelines, dataset rows, and the other arguments of a call."""
    pipe, row, arguments = BUILDERS[name]()
    twin = copy.copy(pipe)
    part = "unet" if name == "unet" else "transformer"
    setattr(twin, part, quantize(copy.deepcopy(getattr(pipe, part)), None, W4A8))
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    for each in (pipe, twin):
        each.set_progress_bar_config(disable=True)
    rows = [{k: v + 0.3 * torch.randn_like(v) for k, v in row.items()} for _ in range(3)]
    return pipe, twin, rows, arguments


def call(pipe, rows, arguments, steps=4, seed=5):
    batch = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
    generator = torch.Generator().manual_seed(seed)
    return pipe(**batch, **arguments, num_inference_steps=steps, generator=generator, return_dict=False)[0]


class Toy(torch.nn.Module):
    """A minimal, fast denoiser; `gain` and `offset` [C] distort its predictions."""

    def __init__(self, gain=None, offset=None, channels=2) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.gain = torch.ones(channels) if gain is None else torch.tensor(gain)
        self.offset = torch.zeros(channels) if offset is None else torch.tensor(offset)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        noise = (
            torch.tanh(self.inner(sample)) + 0.1 * class_labels.view(-1, 1, 1, 1) + timestep.view(-1, 1, 1, 1) / 1000
        )
        return (noise * self.gain.view(-1, 1, 1) + self.offset.view(-1, 1, 1),)


EXACT = {"lambda1": 0.0, "lambda2": 0.0}


def toy_config(scheduler=None, solver=EXACT, steps=4, **stepper):
    scheduler = scheduler or DDIMScheduler(clip_sample=False)
    return {"scheduler": scheduler, "solver": solver, "stepper": {"max_timestep": steps, "batch_size": 2, **stepper}}


def noise(count=5, channels=2, size=6, seed=7):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """A third-party affiner that records what it sees and corrects by a constant."""

    def __init__(self):
        self.seen, self.solved, self.corrected = [], [], []

    def observe(self, timestep, real, quant):
        assert timestep not in self.solved
        self.seen.append((timestep, real, quant))

    def solve(self, timestep):
        self.solved.append(timestep)

    def correct(self, timestep, prediction):
        self.corrected.append(timestep)
        return prediction + 0.05


class Loop(DenoisingLoop):
    """A pipeline, as opposed to a bare denoiser, so the affiner corrects the input of the scheduler's step."""

    def sample(self, steps=4, size=6, count=3):
        noise = torch.randn(count, 2, size, size, generator=torch.Generator().manual_seed(8))
        generator = torch.Generator().manual_seed(9)
        return self(steps, latents=noise, generator=generator, class_labels=torch.arange(count))[0]


def fitted(scheduler, solver=None, steps=4, **config):
    real, quant = Loop(Toy(), scheduler), Loop(Toy(gain=[0.8, 1.3]), copy.deepcopy(scheduler))
    config = {"stepper": {"max_timestep": steps}, **({"solver": solver} if solver else {}), **config}
    noise = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(7))
    return load_affiner(config, list(range(5)), real, quant, latents=noise), real, quant
