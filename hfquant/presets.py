"""Configs that people ask for by name."""

from __future__ import annotations

from typing import Any, cast

# Eight parts of the input with scales of their own take two thirds off SmolLM2's KL at eight bits: an outlier then
# costs its own part alone. Kernels lose at most a tenth of their speed by it.
_PARTS = 8
_INT8_TOKEN = {"type": "int8", "axis": -1, "dynamic": True, "segments": _PARTS}
_FP8_TOKEN = {"type": "fp8e4m3", "axis": -1, "dynamic": True}
# A scale for each token and 64 channels, which is the narrowest part and what SVDQuant's kernels have.
_INT4_TOKEN = {"type": "int4", "axis": -1, "dynamic": True, "segments": 256}
_INT4_MOST = {**_INT4_TOKEN, "int8_share": 0.05}
# Groups of 32 in place of 64 take a quarter off SmolLM2's KL at four bits, for 0.19 bits a weight. A denoiser's last
# projection, a thousandth of its weights, is worth 5 to 8 dB at INT8.
_GROUPED = {"symmetric": False, "clip": "mse", "int8_share": 0.01}
_INT4_GROUP = {"type": "int4", "group_size": 32, **_GROUPED}
_INT6_GROUP = {"type": "int6", "group_size": 64, **_GROUPED}
# One scale a tensor needs most of the outliers in the weights, how many differs by layer.
_SEARCHED = {"type": "smooth", "search_alpha_config": {"enable": True, "min": 0.5, "step": 0.05}}
_EVEN = {"type": "smooth_hadamard", "search_alpha_config": {"enable": True, "min": 0.3, "max": 0.9, "step": 0.05}}
# With float activations, or INT8 ones with a scale a token, the weights' error is what counts. Beside rotation and GPTQ
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
#: Half a bit apart, so that a budget is well spent.
_SEARCHED_BITS = [
    {"type": "int3", "group_size": 32},
    {"type": "int4", "group_size": 64},
    {"type": "int4", "group_size": 32},
    {"type": "int5", "group_size": 64},
    {"type": "int6", "group_size": 64},
    {"type": "int8", "group_size": 64},
]
# At eight bits most of a denoiser's error is what its last projection rounds: left in float it is worth 4 to 8 dB, and
# 1 to 3 dB at six bits or with INT8 inputs, where its bits weigh more against those of the others.
_ENDS = {"float_share": 0.01}
_FEW_ENDS = {"float_share": 0.005}
_ROUND = {"opt": {"type": "default"}, "calib": {"type": "amax"}}
# Rotating blocks of 64 takes half to three quarters off SmolLM2's KL at eight bits; four bits of input need it.
# Kernels lose 0 to 18 % of their speed by it, the most where few outputs share an input.
_ROTATED = {"opt": {"type": "hadamard"}, "calib": {"type": "amax"}}
_SVD = {"opt": {"type": "svd", "low_rank": 32, "alpha": 0.5}, "calib": {"type": "amax"}}


def _channel(dtype: str) -> dict[str, Any]:
    return {"type": dtype, "axis": -1}


#: Named configs. Those whose ``needs_data`` is False quantize while the weights are loaded.
PRESETS: dict[str, dict[str, Any]] = {
    name: {"default": {"real_quant": True, **cast(dict[str, Any], entry)}}
    for name, entry in {
        # None folds its divisors: layers that share one lose more than a division costs (docs/config.md).
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
        "w4a8-dynamic": {**_FEW_ENDS, **_ROUND, "weight_quant": _INT4_GROUP, "input_quant": _INT8_TOKEN},
        "w4a4-gptq": {**_SMOOTH_GPTQ, "weight_quant": _INT4_GROUP, "input_quant": _INT4_MOST},
        "w4a4-dynamic": {
            **_ROUND,
            "opt": {"type": "hadamard"},
            "weight_quant": _INT4_GROUP,
            "input_quant": _INT4_MOST,
        },
        # SVDQuant's own format, which can be exported for its kernels.
        "w4a4-svd": {**_SVD, "weight_quant": {"type": "int4", "group_size": 64}, "input_quant": _INT4_TOKEN},
        "fp8": {
            **_ENDS,
            "opt": {"type": "default"},
            "weight_quant": _channel("fp8e4m3"),
            "input_quant": {"type": "fp8e4m3"},
        },
        "fp8-dynamic": {**_ENDS, **_ROUND, "weight_quant": _channel("fp8e4m3"), "input_quant": _FP8_TOKEN},
    }.items()
}
# As many bytes as w4a16-gptq, spent where they count.
PRESETS["w4-auto"] = {**PRESETS["w4a16-gptq"], "search": {"budget": "w4a16-gptq", "choices": _SEARCHED_BITS}}

#: Names of presets that there were, and the one that is better at fewer bits.
SUCCEEDED = {"w4a8": "w4a8-gptq", "w4a8-svd": "w4a8-gptq"}
