"""Bits per layer under a budget: from a model to a config, and as part of a config."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hfquant
from hfquant.config import ConfigError, parse
from hfquant.integrations.facts import facts_of
from hfquant.nn.modules import quant_layers
from hfquant.search import search
from tests.integrations.mixtures import mixture, tokens
from tests.report.conftest import small_llama
from tests.search.nets import BASE, Net, inputs


def test_bits_go_where_they_count():
    found = search(Net(), inputs(), 7.2, ("int4", "int8"), BASE)
    assert found.chosen == {"loud": "int8", "quiet": "int4"}
    assert found.bits <= 7.2
    assert found.error >= found.bound > 0


def test_a_budget_in_bytes_is_that_in_bits():
    bits = search(Net(), inputs(), 7.2, ("int4", "int8"), BASE)
    weights = 2 * 64 * 64
    size = search(Net(), inputs(), 7.2 * weights / 8, ("int4", "int8"), BASE)
    assert size.chosen == bits.chosen
    assert size.bytes == bits.bytes == round(bits.bits * weights / 8)


def test_more_budget_lowers_the_bound():
    net = Net()
    found = [search(net, inputs(), bits, ("int4", "int6", "int8"), BASE) for bits in (5.3, 7, 9.5)]
    bounds = [choice.bound for choice in found]
    assert bounds == sorted(bounds, reverse=True)
    assert all(choice.error >= choice.bound - 1e-9 for choice in found)


def test_a_language_model_and_its_config():
    model = small_llama()
    before = copy.deepcopy(model.state_dict())
    data = [{"input_ids": torch.randint(50, (2, 12))} for _ in range(4)]
    found = search(model, data, 6.5, ("int4", "int6", "int8"), BASE, facts_of(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(found.chosen) == set(hfquant.plan(model, BASE).layers)
    assert len(set(found.chosen.values())) > 1
    plan = hfquant.plan(model, found.config)
    assert {name: layer.config.weight_quant.type for name, layer in plan.layers.items()} == found.chosen
    quantized = hfquant.quantize(model, None, found.config)
    size = sum(
        t.nbytes
        for layer in quantized.modules()
        if isinstance(layer, hfquant.QuantLinear)
        for t in layer.solved_tensors().values()
    )
    assert size == found.bytes
    assert all(math.isfinite(value) for value in found.judged.values())


class NoGradient(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_without_a_gradient_forward_differences_decide(caplog):
    found = search(NoGradient(), inputs(), 7.2, ("int4", "int8"), BASE)
    assert "no gradient" in caplog.text
    assert found.chosen == {"loud": "int8", "quiet": "int4"}


class Aside(Net):
    """A net with a layer that no gradient reaches; the output depends on it only if its share is not 0."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.aside, self.share = nn.Linear(64, 64, bias=False), share

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            aside = self.share * self.aside(x)
        return super().forward(x) + aside


@pytest.mark.parametrize(("share", "least"), [(0.0, "aside"), (1000.0, "quiet")])
def test_a_layer_without_a_gradient_counts_if_the_output_depends_on_it(share, least, caplog):
    caplog.set_level("INFO", "hfquant")
    found = search(Aside(share), inputs(), 8.0, ("int4", "int8"), BASE)
    assert ("no gradient reaches aside, but" in caplog.text) == bool(share)
    assert found.chosen == {"loud": "int8", "quiet": "int8", "aside": "int8"} | {least: "int4"}


