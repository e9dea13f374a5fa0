"""SmoothQuant (arXiv 2211.10438): move the difficulty of outlier channels from activations to weights.

``X W^T = (X / s)(W s)^T`` with ``s_j = |X_j|^alpha / |W_j|^(1 - alpha)`` for each input channel j, where ``|.|`` is the
largest magnitude: a scale has to reach it. With float activations nothing has to; the error that a column of the weight
makes grows with the mean square of its inputs. There the root mean squares serve better, as AWQ found for the mean
magnitude (arXiv 2306.00978).
"""

from __future__ import annotations

import torch
from torch import Tensor


def smoothing_vector(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """``s = x^alpha / w^(1 - alpha)``, 1 where either is 0.

    Args:
        x: [in], magnitude of each input channel, >= 0.
        w: [in], magnitude of each weight column, >= 0.
        alpha: how much of the difficulty moves to the weights, in [0, 1].

    Returns:
        [in] float32, positive and finite.
    """
    # In float64: a magnitude of 1e30 to the power alpha, over a tiny weight, leaves float32.
    x, w = x.double(), w.double()
    scale = x.pow(alpha) / w.pow(1 - alpha)
    limits = torch.finfo(torch.float32)
    scale = scale.clamp(limits.tiny, limits.max).float()
    return torch.where((x == 0) | (w == 0), torch.ones_like(scale), scale)
