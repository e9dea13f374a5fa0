"""Import quantized checkpoints of other programs. A new format takes a file and a line of :data:`FORMATS`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfquant.importers import awq, compressed_tensors, gptq
from hfquant.importers.checkpoint import checkpoint_tensors, quantization_section
from hfquant.importers.experts import expert_sizes, fuse
from hfquant.importers.layers import ImportedLayer, LayerKind
from hfquant.integrations.checkpoint import CheckpointError
from hfquant.integrations.compat import names_in_model
from hfquant.integrations.config import HfQuantConfig
from hfquant.nn.kinds import layers_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FORMATS", "import_checkpoint"]

#: ``quant_method`` -> function that takes the tensors of quantized linears out of a checkpoint and yields the linears.
FORMATS: dict[str, Callable[[Mapping[str, Any], dict[str, Tensor]], Iterator[tuple[str, ImportedLayer]]]] = {
    "gptq": gptq.take_layers,
    "awq": awq.take_layers,
    "compressed-tensors": compressed_tensors.take_layers,
}


def import_checkpoint(dir: str | os.PathLike[str], dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a checkpoint quantized with GPTQ, AWQ or compressed-tensors as a model quantized by hfquant.

    Codes and zero points are exactly those of the checkpoint, as are the scales (in float32). The model runs on
    hfquant's kernels, and ``save_pretrained`` writes an hfquant checkpoint. Experts stored one by one are fused as in
    the model's class.

    Args:
        dir: folder with config.json and safetensors: GPTQ (any column order that keeps groups contiguous, either
            zero-point convention), AWQ ("gemm"), or compressed-tensors "pack-quantized"; 4- or 8-bit weights.
        dtype: dtype of everything that is not quantized; "auto" is that of the checkpoint.

    Raises:
        FileNotFoundError: the folder, its config or its safetensors do not exist.
        CheckpointError: the checkpoint is not quantized, cannot be represented exactly, is damaged, or does not fit its
            model; the message names the format, layer or tensor.
    """
    import transformers

    folder = Path(dir)
    section = quantization_section(folder)
    method = section.get("quant_method")
    if method not in FORMATS:
        raise CheckpointError(f"{folder} is quantized by {method!r}; only {', '.join(FORMATS)} can be imported")
    config = transformers.AutoConfig.from_pretrained(folder)
    wanted = (config.architectures or [""])[0]
    architecture: Any = getattr(transformers, wanted, None)
    if architecture is None:
        raise CheckpointError(f"{folder}/config.json: architectures names {wanted!r}, which transformers does not have")
    tensors = checkpoint_tensors(folder)
    # Convert layer by layer: a fully unpacked model would take more than twice the memory.
    converted: dict[str, Tensor] = {}
    kinds: dict[str, LayerKind] = {}
    for name, layer in FORMATS[method](section, tensors):
        kinds[name] = layer.kind()
        converted |= {f"{name}.{key}": tensor for key, tensor in layer.tensors().items()}
    if not kinds:
        raise CheckpointError(f"{folder} has no tensors of linears quantized by {method!r}")
    if dtype == "auto" and config.dtype is None:
        dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    with torch.device("meta"):
        empty = architecture(config)
    of_experts = fuse(empty, kinds, converted)
    found = names_in_model(empty, [f"{name}.weight" for name in kinds])
    names = {key.removesuffix(".weight"): inside.removesuffix(".weight") for key, inside in found.items()}
    for name, kind in kinds.items():
        linear = _linear(empty, names[name], kind)
        _drop_zero_bias(name, linear, tensors)
    in_model = {names[key]: kind for key, kind in kinds.items()} | of_experts
    config.quantization_config = _config(empty, in_model).to_dict()
    tensors |= converted
    model, info = architecture.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    # Loaded from tensors, it would be named "None".
    model.name_or_path = model.config._name_or_path = str(folder)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise CheckpointError(f"{folder} does not fit {wanted}: {problem} {sorted(map(str, info[problem]))[:5]}")
    if (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _linear(model: nn.Module, name: str, kind: LayerKind) -> nn.Linear:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if type(linear) is not nn.Linear:
        found = "nothing" if linear is None else f"a {type(linear).__name__}"
        raise CheckpointError(f"layer {name!r}: expected an nn.Linear in {type(model).__name__}, found {found}")
    if (linear.out_features, linear.in_features) != kind.shape:
        raise CheckpointError(
            f"layer {name!r}: expected {linear.in_features} inputs and {linear.out_features} outputs, "
            f"got {kind.shape[1]} and {kind.shape[0]}"
        )
    return linear


def _drop_zero_bias(name: str, linear: nn.Linear, tensors: dict[str, Tensor]) -> None:
    """Drop the all-zero bias that GPTQ programs write for linears that have none."""
    bias = tensors.get(f"{name}.bias")
    if linear.bias is None and bias is not None and not bias.any():
        del tensors[f"{name}.bias"]


def _config(model: nn.Module, kinds: Mapping[str, LayerKind]) -> HfQuantConfig:
    """Return a config whose default is the most common kind of layer, with an entry for every other layer."""
    usual = Counter(kind.weight_quant for kind in kinds.values()).most_common(1)[0][0]
    rest = {"real_quant": True, "seglinear": False, "opt": {"type": "default"}, "calib": {"type": "amax"}}
    rules: dict[str, Any] = {"default": {**rest, "input_quant": None, "weight_quant": dict(usual)}}
    for name, kind in kinds.items():
        if kind.weight_quant != usual:
            rules[name] = {"weight_quant": dict(kind.weight_quant)}
    left = dict.fromkeys([*layers_in(model), *expert_sizes(model)], "not quantized in the imported checkpoint")
    return HfQuantConfig(rules).for_model({}, {n: why for n, why in left.items() if n not in kinds})
