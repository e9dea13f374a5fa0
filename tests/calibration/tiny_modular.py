"""A small modular pipeline: its call is `(state, output, **inputs)`, and its blocks define the inputs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.modular_pipelines import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

from tests.calibration.tiny_models import tiny_unet


class Encode(ModularPipelineBlocks):
    """Turn prompts into embeddings [batch, 3, 12] that depend on their letters, and an optional image into one token.

    As in the pipelines that edit images, the image comes before the prompt.
    """

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("image"), InputParam("prompt", required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("prompt_embeds")]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        assert block.image is None, "no image was given"
        prompts = [block.prompt] if isinstance(block.prompt, str) else list(block.prompt)
        seeds = [sum(map(ord, prompt)) for prompt in prompts]
        embeds = [torch.randn(3, 12, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        block.prompt_embeds = torch.stack(embeds)
        self.set_block_state(state, block)
        return components, state


class EncodeImage(Encode):
    """Require an image."""

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("image", required=True), InputParam("prompt", required=True)]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        block.prompt_embeds = torch.full((1, 3, 12), sum(block.image.size) / 100)
        self.set_block_state(state, block)
        return components, state


class Denoise(ModularPipelineBlocks):
    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("unet", UNet2DConditionModel), ComponentSpec("scheduler", DDIMScheduler)]

    @property
    def inputs(self) -> list[InputParam]:
        steps = InputParam("num_inference_steps", default=50, required=True)
        return [InputParam("prompt_embeds", required=True), steps, InputParam("latents"), InputParam("generator")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents")]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        components.scheduler.set_timesteps(block.num_inference_steps)
        latents = block.latents
        if latents is None:
            latents = torch.randn(len(block.prompt_embeds), 2, 8, 8, generator=block.generator)
        for t in components.scheduler.timesteps:
            noise = components.unet(latents, t, encoder_hidden_states=block.prompt_embeds, return_dict=False)[0]
            latents = components.scheduler.step(noise, t, latents, return_dict=False)[0]
        block.latents = latents
        self.set_block_state(state, block)
        return components, state


class Decode(ModularPipelineBlocks):
    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("latents", required=True), InputParam("output_type", default="pil")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("clips")]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        assert block.output_type == "np"
        block.clips = block.latents.movedim(1, -1).numpy()
        self.set_block_state(state, block)
        return components, state


def tiny_modular(*blocks: type[ModularPipelineBlocks]) -> Any:
    """Return a pipeline of these blocks, by default those that turn prompts into latents."""
    named = {block.__name__.lower(): block for block in blocks or (Encode, Denoise)}
    pipe = SequentialPipelineBlocks.from_blocks_dict(named).init_pipeline()
    pipe.update_components(unet=tiny_unet(), scheduler=DDIMScheduler(clip_sample=False))
    return pipe
