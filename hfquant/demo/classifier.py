"""The judge of the demo: real handwritten digits, and a classifier trained on them that reads generated digits.

The data is scikit-learn's digits, 1,797 images of 8x8 pixels. The denoiser and the judge share one fixed split: both
are trained only on the training part, and the held-out part shows how far the judge can be trusted.
"""

from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC


@lru_cache(maxsize=1)
def digits_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return real digits as (train images, held-out images, train labels, held-out labels).

    Images are `[N, 8, 8]` float32 in [0, 1], labels `[N]` int64; 1,437 for training and 360 held out, stratified by
    class.
    """
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    return tuple(train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=0))


@lru_cache(maxsize=1)
def classifier() -> SVC:
    """Return a support vector machine with an RBF kernel, fitted on the training part of the real digits."""
    train, _, labels, _ = digits_split()
    return SVC(C=10).fit(train.reshape(len(train), -1), labels)


def agreement(images: np.ndarray | torch.Tensor, labels: np.ndarray | torch.Tensor | list[int]) -> float:
    """Return the share of images, from 0 to 1, that the classifier reads as the requested class.

    Args:
        images: `[N, 8, 8]`, `[N, 8, 8, 1]` or `[N, 1, 8, 8]`, float in [0, 1].
        labels: `[N]` digits.

    Raises:
        ValueError: The images do not have 64 pixels, or their number differs from that of the labels.
    """
    pixels = np.asarray(images, dtype=np.float32).reshape(len(images), -1)
    wanted = np.asarray(labels)
    if pixels.shape != (len(wanted), 64):
        raise ValueError(f"expected {len(wanted)} images of 8x8 pixels, one a label; got shape {tuple(images.shape)}.")
    return float(np.mean(classifier().predict(pixels) == wanted))
