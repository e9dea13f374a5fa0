"""A small class-conditional diffusion pipeline in pixel space, for a DiT and any noise-predicting scheduler.

diffusers' own `DiTPipeline` needs an autoencoder, which images of a few pixels have no use for. This file imports only
diffusers and torch, so it also works by itself as a diffusers custom pipeline:
`DiffusionPipeline.from_pretrained(folder, custom_pipeline=".../hfquant/demo", trust_remote_code=True)`.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor


class DigitsPipeline(DiffusionPipeline):
    """Class-conditional image generation with a DiT that works on pixels.

    The denoiser predicts the noise (epsilon) in images scaled to [-1, 1]. Class `num_embeds_ada_norm`, one past the
    last real class, is the null class of classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

    Args:
        transformer: The denoiser, maps `[B, C, H, W]` noisy images to `[B, C, H, W]` noise.
        scheduler: Any diffusers scheduler for noise prediction on a beta schedule (DDPM, DDIM, DPM-Solver++, Euler,
            ...). Swap it with `pipe.scheduler = X.from_config(pipe.scheduler.config)`.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | torch.Tensor,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        eta: float = 0.0,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample one image for each class label.

        Args:
            class_labels: The B classes to generate, integers in `[0, num_embeds_ada_norm)`.
            num_inference_steps: Denoising steps of the scheduler.
            guidance_scale: Weight w of classifier-free guidance, `eps = eps_null + w (eps_class - eps_null)`. Above 1,
                each step runs one batch of 2B: the B requested classes, then the null class. Guidance is off at 1 and
                below.
            generator: Source of the initial noise and of the noise of stochastic schedulers.
            latents: Initial Gaussian noise of unit variance, `[B, C, H, W]`; drawn from `generator` if None.
            output_type: "pil" for a list of B images, "np" for `[B, H, W, C]`, "pt" for `[B, C, H, W]`; arrays and
                tensors are float32 in [0, 1].
            return_dict: Whether to wrap the images in an `ImagePipelineOutput` instead of a tuple.
            eta: Share of noise added back by DDIM and similar schedulers; others ignore it.

        Raises:
            ValueError: A label, the latents' shape or the output type is wrong, or according to its config the
                scheduler does not take noise predictions on a beta schedule.
        """
        config = self.transformer.config
        device = self._execution_device
        labels = torch.as_tensor(class_labels, device=device).reshape(-1)
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        self._check_inputs(labels, shape, latents, output_type)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma

        if guidance_scale > 1:
            labels = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}

        for t in self.progress_bar(self.scheduler.timesteps):
            noise = self._noise(latents, t, labels, guidance_scale)
            latents = self.scheduler.step(noise, t, latents, **extra).prev_sample

        images: Any = (latents / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(
        self, latents: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """Predict the noise in ``latents``; with guidance, ``labels`` also has the null class once per latent."""
        guided = guidance_scale > 1
        model_input = self.scheduler.scale_model_input(latents, t).to(self.transformer.dtype)
        if guided:
            model_input = torch.cat([model_input, model_input])
        timestep = t.expand(len(labels))
        noise: torch.Tensor = self.transformer(
            hidden_states=model_input, timestep=timestep, class_labels=labels
        ).sample.float()
        if not guided:
            return noise
        conditional, unconditional = noise.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _check_inputs(
        self, labels: torch.Tensor, shape: tuple[int, ...], latents: torch.Tensor | None, output_type: str
    ) -> None:
        num_classes = self.transformer.config.num_embeds_ada_norm
        if labels.is_floating_point() or not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"class_labels must be integers from 0 to {num_classes - 1}, at least one; got {labels}.")
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {list(shape)}, got {list(latents.shape)}.")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f'output_type must be "pil", "np" or "pt", got {output_type!r}.')
        # Flow matching, EDM and v-prediction schedulers would run without error, but produce noise.
        scheduler = self.scheduler.config
        if scheduler.get("prediction_type") != "epsilon" or "beta_schedule" not in scheduler:
            raise ValueError(
                f"{type(self.scheduler).__name__} does not take noise predictions on a beta schedule: use a scheduler "
                f'with prediction_type="epsilon", got {scheduler.get("prediction_type")!r}.'
            )
