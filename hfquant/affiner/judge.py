"""Whether an affiner pays off: runs from noise that it was not fitted on, with and without it.

No map harms predictions held out of its fit (:mod:`hfquant.affiner.solvers`), but the effect of all maps on a run is
another matter, as their noise accumulates along it. The latents at the end of the run therefore decide.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hfquant.affiner.inputs import Samples

#: Number of samples to judge by; batches are run until this is reached.
JUDGED = 32
#: Number of standard errors by which the mean gain must exceed zero.
_CERTAIN = 2.0


def fresh_samples(samples: Samples, seed: int) -> Samples:
    """Return the calls of the first :data:`JUDGED` samples or a few more, with initial noise from another seed."""
    generator = torch.Generator().manual_seed(seed)
    picked: Samples = []
    count = 0
    for sample in samples:
        if count >= JUDGED:
            break
        count += next((len(value) for value in sample.values() if isinstance(value, (list, Tensor))), 1)
        sample = dict(sample)
        if isinstance(latents := sample.get("latents"), Tensor):
            noise = torch.randn(latents.shape, generator=generator)
            sample["latents"] = noise.to(latents)
        if "generator" in sample:
            sample["generator"] = torch.Generator().manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
        picked.append(sample)
    return picked


def gain(real: Tensor, without: Tensor, corrected: Tensor) -> Tensor:
    """Return the reduction of the error of each sample's final latents in decibels, [samples] float64."""
    errors = [(x.double() - real.double()).square().flatten(1).mean(1) for x in (without, corrected)]
    tiny = torch.finfo(torch.float32).tiny
    return 10 * (errors[0].clamp(min=tiny) / errors[1].clamp(min=tiny)).log10()


def pays(gains: Tensor) -> bool:
    """Return whether the mean gain is significantly above zero; a single gain only has to be above zero."""
    mean = gains.mean().item()
    return mean > (_CERTAIN * gains.std().item() / math.sqrt(len(gains)) if len(gains) > 1 else 0.0)
