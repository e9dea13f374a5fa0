"""Mixtures of experts in compressed-tensors: names, weights and outputs in plain transformers, and refusals."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from safetensors.torch import load_file
from torch import Tensor, nn

import hfquant
from hfquant.exporters import ExportError
from hfquant.nn.experts import QuantExperts
from hfquant.nn.modules import quant_layers
from tests.exporters.schemes import CHANNEL, SCHEMES, config
from tests.exporters.test_compressed_tensors import activations
from tests.integrations.mixtures import mixture, tokens

NAMES = ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "OlmoeForCausalLM"]
# Widths, and the ranks of DeepSeek's attention, are multiples of 32, the group size.
SIZES = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 32, "kv_lora_rank": 32}
IDS = tokens(2, 12, seed=5)


def quantized(name: str, settings: Any, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    model = hfquant.quantize(mixture(name, dtype, **sizes), [{"input_ids": tokens(8, 40)}], settings)
    hfquant.set_real_quant(model, False)
    return model


def loaded(folder: Path, **options: Any) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def section(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def expert_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.dim() == 3}


def check_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Compare all parameters with those of the dequantized hfquant model."""
    theirs(IDS)  # the first forward decompresses the linears
    expected = dict(hfquant.dequantize(copy.deepcopy(ours)).named_parameters())
    found = dict(theirs.named_parameters())
    assert found.keys() >= expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w8a8-dynamic", "fp8-dynamic"])
@pytest.mark.parametrize("name", NAMES)
def test_plain_transformers_has_the_same_weights_and_outputs(name: str, scheme: str, tmp_path: Path) -> None:
    """Also for routers, shared experts, attention and norms."""
    model = quantized(name, config(SCHEMES[scheme]), **SIZES)
    hfquant.export(model, tmp_path)
    theirs = loaded(tmp_path)
    check_same_weights(model, theirs)
    if SCHEMES[scheme]["input_quant"] is None:
        ours = hfquant.dequantize(copy.deepcopy(model))
        assert torch.equal(theirs(IDS).logits, ours(IDS).logits)
    # transformers quantizes the inputs of the linears too.
    for key, layer in quant_layers(model).items():
        x = torch.randn(2, 5, layer.in_features)
        exact = activations(x, layer) @ layer.effective_weight().double().T
        assert (theirs.get_submodule(key)(x) - exact).norm() < 2e-3 * exact.norm(), key


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_the_float_checkpoint(name: str, tmp_path: Path) -> None:
    model = mixture(name, **SIZES)
    model.save_pretrained(tmp_path / "float")
    hfquant.export(hfquant.quantize(model, None, config(SCHEMES["w8a8-dynamic"])), tmp_path / "made")
    expected = set(load_file(tmp_path / "float" / "model.safetensors"))
    found = load_file(tmp_path / "made" / "model.safetensors")
    assert {k.replace("weight_packed", "weight") for k in found if not k.endswith(("_scale", "_shape"))} == expected


