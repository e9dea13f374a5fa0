"""Mixtures of experts from other programs: separate linears there, fused here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hfquant
from hfquant.integrations.checkpoint import CheckpointError
from hfquant.nn.experts import QuantExperts
from tests.exporters.schemes import SCHEMES, config
from tests.exporters.test_experts import IDS, NAMES, SIZES
from tests.importers.test_importers import FORMATS
from tests.importers.written import Layer
from tests.integrations.mixtures import mixture


def exported(folder: Path, name: str, settings: Any) -> Any:
    model = hfquant.quantize(mixture(name, **SIZES), None, settings)
    hfquant.set_real_quant(model, False)
    hfquant.export(model, folder)
    return model


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
@pytest.mark.parametrize("name", NAMES)
def test_an_export_comes_back(name: str, scheme: str, tmp_path: Path) -> None:
    """Codes and scales are equal to the model's, and the import saves and reloads as an hfquant model."""
    model = exported(tmp_path / "theirs", name, config(SCHEMES[scheme]))
    found = hfquant.import_checkpoint(tmp_path / "theirs")
    hfquant.set_real_quant(found, False)
    assert sum(isinstance(m, QuantExperts) for m in found.modules()) == sum(
        isinstance(m, QuantExperts) for m in model.modules()
    )
    logits = model(IDS).logits
    assert torch.equal(found(IDS).logits, logits)
    found.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    hfquant.set_real_quant(again, False)
    assert torch.equal(again(IDS).logits, logits)


@pytest.mark.parametrize("left", ["*.down_proj", "*.layers.1.*", "*.experts.*"])
def test_experts_in_floats_stay_so(left: str, tmp_path: Path) -> None:
    model = exported(tmp_path, "MixtralForCausalLM", config(SCHEMES["w8a16"], **{left: {"enable": False}}))
    found = hfquant.import_checkpoint(tmp_path)
    hfquant.set_real_quant(found, False)
    assert torch.equal(found(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("program", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_weights_of_other_programs_are_exact(name: str, program: str, tmp_path: Path) -> None:
    """Some experts have only midpoint zero points, which makes them symmetric; others do not."""
    section, store, _ = FORMATS[program]
    mixture(name, **SIZES).save_pretrained(tmp_path)
    tensors, rng = load_file(tmp_path / "model.safetensors"), np.random.default_rng(0)
    layers = {}
    for key in [k.removesuffix(".weight") for k in tensors if ".experts." in k]:
        symmetric = ".experts.2." in key
        layers[key] = Layer(*tensors.pop(f"{key}.weight").shape, 32, 4, symmetric, rng)
        tensors |= {f"{key}.{own}": tensor for own, tensor in store(layers[key]).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": section}
    (tmp_path / "config.json").write_text(json.dumps(config))

    model = hfquant.import_checkpoint(tmp_path)
    own = ("w1", "w3", "w2") if name.startswith("Mixtral") else ("gate_proj", "up_proj", "down_proj")
    assert layers
    for i, block in enumerate(model.model.layers):
        experts = block.mlp.experts
        floats = experts.to_float(torch.float32)
        for expert in range(experts.expert_count):
            gate, up, down = (
                next(
                    y.weight()
                    for key, y in layers.items()
                    if f".layers.{i}." in key and key.endswith(f"s.{expert}.{x}")
                )
                for x in own
            )
            assert np.array_equal(floats.gate_up_proj[expert].double().detach().numpy(), np.concatenate([gate, up]))
            assert np.array_equal(floats.down_proj[expert].double().detach().numpy(), down)


FIRST = "model.layers.0.mlp.experts.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{FIRST}.up_proj")], "up_proj' is not quantized, but"),
        (
            lambda t: t.update(coarser(t)),
            r"experts '.*\.gate_up_proj': '.*0\.up_proj' and '.*gate_proj' have different",
        ),
        (lambda t: t.update(wider(t)), r"layer '.*0\.up_proj': expected 64 inputs and 32 outputs, got 64 and 40"),
    ],
    ids=["missing", "another format", "another shape"],
)
def test_what_does_not_fit_is_named(change: Any, message: str, tmp_path: Path) -> None:
    exported(tmp_path, "OlmoeForCausalLM", config(SCHEMES["w4a16"]))
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        hfquant.import_checkpoint(tmp_path)


def coarser(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = f"{FIRST}.up_proj.weight_scale"
    return {key: tensors[key][:, :1].contiguous()}


def wider(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = f"{FIRST}.up_proj"
    more = {
        k: torch.cat([t, t[:8]]) for k, t in tensors.items() if k in (f"{name}.weight_packed", f"{name}.weight_scale")
    }
    return {**more, f"{name}.weight_shape": torch.tensor([40, 64])}
