"""Other programs' checkpoints become hfquant models: exact codes and weights, hfquant's kernels and file format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn

import hfquant
from hfquant.integrations.checkpoint import CheckpointError
from hfquant.nn.modules import quant_layers
from tests.importers import written
from tests.importers.written import AWQ, GPTQ, Layer, compressed_section

IDS = torch.arange(22).view(2, 11) % 50
FORMATS = {
    "gptq": (GPTQ, written.gptq, {}),
    "gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, lambda layer: written.gptq(layer, 2), {}),
    "gptq symmetric": (GPTQ | {"sym": True}, written.gptq, {"symmetric": True}),
    "gptq one group": (GPTQ | {"group_size": -1}, written.gptq, {"group": -1}),
    "gptq short groups": (GPTQ | {"group_size": 48}, written.gptq, {"group": 48}),
    "gptq 8 bits": (GPTQ | {"bits": 8}, written.gptq, {"bits": 8}),
    "awq": (AWQ, written.awq, {}),
    "compressed-tensors": (compressed_section(), written.compressed_tensors, {}),
    "compressed-tensors symmetric": (
        compressed_section(True),
        written.compressed_tensors,
        {"symmetric": True},
    ),
    "compressed-tensors 8 bits": (compressed_section(), written.compressed_tensors, {"bits": 8}),
    "compressed-tensors one group": (compressed_section(), written.compressed_tensors, {"group": -1}),
}


def check_weights(model: nn.Module, layers: dict[str, Layer]) -> None:
    assert quant_layers(model).keys() == layers.keys()
    for name, layer in quant_layers(model).items():
        expected, half = layers[name], 2 ** (layers[name].bits - 1)
        assert np.array_equal(layer.codes().numpy(), expected.codes - half), name
        grid = layer.grid()
        if grid.zero_point is None:
            assert (expected.zeros == half).all()
        else:
            assert np.array_equal(grid.zero_point.numpy(), expected.zeros - half), name
        # The difference of code and zero point times a half-precision scale has at most 9 + 11 bits, so it is exact.
        assert np.array_equal(layer.effective_weight().double().numpy(), expected.weight()), name


@pytest.mark.parametrize("name", FORMATS)
def test_codes_zero_points_and_weights_are_exact(name: str, tmp_path: Path) -> None:
    section, store, options = FORMATS[name]
    layers = written.write(tmp_path / "theirs", section, store, **options)
    model = hfquant.import_checkpoint(tmp_path / "theirs")
    check_weights(model, layers)
    assert model.dtype == torch.float16
    assert all(layer.real_quant for layer in quant_layers(model).values())
    # What the layers compute.
    for key, layer in quant_layers(model).items():
        x = torch.randn(5, layer.in_features)
        exact = x.double() @ torch.from_numpy(layers[key].weight()).T
        for real_quant, most in ((False, 1e-6), (True, 1e-4)):  # kernels take float inputs as 16-bit integers
            layer.real_quant = real_quant
            assert (layer(x) - exact).norm() < most * exact.norm(), key


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors symmetric", "gptq one group"])
def test_it_saves_as_hfquant(name: str, tmp_path: Path) -> None:
    section, store, options = FORMATS[name]
    layers = written.write(tmp_path / "theirs", section, store, **options)
    model = hfquant.import_checkpoint(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "hfquant"
    left = "not quantized in the imported checkpoint"
    assert saved["skipped"] == {"lm_head": left, "model.embed_tokens": left}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    check_weights(again, layers)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_what_lies_beside_the_weights_is_shared_too(tmp_path: Path) -> None:
    written.write(tmp_path / "theirs", GPTQ, written.gptq)
    words = Tokenizer(models.WordLevel({"<p>": 0, "a": 1}, "<p>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "README.md").write_text("---\nlicense: mit\n---\n")
    hfquant.save_pretrained(hfquant.import_checkpoint(tmp_path / "theirs"), tmp_path / "ours")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").vocab == {"<p>": 0, "a": 1}
    card = ModelCard.load(tmp_path / "ours" / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", None)
    assert "None" not in card.content


def test_what_is_imported_is_exported_exactly(tmp_path: Path) -> None:
    layers = written.write(tmp_path / "theirs", GPTQ, written.gptq)
    hfquant.export(hfquant.import_checkpoint(tmp_path / "theirs"), tmp_path / "exported")
    check_weights(hfquant.import_checkpoint(tmp_path / "exported"), layers)


def test_shards_ties_and_a_base_model(tmp_path: Path) -> None:
    layers = written.write(tmp_path, GPTQ, written.gptq, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for i, part in enumerate((sorted(tensors)[:20], sorted(tensors)[20:])):
        save_file({key: tensors[key] for key in part}, tmp_path / f"part-{i}.safetensors")
        index |= dict.fromkeys(part, f"part-{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    model = hfquant.import_checkpoint(tmp_path)
    check_weights(model, layers)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-1\.safetensors"):
        hfquant.import_checkpoint(tmp_path)


def test_layers_of_another_kind(tmp_path: Path) -> None:
    """Some layers of a checkpoint are symmetric, and one has a single group."""

    def change(name: str, layer: Layer) -> None:
        if "q_proj" in name:
            layer.zeros[:] = 8
        if name.endswith("1.mlp.down_proj"):
            layer.__init__(*layer.codes.shape, -1, 4, False, np.random.default_rng(1))

    section = compressed_section()
    layers = written.write(tmp_path, section, written.compressed_tensors, change=change)
    model = hfquant.import_checkpoint(tmp_path)
    check_weights(model, layers)
    model.save_pretrained(tmp_path / "ours")
    check_weights(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), layers)


def test_groups_that_half_precision_lost_are_zeros(tmp_path: Path) -> None:
    def change(name: str, layer: Layer) -> None:
        layer.scales[3, 1] = 0

    layers = written.write(tmp_path, GPTQ, written.gptq, change=change)
    for name, layer in quant_layers(hfquant.import_checkpoint(tmp_path)).items():
        assert np.array_equal(layer.effective_weight().double().numpy(), layers[name].weight())


def test_a_bias_of_zeros_that_the_model_lacks_is_dropped(tmp_path: Path) -> None:
    def with_bias(layer: Layer) -> dict[str, torch.Tensor]:
        return {**written.gptq(layer), "bias": torch.zeros(len(layer.codes), dtype=torch.float16)}

    layers = written.write(tmp_path, GPTQ, with_bias)
    check_weights(hfquant.import_checkpoint(tmp_path), layers)


def test_a_bias_that_the_model_lacks_is_an_error(tmp_path: Path) -> None:
    def with_bias(layer: Layer) -> dict[str, torch.Tensor]:
        return {**written.gptq(layer), "bias": torch.ones(len(layer.codes), dtype=torch.float16)}

    written.write(tmp_path, GPTQ, with_bias)
    with pytest.raises(CheckpointError, match=r"unexpected_keys.*down_proj\.bias"):
        hfquant.import_checkpoint(tmp_path)


@pytest.mark.parametrize("model_type", ["qwen2"])
def test_biases_stay(model_type: str, tmp_path: Path) -> None:
    """Qwen2's q, k and v projections have biases."""
    layers = written.write(tmp_path, AWQ, written.awq)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": model_type, "architectures": ["Qwen2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    for name, layer in layers.items():
        if "self_attn" in name and "o_proj" not in name:
            tensors[f"{name}.bias"] = torch.randn(len(layer.codes)).half()
    save_file(tensors, tmp_path / "model.safetensors")
    model = hfquant.import_checkpoint(tmp_path)
    check_weights(model, layers)
    name = "model.layers.0.self_attn.k_proj"
    assert torch.equal(model.get_submodule(name).bias, tensors[f"{name}.bias"])


