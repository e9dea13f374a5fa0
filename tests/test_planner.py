"""The plan: which linears are quantized, how each one is, what a checkpoint stores of it, and the table."""

import logging

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5EncoderModel,
)

import hfquant
import hfquant.planner
from hfquant import HfQuantConfig, SegPattern, plan
from hfquant.config import QuantRules
from hfquant.dataflow.trace import LinearTrace, PatternError
from hfquant.integrations import model_facts
from hfquant.integrations.facts import facts_of
from hfquant.layer_config import LayerConfig
from hfquant.layer_plan import LayerPlan
from hfquant.nn.modules import quant_modules
from hfquant.planner import ModelFacts, Plan, matches, plan_layers

FREE = {"opt": {"type": "default"}, "input_quant": None}
OFF = {"default": {**FREE, "search_patterns": []}}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.up(x).chunk(2, dim=-1)
        return self.down(torch.cat([nn.functional.silu(a), b], dim=-1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


NAMES = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]


def tiny_llama(**changes) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, **changes,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


# Which linears.


def test_every_linear_and_nothing_else() -> None:
    class Special(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    class Same(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "special": Special(4, 4),
            "same": Same(4, 4),
            "attention": nn.MultiheadAttention(4, 1),
            "conv": nn.Conv1d(4, 4, 1),
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "up": nn.ConvTranspose2d(4, 4, 2),
            "embedding": nn.Embedding(4, 4),
            "bilinear": nn.Bilinear(4, 4, 4),
        }
    )
    found = plan(model, OFF)
    assert list(found.layers) == ["plain", "same", "conv"]
    assert found.skipped == {
        "special": "it is a subclass of nn.Linear, Special",
        "attention": "nn.MultiheadAttention reads its projections as raw parameters",
        "attention.out_proj": "it is a subclass of nn.Linear, NonDynamicallyQuantizableLinear",
        "depthwise": "a convolution in 4 groups",
        "up": "a transposed convolution",
        "embedding": "an embedding",
        "bilinear": "a bilinear layer",
    }


def test_a_shared_module_is_planned_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    assert list(plan(model, OFF).layers) == ["a"]


def test_a_model_that_is_a_linear_itself_cannot_be_replaced() -> None:
    found = plan(nn.Linear(4, 4), OFF)
    assert found.layers == {}
    assert "wrap it in nn.Sequential" in found.skipped[""]


def test_tied_weights_of_plain_modules() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(6, 4), "out": nn.Linear(4, 6), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    )
    model["out"].weight = model["embed"].weight
    model["b"].weight = model["a"].weight
    model["free"] = nn.Linear(4, 4)
    found = plan(model, OFF)
    assert list(found.layers) == ["free"]
    assert found.skipped == {
        "embed": "an embedding",
        "out": "its weight is tied to embed", "a": "its weight is tied to b", "b": "its weight is tied to a",
    }  # fmt: skip


def test_a_parameter_under_two_names_of_one_module_is_not_tied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["a"].alias = model["a"].weight
    assert list(plan(model, OFF).layers) == ["a"]


@pytest.mark.parametrize("tied", [True, False])
def test_heads_and_tied_weights_of_transformers(tied) -> None:
    found = plan(tiny_llama(tie_word_embeddings=tied), OFF)
    assert len(found.layers) == 2 * 7
    assert list(found.skipped) == ["model.embed_tokens", "lm_head"]
    assert found.skipped["lm_head"] == "the model's output head"


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("BertForSequenceClassification", ["classifier"]),
        ("BertForTokenClassification", ["classifier"]),
        ("RobertaForSequenceClassification", ["classifier.dense", "classifier.out_proj"]),
        ("DistilBertForSequenceClassification", ["pre_classifier", "classifier"]),
        ("LlamaForSequenceClassification", ["score"]),
    ],
)
def test_heads_that_peft_trains(name, heads) -> None:
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class(vocab_size=32, num_hidden_layers=1, num_labels=5))
    found = plan(model, OFF)
    assert [name for name, why in found.skipped.items() if why == "the model's output head"] == heads
    assert found.layers
    included = plan(model, {"default": {**OFF["default"], "include": ["output_heads"]}})
    assert included.layers.keys() >= set(heads)


