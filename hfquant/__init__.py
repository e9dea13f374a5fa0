"""hfquant: calibrated post-training quantization for Hugging Face models.

Importing it makes ``quant_method: "hfquant"`` known to transformers and diffusers, so import it before a quantized
checkpoint is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hfquant.registration import after_import

if TYPE_CHECKING:
    from hfquant.affiner import BlockwiseAffiner, load_affiner
    from hfquant.api import dequantize, plan, quantize, search_bits
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
    from hfquant.config import ConfigError
    from hfquant.diffusion import quantize_pipeline
    from hfquant.enums import Calibrate, DType, Optimum, SegPattern
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
    "search_bits",
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
    **dict.fromkeys(("Calibrate", "DType", "Optimum", "SegPattern"), "hfquant.enums"),
    "ConfigError": "hfquant.config",
    **dict.fromkeys(("set_real_quant",), "hfquant.nn.modules"),
    **dict.fromkeys(("dequantize", "plan", "quantize", "search_bits"), "hfquant.api"),
    "CalibrationError": "hfquant.calibration.batches",
    "HfQuantConfig": "hfquant.integrations.config",
    "PRESETS": "hfquant.presets",
    "QuantLinear": "hfquant.nn.linear",
    "quantize_pipeline": "hfquant.diffusion",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    if (
        name == "HfQuantConfig"
    ):  # on its way into one of the libraries, whichever modules of theirs are imported by then
        _register_transformers()
        _register_diffusers()
    return value


def _register_transformers() -> None:
    from hfquant.integrations import register_transformers

    register_transformers()


def _register_diffusers() -> None:
    from hfquant.integrations import register_diffusers

    register_diffusers()


# Neither library is imported for this: each learns of hfquant once its models can be loaded.
after_import("transformers.modeling_utils", _register_transformers)
after_import("diffusers.models.modeling_utils", _register_diffusers)