def test_bytes_are_those_of_its_own_compressor(tmp_path: Path) -> None:
    """The first half of the fused rows is the gate (w1), the second the up projection (w3)."""
    model = quantized("MixtralForCausalLM", config(SCHEMES["w4a16"]), **SIZES)
    hfquant.export(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    scheme = QuantizationConfig.model_validate(section(tmp_path)).config_groups["group_0"]
    experts = model.model.layers[1].mlp.experts
    weights = experts.to_float(torch.float32)
    for own, weight in {"w1": weights.gate_up_proj[2, :32], "w3": weights.gate_up_proj[2, 32:]}.items():
        name = f"model.layers.1.block_sparse_moe.experts.2.{own}"
        scale = stored[f"{name}.weight_scale"]
        assert scale.shape == (32, 2)
        state = {"weight": weight.detach(), "weight_scale": scale}
        for key, tensor in BaseCompressor.get_value_from_registry("pack-quantized").compress(state, scheme).items():
            assert torch.equal(stored[f"{name}.{key}"], tensor), key


def test_the_config_by_its_own_reading(tmp_path: Path) -> None:
    """As compressed-tensors reads it: experts are packed with no input scheme, linears have one, routers have none."""
    model = quantized("MixtralForCausalLM", config(SCHEMES["w8a8-dynamic"]), **SIZES)
    hfquant.export(model, tmp_path)
    found = QuantizationConfig.model_validate(section(tmp_path))
    linear, layer = nn.Linear(1, 1), "model.layers.0"

    def formats(name: str) -> list[str]:
        return [g.format for g in found.config_groups.values() if is_match(name, linear, g.targets, found.ignore)]

    # The first match counts, by name before class.
    assert formats(f"{layer}.block_sparse_moe.experts.3.w1")[0] == "pack-quantized"
    assert formats(f"{layer}.block_sparse_moe.experts.0.gate_proj")[0] == "pack-quantized"  # vLLM looks up this name
    assert formats(f"{layer}.self_attn.q_proj") == ["int-quantized"]
    assert formats(f"{layer}.block_sparse_moe.gate") == formats("lm_head") == []
    assert [g.input_activations is None for g in found.config_groups.values()] == [True, False]


def test_what_inputs_are_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hfquant.export(quantized("OlmoeForCausalLM", config(SCHEMES["w8a16"]), **SIZES), tmp_path / "weights")
    assert "float inputs" not in caplog.text
    hfquant.export(quantized("OlmoeForCausalLM", config(SCHEMES["w8a8-static"]), **SIZES), tmp_path / "both")
    assert (
        "runs the experts of this export ('model.layers.0.mlp.experts.gate_up_proj' and 3 more) on float" in caplog.text
    )
    assert not any("experts" in k and "input" in k for k in load_file(tmp_path / "both" / "model.safetensors"))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("preset", "width", "floor"),
    [
        ("w4a16", 48, 18),
        ("w4a16", 32, 18),
        pytest.param("w4a16-gptq", 48, 18, marks=pytest.mark.slow),
        ("w8a8", 48, 40),
        ("fp8", 48, 30),
    ],
)
def test_presets_rounded_anew(
    preset: str, width: int, floor: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Experts cannot have zero points or smoothing; if 32 does not divide the width, all experts use groups of 16."""
    model = quantized("Qwen3MoeForCausalLM", preset, hidden_size=64, moe_intermediate_size=width)
    if preset != "fp8":
        with pytest.raises(ExportError, match=r"transformers ignores the zero points|transformed at run time"):
            hfquant.export(model, tmp_path / "refused")
        assert not list(tmp_path.iterdir())
    hfquant.export(model, tmp_path / "made", requantize=True)
    found = expert_weights(loaded(tmp_path / "made"))
    for name, weight in expert_weights(hfquant.dequantize(model)).items():
        error = (found[name] - weight).square().sum().clamp(min=1e-30)
        assert 10 * torch.log10(weight.square().sum() / error) > floor, name
    assert (preset == "fp8") != ("experts 'model.layers.0.mlp.experts.gate_up_proj': requantized" in caplog.text)


def test_parts_of_inputs_are_no_obstacle_in_experts(tmp_path: Path) -> None:
    """Expert inputs are float in the export, so codes with a scale for each part of a row can be kept."""
    parts = {"input_quant": {"segments": 2}}
    model = quantized("Qwen3MoeForCausalLM", config(SCHEMES["w8a8-dynamic"], **{"*experts*": parts}), hidden_size=128)
    assert model.model.layers[0].mlp.experts.plans["gate_up_proj"].input_segments == (64, 64)
    # The down matrix has one part.
    with pytest.raises(ExportError, match="its scheme differs from that of 'model"):
        hfquant.export(model, tmp_path)
    model = quantized(
        "Qwen3MoeForCausalLM",
        config(SCHEMES["w8a8-dynamic"], **{"*experts*": parts}),
        hidden_size=128,
        moe_intermediate_size=128,
    )
    hfquant.export(model, tmp_path)
    check_same_weights(model, loaded(tmp_path))


@pytest.mark.parametrize("requantize", [False, True])
def test_experts_of_two_schemes_are_refused(requantize: bool, tmp_path: Path) -> None:
    model = quantized("OlmoeForCausalLM", config(SCHEMES["w8a16"], **{"*.experts.down_proj": SCHEMES["w6a16"]}))
    with pytest.raises(ExportError, match=r"differs from that of '.*0.mlp.experts.gate_up_proj'.*1.mlp"):
        hfquant.export(model, tmp_path, requantize=requantize)


def test_another_scheme_than_that_of_linears(tmp_path: Path) -> None:
    """Linears are packed with zero points; shared experts are treated like any other linear."""
    experts = {"*.experts.*": {"weight_quant": {**CHANNEL, "type": "int6"}}}
    model = quantized("DeepseekV3ForCausalLM", config(SCHEMES["w4a16-asymmetric"], **experts), **SIZES)
    hfquant.export(model, tmp_path)
    assert section(tmp_path)["dequantize"]
    check_same_weights(model, loaded(tmp_path))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("left", ["*.down_proj", "*.layers.1.*", "*.experts.*", "*attn*"])
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-dynamic", "fp8-dynamic"])
def test_what_is_left_in_floats(scheme: str, left: str, tmp_path: Path) -> None:
    model = quantized("MixtralForCausalLM", config(SCHEMES[scheme], **{left: {"enable": False}}))
    hfquant.export(model, tmp_path)
    check_same_weights(model, loaded(tmp_path))


def test_experts_alone(tmp_path: Path) -> None:
    model = quantized("OlmoeForCausalLM", config(SCHEMES["w8a16"], **{"*attn*": {"enable": False}}))
    assert not quant_layers(model)
    hfquant.export(model, tmp_path)
    check_same_weights(model, loaded(tmp_path))


@pytest.mark.parametrize(
    "name", ["GptOssForCausalLM", "Llama4ForCausalLM", "GraniteMoeForCausalLM", "JetMoeForCausalLM"]
)
@pytest.mark.parametrize("requantize", [False, True])
def test_experts_that_are_published_fused_are_refused(name: str, requantize: bool, tmp_path: Path) -> None:
    model = quantized(name, config(SCHEMES["w8a16"]))
    fused = [n for n, m in model.named_modules() if isinstance(m, QuantExperts)]
    with pytest.raises(ExportError, match=f"of its class store experts fused, .*: '{fused[0]}") as caught:
        hfquant.export(model, tmp_path, requantize=requantize)
    assert all(repr(each)[:-1] in str(caught.value) for each in fused)


def test_experts_that_transformers_would_leave_empty_are_refused(tmp_path: Path) -> None:
    """Llama 4's experts, even in float: transformers builds lists of linears instead, which no checkpoint fills."""
    model = quantized("Llama4ForCausalLM", config(SCHEMES["w8a16"], **{"*.experts.*": {"enable": False}}))
    with pytest.raises(ExportError, match=r"replaces these experts with .* leaves them empty: 'model"):
        hfquant.export(model, tmp_path)


def test_formats_without_a_scale_are_refused(tmp_path: Path) -> None:
    cast = {"*.experts.*": {"weight_quant": {"type": "bf16"}}}
    model = quantized("OlmoeForCausalLM", config(SCHEMES["w8a16"], **cast))
    with pytest.raises(ExportError, match="ignores bf16 experts, which have no scale: 'model"):
        hfquant.export(model, tmp_path)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["w4a16", "w8a8-dynamic", "fp8-dynamic"])
