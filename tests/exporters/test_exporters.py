"""What all exports share: arguments, files, and that a failed export leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

import hfquant
from hfquant.exporters import ExportError, checkpoint
from tests.exporters.schemes import IDS, SCHEMES, quantized
from tests.integrations import small_models
from tests.integrations.own_models import own_model


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("compressed_tensors", r" \(did you mean 'compressed-tensors'\?\)"),
        ("nunchaku", r" \(did you mean 'nunchaku-lite'\?\)"),
        ("gguf", ""),
    ],
)
def test_an_unknown_format_names_the_nearest(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"unknown export format '{name}'{hint}; available: compressed-tensors, nunch"):
        hfquant.export(quantized(SCHEMES["w8a16"]), tmp_path, format=name)


def test_only_an_empty_folder_is_written_to(tmp_path: Path) -> None:
    model = quantized(SCHEMES["w8a16"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match=f"{name} is not an empty folder: export to a new one"):
            hfquant.export(model, tmp_path / name)
    assert (tmp_path / "full" / "notes").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/er"):
        hfquant.export(model, str(tmp_path / name))
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert files == {"config.json", "generation_config.json", "model.safetensors"}


def test_a_model_with_code_of_its_own(tmp_path: Path) -> None:
    small_models.llama_of_64().save_pretrained(tmp_path / "float")
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, trust_remote_code=True)
    model = hfquant.quantize(load(own_model(tmp_path / "float")), None, "w8a16")
    before = model.config.to_dict()
    hfquant.export(model, tmp_path / "exported")
    assert model.config.to_dict() == before
    shutil.rmtree(tmp_path / "float")
    loaded = load(tmp_path / "exported")
    assert type(loaded).__name__ == "OwnModel"
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))
    small_models.llama_of_64().save_pretrained(tmp_path / "float")
    words.save_pretrained(tmp_path / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    hfquant.export(hfquant.quantize(model, None, "w8a16"), tmp_path / "exported")
    writer = transformers.pipeline("text-generation", str(tmp_path / "exported"))
    assert writer.tokenizer is not None
    assert writer.tokenizer.get_vocab() == words.get_vocab()
    hfquant.save_pretrained(model, tmp_path / "saved")
    shutil.rmtree(tmp_path / "float")  # so the tokenizer is that of the folder that the model is loaded from
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    hfquant.export(again, tmp_path / "other")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "other").get_vocab() == words.get_vocab()


def test_a_model_that_is_not_quantized(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="LlamaForCausalLM has no quantized linear: quantize it with hfquant first"):
        hfquant.export(small_models.llama(), tmp_path)
    with pytest.raises(ExportError, match="LlamaForCausalLM has no quantized linear"):
        hfquant.export(hfquant.dequantize(quantized(SCHEMES["w8a16"])), tmp_path)


def test_a_pipeline_is_told_of_its_components(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"got dict; of a pipeline pass a component: hfquant\.export\(pipe"):
        hfquant.export({}, tmp_path)  # type: ignore[arg-type]


def test_a_model_of_another_library(tmp_path: Path) -> None:
    plain = hfquant.quantize(nn.Sequential(nn.Linear(64, 64)), None, "w8a16")
    with pytest.raises(ExportError, match="is a format for transformers models, and Sequential is not one"):
        hfquant.export(plain, tmp_path)
    with pytest.raises(ExportError, match="is a format for diffusers models, and LlamaForCausalLM is not one"):
        hfquant.export(quantized(SCHEMES["w8a16"]), tmp_path, format="nunchaku-lite")


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_torch_state_dict", full)
    with pytest.raises(OSError, match="no space left"):
        hfquant.export(quantized(SCHEMES["w8a16"]), tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_the_config_is_the_models_own_but_for_the_quantization(tmp_path: Path) -> None:
    model = quantized(SCHEMES["w8a8-dynamic"], torch.bfloat16)
    model.generation_config.max_new_tokens = 7
    before = model.config.to_dict()
    hfquant.export(model, tmp_path)
    assert model.config.to_dict() == before
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["intermediate_size"] == 192
    assert "hfquant" not in json.dumps(config)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).max_new_tokens == 7
