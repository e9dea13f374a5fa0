"""The check of all architectures reports what it found."""

from __future__ import annotations

import re
import time
from functools import partial
from itertools import islice

import pytest
import torch
from torch import nn

import hfquant
from benchmarks import architectures, tiny_diffusers, tiny_transformers
from benchmarks.architectures import FLOAT_FAILS, LIBRARIES, NOT_BUILT, NOTHING, markdown

checked = partial(architectures.checked, LIBRARIES["transformers"])


def test_a_language_model_and_one_that_has_nothing_to_quantize() -> None:
    assert re.fullmatch(r"equal, 14 layers, \S+ % off", checked("llama", "w4a16"))
    assert checked("dac", "w4a16") == NOTHING


def test_a_denoiser_on_data_it_makes_itself() -> None:
    said = architectures.checked(LIBRARIES["diffusers"], "GlmImageTransformer2DModel", "w8a8")
    assert re.fullmatch(r"equal, \d\d layers, \S+ % off", said)


def test_models_are_small() -> None:
    model = next(tiny_transformers.small("clip", 10**6))
    assert (model.config.text_config.num_hidden_layers, model.config.vision_config.num_hidden_layers) == (2, 2)
    with pytest.raises(ValueError, match="too large"):
        next(tiny_transformers.small("clip", 10))
    with pytest.raises(ValueError, match="too large"):
        next(tiny_diffusers.small("FluxTransformer2DModel", 10**6))


def test_a_class_that_wants_its_widths_is_cut_in_depth() -> None:
    model = next(tiny_transformers.small("swinv2", 10**8))
    assert model.config.embed_dim == 96


def test_lists_in_a_small_config_fit_its_sizes() -> None:
    config = next(tiny_transformers.small("qwen2_vl", 10**8)).config.text_config
    assert 2 * sum(config.rope_parameters["mrope_section"]) == config.hidden_size // config.num_attention_heads
    config = next(tiny_transformers.small("qwen3_next", 10**8)).config
    assert config.layer_types == ["linear_attention", "full_attention"]
    config = next(tiny_transformers.small("llava_next", 10**8)).config
    assert max(config.image_grid_pinpoints) == [32, 64] == [config.vision_config.image_size, 64]


def test_what_a_failure_is_counted_as(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked("no such type", "w4a16").startswith(NOT_BUILT)
    one = LIBRARIES["transformers"]._replace(small=lambda kind, most: islice(tiny_transformers.small(kind, most), 1))
    calls: list[nn.Module] = []

    def differs(model: nn.Module, other: nn.Module) -> None:
        calls.append(model)
        if len(calls) == failing:
            raise ValueError("x differs")

    monkeypatch.setattr(architectures, "_same", differs)
    failing = 1  # the float model and its copy
    assert architectures.checked(one, "llama", "w4a16") == f"{FLOAT_FAILS}: ValueError: x differs"
    failing = len(calls) + 2  # the quantized models
    assert architectures.checked(one, "llama", "w4a16") == "fails: ValueError: x differs"
    failing = len(calls) + 1  # a float model that does not reload, followed by one that does
    assert checked("llama", "w4a16").startswith("equal, 14 layers")


def test_models_that_differ() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="weight differs"):
        architectures._same(one, other)
    with pytest.raises(ValueError, match="other tensors"):
        architectures._same(one, nn.Linear(2, 2, bias=False))
    other.load_state_dict(one.state_dict())
    architectures._same(one, other)
    with torch.no_grad():  # as in a model whose random weights overflow
        one.bias[0] = other.bias[0] = torch.nan
    architectures._same(one, other)


def test_what_is_beside_quantized_layers_has_to_be_as_it_was() -> None:
    def model(table: float) -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
        made.register_buffer("table", torch.tensor([table]), persistent=False)
        return made

    quantized = hfquant.quantize(model(1.0), None, "w8a8-dynamic")
    architectures._same_beside(model(1.0), quantized)
    with pytest.raises(ValueError, match="table is not the float model's"):
        architectures._same_beside(model(2.0), quantized)


def test_errors_are_relative() -> None:
    assert architectures._error([torch.ones(4), torch.zeros(2)], [torch.full((4,), 0.9), torch.ones(2)]) == (
        pytest.approx(10)
    )


def test_time_is_limited() -> None:
    with pytest.raises(TimeoutError, match="more than 1 s"), architectures.at_most(1):
        time.sleep(3)


def test_the_page() -> None:
    rows = {
        "a": {"w4a16": "equal, 3 layers"},
        "b": {"w4a16": "equal, 3 layers, not run"},
        "c": {"w4a16": "fails: ValueError: x"},
        "d": {"w4a16": f"{NOT_BUILT}: y"},
    }
    page = markdown(rows)
    assert "| equal | 2 |" in page
    assert "| fails | 1 |" in page
    assert "| of the equal ones, without known inputs | 1 |" in page
    assert "- `c`, w4a16: fails: ValueError: x" in page
    assert f"- `d`: {NOT_BUILT}: y" in page