def test_kept_in_float32() -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=32)
    with torch.device("meta"):
        model = T5EncoderModel(config)
    found = plan(model, OFF)
    assert [n for n, why in found.skipped.items() if "_keep_in_fp32_modules" in why] == [
        "encoder.block.0.layer.1.DenseReluDense.wo"
    ]
    assert len(found.layers) == 5
    model = Net()
    model._keep_in_fp32_modules = ["up"]
    model._keep_in_fp32_modules_strict = {"blocks.1.down", "head.weight"}
    assert list(plan_layers(model, QuantRules(OFF), facts=facts_of(model)).layers) == ["blocks.0.down"]
    assert len(plan(model, OFF).layers) == 5, "only a library's models are asked"
    assert model._keep_in_fp32_modules == ["up"]


def test_weights_that_rwkv_changes_when_it_first_runs(tmp_path) -> None:
    """Also if it has already run, as it has once it generated its own calibration data."""
    config = RwkvConfig(vocab_size=32, context_length=16, hidden_size=16, num_hidden_layers=2)
    model = RwkvForCausalLM(config).eval()
    ids = torch.arange(12)[None]
    model(ids)
    hfquant.quantize(model, [{"input_ids": ids}], "w4a16-gptq")
    changed = [f"rwkv.blocks.{i}.{name}" for i in range(2) for name in ("attention.output", "feed_forward.value")]
    assert not set(changed) & set(quant_modules(model))
    assert len(quant_modules(model)) == 10
    model.save_pretrained(tmp_path)
    assert torch.equal(RwkvForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("names", "skipped"),
    [
        (["head"], ["head"]),
        (["blocks.0"], ["blocks.0.up", "blocks.0.down"]),
        (["blocks"], NAMES[:4]),
        (["up"], ["blocks.0.up", "blocks.1.up"]),
        (["0.up"], ["blocks.0.up"]),
        (["*.down", "h*d"], ["blocks.0.down", "blocks.1.down", "head"]),
        (["blocks.[1]*"], ["blocks.1.up", "blocks.1.down"]),
        (["model.head"], ["head"]),
        # Parts of a word or a number do not match.
        (["bloc", "hea", "p", "*.u", "ad"], []),
    ],
)
def test_modules_to_not_convert(names, skipped) -> None:
    found = plan_layers(Net(), QuantRules(OFF, names), facts=ModelFacts(prefix="model"))
    assert found.skipped == dict.fromkeys(skipped, "in modules_to_not_convert")
    assert list(found.layers) == [n for n in NAMES if n not in skipped]


def test_asked_for_by_an_explicit_enable() -> None:
    model = tiny_llama()
    assert "lm_head" in plan(model, {**OFF, "lm_head": {"enable": True}}).layers
    assert "lm_head" in plan(model, {**OFF, "*_head": {"enable": True, "weight_quant": {"type": "int4"}}}).layers
    for not_asked in ({"lm_head": {"real_quant": True}}, {"lm_head": {"enable": True}, "lm*": {"enable": False}}):
        assert "lm_head" in plan(model, {**OFF, **not_asked}).skipped
    # modules_to_not_convert takes precedence.
    config = HfQuantConfig({**OFF, "lm_head": {"enable": True}}, modules_to_not_convert=["lm_head"])
    assert plan(model, config).skipped["lm_head"] == "in modules_to_not_convert"


def test_enable_false() -> None:
    found = plan(Net(), {**OFF, "blocks.*": {"enable": False}, "*.down": {"enable": True}})
    assert found.skipped == {"blocks.0.up": "enable=False", "blocks.1.up": "enable=False"}
    assert plan(Net(), {"default": {"enable": False}}).layers == {}


def test_globs_that_match_nothing_are_reported(caplog) -> None:
    with caplog.at_level(logging.WARNING, "hfquant"):
        plan(Net(), {**OFF, "blocks.0": {"enable": False}, "*.up": {"enable": False}})
    assert [r.getMessage() for r in caplog.records] == [
        "Net: config['blocks.0'] matches no layer (those of a block are 'blocks.0.*')"
    ]


