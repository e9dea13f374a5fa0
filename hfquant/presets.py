"""The named configs."""

from __future__ import annotations

from typing import Any, cast

from hfquant.enums import SegPattern

# Eight input parts, each with its own scale, cut SmolLM2's KL at eight bits by two thirds: an outlier then only affects
# its own part. Kernels lose at most a tenth of their speed.
_PARTS = 8
_INT8_TOKEN = {"type": "int8", "axis": -1, "dynamic": True, "segments": _PARTS}
_FP8_TOKEN = {"type": "fp8e4m3", "axis": -1, "dynamic": True}
# One scale per token and 64 channels: the narrowest part.
_INT4_TOKEN = {"type": "int4", "axis": -1, "dynamic": True, "segments": 256, "int8_share": 0.05}
# Groups of 32 instead of 64 cut SmolLM2's KL at four bits by a quarter, for 0.19 bits per weight. Keeping a denoiser's
# last projection, a thousandth of its weights, at INT8 gains 5 to 8 dB.
_GROUPED = {"symmetric": False, "clip": "mse", "int8_share": 0.01}
_INT4_GROUP = {"type": "int4", "group_size": 32, **_GROUPED}
_INT6_GROUP = {"type": "int6", "group_size": 64, **_GROUPED}
# With one scale per tensor, most of the outliers must move into the weights; how much differs by layer.
_SEARCHED = {"type": "smooth", "search_alpha_config": {"enable": True, "min": 0.5, "step": 0.05}}
_EVEN = {"type": "smooth_hadamard", "search_alpha_config": {"enable": True, "min": 0.3, "max": 0.9, "step": 0.05}}
# With float activations, or INT8 ones with per-token scales, the weights' error dominates. On top of rotation and GPTQ,
# a smoothing vector is not worth its bits (benchmarks/README.md, "What each option is worth"). INT4 inputs need one.
_GPTQ = {"opt": {"type": "hadamard"}, "calib": {"type": "gptq"}}
_SMOOTH_GPTQ = {
    "opt": {
        "type": "smooth_hadamard",
        "magnitude": "rms",
        "search_alpha_config": {"enable": True, "max": 0.5, "step": 0.05},
    },
    "calib": {"type": "gptq"},
}
#: Steps of about half a bit, so that the search can use up its budget.
_SEARCHED_BITS = [
    {"type": "int3", "group_size": 32},
    {"type": "int4", "group_size": 64},
    {"type": "int4", "group_size": 32},
    {"type": "int5", "group_size": 64},
    {"type": "int6", "group_size": 64},
    {"type": "int8", "group_size": 64},
]
# At eight bits most of a denoiser's error comes from rounding its last projection: leaving it in float gains 4 to 8 dB,
# or 1 to 3 dB at six bits or with INT8 inputs, where its bits are a larger part of the total.
_ENDS = {"float_share": 0.01}
_FEW_ENDS = {"float_share": 0.005}
_ROUND = {"opt": {"type": "default"}, "calib": {"type": "amax"}}
# Next to rounded INT4 weights, a second scale for negative inputs gains nothing, and takes almost twice the time with
# many tokens.
_ONE_SCALE = {"search_patterns": [p.value for p in SegPattern if p is not SegPattern.ACTIVATION2LINEAR]}
# Rotating blocks of 64 cuts SmolLM2's KL at eight bits by half to three quarters; INT4 inputs need it. Kernels lose 0
# to 18 % of their speed, the most if few outputs share an input.
_ROTATED = {"opt": {"type": "hadamard"}, "calib": {"type": "amax"}}


def _channel(dtype: str) -> dict[str, Any]:
    return {"type": dtype, "axis": -1}


#: Named configs. Those that need no data (``needs_data`` is False) quantize each weight as it is loaded.
PRESETS: dict[str, dict[str, Any]] = {
    name: {"default": {"real_quant": True, **cast(dict[str, Any], entry)}}
    for name, entry in {
        # No preset folds: sharing a smoothing vector loses more quality than the division costs (docs/config.md).
        "w8a8": {
            **_ENDS,
            "opt": _SEARCHED,
            "weight_quant": _channel("int8"),
            "input_quant": {"type": "int8", "segments": _PARTS, "token_fallback": True},
        },
        "w8a8-dynamic": {**_ENDS, **_ROTATED, "weight_quant": _channel("int8"), "input_quant": _INT8_TOKEN},
        "w8a8-smooth": {
            **_ENDS,
            "opt": {"type": "smooth_hadamard", "alpha": 0.5},
            "weight_quant": _channel("int8"),
            "input_quant": _INT8_TOKEN,
        },
        "w8a16": {**_ENDS, **_ROUND, "weight_quant": _channel("int8"), "input_quant": None},
        "w6a16": {**_FEW_ENDS, **_ROUND, "weight_quant": _INT6_GROUP, "input_quant": None},
        "w4a16": {**_ROUND, "weight_quant": _INT4_GROUP, "input_quant": None},
        "w8a8-gptq": {
            **_ENDS,
            "opt": _EVEN,
            "calib": {"type": "gptq"},
            "weight_quant": _channel("int8"),
            "input_quant": _INT8_TOKEN,
        },
        "w6a16-gptq": {**_FEW_ENDS, **_GPTQ, "weight_quant": _INT6_GROUP, "input_quant": None},
        "w6a8-gptq": {**_FEW_ENDS, **_GPTQ, "weight_quant": _INT6_GROUP, "input_quant": _INT8_TOKEN},
        "w4a16-gptq": {**_GPTQ, "weight_quant": _INT4_GROUP, "input_quant": None},
        "w3a16-gptq": {**_GPTQ, "weight_quant": {**_INT4_GROUP, "type": "int3"}, "input_quant": None},
        "w4a8-gptq": {**_FEW_ENDS, **_GPTQ, "weight_quant": _INT4_GROUP, "input_quant": _INT8_TOKEN},
        "w4a8-dynamic": {**_FEW_ENDS, **_ROUND, **_ONE_SCALE, "weight_quant": _INT4_GROUP, "input_quant": _INT8_TOKEN},
        "w4a4-gptq": {**_SMOOTH_GPTQ, "weight_quant": _INT4_GROUP, "input_quant": _INT4_TOKEN},
        "w4a4-dynamic": {
            **_ROUND,
            "opt": {"type": "hadamard"},
            "weight_quant": _INT4_GROUP,
            "input_quant": _INT4_TOKEN,
        },
        "fp8": {
            **_ENDS,
            "opt": {"type": "default"},
            "weight_quant": _channel("fp8e4m3"),
            "input_quant": {"type": "fp8e4m3"},
        },
        "fp8-dynamic": {**_ENDS, **_ROUND, "weight_quant": _channel("fp8e4m3"), "input_quant": _FP8_TOKEN},
    }.items()
}
# The same number of bytes as w4a16-gptq, spent where they matter most.
PRESETS["w4-auto"] = {**PRESETS["w4a16-gptq"], "search": {"budget": "w4a16-gptq", "choices": _SEARCHED_BITS}}

#: Names of removed presets, each with the one to use instead: better, at fewer bits.
SUCCEEDED = {"w4a8": "w4a8-gptq", "w4a8-svd": "w4a8-gptq", "w4a4-svd": "w4a8-gptq"}
