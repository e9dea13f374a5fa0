"""The guard of a pipeline: compare one image (or audio) in full precision with one quantized, from the same noise."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfquant.calibration.samplers import calls_of, fresh_call, inference, seeded
from hfquant.denoisers import call_making, call_parameters

logger = logging.getLogger(__name__)

#: PSNR in dB below which two images have little in common.
LEAST_PSNR = 15.0


def picture(pipe: Any, batch: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """Return a pipeline's decoded output for its first call of a batch, from fixed noise; None if it fails.

    Args:
        pipe: a pipeline.
        batch: a batch, as for :func:`~hfquant.generate_calibrate_set`.
        arguments: arguments of every call; what they say about the output is ignored.
    """
    args, kwargs = calls_of(pipe, batch)[0]
    kwargs = fresh_call({**arguments, **kwargs})
    if "output_type" in call_parameters(pipe):
        kwargs["output_type"] = "np"
    try:
        with seeded(0), inference(pipe):
            _, found = call_making(pipe, *args, **kwargs)
    except Exception as error:  # noqa: BLE001 (a pipeline without its decoder can still record)
        logger.info("%s cannot generate an image to check (%s: %s)", type(pipe).__name__, type(error).__name__, error)
        return None
    found = found[0] if isinstance(found, tuple) else found
    if not isinstance(found, (Tensor, np.ndarray)):
        return None
    return torch.as_tensor(found).detach().double().cpu()


def compare(name: str, right: Tensor | None, drawn: Tensor | None) -> float | None:
    """Log how close a quantized pipeline's image is to the full-precision one, as a warning if it is far off.

    Args:
        name: name of the pipeline.
        right: the full-precision image, or other output such as audio; None if there is none.
        drawn: that of the quantized pipeline.

    Returns:
        The peak signal-to-noise ratio in dB; None if there is nothing to compare.
    """
    if right is None or drawn is None or right.shape != drawn.shape:
        return None
    is_image = right.dim() >= 4  # not audio or embeddings
    what, flat, zero = ("image", "of one color", "black") if is_image else ("output", "constant", "silent (zero)")
    if bad := int((~drawn.isfinite()).sum()):
        if right.isfinite().all():
            logger.warning(
                "%s: %d of %d values of its %s are NaN or Inf once quantized", name, bad, drawn.numel(), what
            )
        return None
    spread = float(right.max() - right.min())
    if spread and float(drawn.max() - drawn.min()) < 1e-3 * spread:
        kind = zero if float(drawn.abs().max()) < 1e-3 * spread else flat
        logger.warning("%s: its %s is %s once quantized", name, what, kind)
    error = float((right - drawn).square().mean())
    ratio = 10 * math.log10(spread**2 / error) if error and spread else math.inf
    level = logging.WARNING if ratio < LEAST_PSNR else logging.INFO
    logger.log(level, "%s: PSNR of the quantized pipeline's %s against full precision: %.1f dB", name, what, ratio)
    return ratio
