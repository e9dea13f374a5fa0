"""Mixtures of experts in both libraries: quantized during and after loading, saved, reloaded, dequantized."""

import copy
import importlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hfquant
from benchmarks import tiny_diffusers
from hfquant import HfQuantConfig
from hfquant.experts import UnfusedExperts
from hfquant.integrations import model_facts
from hfquant.integrations.checkpoint import CheckpointError
from hfquant.integrations.experts import layout_of
from hfquant.integrations.sharing.facts import of_models
from hfquant.nn.experts import QuantExperts
from hfquant.nn.modules import quant_modules
from tests.integrations.mixtures import MIXTURES, Sizes, mixture, nucleus, nucleus_inputs, tokens
from tests.schemes import SVDQUANT

GOAL = ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM", "OlmoeForCausalLM"]


def experts_in(model: nn.Module, kind: type = QuantExperts) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def assert_same_tensors(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key


def share(plan: Any, model: nn.Module) -> float:
    """Return the planned share of parameters in codes, among matrices except embeddings, output heads and biases."""
    facts = model_facts(model)
    experts = [f"{name}.{p}" for name, layout in facts.experts.items() for p in layout.projections]
    counts = {key: len(model.get_parameter(key)) for key in experts}
    planned = sum(x.in_features * x.out_features * counts.get(name, 1) for name, x in plan.layers.items())
    aside = [m for n, m in model.named_modules() if isinstance(m, nn.Embedding) or n in facts.uncounted]
    excluded = {id(p) for module in aside for p in module.parameters()}
    kept = [p for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in excluded and not n.endswith("bias")]
    return planned / sum(p.numel() for p in kept)


def outputs(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [n for n in MIXTURES if "VL" not in n])
def test_from_a_float_checkpoint_and_back(name: str, tmp_path: Path) -> None:
    """Fused while loading from one tensor per expert, quantized as they are built, equal to quantizing in memory."""
    model, ids = mixture(name), tokens()
    before = {key: type(module) for key, module in model.named_modules()}
    floats = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "float")
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig("w8a8-dynamic")).eval()
    assert share(hfquant.plan(floats, "w8a8-dynamic"), floats) >= 0.95
    hfquant.quantize(model, None, "w8a8-dynamic")
    assert_same_tensors(loaded, model)
    experts = experts_in(loaded)
    assert experts.keys() == model_facts(floats).experts.keys()
    for key, module in experts.items():
        original = UnfusedExperts(floats.get_submodule(key), layout_of(floats.get_submodule(key)))
        for projection in module.plans:
            for i, linear in enumerate(original.get_submodule(projection).children()):
                noise = linear.weight - model_weight(module, projection, i)
                assert 10 * (linear.weight.square().sum() / noise.square().sum()).log10() > 35
    loaded.save_pretrained(tmp_path / "quantized", max_shard_size="20kB")
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 1
    again = type(model).from_pretrained(tmp_path / "quantized").eval()
    assert_same_tensors(again, loaded)
    assert again.config.quantization_config == loaded.config.quantization_config
    assert torch.equal(outputs(again, ids), outputs(loaded, ids))
    again.dequantize()
    assert {key: type(module) for key, module in again.named_modules()} == before
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in floats.state_dict().items()}
    again.save_pretrained(tmp_path / "dequantized")
    assert_same_tensors(type(model).from_pretrained(tmp_path / "dequantized"), again)


