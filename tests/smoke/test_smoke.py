"""Each public entry point once, on tiny models; `make test-floors` runs this with the oldest supported versions."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn

import hfquant
from hfquant import HfQuantConfig, QuantLinear
from hfquant.demo import load_digits_pipeline
from tests.integrations.small_models import DIFFUSERS, TRANSFORMERS, assert_same, inputs_of, outputs, sqnr

MODELS = {"llama": TRANSFORMERS["llama"], "dit": DIFFUSERS["dit"]}
STATIC = {"default": {"weight_quant": {"type": "int8", "axis": -1}, "input_quant": {"type": "int8"}}}
ADVANCED = {"default": {**STATIC["default"], "opt": {"type": "svd", "low_rank": 4}, "calib": {"type": "gptq"}}}


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("name", MODELS)
def test_plan_and_quantize_without_data(name: str, tmp_path: Path) -> None:
    exact = MODELS[name]()
    planned = hfquant.plan(MODELS[name](), "w8a8-dynamic").layers
    in_memory = hfquant.quantize(MODELS[name](), None, "w8a8-dynamic")
    assert planned
    assert quant_layers(in_memory).keys() == planned.keys()
    assert sqnr(outputs(exact, inputs_of(exact)), outputs(in_memory, inputs_of(exact))) > 30

    exact.save_pretrained(tmp_path / "float")
    on_load = type(exact).from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig("w8a8-dynamic"))
    assert_same(on_load, in_memory)
    on_load.save_pretrained(tmp_path / "quantized")
    assert_same(type(exact).from_pretrained(tmp_path / "quantized"), in_memory)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", [STATIC, ADVANCED], ids=["smooth", "svd and gptq"])
def test_quantize_with_data(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    exact = MODELS[name]()
    inputs = inputs_of(exact)
    model = hfquant.quantize(MODELS[name](), [inputs] * 2, config)
    assert len(quant_layers(model)) > 10
    assert sqnr(outputs(exact, inputs), outputs(model, inputs)) > 25
    model.save_pretrained(tmp_path)
    assert_same(type(exact).from_pretrained(tmp_path), model)
    assert not quant_layers(hfquant.dequantize(model))


def test_calibration_set_of_a_pipeline(tmp_path: Path) -> None:
    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    labels = torch.utils.data.DataLoader(list(range(8)), batch_size=4)
    sampler = hfquant.UniformSampler(3, seed=0)
    made = hfquant.generate_calibrate_set(pipe, sampler, labels, "transformer", tmp_path, num_inference_steps=4)
    stored = hfquant.load_calibrate_set(tmp_path)
    assert stored is not None
    assert len(made) == len(stored) == 2 * 3
    for ours, theirs in zip(made, stored, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]


def test_pipeline_from_a_dataset(tmp_path: Path) -> None:
    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    rows = datasets.IterableDataset.from_generator(lambda: ({"label": i % 10} for i in range(8)))
    data = {"dataset": rows, "column": {"class_labels": "label"}, "samples": 8, "batch_size": 4}
    hfquant.quantize_pipeline(pipe, data, STATIC, num_inference_steps=2)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    assert_same(again.transformer, pipe.transformer)
    assert len(quant_layers(again.transformer)) > 10


def test_command_line(tmp_path: Path) -> None:
    script = Path(sysconfig.get_path("scripts")) / "hfquant"
    for arguments in (["--help"], ["calibrate", "--help"]):
        found = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        assert "calibrate" in found.stdout

    load_digits_pipeline().save_pretrained(tmp_path / "digits")
    datasets.Dataset.from_dict({"label": list(range(4))}).to_parquet(tmp_path / "labels.parquet")
    options = {"--source": tmp_path / "labels.parquet", "--out": tmp_path / "set", "--column": "label", "--steps": 2}
    words = [str(word) for option in options.items() for word in option]
    command = [sys.executable, "-m", "hfquant.cli", "calibrate", str(tmp_path / "digits"), *words]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert hfquant.load_calibrate_set(tmp_path / "set") is not None
