"""hfquant: calibrated post-training quantization for Hugging Face models.

Importing it registers ``quant_method: "hfquant"`` with transformers and diffusers, so import it before loading a
quantized checkpoint.
"""

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hfquant.registration import after_import

if TYPE_CHECKING:
    from hfquant.affiner import BlockwiseAffiner, load_affiner
    from hfquant.api import dequantize, distill, plan, quantize, search_bits
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
    from hfquant.exporters import export
    from hfquant.importers import import_checkpoint
    from hfquant.integrations.config import HfQuantConfig
    from hfquant.integrations.sharing import push_to_hub, save_pretrained
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
    "distill",
    "export",
    "generate_calibrate_set",
    "import_checkpoint",
    "load_affiner",
    "load_calibrate_set",
    "plan",
    "push_to_hub",
    "quantize",
    "quantize_pipeline",
    "save_pretrained",
    "search_bits",
    "set_real_quant",
]

# Imported on first use, to keep `import hfquant` cheap.
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
    **dict.fromkeys(("dequantize", "distill", "plan", "quantize", "search_bits"), "hfquant.api"),
    "CalibrationError": "hfquant.calibration.batches",
    "HfQuantConfig": "hfquant.integrations.config",
    **dict.fromkeys(("push_to_hub", "save_pretrained"), "hfquant.integrations.sharing"),
    "export": "hfquant.exporters",
    "import_checkpoint": "hfquant.importers",
    "PRESETS": "hfquant.presets",
    "QuantLinear": "hfquant.nn.linear",
    "quantize_pipeline": "hfquant.diffusion",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    if name == "HfQuantConfig":  # about to be passed to transformers, whichever of its modules are imported by now
        _adapt("register_transformers")
    return value


def _adapt(name: str) -> None:
    getattr(import_module("hfquant.integrations.adaptations"), name)()


# This imports no library: each module is adapted once it is imported. Any of them may be the first of its library that
# a program imports.
for _module, _name in {
    "transformers.modeling_utils": "adapt_transformers_models",
    "diffusers.quantizers.auto": "register_diffusers",
    "diffusers.models.modeling_utils": "adapt_diffusers_models",
    "diffusers.loaders.lora_pipeline": "adapt_lora",
    "diffusers.loaders.unet": "adapt_ip_adapters",
    "diffusers.models.attention": "adapt_attention",
    "diffusers.models.unets.unet_motion_model": "adapt_motion_modules",
    "diffusers.pipelines.free_noise_utils": "adapt_free_noise",
    "diffusers.training_utils": "adapt_averages",
    "peft": "register_peft",
}.items():
    after_import(_module, partial(_adapt, _name))
