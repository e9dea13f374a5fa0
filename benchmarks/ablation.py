"""Ablation: configs that differ in one feature at a time.

Each row is one line: its name, ``<kind>/hfquant-<features that are on>``, and its config. Kinds with float activations
are weight-only. The others quantize activations with dynamic per-token scales, or with calibrated scales if the name
says "static". If it says "tensor", activations are static too and each weight has a single scale (the reference's
default).
"""

from __future__ import annotations

from typing import Any

from hfquant.presets import PRESETS

GROUP = {"type": "int4", "group_size": 64}
#: As in the presets.
FINE_GROUP = {"type": "int4", "group_size": 32, "symmetric": False, "clip": "mse"}
INT6_GROUP = {"type": "int6", "group_size": 64, "symmetric": False, "clip": "mse"}
TOKEN = {"type": "int8", "axis": -1, "dynamic": True}
TOKEN4 = {"type": "int4", "axis": -1, "dynamic": True}
STATIC = {"type": "int8"}
INT8 = {"type": "int8", "axis": -1}
INT8_GROUP = {"type": "int8", "group_size": 64}
FP8 = {"type": "fp8e4m3"}

SEARCH = {"search_alpha_config": {"enable": True}}
FINE = {"search_alpha_config": {"enable": True, "min": 0.5, "step": 0.05}}
SMOOTH = {"type": "smooth", "alpha": 0.5}
RMS = {**SMOOTH, "magnitude": "rms", "search_alpha_config": {"enable": True, "max": 0.5, "step": 0.05}}
EVEN = {**SMOOTH, "search_alpha_config": {"enable": True, "min": 0.3, "max": 0.9, "step": 0.05}}
SVD = {"type": "svd", "alpha": 0.5, "low_rank": 32}
THIN_SVD = {"type": "svd", "alpha": 0.5, "low_rank": 8}  # for layers 192 wide
GPTQ = {"type": "gptq"}

NONE: list[str] = []
DUAL = ["activation2linear"]
SEGMENTS = ["linear2chunk", "linear2split", "concat2linear", "stack2linear", "reshape2linear"]


def config(
    weight: dict[str, Any],
    inputs: dict[str, Any] | None,
    opt: dict[str, Any] | None = None,
    calib: dict[str, Any] | None = None,
    patterns: list[str] | None = None,
    **weight_options: Any,
) -> dict[str, Any]:
    """Return a config for all linears. What is not passed is off, but ``patterns=None`` leaves all patterns on."""
    entry = {
        "opt": opt or {"type": "default"},
        "calib": calib or {"type": "amax"},
        "weight_quant": {**weight, **weight_options},
        "input_quant": inputs,
    }
    return {"default": entry if patterns is None else {**entry, "search_patterns": patterns}}


