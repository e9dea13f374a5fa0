"""Checkpoints in other programs' formats, written bit by bit from their published specifications, and their weights.

Nothing here uses hfquant: words are built with Python's integers, weights with numpy's float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

Unsigned = np.ndarray


def words(codes: Unsigned, bits: int, order: list[int] | None = None) -> Tensor:
    """Pack unsigned codes [rows, K] into int32 [rows, ceil(K bits / 32)]; place i of a word holds code ``order[i]``."""
    per = 32 // bits
    padded = np.zeros((len(codes), -(-codes.shape[1] // per) * per), dtype=np.int64)
    padded[:, : codes.shape[1]] = codes
    out = np.zeros((len(codes), padded.shape[1] // per), dtype=np.int64)
    for i in range(per):
        out |= padded[:, (order or list(range(per)))[i] :: per] << (bits * i)
    return torch.from_numpy(out.astype(np.uint32).view(np.int32).copy())


class Layer:
    """A random quantized linear: unsigned codes and zero points, half-precision scales, and each column's group."""

    def __init__(self, rows: int, columns: int, group: int, bits: int, symmetric: bool, rng: np.random.Generator):
        self.bits, self.group = bits, columns if group == -1 else group
        count = -(-columns // self.group)
        self.codes = rng.integers(0, 2**bits, (rows, columns))
        self.zeros = rng.integers(0, 2**bits, (rows, count))
        if symmetric:
            self.zeros[:] = 2 ** (bits - 1)
        self.scales = rng.uniform(0.001, 0.02, (rows, count)).astype(np.float16)
        self.index = np.arange(columns) // self.group

    def weight(self) -> np.ndarray:
        """Return ``(code - zero) * scale`` [out, in] float64."""
        zeros, scales = self.zeros[:, self.index], self.scales.astype(np.float64)[:, self.index]
        return (self.codes - zeros) * scales


def gptq(layer: Layer, version: int = 1) -> dict[str, Tensor]:
    zeros = layer.zeros.T
    if version == 1:
        # GPTQModel subtracts 1 from each place of whole words, so a zero point of 0 borrows from the next one.
        stored = words(zeros, layer.bits).numpy().view(np.uint32).astype(np.int64)
        stored = (stored - sum(1 << s for s in range(0, 32, layer.bits))) % 2**32
        qzeros = torch.from_numpy(stored.astype(np.uint32).view(np.int32).copy())
    else:
        qzeros = words(zeros, layer.bits)
    return {
        "qweight": words(layer.codes, layer.bits).T.contiguous(),
        "qzeros": qzeros,
        "scales": torch.from_numpy(layer.scales.T.copy()),
        "g_idx": torch.from_numpy(layer.index.astype(np.int32)),
    }


def awq(layer: Layer) -> dict[str, Tensor]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {
        "qweight": words(layer.codes.T, 4, order),
        "qzeros": words(layer.zeros.T, 4, order),
        "scales": torch.from_numpy(layer.scales.T.copy()),
    }


def compressed_tensors(layer: Layer) -> dict[str, Tensor]:
    stored = {
        "weight_packed": words(layer.codes, layer.bits),
        "weight_scale": torch.from_numpy(layer.scales.copy()),
        "weight_shape": torch.tensor(layer.codes.shape),
    }
    if (layer.zeros != 2 ** (layer.bits - 1)).any():
        stored["weight_zero_point"] = words(layer.zeros.T, layer.bits).T.contiguous()
    return stored


def model(**overrides: Any) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 50, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | overrides)).half().eval()


def write(
    folder: Path,
    section: dict[str, Any],
    store: Callable[[Layer], dict[str, Tensor]],
    group: int = 32,
    bits: int = 4,
    symmetric: bool = False,
    change: Callable[[str, Layer], None] = lambda name, layer: None,
    **overrides: Any,
) -> dict[str, Layer]:
    """Write a tiny Llama with quantized linears (except the head), and return them."""
    rng, float_model = np.random.default_rng(0), model(**overrides)
    layers, tensors = {}, {**float_model.state_dict()}
    if float_model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, linear in float_model.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            layers[name] = Layer(*linear.weight.shape, group, bits, symmetric, rng)
            change(name, layers[name])
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{key}": value for key, value in store(layers[name]).items()}
    folder.mkdir(parents=True, exist_ok=True)
    float_model.config.dtype, float_model.config.architectures = "float16", ["LlamaForCausalLM"]
    config = json.loads(float_model.config.to_json_string()) | {"quantization_config": section}
    config |= {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return layers


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def compressed_section(symmetric: bool = False) -> dict[str, Any]:
    weights = {"type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    groups = {f"group_{bits}": {"targets": ["Linear"], "weights": {"num_bits": bits, **weights}} for bits in (4, 8)}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }
