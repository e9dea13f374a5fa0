"""Whether an affiner pays: runs from noise that it was not fitted on, with it and without it.

Each map does no harm to predictions held out of its fit (:mod:`hfquant.affiner.solvers`). What a run makes of all of
them is another matter: their noise adds up along it. So the last word has the latents at its end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hfquant.affiner.inputs import Samples

#: Samples enough to judge by; batches are run as long as there are fewer.
JUDGED = 32
#: Standard errors by which the runs have to gain.
_CERTAIN = 2.0


def fresh_samples(samples: Samples, seed: int) -> Samples:
    """Return the calls of the first samples, :data:`JUDGED` or a few more, with initial noise of another seed."""
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
    """Return by how many decibels the error of each sample's last latents falls, [samples] float64."""
    errors = [(x.double() - real.double()).square().flatten(1).mean(1) for x in (without, corrected)]
    tiny = torch.finfo(torch.float32).tiny
    return 10 * (errors[0].clamp(min=tiny) / errors[1].clamp(min=tiny)).log10()


def pays(gains: Tensor) -> bool:
    """Return whether the mean of gains is above zero beyond its error; of a single one, whether it is above zero."""
    mean = gains.mean().item()
    return mean > (_CERTAIN * gains.std().item() / math.sqrt(len(gains)) if len(gains) > 1 else 0.0)