def test_base_model_prefix() -> None:
    rules = {**OFF, "model.layers.0.*": {"enable": False}, "layers.1.mlp.*": {"enable": False}}
    whole = tiny_llama()
    with torch.device("meta"):
        base = LlamaModel(whole.config)
    assert model_facts(whole).aliases("model.layers.0.mlp") == ("model.layers.0.mlp", "layers.0.mlp")
    assert model_facts(base).aliases("layers.0.mlp") == ("layers.0.mlp", "model.layers.0.mlp")
    assert ModelFacts().aliases("x") == model_facts(nn.Module()).aliases("x") == ("x",)
    with_head, without = plan(whole, rules), plan(base, rules)
    assert [n.removeprefix("model.") for n in with_head.layers] == list(without.layers)
    assert len(without.layers) == 4
    assert matches(("a.b.c",), ["b"])
    assert not matches(("a.bb.c",), ["b"])


def test_weights_read_by_others_are_left_alone() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.used(x), self.read.weight)

    found = plan(Reader(), {"default": FREE}, torch.zeros(2, 4))
    assert list(found.layers) == ["used"]
    assert found.skipped == {"read": "its weight is read outside its own forward"}


# How each is quantized, given what surrounds it.


def seen(monkeypatch, linear: nn.Linear, config: dict, **trace) -> LayerPlan:
    """Return the plan of a model's only linear, given the fields of its trace."""
    fields = {
        "name": "fc", "order": 0, "calls": 1, "input_segments": (linear.in_features,),
        "output_segments": (linear.out_features,), "activations": (None,), "patterns": (), "evidence": ("seen",),
    }  # fmt: skip
    found = LinearTrace(**{**fields, **trace})
    monkeypatch.setattr(hfquant.planner, "trace", lambda *args, **kwargs: {"fc": found})
    return plan(nn.ModuleDict({"fc": linear}), {"default": config}, torch.zeros(1)).layers["fc"]


JOINED = {"input_segments": (8, 24), "activations": ("silu", None)}
A8 = {"opt": {"type": "default"}, "input_quant": {"type": "int8", "dynamic": True}, "weight_quant": {"axis": -1}}


@pytest.mark.parametrize("pattern", ["concat2linear", "stack2linear", "reshape2linear"])
def test_input_segments(monkeypatch, pattern) -> None:
    linear, patterns = nn.Linear(32, 6), (SegPattern(pattern),)
    assert seen(monkeypatch, linear, A8, **JOINED, patterns=patterns).input_segments == (8, 24)
    for off in ({"seglinear": False}, {"search_patterns": [p for p in SegPattern if p is not patterns[0]]}):
        assert seen(monkeypatch, linear, {**A8, **off}, **JOINED, patterns=patterns).input_segments == (32,)
    # Groups must not straddle segments, which have no effect if no scale belongs to a single segment.
    for weight, expected in (({"group_size": 8}, (8, 24)), ({"group_size": 16}, (32,))):
        assert (
            seen(monkeypatch, linear, {**A8, "weight_quant": weight}, **JOINED, patterns=patterns).input_segments
            == expected
        )
    for config, expected in (
        ({**FREE, "weight_quant": {"axis": -1}}, (8, 24)),
        ({**FREE, "weight_quant": {"group_size": 8}}, (32,)),
        ({**FREE, "weight_quant": {"type": "fp16"}}, (32,)),
        ({**A8, "weight_quant": {"group_size": 8}, "input_quant": {"type": "fp16"}}, (32,)),
        ({**A8, "weight_quant": {"type": "bf16"}}, (8, 24)),
    ):
        assert seen(monkeypatch, linear, config, **JOINED, patterns=patterns).input_segments == expected


def test_parts_of_input_segments(monkeypatch) -> None:
    """Segments from the dataflow are divided further; each part has the activation of its segment."""
    joined = {"input_segments": (256, 128), "activations": ("silu", None)}
    both = {**joined, "patterns": (SegPattern.CONCAT2LINEAR, SegPattern.ACTIVATION2LINEAR)}
    config = {**A8, "input_quant": {**A8["input_quant"], "segments": 3}}
    found = seen(monkeypatch, nn.Linear(384, 6), config, **both)
    assert (found.input_segments, found.dual) == ((128,) * 3, (True, True, False))
    # Without dataflow segments, a part that overlaps two of them has no activation.
    uneven = {**both, "input_segments": (192, 192)}
    found = seen(monkeypatch, nn.Linear(384, 6), {**config, "seglinear": False}, **uneven)
    assert (found.input_segments, found.dual) == ((128,) * 3, (False,) * 3)
    assert seen(monkeypatch, nn.Linear(384, 6), config, **uneven).input_segments == (128, 64, 128, 64)
    gelu = {"activations": ("gelu",), "patterns": (SegPattern.ACTIVATION2LINEAR,)}
    assert seen(monkeypatch, nn.Linear(384, 6), config, **gelu).dual == (True,) * 3


