"""The guard of a pipeline: one image in full precision and one quantized, from equal noise."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfquant.calibration.samplers import calls_of, fresh_call, inference, seeded

logger = logging.getLogger(__name__)

#: Below it an image has little to do with the other, dB.
LEAST_PSNR = 15.0


def picture(pipe: Any, batch: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """Return what a pipeline draws in its first call of a batch, decoded, from fixed noise; None if it cannot.

    Args:
        pipe: a pipeline.
        batch: as for :func:`~hfquant.generate_calibrate_set`.
        arguments: of every call; what they say of the output's type does not count.
    """
    args, kwargs = calls_of(batch)[0]
    kwargs = fresh_call({**arguments, **kwargs})
    if "output_type" in inspect.signature(type(pipe).__call__).parameters:
        kwargs["output_type"] = "np"
    try:
        with seeded(0), inference(pipe):
            output = pipe(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 (a pipeline without its decoder records just as well)
        logger.info("%s draws no image to check (%s: %s)", type(pipe).__name__, type(error).__name__, error)
        return None
    found = next((v for n in ("images", "frames") if (v := getattr(output, n, None)) is not None), output)
    found = found[0] if isinstance(found, tuple) else found
    if not isinstance(found, (Tensor, np.ndarray)):
        return None
    return torch.as_tensor(found).detach().double().cpu()


def compare(name: str, right: Tensor | None, drawn: Tensor | None) -> float | None:
    """Log how near a quantized pipeline's image is to that of full precision, as a warning where it is far off.

    Args:
        name: of the pipeline.
        right: in full precision; None where there is none.
        drawn: quantized.

    Returns:
        The peak signal to noise ratio in dB; None where there is nothing to compare.
    """
    if right is None or drawn is None or right.shape != drawn.shape:
        return None
    if bad := int((~drawn.isfinite()).sum()):
        if right.isfinite().all():
            logger.warning("%s: %d of %d values of its image are NaN or Inf once quantized", name, bad, drawn.numel())
        return None
    spread = float(right.max() - right.min())
    if spread and float(drawn.max() - drawn.min()) < 1e-3 * spread:
        kind = "black" if float(drawn.abs().max()) < 1e-3 * spread else "of one colour"
        logger.warning("%s: its image is %s once quantized", name, kind)
    error = float((right - drawn).square().mean())
    ratio = 10 * math.log10(spread**2 / error) if error and spread else math.inf
    if ratio < LEAST_PSNR:
        logger.warning("%s: its image is at %.1f dB to full precision once quantized", name, ratio)
    else:
        logger.info("%s: its image is at %.1f dB to full precision once quantized", name, ratio)
    return ratio
