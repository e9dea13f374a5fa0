"""Plot the effect of an affiner: the error of the predictions at each timestep, before and after."""

from __future__ import annotations

import os
from typing import Any

from hfquant.affiner import BlockwiseAffiner


def plot_affiner(affiner: BlockwiseAffiner, path: str | os.PathLike[str]) -> Any:
    """Write a PNG of the mean squared error of predictions on the fitted samples, by timestep.

    Args:
        affiner: A fitted affiner.
        path: File to write.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: The affiner has not been fitted.
        ImportError: matplotlib is not installed (`pip install hfquant[demo]`).
    """
    from matplotlib.figure import Figure

    if not affiner.errors:
        raise ValueError("the affiner has not been fitted, so there is nothing to plot")
    timesteps = list(affiner.errors)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for i, label in enumerate(("quantized", f"with affiner ({affiner.config.type})")):
        axes.plot(timesteps, [error[i] for error in affiner.errors.values()], marker=".", label=label)
    axes.set(xlabel="timestep (noise to image)", ylabel="mean squared error of predictions", yscale="log")
    axes.invert_xaxis()
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
    return figure
