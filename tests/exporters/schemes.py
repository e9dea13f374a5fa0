"""Layers that compressed-tensors can express, and models quantized with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import hfquant
from tests.integrations import small_models

IDS = torch.arange(24).view(2, 12) % 101
TOKEN = {"type": "int8", "axis": -1, "dynamic": True}
CHANNEL = {"type": "int8", "axis": -1}
GROUPS = {"type": "int4", "group_size": 32}

SCHEMES: dict[str, dict[str, Any]] = {
    "w8a8-dynamic": {"weight_quant": CHANNEL, "input_quant": TOKEN},
    "w8a8-dynamic-tensor": {"weight_quant": CHANNEL, "input_quant": {"type": "int8", "dynamic": True}},
    "w8a8-static": {"weight_quant": CHANNEL, "input_quant": {"type": "int8"}},
    "w8a8-one-scale": {"weight_quant": {"type": "int8"}, "input_quant": {"type": "int8"}},
    "w8a8-asymmetric": {"weight_quant": {**CHANNEL, "symmetric": False}, "input_quant": TOKEN},
    "w8a16": {"weight_quant": CHANNEL, "input_quant": None},
    "w8a16-asymmetric": {"weight_quant": {**CHANNEL, "symmetric": False}, "input_quant": None},
    "w4a16": {"weight_quant": GROUPS, "input_quant": None},
    "w4a16-float-scales": {"weight_quant": {**GROUPS, "scale": "float32"}, "input_quant": None},
    "w4a16-asymmetric": {"weight_quant": {**GROUPS, "symmetric": False}, "input_quant": None},
    "w4a16-channel": {"weight_quant": {"type": "int4", "axis": -1}, "input_quant": None},
    "w4a16-gptq": {
        "weight_quant": {**GROUPS, "symmetric": False, "clip": "mse"},
        "calib": {"type": "gptq"},
        "input_quant": None,
    },
    "w4a8-dynamic": {"weight_quant": GROUPS, "input_quant": TOKEN},
    "w4a8-static": {"weight_quant": {**GROUPS, "symmetric": False}, "input_quant": {"type": "int8"}},
    "w3a16": {"weight_quant": {"type": "int3", "group_size": 32}, "input_quant": None},
    "w5a16": {"weight_quant": {"type": "int5", "group_size": 32, "symmetric": False}, "input_quant": None},
    "w6a16": {"weight_quant": {"type": "int6", "group_size": 32}, "input_quant": None},
    "fp8-dynamic": {
        "weight_quant": {"type": "fp8e4m3", "axis": -1},
        "input_quant": {**TOKEN, "type": "fp8e4m3"},
    },
    "fp8-static": {"weight_quant": {"type": "fp8e4m3", "axis": -1}, "input_quant": {"type": "fp8e4m3"}},
    "fp8-weights": {"weight_quant": {"type": "fp8e4m3", "axis": -1}, "input_quant": None},
}


def config(scheme: dict[str, Any], **layers: Any) -> dict[str, Any]:
    plain = {"seglinear": False, "search_patterns": [], "opt": {"type": "default"}, "calib": {"type": "amax"}}
    return {"default": {**plain, **scheme}, **layers}


def quantized(scheme: dict[str, Any], dtype: torch.dtype = torch.float32, **layers: Any) -> nn.Module:
    """Quantize a tiny Llama with a tied head and widths that are multiples of 32, the group size."""
    model = small_models.llama_of_64().to(dtype)
    return hfquant.quantize(model, [{"input_ids": IDS}], config(scheme, **layers))
