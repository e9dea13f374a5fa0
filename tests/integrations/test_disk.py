"""Disk offload beyond plain linears: layers that share one set of codes, and fused experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import hfquant
from hfquant import HfQuantConfig
from hfquant.integrations.placement import tensor_bytes
from hfquant.nn.experts import QuantExperts
from hfquant.nn.modules import quant_layers, quant_modules
from hfquant.offload import on_disk
from tests.integrations import small_models
from tests.integrations.mixtures import mixture, nucleus, nucleus_inputs, tokens
from tests.integrations.small_models import inputs_of, outputs
from tests.integrations.test_placement import INT4, device_map, tensors_in

#: Models with embeddings and heads: the layer that owns the codes, and the layers that share them.
TIED = {
    "llama": ("model.embed_tokens", {"lm_head"}),
    "bart": ("model.shared", {"lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens"}),
}


def config_of(scheme: str, inputs: dict[str, Any]) -> HfQuantConfig:
    rules = hfquant.PRESETS.get(scheme, INT4)
    rules = {"default": {**rules["default"], "include": ["embeddings", "output_heads"]}}
    config = HfQuantConfig(rules)
    config.calibration = [inputs] if config.needs_data else None
    return config


def leaves(model: nn.Module, disk: set[str]) -> dict[str, str]:
    """Return a device map of leaf modules and loose tensors, with ``disk`` on disk."""
    found = {name: "cpu" for name, module in model.named_modules() if name and not module._modules}
    for name, module in model.named_modules():
        if module._modules:
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            found |= {f"{name}.{key}".lstrip("."): "cpu" for key, _ in own}
    return found | dict.fromkeys(disk, "disk")


@pytest.fixture(scope="module")
def tied(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    made: dict[Any, Any] = {}

    def get(name: str, scheme: str) -> tuple[HfQuantConfig, Path, Any, dict[str, Any], Tensor]:
        """Return the config, the quantized checkpoint, the model in memory, inputs, and its outputs."""
        if (name, scheme) not in made:
            float_model = getattr(small_models, name)()
            inputs = inputs_of(float_model)
            config = config_of(scheme, inputs)
            model = type(float_model).from_pretrained(checkpoint(name), quantization_config=config)
            owner, others = TIED[name]
            layers = quant_layers(model)
            assert all(layers[n].weight is layers[owner].weight for n in others)
            folder = tmp_path_factory.mktemp(f"{name}-{scheme}")
            model.save_pretrained(folder)
            made[name, scheme] = config, folder, model, inputs, outputs(model, inputs)
        return made[name, scheme]

    return get


CASES = [("llama", "w8a8"), ("bart", "w8a16"), pytest.param("llama", "int4", marks=pytest.mark.slow)]


@pytest.mark.parametrize("on_load", [False, True])
@pytest.mark.parametrize(("name", "scheme"), CASES)
@pytest.mark.parametrize("limit", [0.2, 0.7])
def test_tied_layers_where_an_inferred_map_puts_them(
    limit: float, name: str, scheme: str, on_load: bool, tied, checkpoint, tmp_path
) -> None:
    config, folder, expected, inputs, y = tied(name, scheme)
    source, given = (checkpoint(name), config) if on_load else (folder, None)
    memory = {"cpu": int(limit * tensor_bytes(expected))}
    model = type(expected).from_pretrained(
        source, quantization_config=given, device_map="auto", max_memory=memory, offload_folder=tmp_path
    )
    assert any(layer.weight.is_meta for layer in quant_layers(model).values())
    for _ in range(2):
        assert torch.equal(outputs(model, inputs), y)


@pytest.mark.parametrize(
    ("where", "buffers"), [("all", True), ("both", False), ("owner", True), ("owner", False), ("others", True)]
)
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_tied_layers_where_a_map_says(name: str, scheme: str, where: str, buffers: bool, tied, tmp_path) -> None:
    """Also with tied layers in different places, which neither library supports for float models."""
    _, folder, expected, inputs, y = tied(name, scheme)
    owner, others = TIED[name]
    disk = {"all": set(), "both": {owner, *others}, "owner": {owner}, "others": others}[where]
    model = type(expected).from_pretrained(
        folder,
        device_map=leaves(expected, disk) if disk else {"": "disk"},
        offload_folder=tmp_path,
        offload_buffers=buffers,
    )
    layers = quant_layers(model)
    assert layers[owner].weight.is_meta == (where != "others")
    for _ in range(2):
        assert torch.equal(outputs(model, inputs), y)
    model.save_pretrained(tmp_path / "again")
    with (
        safe_open(tmp_path / "again" / "model.safetensors", "pt") as ours,
        safe_open(folder / "model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
        assert all(torch.equal(ours.get_tensor(key), theirs.get_tensor(key)) for key in theirs.keys())  # noqa: SIM118


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_tied_layers_are_quantized_on_their_way_to_disk(name: str, scheme: str, tied, checkpoint, tmp_path) -> None:
    config, _, expected, inputs, y = tied(name, scheme)
    owner, others = TIED[name]
    for i, where in enumerate((leaves(expected, {owner, *others}), {"": "disk"})):
        model = type(expected).from_pretrained(
            checkpoint(name), quantization_config=config, device_map=where, offload_folder=tmp_path / str(i)
        )
        assert quant_layers(model)[owner].weight.is_meta
        assert torch.equal(outputs(model, inputs), y)


def test_a_tied_bias_on_disk(tmp_path) -> None:
    """BERT's decoder has the embedding's weight and the bias of its parent module."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    float_model = BertForMaskedLM(BertConfig(vocab_size=40, **sizes)).eval()
    nn.init.normal_(float_model.cls.predictions.bias)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    model = hfquant.quantize(float_model, None, config_of("w8a16", inputs))
    y = outputs(model, inputs)
    model.save_pretrained(tmp_path / "model")
    loaded = BertForMaskedLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "folder"
    )
    assert quant_layers(loaded)["cls.predictions.decoder"].bias.is_meta
    assert torch.equal(outputs(loaded, inputs), y)