def test_a_config_without_a_dtype(tmp_path: Path) -> None:
    layers = written.write(tmp_path, GPTQ, written.gptq)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = hfquant.import_checkpoint(tmp_path)
    assert model.dtype == torch.float16
    check_weights(model, layers)


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    """Older programs left config.json unchanged."""
    for method, file, section, store in (
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}, written.gptq),
        (
            "awq",
            "quant_config.json",
            {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"},
            written.awq,
        ),
    ):
        folder = tmp_path / method
        layers = written.write(folder, {}, store)
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / file).write_text(json.dumps(section))
        check_weights(hfquant.import_checkpoint(folder), layers)


def damage(folder: Path, how: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    match how:
        case "missing":
            del tensors[f"{name}.scales"]
        case "narrow":
            tensors[f"{name}.qzeros"] = tensors[f"{name}.qzeros"][:, :-1].contiguous()
        case "groups":
            tensors[f"{name}.scales"] = tensors[f"{name}.scales"][:-1].contiguous()
        case "dtype":
            tensors[f"{name}.qweight"] = tensors[f"{name}.qweight"].long()
        case "nan":
            tensors[f"{name}.scales"][0, 0] = torch.nan
        case "size":
            tensors[f"{name}.qweight"] = tensors[f"{name}.qweight"][:-4].contiguous()
            tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"][:-32].contiguous()
            for key in ("scales", "qzeros"):
                tensors[f"{name}.{key}"] = tensors[f"{name}.{key}"][:-1].contiguous()
        case "norm":
            del tensors["model.norm.weight"]
        case "stray":
            tensors["model.layers.1.mlp.act.scales"] = torch.ones(4)
        case "elsewhere":
            tensors |= {k.replace(name, "model.layers.1.mlp.other"): v for k, v in tensors.items() if name in k}
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"lacks model\.layers\.1\.mlp\.up_proj\.scales"),
        ("narrow", r"up_proj\.qzeros: 160 codes of 4 bits take 20 int32 words per row, got \(2, 19\)"),
        ("groups", r"up_proj': expected scales of shape \(160, 2\), got \(160, 1\)|g_idx names groups"),
        ("dtype", r"up_proj\.qweight: expected torch\.int32, got torch\.int64"),
        ("nan", r"up_proj': scales must be finite"),
        ("size", r"up_proj': expected 64 inputs and 160 outputs, got 32 and 160"),
        ("norm", r"missing_keys.*model\.norm\.weight"),
        ("stray", r"unexpected_keys.*act\.scales"),
        ("elsewhere", r"model\.layers\.1\.mlp\.other': expected an nn\.Linear in LlamaForCausalLM, found nothing"),
    ],
)
def test_damage_is_named(how: str, message: str, tmp_path: Path) -> None:
    written.write(tmp_path, GPTQ, written.gptq)
    damage(tmp_path, how)
    with pytest.raises(CheckpointError, match=message):
        hfquant.import_checkpoint(tmp_path)


