"""What the two libraries' own quantization tests require of a backend, checked for this one on a CPU.

Each test here corresponds to one there: diffusers' `QuantizationTesterMixin` and its tests of configs and compilation,
and transformers' tests of each backend. They run on tiny models of real classes, in the libraries' default dtype and in
bfloat16.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import pipeline

from hfquant import HfQuantConfig, QuantLinear
from hfquant.integrations.config import METHOD
from hfquant.nn.modules import quant_layers
from tests.integrations import small_models
from tests.integrations.small_models import assert_same, inputs_of, outputs, sqnr
from tests.integrations.test_pipelines import tokenizer

CONFIGS: dict[str, dict[str, Any]] = {
    "int8": {"config": "w8a8-dynamic"},
    "fp8": {"config": "fp8-dynamic"},
    "int4": {
        "config": {
            "default": {"opt": {"type": "default"}, "weight_quant": {"type": "int4", "axis": -1}, "input_quant": None}
        }
    },
}
TRANSFORMERS = ("llama", "vit", "t5_encoder")
DIFFUSERS = ("flux", "sd3", "pixart", "wan")
NAMES = (*TRANSFORMERS, *DIFFUSERS)
#: A linear of each model to leave in float.
LEFT_ALONE = {
    "llama": "down_proj",
    "vit": "q_proj",
    "t5_encoder": "SelfAttention.o",
    "flux": "proj_mlp",
    "sd3": "ff",
    "pixart": "proj_out",
    "wan": "ffn",
}
#: Small linears that 8-bit presets leave in float.
ENDS = {"vit": {"classifier"}, "sd3": {"proj_out"}, "flux": {"proj_out"}}
#: Names of a transformer's attention projections.
PROJECTIONS = ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v")
WRAPPED = ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj")

#: Fast tests cover one config per model, and all configs across both libraries; the full grid is slow.
FAST = {
    "llama": "int4",
    "vit": "int8",
    "t5_encoder": "fp8",
    "flux": "int4",
    "sd3": "int8",
    "pixart": "fp8",
    "wan": "int8",
}


def pairs(names: Sequence[str]) -> Any:
    """Parametrize over each model with each config."""
    return pytest.mark.parametrize(
        ("name", "config"),
        [
            pytest.param(name, config, marks=[] if FAST[name] == config else pytest.mark.slow)
            for name in names
            for config in CONFIGS
        ],
    )


every_model = pytest.mark.parametrize("name", NAMES)
every_pair = pairs(NAMES)


def build(name: str) -> nn.Module:
    return (small_models.DIFFUSERS | small_models.TRANSFORMERS)[name]()


@pytest.fixture(scope="module")
def create(checkpoint: Callable[[str], Path]) -> Callable[..., Any]:
    """Load a float model, or quantize it with a config's arguments. Models that no test changes are loaded once."""

    def load(name: str, config: str | None, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
        given = {k: kwargs.pop(k) for k in ("modules_to_not_convert",) if k in kwargs}
        if config is not None:
            kwargs["quantization_config"] = HfQuantConfig(**CONFIGS[config], **given)
        dtype_name = "torch_dtype" if name in DIFFUSERS else "dtype"
        return type(build(name)).from_pretrained(checkpoint(name), **{dtype_name: dtype}, **kwargs)

    shared = cache(load)
    return lambda *args, **kwargs: load(*args, **kwargs) if kwargs else copy.deepcopy(shared(*args))


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def kept(model: nn.Module) -> set[str]:
    """Return linears that a library or model keeps in full precision: heads, tied ones, `_keep_in_fp32_modules`."""
    lists = [*(model._keep_in_fp32_modules or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {n for n, m in linears(model).items() if m is head or set(lists) & set(n.split("."))}


@pytest.mark.sampled(2)
@every_pair
def test_number_of_parameters(name, config, create):
    plain, quantized = create(name, None).num_parameters(), create(name, config).num_parameters()
    assert quantized < plain if config == "int4" else quantized == plain  # packed codes: one int8 holds two weights


@every_pair
def test_memory_footprint(name, config, create):
    plain, model = create(name, None).get_memory_footprint(), create(name, config)
    tensors = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert model.get_memory_footprint() <= tensors
    assert plain / tensors >= (2.0 if config == "int4" else 1.2)


@pytest.mark.sampled(2)
@every_pair
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inference(name, config, dtype, create):
    plain, model = create(name, None, dtype), create(name, config, dtype)
    inputs = inputs_of(plain)
    expected, y = outputs(plain, inputs), outputs(model, inputs)
    assert y.dtype == expected.dtype
    assert y.isfinite().all()
    assert sqnr(expected, y) > (5 if config == "int4" else 15)


@every_pair
def test_every_linear_is_quantized(name, config, create):
    plain, model = create(name, None), create(name, config)
    expected = linears(plain).keys() - kept(plain) - (ENDS.get(name, set()) if config != "int4" else set())
    assert quant_layers(model).keys() == expected
    assert expected
    bits = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.int8}[config]
    for layer in quant_layers(model).values():
        packed = (layer.in_features + 1) // 2 if config == "int4" else layer.in_features
        assert layer._stored_codes().dtype in (bits, torch.int8)
        assert tuple(layer.weight.shape) == (layer.out_features, packed)


@pytest.mark.sampled(2)
@every_model
def test_modules_to_not_convert(name, create):
    left = LEFT_ALONE[name]
    model, whole = create(name, "int4", modules_to_not_convert=[left]), create(name, "int4")
    names = linears(model).keys()
    excluded = {n for n in names if f".{left}." in f".{n}."}
    assert excluded
    assert quant_layers(model).keys() == quant_layers(whole).keys() - excluded
    assert all(type(model.get_submodule(n)) is nn.Linear for n in excluded)
    assert model.get_memory_footprint() > whole.get_memory_footprint()


@pytest.mark.sampled(2)
@every_model
def test_modules_kept_in_float32(name, create, monkeypatch):
    """The class lists them, as a model or a test may do."""
    cls, left = type(build(name)), LEFT_ALONE[name].rpartition(".")[2]
    monkeypatch.setattr(cls, "_keep_in_fp32_modules", [left])
    model = create(name, "int8", torch.float16, output_loading_info=False)
    for n, layer in linears(model).items():
        if left in n.split("."):
            assert (type(layer), layer.weight.dtype) == (nn.Linear, torch.float32), n
        elif n in quant_layers(model):
            assert layer.weight.dtype == torch.int8
    assert any(left in n.split(".") for n in linears(model))
    assert cls._keep_in_fp32_modules == [left]


@every_model
def test_casts(name, create):
    """A cast is refused, or changes only what is neither code nor scale. diffusers refuses all, transformers two."""
    model = create(name, "int8")
    inputs = inputs_of(model)
    expected = outputs(model, inputs)
    refused = [lambda m: m.half(), lambda m: m.float()]
    if name in DIFFUSERS:
        refused += [lambda m: m.to(torch.float16), lambda m: m.to(device="cpu", dtype=torch.float16)]
    for cast in refused:
        with pytest.raises(ValueError, match=r"not supported|unsupported"):
            cast(model)
    assert torch.equal(outputs(model.to("cpu"), inputs), expected)
    if name in TRANSFORMERS:
        model.to(torch.bfloat16)
        assert all(layer.weight.dtype == torch.int8 for layer in quant_layers(model).values())
        assert all(layer.weight_scale.dtype == torch.float32 for layer in quant_layers(model).values())
        y = outputs(model, inputs)
        assert y.dtype == torch.bfloat16
        assert sqnr(expected, y) > 15


@pairs([name for name in NAMES if name != "pixart"])  # PixArt's class accepts none in diffusers
def test_adapters_add_and_run(name, config, create):
    model = create(name, config)
    inputs = inputs_of(model)
    before = outputs(model, inputs)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(PROJECTIONS), init_lora_weights=False))
    y = outputs(model, inputs)
    assert y.isfinite().all()
    assert not torch.allclose(y, before)
    assert all(isinstance(m.base_layer, QuantLinear) for m in model.modules() if hasattr(m, "lora_A"))
    getattr(model, "disable_adapters")()  # noqa: B009  # of either library
    assert torch.equal(outputs(model, inputs), before)


