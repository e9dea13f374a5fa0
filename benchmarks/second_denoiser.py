"""A second denoiser: larger images than the embedded one, another scheduler, every linear quantized.

    python -m benchmarks.second_denoiser --json benchmarks/results/second_denoiser.json

A DiT of four blocks (2.7 M weights, 49 tokens) is trained on scikit-learn's digits, enlarged to 28 x 28 pixels and
randomly shifted, in 1,200 steps (seven minutes on one core; kept in `.models`). The score is the PSNR to full precision
of 64 images, drawn in 20 DDIM steps from equal noise. Unlike in :mod:`benchmarks.quality`, where peers' kernels set the
limit, no linear is excluded; linears that a preset leaves in float count as stored. Rows that the JSON file already has
are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import hfquant
from benchmarks import metrics, models
from benchmarks.quality import store
from hfquant.affiner import load_affiner
from hfquant.demo import DigitsPipeline

FOLDER = models.MODELS / "second-denoiser"
SIZE, STEPS, BATCH = 28, 1200, 32
PICTURES, CALIBRATION, FIT = 64, 16, 16
#: Seeds of the initial noise, by purpose of the images.
SEEDS = {"calibration": 1, "evaluation": 2, "affiner": 7}


def main(argv: list[str] | None = None) -> int:
    """Measure, print the page and store it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.second_denoiser", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--presets", nargs="+", default=[*hfquant.PRESETS], choices=hfquant.PRESETS)
    parser.add_argument("--affiner", action="store_true", help="fit an affiner to each as well")
    parser.add_argument("--distill", action="store_true", help="distill each as well")
    parser.add_argument("--rounding-steps", type=int, default=0, help="of learned rounding before distilling")
    parser.add_argument("--json", type=Path, help="file that rows are added to; a .md of the same name goes beside it")
    args = parser.parse_args(argv)

    model = denoiser()
    calls = calibration(model)
    expected = pictures(model, PICTURES, "evaluation")
    stored = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    rows: dict[str, dict[str, float]] = stored.get("rows", {})

    def judged(quantized: nn.Module, **more: Any) -> Tensor:
        return metrics.psnr(expected, pictures(quantized, PICTURES, "evaluation", **more), 1.0)

    for preset in args.presets:
        row = rows.setdefault(preset, {})
        if "PSNR dB" in row and ("affiner" in row or not args.affiner) and ("distilled" in row or not args.distill):
            continue
        quantized = hfquant.quantize(copy.deepcopy(model), calls, preset)
        plain = judged(quantized)
        weights = {n: m.weight.numel() for n, m in linears(model).items()}
        row["bits"] = metrics.bits_per_weight(quantized, weights, left=linears(quantized))
        row["PSNR dB"], row["error"] = metrics.mean_and_error(plain)
        if args.affiner:
            affiner = fitted(model, quantized)
            row["affiner"], row["affiner error"] = metrics.mean_and_error(judged(quantized, affiner=affiner) - plain)
        if args.distill:
            hfquant.distill(quantized, model, shuffled(calls), steps=150, rounding_steps=args.rounding_steps)
            row["distilled"], row["distilled error"] = metrics.mean_and_error(judged(quantized) - plain)
        print(preset, row, file=sys.stderr, flush=True)
        if args.json:
            store(args.json, rows, markdown(rows))
    print(markdown(rows))
    return 0


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return all linears, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def denoiser() -> nn.Module:
    """Return the trained model, from its folder if it exists there."""
    if not FOLDER.exists():
        trained().save_pretrained(FOLDER)
    return DiTTransformer2DModel.from_pretrained(FOLDER).eval()


def trained() -> nn.Module:
    """Train the model. Adaptive norms and the output start at zero; a tenth of the labels are dropped."""
    from sklearn.datasets import load_digits

    torch.manual_seed(5)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.pad(F.interpolate(images, size=24, mode="bicubic").clamp(0, 1), (2, 2, 2, 2)) * 2 - 1
    labels = torch.tensor(digits.target)
    model = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=1,
        num_layers=4,
        sample_size=SIZE,
        patch_size=4,
        num_embeds_ada_norm=10,
    ).eval()
    for layer in [*(b.norm1.linear for b in model.transformer_blocks), model.proj_out_1, model.proj_out_2]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / 50, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
    )
    noising = DDPMScheduler(beta_schedule="linear")
    for _ in trange(STEPS, desc="training"):
        pick, move = torch.randint(len(images), (BATCH,)), torch.randint(-2, 3, (2,)).tolist()
        x = torch.roll(images[pick], move, (2, 3))
        t = ((torch.arange(BATCH) + torch.rand(BATCH)) / BATCH * 1000).long().clamp(max=999)
        noise = torch.randn_like(x)
        label = torch.where(torch.rand(BATCH) < 0.1, 10, labels[pick])
        loss = F.mse_loss(model(noising.add_noise(x, noise, t), t, label).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def pipeline(model: nn.Module) -> DigitsPipeline:
    """Return a pipeline around the denoiser, without a progress bar."""
    pipe = DigitsPipeline(model, DDIMScheduler(beta_schedule="linear"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(count: int, purpose: str) -> Tensor:
    """Return the initial noise of images, [count, 1, 28, 28]."""
    return torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(SEEDS[purpose]))


def calibration(model: nn.Module) -> list[dict[str, Any]]:
    """Return the arguments of the denoiser's calls while it draws the calibration images, one call per step."""
    calls: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(lambda _m, _a, kwargs: calls.append(kwargs), with_kwargs=True)
    pictures(model, CALIBRATION, "calibration")
    handle.remove()
    return calls


def pictures(model: nn.Module, count: int, purpose: str, affiner: Any = None) -> Tensor:
    """Return images, cycling through the classes, [count, 1, 28, 28] in [0, 1]."""
    pipe, labels = pipeline(model), [i % 10 for i in range(count)]
    if affiner is None:
        return pipe(labels, 20, latents=noise(count, purpose), output_type="pt").images
    with affiner.attach(pipe):
        return pipe(labels, 20, latents=noise(count, purpose), output_type="pt").images


def fitted(model: nn.Module, quantized: nn.Module) -> Any:
    """Return the default affiner, fitted on 16 runs."""
    config = {"stepper": {"max_timestep": 20, "batch_size": FIT}}
    pipes = pipeline(copy.deepcopy(model)), pipeline(quantized)
    return load_affiner(config, [i % 10 for i in range(FIT)], *pipes, latents=noise(FIT, "affiner"), shuffle=False)


def shuffled(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the calls split into four rows each, in random order."""
    size = len(calls[0]["hidden_states"])
    parts = [
        {n: v[i : i + 4] if isinstance(v, Tensor) and v.shape[:1] == (size,) else v for n, v in call.items()}
        for call in calls
        for i in range(0, size, 4)
    ]
    return [parts[i] for i in torch.randperm(len(parts), generator=torch.Generator().manual_seed(0))]


def markdown(rows: dict[str, dict[str, float]]) -> str:
    """Return a table of PSNR and of the gains of an affiner and of distillation, in dB with standard errors."""
    measured = [k for k in ("affiner", "distilled") if any(k in row for row in rows.values())]
    columns = ["preset", "bits", "PSNR dB", *measured]
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for name, row in rows.items():
        gains = [f"{row[k]:+.2f} ± {row[f'{k} error']:.2f}" if k in row else "" for k in measured]
        cells = [name, f"{row['bits']:.2f}", f"{row['PSNR dB']:.2f} ± {row['error']:.2f}", *gains]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