MAP = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "model.layers.0", "lm_head"), "cpu")


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("name", "buffers"), [("MixtralForCausalLM", False), ("OlmoeForCausalLM", True), ("GptOssForCausalLM", False)]
)
def test_experts_are_quantized_on_their_way_to_disk(name: str, buffers: bool, tmp_path) -> None:
    """Classes that store experts fused, one by one (Mixtral), or transposed with biases (GPT-OSS)."""
    model, ids = mixture(name), tokens()
    model.save_pretrained(tmp_path / "float")
    expected = type(model).from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig("w8a8-dynamic"))
    y, folder = logits(expected, ids), tmp_path / "folder"
    loaded = type(model).from_pretrained(
        tmp_path / "float",
        quantization_config=HfQuantConfig("w8a8-dynamic"),
        device_map=MAP | {"model.layers.1": "disk"},
        offload_folder=folder,
        offload_buffers=buffers,
    )
    experts = loaded.model.layers[1].mlp.experts
    assert isinstance(experts, QuantExperts)
    assert on_disk(experts) is not None
    assert experts.down_proj.is_meta
    assert experts.down_proj_scale.is_meta == buffers
    assert not loaded.model.layers[0].mlp.experts.down_proj.is_meta
    for _ in range(2):
        assert torch.equal(logits(loaded, ids), y)
    stored = tensors_in(folder)
    assert any(key.endswith(":down_proj") and tensor.dtype == torch.int8 for key, tensor in stored.items())
    assert not [key for key, tensor in stored.items() if key.endswith("_proj") and tensor.is_floating_point()]
    assert not [key for key in stored if "experts" in key and "_proj.safetensors" in key]
    assert not list(folder.glob("*experts*.dat"))
    loaded.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(again, ids), y)
    assert quant_modules(again).keys() == quant_modules(expected).keys()


def test_a_projection_that_stays_in_float_goes_to_disk_as_it_is(tmp_path) -> None:
    model, ids = mixture("OlmoeForCausalLM"), tokens()
    model.save_pretrained(tmp_path / "float")
    rules = {"default": hfquant.PRESETS["w8a16"]["default"], "*.experts.down_proj*": {"enable": False}}
    expected = type(model).from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig(rules))
    loaded = type(model).from_pretrained(
        tmp_path / "float",
        quantization_config=HfQuantConfig(rules),
        device_map={"": "disk"},
        offload_folder=tmp_path / "folder",
    )
    experts = loaded.model.layers[1].mlp.experts
    assert list(experts.plans) == ["gate_up_proj"]
    assert torch.equal(logits(loaded, ids), logits(expected, ids))


def test_experts_where_an_inferred_map_puts_them(tmp_path) -> None:
    model, ids = mixture("MixtralForCausalLM"), tokens()
    model.save_pretrained(tmp_path / "float")
    config = HfQuantConfig("w8a16")
    expected = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    y, size = logits(expected, ids), tensor_bytes(expected)
    largest = max(layer.in_features * layer.out_features for layer in hfquant.plan(model, config).layers.values())
    loaded = type(model).from_pretrained(
        tmp_path / "float",
        quantization_config=config,
        device_map="auto",
        max_memory={"cpu": size // 2 + 12 * largest},
        offload_folder=tmp_path / "folder",
    )
    assert "disk" in loaded.hf_device_map.values()
    assert torch.equal(logits(loaded, ids), y)


def test_experts_on_disk_without_a_folder(tmp_path) -> None:
    model = mixture("OlmoeForCausalLM")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="offload_folder"):
        type(model).from_pretrained(tmp_path, quantization_config=HfQuantConfig("w8a16"), device_map={"": "disk"})


def test_experts_of_diffusers_are_quantized_on_their_way_to_disk(tmp_path) -> None:
    model, inputs = nucleus(), nucleus_inputs()
    model.save_pretrained(tmp_path / "float")
    kind = type(model)
    expected = kind.from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig("w8a16"))
    y = outputs(expected, inputs)
    experts = "transformer_blocks.3.img_mlp.experts"
    assert isinstance(expected.get_submodule(experts), QuantExperts)
    where = device_map(model, "transformer_blocks") | {"transformer_blocks.3": "disk"}
    loaded = kind.from_pretrained(
        tmp_path / "float",
        quantization_config=HfQuantConfig("w8a16"),
        device_map=where,
        offload_folder=tmp_path / "folder",
    )
    assert loaded.get_submodule(experts).down_proj.is_meta
    assert torch.equal(outputs(loaded, inputs), y)