#: Features that matter on any model.
ABLATION: dict[str, dict[str, Any]] = {
    "w8a16/hfquant": config(INT8, None),
    "w8a8/hfquant-dynamic": config(INT8, TOKEN),
    "w8a8/hfquant-dynamic-4-parts": config(INT8, {**TOKEN, "segments": 4}),
    "w8a8/hfquant-dynamic-8-parts": config(INT8, {**TOKEN, "segments": 8}),
    "w8a8/hfquant-static-8-parts": config(INT8, {**STATIC, "segments": 8}),
    "w8a8/hfquant-static-8-parts-smooth-fine": config(INT8, {**STATIC, "segments": 8}, {**SMOOTH, **FINE}),
    "fp8a16/hfquant": config({**FP8, "axis": -1}, None),
    "w8a8/hfquant-static": config(INT8, STATIC),
    "w8a8/hfquant-static-smooth": config(INT8, STATIC, SMOOTH),
    "w8a8/hfquant-static-smooth-search": config(INT8, STATIC, {**SMOOTH, **SEARCH}),
    "w8a8/hfquant-static-smooth-search-gptq": config(INT8, STATIC, {**SMOOTH, **SEARCH}, GPTQ),
    "w8a8/hfquant-static-smooth-fine": config(INT8, STATIC, {**SMOOTH, **FINE}),
    "w8a8/hfquant-static-smooth-fine-by-token": config(INT8, {**STATIC, "token_fallback": True}, {**SMOOTH, **FINE}),
    "w8a8/hfquant-static-smooth-fine-gptq": config(INT8, STATIC, {**SMOOTH, **FINE}, GPTQ),
    "w8a8/hfquant-static-svd-fine": config(INT8, STATIC, {**SVD, "low_rank": 16, **FINE}),
    # Static too, with 16 bits only for the activations that have massive outliers.
    "w8a8/hfquant-static-smooth-fine-down-a16": {
        **config(INT8, STATIC, {**SMOOTH, **FINE}),
        "*down_proj": {"input_quant": {"type": "int16"}},
    },
    "w8a8/hfquant-static-smooth-fine-g64-gptq": config(INT8_GROUP, STATIC, {**SMOOTH, **FINE}, GPTQ),
    "w8a8/hfquant-static-smooth-search-fp8-inputs": config(INT8, FP8, {**SMOOTH, **SEARCH}),
    "w8a8/hfquant-dynamic-smooth": config(INT8, TOKEN, SMOOTH),
    "w8a8/hfquant-dynamic-smooth-search": config(INT8, TOKEN, {**SMOOTH, **SEARCH}),
    "w8a8/hfquant-dynamic-smooth-gptq": config(INT8, TOKEN, EVEN, GPTQ),
    "w6a16/hfquant-smooth-rms-gptq": config(INT6_GROUP, None, RMS, GPTQ),
    "w6a8/hfquant-smooth-rms-gptq": config(INT6_GROUP, TOKEN, RMS, GPTQ),
    "fp8a8/hfquant-static": config({**FP8, "axis": -1}, FP8),
    "fp8a8/hfquant-static-smooth-search": config({**FP8, "axis": -1}, FP8, {**SMOOTH, **SEARCH}),
    "w4a16/hfquant-mse": config(GROUP, None, clip="mse"),
    "w4a16/hfquant-asym": config(GROUP, None, symmetric=False),
    "w4a16/hfquant-gptq": config(GROUP, None, calib=GPTQ),
    "w4a16/hfquant-gptq-order": config(GROUP, None, calib={**GPTQ, "act_order": True}),
    "w4a16/hfquant-gptq-mse": config(GROUP, None, calib=GPTQ, clip="mse"),
    "w4a16/hfquant-gptq-asym": config(GROUP, None, calib=GPTQ, symmetric=False),
    "w4a16/hfquant-gptq-mse-asym": config(GROUP, None, calib=GPTQ, clip="mse", symmetric=False),
    "w4a16/hfquant-smooth-search-gptq-mse-asym": config(
        GROUP, None, {**SMOOTH, **SEARCH}, GPTQ, clip="mse", symmetric=False
    ),
    "w4a16/hfquant-smooth-rms": config(GROUP, None, RMS),
    "w4a16/hfquant-smooth-rms-mse-asym": config(GROUP, None, RMS, clip="mse", symmetric=False),
    "w4a16/hfquant-smooth-rms-gptq-mse-asym": config(GROUP, None, RMS, GPTQ, clip="mse", symmetric=False),
    "w4a16/hfquant-g32-smooth-rms-gptq": config(FINE_GROUP, None, RMS, GPTQ),
    "w4a16/hfquant-svd": config(GROUP, None, SVD),
    "w4a16/hfquant-svd-gptq-mse-asym": config(GROUP, None, SVD, GPTQ, clip="mse", symmetric=False),
    "w4a8/hfquant-dynamic": config(FINE_GROUP, TOKEN),
    "w4a8/hfquant-smooth": config(GROUP, TOKEN, SMOOTH),
    "w4a8/hfquant-smooth-search": config(GROUP, TOKEN, {**SMOOTH, **SEARCH}),
    "w4a8/hfquant-svd": config(GROUP, TOKEN, SVD),
    "w4a8/hfquant-gptq": config(GROUP, TOKEN, calib=GPTQ),
    "w4a8/hfquant-gptq-mse-asym": config(GROUP, TOKEN, calib=GPTQ, clip="mse", symmetric=False),
    "w4a8/hfquant-smooth-rms-gptq-mse-asym": config(GROUP, TOKEN, RMS, GPTQ, clip="mse", symmetric=False),
    "w4a8/hfquant-g32-smooth-rms-gptq": config(FINE_GROUP, TOKEN, RMS, GPTQ),
    "w4a8/hfquant-svd-gptq-mse-asym": config(GROUP, TOKEN, SVD, GPTQ, clip="mse", symmetric=False),
    "w4a4/hfquant": config(GROUP, TOKEN4),
    "w4a4/hfquant-smooth": config(GROUP, TOKEN4, SMOOTH),
    "w4a4/hfquant-svd": config(GROUP, TOKEN4, SVD),
    "w4a4/hfquant-svdquant": config(GROUP, {**TOKEN4, "segments": 256}, SVD),  # its own format
    "w4a4/hfquant-svd-gptq-mse-asym": config(GROUP, TOKEN4, SVD, GPTQ, clip="mse", symmetric=False),
}

