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
        _register_transformers()
    return value


def _register_transformers() -> None:
    from hfquant.integrations import register_transformers

    register_transformers()


def _register_diffusers() -> None:
    from hfquant.integrations import register_diffusers

    _register_transformers()  # a PipelineQuantizationConfig looks the method up in both libraries
    register_diffusers()


def _adapt_transformers_models() -> None:
    from transformers.modeling_utils import PreTrainedModel

    from hfquant.integrations import register_saving
    from hfquant.integrations.refusals import refuse_resizing
    from hfquant.nn.layer import QuantLayer

    _register_transformers()
    register_saving(PreTrainedModel)
    refuse_resizing(PreTrainedModel, QuantLayer)


def _adapt_diffusers_models() -> None:
    from diffusers.models.modeling_utils import ModelMixin

    from hfquant.integrations import register_saving
    from hfquant.integrations.compat import accept_own_dtype

    accept_own_dtype()
    register_saving(ModelMixin)


def _register_peft() -> None:
    from hfquant.integrations import register_peft

    register_peft()


def _register_diffusers_lora() -> None:
    from hfquant.integrations import register_diffusers_lora

    register_diffusers_lora()


def _adapt_diffusers(module: str) -> None:
    from hfquant.integrations import adapt_diffusers

    adapt_diffusers(module)


# This imports no library: hfquant registers with each once the module that loads its models or adapters is imported.
after_import("transformers.modeling_utils", _adapt_transformers_models)
after_import("diffusers.quantizers.auto", _register_diffusers)
after_import("diffusers.models.modeling_utils", _adapt_diffusers_models)
after_import("diffusers.loaders.lora_pipeline", _register_diffusers_lora)
after_import("peft", _register_peft)
# Here and not where diffusers is registered: importing one of these modules may be what imports diffusers.
for _name in (
    "diffusers.loaders.unet",
    "diffusers.models.attention",
    "diffusers.models.unets.unet_motion_model",
    "diffusers.pipelines.free_noise_utils",
    "diffusers.training_utils",
):
    after_import(_name, partial(_adapt_diffusers, _name))
