"""The judge of the demo: real handwritten digits, and a classifier trained on them that reads generated ones.

The data are scikit-learn's digits, 1,797 images of 8x8 pixels. One fixed split serves the denoiser and the judge:
both are trained on its first part only, the rest says how far the judge can be trusted.
"""

from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC


@lru_cache(maxsize=1)
def digits_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Real digits as (train images, held-out images, train labels, held-out labels).

    Images are `[N, 8, 8]` float32 in [0, 1], labels `[N]` int64; 1,437 of them to train on, 360 held out, every class
    in proportion.
    """
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    return tuple(train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=0))


@lru_cache(maxsize=1)
def classifier() -> SVC:
    """A support vector machine with an RBF kernel, fitted on the training part of the real digits."""
    train, _, labels, _ = digits_split()
    return SVC(C=10).fit(train.reshape(len(train), -1), labels)


def agreement(images: np.ndarray | torch.Tensor, labels: np.ndarray | torch.Tensor | list[int]) -> float:
    """Share of images, from 0 to 1, that the classifier reads as the class that was asked for.

    Args:
        images: `[N, 8, 8]`, `[N, 8, 8, 1]` or `[N, 1, 8, 8]`, float in [0, 1].
        labels: `[N]` digits.

    Raises:
        ValueError: The images do not have 64 pixels, or are not as many as the labels.
    """
    pixels = np.asarray(images, dtype=np.float32).reshape(len(images), -1)
    wanted = np.asarray(labels)
    if pixels.shape != (len(wanted), 64):
        raise ValueError(f"expected {len(wanted)} images of 8x8 pixels, one a label; got shape {tuple(images.shape)}.")
    return float(np.mean(classifier().predict(pixels) == wanted))
