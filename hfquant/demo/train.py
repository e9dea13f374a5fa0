"""Train the embedded digits denoiser and write it as a pipeline folder.

A class-conditional DiT (Peebles and Xie, arXiv 2212.09748) learns the noise in scikit-learn's 8x8 digits (Ho et al.,
arXiv 2006.11239), with label dropout for classifier-free guidance. Seeded; about ten minutes on one core:

    python -m hfquant.demo.train --out hfquant/demo/digits
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel, DPMSolverMultistepScheduler
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange

from hfquant.demo.classifier import agreement, digits_split
from hfquant.demo.pipeline import DigitsPipeline

NUM_CLASSES = 10
LABEL_DROPOUT = 0.1
# The noise schedule of latent diffusion models. Neighboring pixels of an 8x8 image reveal little about each other, so
# with the linear schedule used for 256x256 images, nothing is left of the digit long before the last step.
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def build_transformer() -> DiTTransformer2DModel:
    """Return a DiT of 1.6 M parameters: 16 tokens of 2x2 pixels, two blocks, width 192 (deliberately no power of 2)."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    # adaLN-Zero: every block starts as the identity. diffusers leaves this initialization to the training code.
    for layer in [*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    # In training mode each block drops labels independently, so the model as a whole would never learn to do without
    # them. It therefore stays in eval mode (nothing else depends on it), and `train` drops them for all blocks at once.
    return model.eval()


def train(steps: int, batch_size: int, lr: float) -> DiTTransformer2DModel:
    """Fit the denoiser to the training split and return the moving average of its weights, in float32."""
    images, _, labels, _ = digits_split()
    data = torch.from_numpy(images)[:, None] * 2 - 1
    classes = torch.from_numpy(labels)

    model = build_transformer()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.05, fused=True)
    warmup = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(step / warmup, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    noising = DDPMScheduler(**NOISE)

    progress = trange(steps, desc="training")
    average_loss = 1.0
    for _ in progress:
        pick = torch.randint(len(data), (batch_size,))
        # One timestep from each of batch_size equal intervals: distributed like independent draws, but with less
        # variance.
        t = ((torch.arange(batch_size) + torch.rand(batch_size)) / batch_size * 1000).long().clamp(max=999)
        label = torch.where(torch.rand(batch_size) < LABEL_DROPOUT, NUM_CLASSES, classes[pick])
        noise = torch.randn(batch_size, *data.shape[1:])
        prediction = model(noising.add_noise(data[pick], noise, t), t, label).sample
        loss = F.mse_loss(prediction, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(model)
        average_loss += 0.01 * (loss.item() - average_loss)
        progress.set_postfix(loss=f"{average_loss:.4f}", refresh=False)
    return ema.module


def main() -> None:
    """Train, save in float16, reload, and print how often the classifier reads the requested digit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("hfquant/demo/digits"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    transformer = train(args.steps, args.batch_size, args.lr)
    scheduler = DPMSolverMultistepScheduler(**NOISE)
    # float16 halves the file size; the weights are loaded as float32.
    DigitsPipeline(transformer.half(), scheduler).save_pretrained(args.out)

    pipe = DigitsPipeline.from_pretrained(args.out)
    labels = torch.arange(NUM_CLASSES).repeat(20)
    for seed in range(5):
        samples = pipe(labels, generator=torch.Generator().manual_seed(seed), output_type="pt").images
        print(f"seed {seed}: the classifier agrees with {agreement(samples, labels):.1%} of {len(labels)} samples")


if __name__ == "__main__":
    main()