def floats_as(dtype: torch.dtype, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: floats_as(dtype, v) for k, v in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class Adapted(nn.Module):
    """A linear with a parallel low-rank adapter, whose up projection starts at zero."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.down = linear, nn.Linear(linear.in_features, 4, bias=False)
        self.up = nn.Linear(4, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


@pairs(["llama", "flux", "sd3", "pixart", "wan"])
def test_training_of_adapters(name, config, create):
    """As in the libraries' own tests: all else frozen, vectors in float32, and autocast in the forward."""
    model = create(name, config, torch.bfloat16)
    for parameter in model.parameters():
        parameter.requires_grad = False
        if parameter.ndim == 1:
            parameter.data = parameter.data.to(torch.float32)
    adapters = []
    for parent in list(model.modules()):
        for child in WRAPPED:
            if isinstance(getattr(parent, child, None), QuantLinear):
                setattr(parent, child, Adapted(getattr(parent, child)))
                adapters.append(getattr(parent, child))
    assert adapters
    inputs = floats_as(torch.bfloat16, inputs_of(build(name)))
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs)[0].norm().backward()
    # SD3's last block computes a context that nothing uses.
    gradients = [adapter.up.weight.grad for adapter in adapters if adapter.up.weight.grad is not None]
    assert len(gradients) >= len(adapters) - 1
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient.norm() > 0
    assert all(layer.weight.grad is None for layer in quant_layers(model).values())


