"""SmoothQuant (arXiv 2211.10438): move the difficulty of outlier channels from activations to weights.

``X W^T = (X / s)(W s)^T`` with ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` for each input channel j.
"""

from __future__ import annotations

import torch
from torch import Tensor


def smoothing_vector(x_amax: Tensor, w_amax: Tensor, alpha: float) -> Tensor:
    """``s = x_amax^alpha / w_amax^(1 - alpha)``, 1 where either is 0.

    Args:
        x_amax: [in], largest magnitude of each input channel.
        w_amax: [in], largest magnitude of each weight column.
        alpha: how much of the difficulty moves to the weights, in [0, 1].

    Returns:
        [in] float32, positive and finite.
    """
    # In float64: a channel's amax of 1e30 to the power alpha, over a tiny weight, leaves float32.
    x, w = x_amax.double(), w_amax.double()
    scale = x.pow(alpha) / w.pow(1 - alpha)
    limits = torch.finfo(torch.float32)
    scale = scale.clamp(limits.tiny, limits.max).float()
    return torch.where((x == 0) | (w == 0), torch.ones_like(scale), scale)