def assert_run_as_their_class(experts: nn.Module, *inputs: Any) -> None:
    layout = layout_of(experts)
    assert layout is not None
    with torch.no_grad():
        torch.testing.assert_close(UnfusedExperts(experts, layout)(*inputs), experts(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_run_as_their_class_does(name: str) -> None:
    """On the inputs that the class's own model passes to them."""
    model, seen = mixture(name), []
    experts = [model.get_submodule(key) for key in model_facts(model).experts]
    hooks = [m.register_forward_pre_hook(lambda module, args: seen.append((module, args))) for m in experts]
    outputs(model, tokens())
    for hook in hooks:  # the comparison calls them again
        hook.remove()
    assert len(seen) == len(experts) > 0
    for module, inputs in seen:
        assert_run_as_their_class(module, *inputs)


@pytest.mark.slow
def test_every_class_that_declares_its_experts() -> None:
    """Every such class in transformers, on random tokens and routing."""
    found = 0
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        names = re.findall(r"^@use_experts_implementation.*\nclass (\w+)", file.read_text(), re.MULTILINE)
        for name in names:
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            torch.manual_seed(0)
            experts = getattr(module, name)(Sizes())
            for parameter in experts.parameters():
                nn.init.normal_(parameter, std=0.3)
            index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
            assert_run_as_their_class(experts, torch.randn(9, 16), index, torch.rand(9, 2))
            found += 1
    assert found >= 60


def model_weight(experts: QuantExperts, projection: str, number: int) -> Tensor:
    from hfquant.nn.linear import QuantLinear

    layer = QuantLinear.from_tensors(experts.plans[projection], experts.tensors_of(projection, number), None)
    return layer.effective_weight()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["GptOssForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize("preset", ["w8a8", "w4a16-gptq", pytest.param(SVDQUANT, id="svdquant")])
def test_calibrated(name: str, preset: str | dict[str, Any], tmp_path: Path) -> None:
    """In bf16, with and without transposed weights and biases: one report per expert; sharded, reloaded bit for bit."""
    model = mixture(name, torch.bfloat16)
    data = [{"input_ids": tokens(4, 60, seed)} for seed in range(3)]
    ids = tokens(2, 20, 9)
    exact = outputs(model, ids).float()
    hfquant.quantize(model, data, preset)
    reports = {report.name: report for report in model.quant_report.layers}
    for key, experts in experts_in(model).items():
        for projection, plan in experts.plans.items():
            for i in range(experts.expert_count):
                report = reports[f"{key}.{projection}.{i}"]
                assert report.fallback == (i in plan.rounded)
                assert report.fallback or report.sqnr > 10
    noise = (outputs(model, ids).float() - exact).square().mean()
    assert noise < exact.square().mean()
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    again = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert_same_tensors(again, model)
    assert torch.equal(outputs(again, ids), outputs(model, ids))
    assert again.generate(ids[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_few_rows_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In one log line, in the report, and in config.json, from which a reload restores it."""
    model = mixture("DeepseekV3ForCausalLM")
    with caplog.at_level(logging.WARNING):
        hfquant.quantize(model, [{"input_ids": tokens(1, 40)}], "w8a8")
    line = next(r.message for r in caplog.records if "fewer than 32 rows" in r.message)
    few = model.model.layers[1].mlp.experts.plans["down_proj"].rounded
    assert 0 < len(few) < 8 or "[0, 1, 2, 3, 4, 5, 6, 7]" in line
    assert f"model.layers.1.mlp.experts.down_proj {list(few)}" in line
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    assert stored["model.layers.1.mlp.experts.down_proj"]["rounded"] == list(few)
    again = type(model).from_pretrained(tmp_path)
    assert again.model.layers[1].mlp.experts.plans["down_proj"].rounded == few
    stored_config = json.loads((tmp_path / "config.json").read_text())
    stored_config["quantization_config"]["layers"]["model.layers.1.mlp.experts.down_proj"]["rounded"] = [-1]
    (tmp_path / "config.json").write_text(json.dumps(stored_config))
    with pytest.raises(hfquant.ConfigError, match=r"rounded=\[-1\] in the stored plan are not expert indices"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("preset", ["w8a16", "w4a16"])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_checkpoint_that_is_transposed_on_the_way_in(transposed: bool, preset: str, tmp_path: Path) -> None:
    """The published float experts of Qwen3-VL are transposed; codes never are, and they have other shapes."""
    model = mixture("Qwen3VLMoeForConditionalGeneration")
    model.save_pretrained(tmp_path / "float")
    file = tmp_path / "float" / "model.safetensors"
    stored = load_file(file)
    for name in [n for n in stored if transposed and n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        stored[name] = stored[name].transpose(1, 2).contiguous()
    save_file(stored, file, metadata={"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig(preset))
    hfquant.quantize(model, None, preset)
    key = "model.language_model.layers.0.mlp.experts"
    assert_same_tensors(loaded.get_submodule(key), model.get_submodule(key))
    loaded.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized")
    assert_same_tensors(again, loaded)
    assert torch.equal(outputs(again, tokens()), outputs(loaded, tokens()))


def test_the_float_class_takes_no_codes(tmp_path: Path) -> None:
    """A checkpoint that lost its config, or is read without hfquant, fails with an error that names the tensors."""
    model = mixture("MixtralForCausalLM")
    hfquant.quantize(model, None, "w8a16")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {t.shape for key, t in stored.items() if key.endswith("experts.down_proj")} == {(1, 4, 24, 16)}
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"experts\.down_proj|size mismatch|mismatch"):
        type(model).from_pretrained(tmp_path)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    model = mixture("GptOssForCausalLM")
    hfquant.quantize(model, None, "w8a16")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    key = "model.layers.1.mlp.experts.gate_up_proj"
    scale = good[f"{key}_scale"]
    for changed, message in (
        ({f"{key}_scale": None}, rf"lacks 1 tensor \({key}_scale\)"),
        ({f"{key}_bias": None}, rf"lacks 1 tensor \({key}_bias\)"),
        ({f"{key}_smooth": torch.ones(4, 24)}, rf"has 1 tensor \({key}_smooth\) .* does not explain"),
        ({f"{key}_scale": scale[:3]}, rf"{key}_scale: expected shape \(4, 32, 1\)"),
        ({key: good[key][..., :5]}, rf"{key}: expected shape \(1, 4, 32, 24\)"),
        ({f"{key}_scale": scale * -1}, rf"{key}_scale: scales must be finite and positive"),
    ):
        tensors = {k: v for k, v in {**good, **changed}.items() if v is not None}
        save_file({k: v.contiguous() for k, v in tensors.items()}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            type(model).from_pretrained(tmp_path)


def test_what_is_switched_off_stays_float(tmp_path: Path) -> None:
    model, ids = mixture("Qwen3MoeForCausalLM"), tokens()
    model.save_pretrained(tmp_path / "float")
    config = {"default": {"opt": {"type": "default"}, "input_quant": None}, "*.down_proj": {"enable": False}}
    settings = HfQuantConfig(config, modules_to_not_convert=["layers.0.mlp.experts"])
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=settings)
    assert list(experts_in(loaded)) == ["model.layers.1.mlp.experts"]
    assert torch.equal(loaded.model.layers[1].mlp.experts.down_proj, model.model.layers[1].mlp.experts.down_proj)
    assert loaded.config.quantization_config.skipped["model.layers.1.mlp.experts.down_proj"] == "enable=False"
    loaded.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized")
    assert_same_tensors(again, loaded)
    assert torch.equal(outputs(again, ids), outputs(loaded, ids))


def test_offloaded_experts_run(tmp_path: Path) -> None:
    """accelerate fetches the codes and scales of a quantized mixture like those of any other module."""
    model, ids = mixture("OlmoeForCausalLM"), tokens()
    hfquant.quantize(model, None, "w8a8-dynamic")
    expected = outputs(model, ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(cpu_offload(model, offload_buffers=True), ids), expected)
    disk = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "model.layers.0", "lm_head"), "cpu")
    disk["model.layers.1"] = "disk"
    again = type(model).from_pretrained(tmp_path, device_map=disk, offload_folder=tmp_path / "folder")
    assert torch.equal(outputs(again, ids), expected)
    again.save_pretrained(tmp_path / "copy")
    assert_same_tensors(type(model).from_pretrained(tmp_path / "copy"), type(model).from_pretrained(tmp_path))


@pytest.mark.slow
def test_compiled() -> None:
    """As far as transformers can compile its own loop over experts, with graph breaks."""
    model = mixture("MixtralForCausalLM")
    hfquant.quantize(model, None, "w8a8-dynamic")
    experts = model.model.layers[0].mlp.experts
    compiled = torch.compile(experts, backend="eager")
    for seed, count in enumerate((7, 9)):
        generator = torch.Generator().manual_seed(seed)
        x, index = torch.randn(count, 24, generator=generator), torch.randint(4, (count, 1), generator=generator)
        inputs = x, torch.cat([index, (index + 1) % 4], 1), torch.rand(count, 2, generator=generator)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), experts(*inputs), rtol=1e-5, atol=1e-5)


def test_the_card_counts_experts() -> None:
    model = mixture("GptOssForCausalLM")
    hfquant.quantize(model, None, "w8a16")
    (component,) = of_models(model).components
    # Each of the two layers has four attention projections and two projections of four experts.
    assert sum(row.layers for row in component.rows) == 2 * (4 + 2 * 4)
    codes = {id(layer.get_parameter(name)) for layer in quant_modules(model).values() for name in layer.code_names}
    assert sum(row.elements for row in component.rows) == sum(p.numel() for p in model.parameters() if id(p) in codes)


def test_undone_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture("MixtralForCausalLM")
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    monkeypatch.setattr("hfquant.integrations.apply.own_config", lambda *args: pytest.fail("interrupted"))
    with pytest.raises(pytest.fail.Exception):
        hfquant.quantize(model, None, "w8a16")
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in state.items())
    assert not hasattr(model, "hf_quantizer")


def test_fused_experts_of_diffusers(tmp_path: Path) -> None:
    model, inputs = nucleus(), nucleus_inputs()
    assert share(hfquant.plan(model, "w8a8-dynamic"), model) >= 0.95
    with torch.no_grad():
        exact = model(**inputs)[0]
        model.save_pretrained(tmp_path / "float", max_shard_size="20kB")
        loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig("w8a8-dynamic"))
        hfquant.quantize(model, None, "w8a8-dynamic")
        assert_same_tensors(loaded, model)
        assert list(experts_in(loaded)) == ["transformer_blocks.3.img_mlp.experts"]
        assert type(loaded.transformer_blocks[3].img_mlp.gate) is nn.Linear
        loaded.save_pretrained(tmp_path / "quantized", max_shard_size="20kB")
        again = type(model).from_pretrained(tmp_path / "quantized")
        assert_same_tensors(again, loaded)
        out = again(**inputs)[0]
        assert torch.equal(out, loaded(**inputs)[0])
        assert (out - exact).norm() < 0.1 * exact.norm()
        again.dequantize()
        assert (again(**inputs)[0] - exact).norm() < 0.1 * exact.norm()
    assert type(again.transformer_blocks[3].img_mlp.experts).__name__ == "SwiGLUExperts"


def test_fused_experts_of_diffusers_with_data(tmp_path: Path) -> None:
    model, inputs = nucleus(), nucleus_inputs()
    hfquant.quantize(model, [{**inputs, "timestep": torch.tensor([t])} for t in (0.2, 0.3, 0.5, 0.7, 0.9)], "w8a8")
    assert all(not r.fallback for r in model.quant_report.layers if "img_mlp.experts" in r.name)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same_tensors(again, model)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    stored = load_file(file)
    key = "transformer_blocks.3.img_mlp.experts.down_proj_smooth"
    save_file({k: v for k, v in stored.items() if k != key}, file)
    with pytest.raises(CheckpointError, match=f"lacks 1 tensor \\({key}\\)"):
        type(model).from_pretrained(tmp_path)


def test_experts_that_are_linears() -> None:
    """HiDream keeps a list of feed-forward modules: everything but the router's weight is quantized."""
    model = tiny_diffusers.build("HiDreamImageTransformer2DModel")
    plan = hfquant.plan(model, "w8a8-dynamic")
    assert sum("experts" in name for name in plan.layers) > 8
    assert share(plan, model) >= 0.95


PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "OlmoeForCausalLM": ("OlmoeConfig", {}),
    "MixtralForCausalLM": ("MixtralConfig", {}),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {"num_hidden_layers": 48, "num_experts": 128, "moe_intermediate_size": 768, "head_dim": 128},
    ),
    "GptOssForCausalLM": ("GptOssConfig", {}),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", {}),
}


@pytest.mark.parametrize(
    "name", [n if n == "OlmoeForCausalLM" else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED]
)
def test_plan_of_the_published_size(name: str) -> None:
    """On the meta device nothing is allocated; there is one entry per parameter, for nearly all parameters."""
    config, fields = PUBLISHED[name]
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config)(**fields))
    plan = hfquant.plan(model, "w8a8")
    assert share(plan, model) >= 0.95
    layouts = model_facts(model).experts
    assert all(f"{name}.{p}" in plan.layers for name, layout in layouts.items() for p in layout.projections)
    assert not experts_in(model, UnfusedExperts)
    routed = [layer for key, layer in plan.layers.items() if key.endswith("experts.down_proj")]
    assert all(layer.dual and all(layer.dual) for layer in routed)