#: Bits chosen per layer at sizes between the presets: the choices of ``w4-auto`` and, below 4 bits, cheaper ones.
_CHOICES = PRESETS["w4-auto"]["search"]["choices"]
_FEW_BITS = [{"type": "int2", "group_size": 32}, {"type": "int3", "group_size": 64}, *_CHOICES]
SEARCHED: dict[str, dict[str, Any]] = {
    f"searched/{bits}-bits": {
        **PRESETS["w4-auto"],
        "search": {"budget": bits, "choices": _FEW_BITS if bits < 4 else _CHOICES},
    }
    for bits in (3.5, 4.45, 4.67, 5.1, 6.25)
}

#: Too few bits for closed-form solutions alone: a starting point for distillation.
TWO_BITS: dict[str, dict[str, Any]] = {
    "w2a16/hfquant-gptq": {
        "default": {
            **PRESETS["w4a16-gptq"]["default"],
            "weight_quant": {**FINE_GROUP, "type": "int2", "group_size": 64},
        }
    }
}

_FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"patterns": NONE},
    "segments": {"patterns": SEGMENTS},
    "dual": {"patterns": DUAL},
    "smooth-alone": {"opt": SMOOTH, "patterns": NONE},
    "svd-alone": {"opt": THIN_SVD, "patterns": NONE},
    "gptq-alone": {"calib": GPTQ, "patterns": NONE},
    "full-smooth": {"opt": {**SMOOTH, **SEARCH}, "calib": GPTQ, "clip": "mse", "symmetric": False},
    "full-svd": {"opt": {**THIN_SVD, **SEARCH}, "calib": GPTQ, "clip": "mse", "symmetric": False},
}

#: Features that need segments, or activations with a small negative side: measured on the DiT.
DIGITS_ABLATION: dict[str, dict[str, Any]] = {
    f"{kind}/hfquant-{prefix}{name}": config(weight, inputs, **features)
    for kind, prefix, weight, inputs in (
        ("w8a8", "tensor-", {"type": "int8"}, STATIC),
        ("w4a8", "", GROUP, TOKEN),
        ("w4a8", "static-", GROUP, STATIC),
        ("w4a8", "tensor-", {"type": "int4"}, STATIC),
        ("w4a4", "", GROUP, TOKEN4),
        ("w4a4", "static-", GROUP, {"type": "int4"}),
    )
    for name, features in _FEATURES.items()
}
