"""Digests of quantized checkpoints, which must not change if numerics are meant to stay the same.

``python -m tests.golden [CASE ...]`` records them in golden.json. Digests of data-free cases are equal on every CPU.
Sums in a forward are not, and if two grids or smoothing strengths are equally good, the last bit decides between them.
Calibrated cases therefore fix the strength, and record averages of each layer's dequantized weight and its error.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import calibration_text, smollm2, token_batches
from hfquant import PRESETS, QuantLinear, quantize
from hfquant.demo import load_digits_pipeline
from tests.schemes import SVDQUANT

FILE = Path(__file__).with_suffix(".json")

DATA_FREE = ("w8a8-dynamic", "w8a16", "w6a16", "w4a16", "w4a8-dynamic", "fp8-dynamic")
CALIBRATED = ("w8a8", "w8a8-smooth", "w8a8-gptq", "w6a8-gptq", "w4a16-gptq", "w4a8-gptq", "svdquant", "fp8")
CASES = (
    *(f"digits/{preset}" for preset in (*DATA_FREE, *CALIBRATED)),
    *(f"smollm2/{preset}" for preset in ("w8a8-dynamic", "w4a16", "w6a16", "fp8-dynamic")),
    "smollm2/w8a8-smooth",
)


def is_data_free(case: str) -> bool:
    return case.partition("/")[2] in DATA_FREE


def quantized(case: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a case's model, quantized on fixed data, and the original weights of its linears."""
    kind, _, preset = case.partition("/")
    config = copy.deepcopy({**PRESETS, "svdquant": SVDQUANT}[preset])
    # Use the presets as they were when first recorded, so that preset changes do not require a new recording.
    config["default"].pop("float_share", None)
    if preset in ("w6a8-gptq", "w4a16-gptq", "w4a8-gptq"):
        config["default"]["opt"] = copy.deepcopy(PRESETS["w4a4-gptq"]["default"]["opt"])
    opt = config["default"].get("opt", {})
    opt.pop("fold", None)
    opt.pop("search_alpha_config", None)
    opt["type"] = {"hadamard": "default", "smooth_hadamard": "smooth"}.get(opt.get("type"), opt.get("type"))
    (config["default"]["input_quant"] or {}).pop("segments", None)
    if "group_size" in config["default"]["weight_quant"]:
        config["default"]["weight_quant"] |= {"scale": "float32", "int8_share": 0.0}
    if preset == "svdquant":
        config["proj_out_2"] = {"opt": {"low_rank": 2}}  # all 4 would leave only noise for the codes
    if kind == "digits":
        model, data = load_digits_pipeline().transformer, _digits_batches()
    else:
        model, tokenizer = smollm2()
        data = token_batches(tokenizer, calibration_text(), seqlen=128, count=4, batch_size=1)
    originals = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return quantize(model, None if is_data_free(case) else data, config), originals


def _digits_batches() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "hidden_states": torch.randn(4, 1, 8, 8, generator=generator),
            "timestep": torch.full((4,), 40 + 120 * i),
            "class_labels": torch.arange(4) + i,
        }
        for i in range(8)
    ]


def figures(case: str) -> dict[str, Any]:
    """Return what is recorded: a digest per layer, or each tensor's mean and mean magnitude."""
    result: dict[str, Any] = {}
    model, originals = quantized(case)
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantLinear):
            continue
        tensors = {key: t.contiguous() for key, t in sorted(layer.state_dict().items())}
        if is_data_free(case):
            zero_point = layer.grid().zero_point
            if zero_point is not None:
                tensors["weight_zero_point"] = zero_point  # recorded unpacked
            digest = hashlib.sha256()
            for key, tensor in tensors.items():
                digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.view(torch.uint8).numpy().tobytes())
            result[name] = digest.hexdigest()[:16]
        else:
            tensors = {key: t for key, t in tensors.items() if not key.startswith("weight")}
            tensors |= {"dequantized": layer.dequantize(), "error": layer.effective_weight() - originals[name]}
            result[name] = {k: [t.double().mean().item(), t.double().abs().mean().item()] for k, t in tensors.items()}
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
    recorded |= {case: figures(case) for case in sys.argv[1:] or CASES}
    FILE.write_text(json.dumps(recorded, indent=0, sort_keys=True) + "\n")