SECTIONS: list[tuple[dict[str, Any], str]] = [
    (GPTQ | {"bits": 3}, r"weights of 3 bits cannot be imported, only 4 and 8"),
    (GPTQ | {"checkpoint_format": "marlin"}, r"checkpoint_format 'marlin' is not one of gptq, gptq_v2"),
    (
        GPTQ | {"dynamic": {"-:.*lm_head": {}, ".*down.*": {"bits": 8}}},
        r"dynamic overrides the settings of some layers \('\.\*down\.\*'\)",
    ),
    (GPTQ | {"group_size": 0}, r"group_size=0"),
    (GPTQ | {"pack_dtype": "int8"}, r"pack_dtype is 'int8'"),
    (AWQ | {"version": "gemv"}, r"version 'gemv' cannot be imported, only 'gemm'"),
    (AWQ | {"bits": 8}, r"AWQ with 8 bits"),
    ({"quant_method": "bitsandbytes"}, r"quantized by 'bitsandbytes'; only gptq, awq, compressed"),
    (compressed_section() | {"format": "marlin-24"}, r"format 'marlin-24' \(group_4\) cannot be imported"),
    (compressed_section() | {"config_groups": {}}, r"no config_groups"),
    (
        compressed_section()
        | {"config_groups": {"group_0": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}},
        r"group_0 quantizes activations",
    ),
]


@pytest.mark.parametrize(("section", "message"), SECTIONS, ids=[message[:25] for _, message in SECTIONS])
def test_what_cannot_be_held_is_refused_by_name(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    written.write(tmp_path, section, written.gptq)
    with pytest.raises(CheckpointError, match=message):
        hfquant.import_checkpoint(tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config\.json"):
        hfquant.import_checkpoint(tmp_path / "nowhere")
    written.model().save_pretrained(tmp_path / "float")
    with pytest.raises(CheckpointError, match="the checkpoint is not quantized"):
        hfquant.import_checkpoint(tmp_path / "float")
    written.write(tmp_path / "made", GPTQ, written.gptq)
    for change, error, message in (
        (lambda folder: (folder / "config.json").write_text("{"), CheckpointError, r"config\.json is damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 40), CheckpointError, "is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "no safetensors"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
            CheckpointError,
            r"names '\.\./b'",
        ),
    ):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "made", tmp_path / "copy")
        change(tmp_path / "copy")
        with pytest.raises(error, match=message):
            hfquant.import_checkpoint(tmp_path / "copy")
