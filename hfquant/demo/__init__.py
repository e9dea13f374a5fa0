"""A real denoiser small enough to ship: a class-conditional DiT trained on 8x8 handwritten digits.

`python -m hfquant.demo` quantizes it and shows the effect on its images; tests and benchmarks use it too. This module
needs nothing beyond hfquant itself. The judge (`hfquant.demo.classifier`) and the command need the `demo` extra and
import it themselves.
"""

from pathlib import Path
from typing import Any

import diffusers

from hfquant.demo.pipeline import DigitsPipeline

__all__ = ["DIGITS_PATH", "DigitsPipeline", "load_digits_pipeline"]

DIGITS_PATH = Path(__file__).parent / "digits"
"""Folder of the embedded pipeline, in the layout that `DiffusionPipeline.save_pretrained` writes."""

# `DiffusionPipeline.from_pretrained` looks up the class named in model_index.json in diffusers' own namespace, and
# there is no other registry. Once this module is imported, saved digits pipelines load through it as well.
diffusers.DigitsPipeline = DigitsPipeline


def load_digits_pipeline(**kwargs: Any) -> DigitsPipeline:
    """Load the embedded digits pipeline, in float32 by default.

    Args:
        **kwargs: Passed to `DigitsPipeline.from_pretrained`, for instance `quantization_config`.
    """
    return DigitsPipeline.from_pretrained(DIGITS_PATH, **kwargs)
