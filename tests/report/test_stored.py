"""The contents of a quantized folder, read only from its files' headers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import MultiControlNetModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import hfquant
from hfquant.integrations.checkpoint import CheckpointError
from hfquant.recipes.run import save
from hfquant.report.stored import REPORT_FILE, read_folder
from tests.integrations.tiny_pipelines import CASES


def test_a_pipeline(digits):
    found, models = read_folder(digits)
    assert found.kind == "DigitsPipeline"
    model = models["transformer"]
    assert model.kind == "DiTTransformer2DModel"
    assert len(model.layers) == 20
    tensors = load_file(digits / "transformer" / "diffusion_pytorch_model.safetensors")
    assert model.bytes == sum(t.nbytes for t in tensors.values())
    layer = next(x for x in model.layers if x.name == "transformer_blocks.0.norm1.linear")
    own = [t for n, t in tensors.items() if n.startswith(f"{layer.name}.") and not n.endswith(".bias")]
    assert layer.bytes == sum(t.nbytes for t in own)
    assert layer.shape == (1152, 192)
    assert layer.bits == pytest.approx(8 * layer.bytes / (1152 * 192))
    assert (layer.weight, layer.input, layer.rank) == ("int4 g64", "int4 dynamic", 32)
    assert len(layer.segments[1]) == 6
    assert layer.sqnr > layer.plain_sqnr - 3
    assert model.full_bytes == model.bytes + sum(4 * x.shape[0] * x.shape[1] - x.bytes for x in model.layers)


def test_a_model_without_data(llama):
    models = read_folder(llama)[1]
    assert list(models) == ["model"]
    model = models["model"]
    assert len(model.layers) == 14
    assert set(model.skipped) == {"lm_head", "model.embed_tokens"}
    assert all(layer.sqnr is None for layer in model.layers)
    assert 4 < model.bits <= 4.9
    assert json.loads(json.dumps(model.to_dict()))["layers"][0]["bits"] == pytest.approx(model.layers[0].bits, abs=1e-3)


def test_without_the_report_there_are_no_errors(digits, tmp_path):
    copy = Path(shutil.copytree(digits, tmp_path / "copy"))
    (copy / "transformer" / REPORT_FILE).unlink()
    assert all(layer.sqnr is None for layer in read_folder(copy)[1]["transformer"].layers)


def test_experts_of_a_parameter_are_one_entry(tmp_path):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 50, "num_local_experts": 3}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    data = [{"input_ids": torch.randint(50, (2, 64))} for _ in range(2)]
    save(hfquant.quantize(model, data, "w8a8-smooth"), tmp_path)
    stored = read_folder(tmp_path)[1]["model"]
    layer = next(x for x in stored.layers if x.name.endswith("experts.down_proj"))
    assert layer.shape == (3 * 64, 96)
    # Each expert has 96 divisors, and a scale per row for each of the two parts of its input.
    assert layer.bits == 8 + 32 * (96 + 2 * 64) / (64 * 96)
    own = [x for x in model.quant_report.layers if x.name.startswith(layer.name)]
    assert len(own) == 3
    assert layer.sqnr == pytest.approx(min(x.sqnr for x in own))
    weights = sum(x.shape[0] * x.shape[1] for x in stored.layers)
    assert stored.full_bytes == stored.bytes + 4 * weights - sum(x.bytes for x in stored.layers)


def test_several_controlnets_are_read_from_their_folders(tmp_path):
    pipe = CASES["sd-controlnet"].build()
    pipe.controlnet = MultiControlNetModel([pipe.controlnet, CASES["sd-controlnet"].build().controlnet])
    hfquant.quantize_pipeline(pipe, None, "w8a16", ["unet", "controlnet.nets.1"])
    save(pipe, tmp_path)
    models = read_folder(tmp_path)[1]
    assert set(models) == {"unet", "controlnet.nets.1"}
    tensors = load_file(tmp_path / "controlnet_1" / "diffusion_pytorch_model.safetensors")
    assert models["controlnet.nets.1"].kind == "ControlNetModel"
    assert models["controlnet.nets.1"].bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "controlnet_1" / "quant_report.json").is_file()
    assert "controlnet.nets.1" in (tmp_path / "README.md").read_text()


class TestBadFolders:
    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_folder(tmp_path / "none")

    def test_not_quantized(self, tmp_path):
        from tests.report.conftest import small_llama

        small_llama().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="nothing in it was quantized by hfquant"):
            read_folder(tmp_path)

    def test_no_weights(self, llama, tmp_path):
        copy = Path(shutil.copytree(llama, tmp_path / "copy"))
        (copy / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="no safetensors file"):
            read_folder(copy)

    @pytest.mark.parametrize("content", [b"", b"\xff" * 40, (8).to_bytes(8, "little") + b"not json"])
    def test_damaged_weights(self, content, llama, tmp_path):
        copy = Path(shutil.copytree(llama, tmp_path / "copy"))
        (copy / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
            read_folder(copy)


def test_what_layers_share_counts_once(tmp_path):
    """The head shares the embedding's codes, so it stores nothing and adds no weights to the count."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, vocab_size=500, **heads))
    config = {
        "default": {
            "weight_quant": {"type": "int8", "axis": -1},
            "input_quant": None,
            "opt": {"type": "default"},
            "include": ["embeddings", "output_heads"],
        }
    }
    save(hfquant.quantize(model, None, config), tmp_path / "tied")
    stored = read_folder(tmp_path / "tied")[1]["model"]
    by_name = {layer.name: layer for layer in stored.layers}
    assert sorted(layer.bytes for layer in (by_name["model.embed_tokens"], by_name["lm_head"])) == [0, 500 * (64 + 4)]
    own = [layer for layer in stored.layers if layer.bytes]
    assert stored.bits == pytest.approx(
        sum(layer.bits * layer.shape[0] * layer.shape[1] for layer in own)
        / sum(layer.shape[0] * layer.shape[1] for layer in own)
    )
    assert 8 < stored.bits < 8.7
