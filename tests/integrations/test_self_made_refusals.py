"""Models that fail on some of the data that they could generate, or on all of it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

import hfquant
from hfquant import CalibrationError
from hfquant.integrations import self_made as module
from hfquant.integrations.data import transformers_batches
from hfquant.nn.modules import quant_layers
from tests.integrations import small_models
from tests.integrations.test_self_made import ASKED, home, llava  # noqa: F401 (home is a fixture)


def test_a_plain_module_and_unknown_inputs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match="only transformers models and diffusers pipelines"):
        hfquant.quantize(nn.Sequential(nn.Linear(4, 4)), "self", "w8a8")
    with pytest.raises(CalibrationError, match="w8a8 is the name of a preset: pass it as config"):
        hfquant.quantize(nn.Sequential(nn.Linear(4, 4)), "w8a8", "w8a8")
    monkeypatch.setattr(module, "example_inputs", lambda model: None)
    with pytest.raises(CalibrationError, match="BertModel needs calibration data and cannot make its own: the inputs"):
        hfquant.quantize(small_models.TRANSFORMERS["bert"](), None, "w8a8")


def test_a_model_without_a_forward_is_refused_with_its_parts() -> None:
    """As Qwen2.5-Omni, whose `generate` calls the forwards of its parts."""

    class Whole(LlamaPreTrainedModel):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.thinker, self.voices = LlamaForCausalLM(config), nn.ModuleList()
            self.post_init()

    model = Whole(small_models.llama_of_64().config)
    with pytest.raises(CalibrationError, match=r"Whole has no forward, .* or quantize its parts \(thinker\)"):
        hfquant.quantize(model, None, "w8a8")
    assert not quant_layers(model)
    hfquant.quantize(model.thinker, [small_models.transformers_inputs(model.thinker)], "w8a8")
    assert quant_layers(model)


def test_noise_that_a_forward_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_models.TRANSFORMERS["vit"]()
    shapes = {"pixel_values": torch.zeros(1, 3, 5, 7)}
    monkeypatch.setattr(module, "example_inputs", lambda model: shapes)
    with pytest.raises(CalibrationError, match=r"own: it fails on noise with ValueError: .*; pass batches of its"):
        hfquant.quantize(model, None, "w8a8")
    assert not quant_layers(model)


@pytest.mark.parametrize("inputs", ["unknown", "wrong", "not made"])
def test_a_language_model_whose_other_inputs_are_unknown_is_calibrated_on_text(
    inputs: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The vision encoder, which no text reaches, is quantized without data."""
    shapes = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 5, 7)}
    monkeypatch.setattr(module, "example_inputs", lambda model: None if inputs == "unknown" else shapes)
    if inputs == "not made":
        monkeypatch.setattr(module, "_pictures", failing)
    model = llava()
    with caplog.at_level(logging.WARNING, "hfquant"):
        hfquant.quantize(model, dict(ASKED), "w4a16-gptq")
    vision = {name for name in quant_layers(model) if "language_model" not in name and name != "lm_head"}
    assert vision
    assert vision < quant_layers(model).keys()
    assert {layer.name for layer in model.quant_report.layers if layer.fallback} == vision
    why = {
        "unknown": "the inputs of its forward are unknown",
        "wrong": "it fails on noise with ValueError: ",
        "not made": "it fails on noise with ArithmeticError: no pictures",
    }
    assert f"LlavaForConditionalGeneration: {why[inputs]}" in caplog.text
    assert "it is calibrated on text alone" in caplog.text


def failing(*_: Any) -> Any:
    raise ArithmeticError("no pictures")


def test_a_language_model_that_takes_no_text_alone_is_calibrated_on_noise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_text", failing)
    model = llava()
    with caplog.at_level(logging.WARNING, "hfquant"):
        hfquant.quantize(model, dict(ASKED), "w4a16-gptq")
    assert not [layer.name for layer in model.quant_report.layers if layer.fallback]
    assert "it fails on text with ArithmeticError: no pictures, so it is calibrated on noise alone" in caplog.text


def test_a_language_model_that_takes_neither_is_refused_with_both_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_text", failing)
    monkeypatch.setattr(module, "example_inputs", lambda model: None)
    with pytest.raises(CalibrationError, match="inputs of its forward are unknown; it fails on text with Arithmetic"):
        hfquant.quantize(llava(), dict(ASKED), "w4a16-gptq")


def test_a_forward_that_fails_is_named_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, a text model that needs more than text: the user has to pass batches."""

    def failing(self: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        return torch.ones(2) @ torch.ones(3)

    model = small_models.llama()
    monkeypatch.setattr(type(model), "forward", failing)
    with pytest.raises(
        CalibrationError, match=r"make its own: it fails on text with RuntimeError: .*; pass batches of"
    ):
        transformers_batches(model, ASKED)