@every_pair
def test_serialization(name, config, create, tmp_path):
    model = create(name, config, torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == METHOD
    kwargs = {"torch_dtype" if name in DIFFUSERS else "dtype": torch.bfloat16}
    assert_same(type(model).from_pretrained(tmp_path, **kwargs), model)


@every_model
def test_the_config_of_a_model(name, create):
    model = create(name, "int8", torch.bfloat16)
    config = model.config["quantization_config"] if name in DIFFUSERS else model.config.quantization_config
    assert isinstance(config, HfQuantConfig)
    assert config.to_dict() == config.to_diff_dict() == json.loads(config.to_json_string()) == dict(config)
    assert HfQuantConfig.from_dict(config.to_dict()) == config
    assert model.is_quantized
    assert model.quantization_method == METHOD
    if name in DIFFUSERS:
        assert model.config["_pre_quantization_dtype"] == torch.bfloat16


@pytest.mark.sampled(2)
@every_model
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(name, device_map, create):
    if device_map == "auto" and build(name)._no_split_modules is None:
        with pytest.raises(ValueError, match="_no_split_modules"):
            create(name, "int8", device_map=device_map)
        return
    model = create(name, "int8", device_map=device_map)
    if name in DIFFUSERS:  # transformers drops a map that has a single device
        assert model.hf_device_map is not None
    assert model.device == torch.device("cpu")
    assert_same(model, create(name, "int8"))


@every_pair
def test_dequantize(name, config, create):
    model = create(name, config, torch.bfloat16)
    weights = {n: layer.effective_weight() for n, layer in quant_layers(model).items()}
    model.dequantize()
    for n, layer in linears(model).items():
        assert not isinstance(layer, QuantLinear)
        if n in weights:
            assert torch.equal(layer.weight, weights[n].bfloat16())
    assert outputs(model, inputs_of(model)).isfinite().all()
    assert not model.is_quantized
    assert not hasattr(model, "hf_quantizer")


def test_generation_and_the_pipeline_of_transformers(create, checkpoint, tmp_path):
    model = create("llama", "int8")
    ids = torch.arange(3, 9)[None]
    plain = create("llama", None).generate(ids, max_new_tokens=5, do_sample=False)
    made = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert made.shape == plain.shape
    assert torch.equal(made[:, : ids.shape[1]], ids)
    quantized = create("llama", "int4")
    quantized.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    text = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert quant_layers(text.model).keys() == quant_layers(quantized).keys()
    (answer,) = text("a b c", max_new_tokens=3, do_sample=False)
    assert answer["generated_text"].startswith("a b c")


def assert_compiled_alike(compiled: Tensor, eager: Tensor, plain: Tensor) -> None:
    """Fused float ops differ in the last bit, which moves a few codes: far less than the quantization error."""
    assert sqnr(eager, compiled) > sqnr(plain, eager) + 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "flux", "sd3", "pixart"])
def test_compiled_whole(name, create):
    torch.compiler.reset()
    plain, model = create(name, None), create(name, FAST[name])
    inputs = inputs_of(model) | ({"use_cache": False} if name == "llama" else {})
    eager = outputs(model, inputs)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert_compiled_alike(compiled(**inputs)[0], eager, outputs(plain, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_compiled_and_group_offloaded(name, create):
    torch.compiler.reset()
    plain, model = create(name, None), create(name, FAST[name])
    inputs = inputs_of(model)
    eager, cpu = outputs(model, inputs), torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    with torch.no_grad(), torch._dynamo.config.patch(cache_size_limit=1000):
        assert_compiled_alike(torch.compile(model)(**inputs)[0], eager, outputs(plain, inputs))
