"""hfquant: calibrated post-training quantization for Hugging Face models.

Importing it makes ``quant_method: "hfquant"`` known to transformers and diffusers, so import it before a quantized
checkpoint is loaded.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfquant.affiner import BlockwiseAffiner, load_affiner
    from hfquant.api import dequantize, plan, quantize
    from hfquant.calibration import (
        BaseCalibSet,
        BaseSampler,
        LanguageModelSampler,
        NormalSampler,
        UniformSampler,
        generate_calibrate_set,
        load_calibrate_set,
    )
    from hfquant.calibration.batches import CalibrationError
    from hfquant.config import Calibrate, ConfigError, DType, Optimum, SegPattern
    from hfquant.diffusion import quantize_pipeline
    from hfquant.integrations.config import HfQuantConfig
    from hfquant.nn.linear import QuantLinear
    from hfquant.nn.modules import set_real_quant
    from hfquant.presets import PRESETS

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "BaseCalibSet",
    "BaseSampler",
    "BlockwiseAffiner",
    "Calibrate",
    "CalibrationError",
    "ConfigError",
    "DType",
    "HfQuantConfig",
    "LanguageModelSampler",
    "NormalSampler",
    "Optimum",
    "QuantLinear",
    "SegPattern",
    "UniformSampler",
    "dequantize",
    "generate_calibrate_set",
    "load_affiner",
    "load_calibrate_set",
    "plan",
    "quantize",
    "quantize_pipeline",
    "set_real_quant",
]

# Imported on first use: `import hfquant` stays light.
_LAZY = {
    **dict.fromkeys(("BlockwiseAffiner", "load_affiner"), "hfquant.affiner"),
    **dict.fromkeys(
        (
            "BaseCalibSet",
            "BaseSampler",
            "LanguageModelSampler",
            "NormalSampler",
            "UniformSampler",
            "generate_calibrate_set",
            "load_calibrate_set",
        ),
        "hfquant.calibration",
    ),
    **dict.fromkeys(("Calibrate", "ConfigError", "DType", "Optimum", "SegPattern"), "hfquant.config"),
    **dict.fromkeys(("set_real_quant",), "hfquant.nn.modules"),
    **dict.fromkeys(("dequantize", "plan", "quantize"), "hfquant.api"),
    "CalibrationError": "hfquant.calibration.batches",
    "HfQuantConfig": "hfquant.integrations.config",
    "PRESETS": "hfquant.presets",
    "QuantLinear": "hfquant.nn.linear",
    "quantize_pipeline": "hfquant.diffusion",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


# `hfquant --help` need not wait seconds for both libraries: the command's own loading registers.
if not sys.argv or Path(sys.argv[0]).stem != "hfquant":
    from hfquant.integrations import register

    register()