@pytest.mark.parametrize("pattern", ["linear2chunk", "linear2split"])
def test_output_segments(monkeypatch, pattern) -> None:
    linear, split = nn.Linear(6, 32), {"output_segments": (8, 24), "patterns": (SegPattern(pattern),)}
    for config, expected in (
        ({**A8, "weight_quant": {"axis": None}}, (8, 24)),
        (A8, (32,)),  # one scale per row: segments share nothing
        ({**A8, "weight_quant": {"group_size": 2}}, (32,)),
        ({**A8, "weight_quant": {"type": "fp16"}}, (32,)),
        ({**A8, "opt": {"type": "smooth"}}, (8, 24)),
        ({**A8, "opt": {"type": "svd", "low_rank": 6}}, (8, 24)),
        ({**A8, "opt": {"type": "smooth"}, "seglinear": False}, (32,)),
        ({**A8, "opt": {"type": "smooth"}, "search_patterns": ["concat2linear"]}, (32,)),
    ):
        assert seen(monkeypatch, linear, config, **split).output_segments == expected
    # A low-rank branch per segment needs at least that many rows in the segment.
    short = {**split, "output_segments": (4, 28)}
    assert seen(monkeypatch, linear, {**A8, "opt": {"type": "svd", "low_rank": 6}}, **short).output_segments == (32,)


def test_dual(monkeypatch) -> None:
    linear = nn.Linear(32, 6)
    both = {**JOINED, "patterns": (SegPattern.CONCAT2LINEAR, SegPattern.ACTIVATION2LINEAR)}
    gelu = {"activations": ("gelu",), "patterns": (SegPattern.ACTIVATION2LINEAR,)}
    assert seen(monkeypatch, linear, A8, **both).dual == (True, False)
    assert seen(monkeypatch, linear, A8, **gelu).dual == (True,)
    assert seen(monkeypatch, linear, {**A8, "search_patterns": SegPattern.seg()}, **both).dual == (False, False)
    assert seen(monkeypatch, linear, {**A8, "seglinear": False}, **both).dual == (False,)
    assert seen(monkeypatch, linear, {**A8, "seglinear": False}, **gelu).dual == (True,)
    for quant, dual in (
        (None, False),
        ("int4", True),
        ("int6", True),
        ("int16", False),
        ("fp8e4m3", False),
        ("bf16", False),
    ):
        config = {**A8, "input_quant": quant and {"type": quant, "dynamic": True}}
        assert seen(monkeypatch, linear, config, **gelu).dual == (dual,)


@pytest.mark.parametrize("opt", ["hadamard", "smooth_hadamard"])
def test_rotated_inputs_have_no_small_side(monkeypatch, opt: str) -> None:
    gelu = {"activations": ("gelu",), "patterns": (SegPattern.ACTIVATION2LINEAR,)}
    config = {**A8, "opt": {"type": opt}, "input_quant": {"type": "int8", "axis": -1, "dynamic": True}}
    found = seen(monkeypatch, nn.Linear(64, 6), config, **gelu)
    assert found.dual == (False,)
    assert "no dual scale: the input is rotated" in found.evidence


def test_a_real_trace() -> None:
    config = {
        "default": {**A8, "opt": {"type": "smooth"}},
        "*.1.*": {"search_patterns": ["linear2chunk"]},
        "head": {"enable": False},
    }
    found = plan(Net(), config, torch.zeros(2, 8))
    assert list(found.layers) == NAMES[:4]
    up, down, up1, down1 = found.layers.values()
    assert up.output_segments == up1.output_segments == (16, 16)
    assert (down.input_segments, down.dual) == ((16, 16), (True, False))
    assert (down1.input_segments, down1.dual) == ((32,), (False,))
    assert found.skipped == {"head": "enable=False"}


def test_layers_come_in_order_of_execution() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x))

    assert list(plan(Backwards(), {"default": FREE}, torch.zeros(2, 4)).layers) == ["first", "last", "idle"]


