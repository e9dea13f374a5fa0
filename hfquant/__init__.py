"""hfquant: calibrated post-training quantization for Hugging Face models.

Importing it makes ``quant_method: "hfquant"`` known to transformers and diffusers, so import it before a quantized
checkpoint is loaded.
"""

from hfquant.config import PRESETS, Calibrate, ConfigError, DType, Optimum, SegPattern
from hfquant.integrations import register
from hfquant.integrations.config import HfQuantConfig
from hfquant.linear import QuantLinear, set_real_quant
from hfquant.observers import CalibrationError
from hfquant.planner import plan
from hfquant.ptq import dequantize, quantize

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Calibrate",
    "CalibrationError",
    "ConfigError",
    "DType",
    "HfQuantConfig",
    "Optimum",
    "QuantLinear",
    "SegPattern",
    "dequantize",
    "plan",
    "quantize",
    "set_real_quant",
]

register()