def test_layers_of_a_model_that_do_not_affect_its_output():
    """LLaVA reads the last but one layer of its vision tower."""
    from tests.integrations.test_apply import llava

    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(4):
        ids = torch.randint(8, 200, (1, 40), generator=generator)
        ids[:, 2:18] = 7
        data.append({"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32, generator=generator)})
    model = llava()
    found = search(model, data, 6.0, ("int4", "int8"), BASE, facts_of(model))
    assert all(math.isfinite(value) and value >= 0 for value in (*found.judged.values(), found.error, found.bound))
    assert {label for name, label in found.chosen.items() if ".vision_tower." in name and ".layers.2." in name} == {
        "int4"
    }


def test_divergences_below_zero_are_rounding_errors(monkeypatch):
    from hfquant.search import repair

    monkeypatch.setattr(repair, "divergence", lambda output, *_: torch.full((len(output),), -1e-9))
    for net in (Net(), NoGradient()):
        found = search(net, inputs(), 7.2, ("int4", "int8"), BASE)
        assert set(found.judged.values()) == {0.0}


def test_the_bytes_of_a_preset_are_a_budget():
    net = Net()
    found = search(net, inputs(), "w4a16", ("int3", "int4", "int8"), BASE)
    plan = hfquant.plan(net, "w4a16").layers
    most = sum(math.prod(t.shape) * t.dtype.itemsize for p in plan.values() for t in p.tensors().values())
    assert most - 64 * 16 < found.bytes <= most


@pytest.mark.parametrize("budget", [6.5, "w8a16"])
def test_excluded_layers_are_neither_chosen_for_nor_counted(budget):
    model = small_llama()
    rules = parse(BASE, ["*.down_proj"])
    data = [{"input_ids": torch.randint(50, (2, 12))} for _ in range(4)]
    found = search(model, data, budget, ("int4", "int6", "int8"), rules, facts_of(model))
    names = [name for name in hfquant.plan(model, BASE).layers if not name.endswith("down_proj")]
    assert sorted(found.chosen) == sorted(names)
    weights = sum(model.get_parameter(f"{name}.weight").numel() for name in names)
    assert found.bytes == round(found.bits * weights / 8)


def test_layers_that_are_not_chosen_for_keep_what_the_base_says():
    """A tied head shares its codes with the embedding, which no gradient reaches."""
    model = small_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    base = {"default": {**BASE["default"], "include": ["embeddings", "output_heads"]}}
    data = [{"input_ids": torch.randint(50, (2, 12))} for _ in range(4)]
    found = search(model, data, 8.0, ("int6", "int8"), base, facts_of(model))
    assert not {"lm_head", "model.embed_tokens"} & set(found.chosen)
    plan = hfquant.plan(model, found.config).layers
    assert {name: plan[name].config.weight_quant.type for name in found.chosen} == found.chosen
    assert plan["lm_head"].config.weight_quant.type == plan["model.embed_tokens"].config.weight_quant.type == "int4"


def test_presets_leave_it_to_the_base_which_layers_are_quantized():
    model = small_llama()
    base = {"default": {**BASE["default"], "include": ["output_heads"]}}
    data = [{"input_ids": torch.randint(50, (2, 12))} for _ in range(4)]
    config = hfquant.search_bits(model, data, 9.0, ["int4", "w8a16"], base)
    assert "lm_head" in hfquant.plan(model, config).layers


class Blocks(nn.Module):
    """Repeated blocks and a small layer outside of them, which presets of 8 bits leave in float."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.out = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.out(x)


@pytest.mark.parametrize("base", ["w4a16", "w8a16"])
@pytest.mark.parametrize(
    "choices",
    [["w4a16", "w8a16"], ["w8a16", "w4a16"], ["w4a16", {"float_share": 0.5, "weight_quant": {"type": "int8"}}]],
)
def test_choices_that_would_leave_other_layers_in_float(base, choices):
    model = Blocks().eval()
    config = hfquant.search_bits(model, inputs(8), 6.5, choices, base)
    assert hfquant.plan(model, config).layers.keys() == hfquant.plan(model, base).layers.keys()


def test_entries_of_the_base_hold_besides_the_choice():
    torch.manual_seed(0)
    model = Blocks().eval()
    for i in (2, 3):
        model.blocks[i].weight.data.mul_(20)
    base = {
        **BASE,
        "blocks.3": {"input_quant": {"type": "int8", "axis": -1, "dynamic": True}},
        "blocks.2": {"calib": {"type": "amax"}},
        "*blocks*": {"calib": {"type": "gptq"}},
        "out": {"enable": False},
    }
    config = hfquant.search_bits(model, inputs(8), 7.0, ("int4", "int8"), base)
    layers = hfquant.plan(model, config).layers
    assert list(layers) == [f"blocks.{i}" for i in range(4)]
    kept, other = layers["blocks.3"].config, layers["blocks.0"].config
    assert [layer.config.weight_quant.type for layer in layers.values()] == ["int4", "int4", "int8", "int8"]
    assert kept.input_quant is not None
    assert kept.input_quant.dynamic
    assert other.input_quant is None
    assert {layer.config.calib.type for layer in layers.values()} == {"gptq"}


def test_experts_and_presets():
    model = mixture("MixtralForCausalLM")
    before = copy.deepcopy(model.state_dict())
    data = [{"input_ids": tokens(seed=i)} for i in range(4)]
    config = hfquant.search_bits(model, data, 8.5, ["w8a8-dynamic", {"type": "int4", "group_size": 16}], BASE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    layers = hfquant.plan(model, config).layers
    kinds = {(p.config.weight_quant.type, p.config.input_quant and p.config.input_quant.type) for p in layers.values()}
    assert kinds == {("int8", "int8"), ("int4", None)}
    assert all(p.config.group_size == (16 if p.config.weight_quant.type == "int4" else None) for p in layers.values())
    hfquant.quantize(model, data, config)


@pytest.mark.parametrize("kind", ["config", pytest.param("preset", marks=pytest.mark.slow)])
def test_a_config_that_asks_for_a_search(kind, tmp_path):
    small_llama().save_pretrained(tmp_path / "float")
    choices = ["int3", "int4", "int6", {"type": "int8", "group_size": 64}]
    config = "w4-auto" if kind == "preset" else {**BASE, "search": {"budget": 5.6, "choices": choices}}
    ids = [{"input_ids": torch.randint(50, (2, 12))} for _ in range(4)]
    asked = hfquant.HfQuantConfig(config, calibration=ids)
    assert asked.needs_data
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=asked)
    types = {name: layer.plan.config.weight_quant.type for name, layer in quant_layers(model).items()}
    assert len(set(types.values())) > 1
    weights = sum(p.in_features * p.out_features for p in (x.plan for x in quant_layers(model).values()))
    size = sum(t.nbytes for x in quant_layers(model).values() for t in x.solved_tensors().values())
    if kind == "config":
        assert size <= 5.6 * weights / 8
    else:
        plain = hfquant.quantize(small_llama(), ids, "w4a16-gptq")
        assert size <= sum(t.nbytes for x in quant_layers(plain).values() for t in x.solved_tensors().values())
    model.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert stored["config"] == asked.to_dict()["config"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert {name: x.plan.config.weight_quant.type for name, x in quant_layers(again).items()} == types
    assert torch.equal(again(**ids[0]).logits, model(**ids[0]).logits)


class TestBadInput:
    def test_choices(self):
        with pytest.raises(ConfigError, match="unknown number format 'int5x'"):
            search(Net(), inputs(), 5, ("int4", "int5x"), BASE)

    def test_a_budget_that_nothing_fits(self):
        with pytest.raises(ValueError, match=r"budget: \d+ bytes is too small; the smallest .* take \d+"):
            search(Net(), inputs(), 2, ("int4", "int8"), BASE)
        with pytest.raises(ConfigError, match="budget: expected bits, bytes or the name of a preset, got 'w4'"):
            search(Net(), inputs(), "w4", ("int4", "int8"), BASE)

    def test_too_little_data(self):
        with pytest.raises(ValueError, match="at least two samples"):
            search(Net(), [torch.randn(1, 64)], 7, ("int4", "int8"), BASE)

    def test_a_search_that_says_nothing(self):
        for rule in ({}, {"budget": 4, "choice": ["int4"]}, {"budget": None}, []):
            with pytest.raises(ConfigError, match="search"):
                hfquant.HfQuantConfig({**BASE, "search": rule})