def test_without_example_or_with_a_failing_forward(caplog, monkeypatch) -> None:
    with caplog.at_level(logging.INFO, "hfquant"):
        found = plan(Net(), {"default": A8})
    assert "no example inputs, so layers are quantized without segments" in caplog.text
    assert all(
        p.input_segments == (p.in_features,) and p.output_segments == (p.out_features,) for p in found.layers.values()
    )

    def fail(*args, **kwargs):
        raise PatternError("no luck")

    monkeypatch.setattr(hfquant.planner, "trace", fail)
    caplog.clear()
    assert plan(Net(), {"default": A8}, torch.zeros(2, 8)) == found
    assert "Net: pattern detection failed (no luck); continuing without segments" in caplog.text


# Sizes that do not fit.


@pytest.mark.parametrize("section", [{"weight_quant": {"group_size": 3}}, {"calib": {"type": "gptq", "group_size": 3}}])
def test_the_last_group_may_be_short(section, caplog) -> None:
    with caplog.at_level(logging.INFO, "hfquant"):
        found = plan(Net(), {**OFF, "*.up": section})
    assert found.layers["blocks.0.up"].columns == found.layers["blocks.1.up"].columns == (3, 3, 2)
    assert found.layers["blocks.0.up"].tensors()["weight_scale"].shape == (32, 3)
    assert [r.getMessage() for r in caplog.records] == [
        "Net: in 2 layers the last group of a segment is shorter (first: 'blocks.0.up')"
    ]


@pytest.mark.parametrize("group", [16, 64])
def test_a_group_wider_than_the_layer_is_the_row(group) -> None:
    found = plan(Net(), {**OFF, "*.up": {"weight_quant": {"group_size": group}}})
    assert found.layers["blocks.0.up"].columns == (8,)


def test_groups_of_the_whole_row_or_a_single_column() -> None:
    for group, columns in ((8, (8,)), (1, (1,) * 8), (2, (2,) * 4)):
        found = plan(Net(), {**OFF, "*.up": {"weight_quant": {"group_size": group}}})
        assert found.layers["blocks.0.up"].columns == columns


def test_a_rank_is_cut_to_the_layer(caplog) -> None:
    with caplog.at_level(logging.INFO, "hfquant"):
        found = plan(Net(), {"default": {**FREE, "search_patterns": [], "opt": {"type": "svd", "low_rank": 6}}})
    assert [p.transform.low_rank for p in found.layers.values()] == [6, 6, 6, 6, 5]
    assert {p.config.opt.low_rank for p in found.layers.values()} == {6}
    assert found.layers["head"].tensors()["svd_up"].shape == (5, 5)
    assert [r.getMessage() for r in caplog.records] == [
        "Net: in 1 layer opt is reduced to the layer size (first: 'head')"
    ]


# The table.


def test_table_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Net()
    config = {
        "default": {**A8, "opt": {"type": "smooth"}, "weight_quant": {"type": "int4", "group_size": 8}},
        "*.1.up": {"input_quant": None, "calib": {"type": "gptq"}},
        "head": {"enable": False},
    }
    found = plan(model, config, torch.zeros(2, 8))
    assert all(p.is_meta for p in model.parameters())
    lines = str(found).splitlines()
    assert len(lines) == 1 + len(NAMES)
    header = "layer in x out weight input opt segments in | out dual why"
    assert " ".join(lines[0].split()) == header
    rows = {line.split()[0]: line for line in lines[1:]}
    assert list(rows) == NAMES
    for word in ("8 x 32", "int4 g8", "int8 dynamic", "smooth/amax", "1 | 2 x 16", "chunk"):
        assert word in rows["blocks.0.up"]
    for word in ("32 x 8", "2 x 16 | 1", "yes", "silu"):
        assert word in rows["blocks.0.down"]
    assert "  -  " in rows["blocks.1.up"]
    assert "smooth/gptq" in rows["blocks.1.up"]
    assert "skipped: enable=False" in rows["head"]
    assert " ".join(str(Plan({}, {})).split()) == header


def test_plan_takes_every_form_of_config() -> None:
    expected = plan(Net(), {"default": hfquant.PRESETS["w8a16"]["default"]})
    assert plan(Net(), "w8a16") == plan(Net(), HfQuantConfig("w8a16")) == expected
    assert plan(Net()).layers["head"].config == LayerConfig()
    with pytest.raises(TypeError, match="expected a dict, a preset's name"):
        plan(Net(), 4)