def test_half_precision_and_shards(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """For integers the scale and the product are rounded; FP8 experts are multiplied in float32."""
    model = quantized("Qwen3MoeForCausalLM", config(SCHEMES[scheme]), dtype, **SIZES)
    hfquant.export(model, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-0*.safetensors"))) > 2
    theirs = loaded(tmp_path)
    assert theirs.dtype == dtype
    found = expert_weights(theirs)
    for name, weight in expert_weights(hfquant.dequantize(model)).items():
        error = (found[name].float() - weight.float()).abs()
        assert (error <= 2.02 * torch.finfo(dtype).eps * weight.float().abs() + 1e-7).all(), name


def test_offloaded_experts_are_fetched(tmp_path: Path) -> None:
    settings = config(SCHEMES["w8a16"])
    quantized("OlmoeForCausalLM", settings).save_pretrained(tmp_path / "ours")
    rest = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours",
        device_map=rest | {"model.layers.0": "disk", "model.layers.1": "cpu"},
        offload_folder=tmp_path / "offload",
    )
    hfquant.export(model, tmp_path / "theirs")
    check_same_weights(quantized("OlmoeForCausalLM", settings), loaded(tmp_path / "theirs"))


def test_a_model_that_was_loaded_is_exported_alike_and_stays_as_it_is(tmp_path: Path) -> None:
    model = quantized("MixtralForCausalLM", config(SCHEMES["w8a16"]))
    hfquant.export(model, tmp_path / "first")
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    hfquant.export(again, tmp_path / "second")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    for each in (model, again):
        each.save_pretrained(tmp_path / "after")
        assert (tmp_path / "after" / "model.safetensors").read_bytes() == (
            tmp_path / "ours" / "model.safetensors"
        ).read_bytes()


def test_the_base_model_of_an_export(tmp_path: Path) -> None:
    model = quantized("Qwen3MoeForCausalLM", config(SCHEMES["w8a16"]))
    hfquant.export(model, tmp_path)
    found = expert_weights(transformers.AutoModel.from_pretrained(tmp_path))
    for name, weight in expert_weights(hfquant.dequantize(model)).items():
        assert torch.equal(found[name.removeprefix("model.")], weight), name


# A process without hfquant loads the exported folders.
ELSEWHERE = """
import sys
import torch
import transformers
from safetensors.torch import save_file

transformers.utils.logging.disable_progress_bar()
for folder in sys.argv[1:]:
    ids = torch.load(folder + "/../ids", weights_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = {"logits": model(ids).logits}
    found |= {name: p for name, p in model.named_parameters() if p.dim() == 3}
    save_file({name: t.detach().contiguous() for name, t in found.items()}, folder + "/found.out")
assert "hfquant" not in sys.modules
"""


@pytest.mark.slow
def test_a_fresh_process_without_hfquant(tmp_path: Path) -> None:
    torch.save(IDS, tmp_path / "ids")
    models = {}
    for name in NAMES:
        for scheme in ("w4a16", "w8a16", "w8a8-dynamic", "fp8-dynamic"):
            folder = tmp_path / f"{name}-{scheme}"
            models[folder] = quantized(name, config(SCHEMES[scheme]), **SIZES)
            hfquant.export(models[folder], folder)
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", ELSEWHERE, *map(str, models)], check=True, env=environment, cwd=tmp_path)
    for folder, model in models.items():
        found = load_file(folder / "found.out")
        for name, weight in expert_weights(hfquant.dequantize(copy.deepcopy(model))).items():
            assert torch.equal(found[name], weight), (folder, name)
        if model.model.layers[0].self_attn.o_proj.plan.config.input_quant is None:
            assert torch.equal(found["logits"], hfquant.dequantize(model)(IDS).logits), folder
