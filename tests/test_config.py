"""The config: what it accepts, what it resolves to, and how it reports errors."""

import copy
import itertools
import json
from types import MappingProxyType

import pytest

from hfquant.algorithms.smooth import SearchAlpha
from hfquant.config import PRESETS, ConfigError, QuantRules, parse
from hfquant.enums import Calibrate, DType, Optimum, SegPattern
from hfquant.formats import number_format
from hfquant.layer_config import InputQuant, LayerConfig

REFERENCE = {
    "default": {
        "enable": True,
        "seglinear": True,
        "search_patterns": SegPattern.all(),
        "real_quant": False,
        "opt": {"type": Optimum.SMOOTH, "alpha": 0.5},
        "calib": {"type": Calibrate.AMAX},
        "input_quant": {"type": DType.INT8, "axis": None},
        "weight_quant": {"type": DType.INT8, "axis": None},
    }
}


def default(**fields) -> LayerConfig:
    return QuantRules({"default": fields}).default


# Meaning of the fields.


def test_reference_dict_is_the_default() -> None:
    assert QuantRules(REFERENCE).default == QuantRules({}).default == QuantRules(None).default == LayerConfig()


@pytest.mark.parametrize(
    ("section", "field", "enum"),
    [
        ("weight_quant", "type", DType),
        ("input_quant", "type", DType),
        ("opt", "type", Optimum),
        ("calib", "type", Calibrate),
    ],
)
def test_enums_by_member_and_by_string(section, field, enum) -> None:
    rest = {} if section == "input_quant" else {"input_quant": None}  # some values do not work with an input format
    for member in enum:
        assert member.value == member.name.lower() == str(member)
        given = [QuantRules({"default": {section: {field: v}, **rest}}) for v in (member, member.value, member.name)]
        assert [getattr(getattr(g.default, section), field) for g in given] == [member] * 3
        # The stored form has the lower-case name, however it was given.
        assert [g.raw for g in given] == [{"default": {section: {field: member.name.lower()}, **rest}}] * 3


def test_search_patterns() -> None:
    assert SegPattern.seg() == [p for p in SegPattern.all() if p is not SegPattern.ACTIVATION2LINEAR]
    assert set(SegPattern.all()) == set(SegPattern)
    assert len(SegPattern) == 6
    assert default(search_patterns=["stack2linear", SegPattern.STACK2LINEAR]).search_patterns == (
        SegPattern.STACK2LINEAR,
    )
    assert default(search_patterns=()).search_patterns == ()


def test_facts_of_the_formats() -> None:
    assert {d.name: number_format(d.value).bits for d in DType} == {
        "INT2": 2, "INT3": 3, "INT4": 4, "INT5": 5, "INT6": 6, "INT7": 7, "INT8": 8, "INT16": 16,
        "FP8E4M3": 8, "FP8E5M2": 8, "FP16": 16, "BF16": 16,
    }  # fmt: skip
    assert [d.name for d in DType if number_format(d).is_integer] == [
        f"INT{bits}" for bits in (2, 3, 4, 5, 6, 7, 8, 16)
    ]
    assert [d.name for d in DType if not number_format(d).has_scale] == ["FP16", "BF16"]


@pytest.mark.parametrize(("low", "high", "step"), [(0, 1, 0.1), (0.2, 0.9, 0.25), (0.5, 0.5, 0.1), (0.1, 0.7, 0.3)])
def test_alpha_grid(low, high, step) -> None:
    grid = SearchAlpha(enable=True, min=low, max=high, step=step).grid()
    assert grid[0] == low
    assert grid[-1] == high
    assert all(b - a <= step + 1e-9 for a, b in itertools.pairwise(grid))
    assert len(grid) == len(set(grid)) == 1 + -int(-(high - low) / step // 1)


# Round trips and ownership.


@pytest.mark.parametrize("config", [REFERENCE, *PRESETS.values()])
def test_json_round_trip(config) -> None:
    rules = parse(config)
    again = QuantRules(json.loads(json.dumps(rules.raw)))
    assert again.raw == rules.raw
    assert again.default == rules.default


def test_callers_dict_is_not_kept_or_changed() -> None:
    config = {**copy.deepcopy(REFERENCE), "*.fc": {"opt": {"type": "SVD", "search_alpha_config": {"enable": True}}}}
    before = copy.deepcopy(config)
    rules = QuantRules(config)
    rules.resolve("a.fc")
    assert config == before
    config["*.fc"]["opt"]["low_rank"] = 3
    config["default"]["search_patterns"].clear()
    assert rules.resolve("b.fc").opt.low_rank == 32
    assert len(rules.default.search_patterns) == 6
    presets = copy.deepcopy(PRESETS)
    parse("w4a4-gptq").raw["default"]["opt"]["alpha"] = 0.9
    assert presets == PRESETS


def test_any_mapping_and_sections_as_objects() -> None:
    section = InputQuant(type=DType.FP8E4M3, dynamic=True)
    rules = QuantRules(MappingProxyType({"default": MappingProxyType({"input_quant": section})}))
    assert rules.raw == {"default": {"input_quant": {"type": "fp8e4m3", "dynamic": True}}}
    assert rules.default.input_quant == section


# Overrides.


def test_last_listed_glob_wins_field_by_field() -> None:
    rules = QuantRules(
        {
            "*.attn.*": {"weight_quant": {"group_size": 32}, "real_quant": True},
            "default": {"weight_quant": {"type": "int4", "axis": -1}},
            "*.to_q": {"weight_quant": {"group_size": 64, "clip": "mse"}},
            "blocks.0.*": {"real_quant": False},
        }
    )
    q = rules.resolve("blocks.0.attn.to_q")
    assert (q.weight_quant.type, q.weight_quant.axis) == (DType.INT4, -1)
    assert (q.weight_quant.group_size, q.weight_quant.clip, q.real_quant) == (64, "mse", False)
    k = rules.resolve("blocks.1.attn.to_k")
    assert (k.weight_quant.group_size, k.weight_quant.clip, k.real_quant) == (32, "amax", True)
    assert rules.resolve("blocks.1.proj") == rules.default
    assert rules.matching("blocks.0.attn.to_q") == ("*.attn.*", "*.to_q", "blocks.0.*")


def test_order_decides_not_specificity() -> None:
    entries = {"blocks.0.fc": {"enable": False}, "*": {"enable": True}}
    assert QuantRules(entries).resolve("blocks.0.fc").enable
    assert not QuantRules(dict(reversed(entries.items()))).resolve("blocks.0.fc").enable


def test_globs_are_case_sensitive_and_match_whole_names() -> None:
    rules = QuantRules({"Fc": {"enable": False}, "b[01]": {"enable": False}, "c?": {"enable": False}})
    names = ("Fc", "fc", "x.Fc", "b0", "b2", "c1", "c12")
    assert [n for n in names if not rules.resolve(n).enable] == ["Fc", "b0", "c1"]


def test_aliases_match_too() -> None:
    rules = QuantRules({"layers.0.fc": {"enable": False}})
    assert not rules.resolve("model.layers.0.fc", "layers.0.fc").enable
    assert rules.resolve("model.layers.0.fc").enable


def test_another_type_replaces_the_section() -> None:
    rules = QuantRules(
        {
            "default": {"opt": {"type": "svd", "low_rank": 8, "alpha": 0.9}, "weight_quant": {"group_size": 32}},
            "a": {"opt": {"type": "smooth"}, "weight_quant": {"type": "fp8e4m3"}},
            "b": {"opt": {"type": "SVD", "low_rank": 4}, "weight_quant": {"type": "int8"}},
            "c": {"opt": {"low_rank": 2}, "weight_quant": {"type": "int4"}},
        }
    )
    a, b, c = (rules.resolve(n) for n in "abc")
    assert (a.opt.type, a.opt.alpha, a.weight_quant.group_size) == (Optimum.SMOOTH, 0.5, None)
    assert (b.opt.alpha, b.opt.low_rank) == (0.9, 4)
    # The default entry leaves the type at its default, int8, and the override names int8 too, so the type is the same.
    assert b.weight_quant.group_size == 32
    assert (c.opt.type, c.opt.alpha, c.opt.low_rank, c.weight_quant.group_size) == (Optimum.SVD, 0.9, 2, None)


def test_input_quant_none_and_back() -> None:
    rules = QuantRules(
        {
            "default": {"input_quant": {"type": "int6", "dynamic": True}},
            "a*": {"input_quant": None},
            "ab": {"input_quant": {}},
        }
    )
    assert rules.resolve("a").input_quant is None
    assert rules.resolve("ab").input_quant == InputQuant()
    assert rules.resolve("x").input_quant == InputQuant(type=DType.INT6, dynamic=True)


def test_nested_search_config_merges() -> None:
    rules = QuantRules(
        {
            "default": {"opt": {"search_alpha_config": {"enable": True, "max": 0.5}}},
            "a": {"opt": {"search_alpha_config": {"min": 0.25}}},
        }
    )
    assert rules.resolve("a").opt.search_alpha_config == SearchAlpha(enable=True, min=0.25, max=0.5)


# Strictness.

WRONG = [
    ({"enable": 1}, "enable", "1"),
    ({"enable": "yes"}, "enable", "'yes'"),
    ({"real_quant": None}, "real_quant", "None"),
    ({"search_patterns": "all"}, "search_patterns", "'all'"),
    ({"search_patterns": ["linear"]}, "search_patterns", "linear2chunk"),
    ({"opt": "smooth"}, "opt", "'smooth'"),
    ({"opt": None}, "opt", "None"),
    ({"opt": {"type": "smoth"}}, "opt.type", "default, smooth, svd, hadamard, smooth_hadamard, got 'smoth'"),
    ({"opt": {"type": DType.INT8}}, "opt.type", "'int8'"),
    ({"opt": {"alpha": True}}, "opt.alpha", "True"),
    ({"opt": {"alpha": "0.5"}}, "opt.alpha", "'0.5'"),
    ({"opt": {"alpha": float("nan")}}, "opt.alpha", "nan"),
    ({"opt": {"alpha": float("inf")}}, "opt.alpha", "inf"),
    ({"opt": {"alpha": 1.5}}, "opt.alpha", "less than or equal to 1, got 1.5"),
    ({"opt": {"type": "svd", "low_rank": 0}}, "opt.low_rank", "greater than or equal to 1, got 0"),
    ({"opt": {"type": "svd", "low_rank": 4.0}}, "opt.low_rank", "4.0"),
    ({"opt": {"type": "svd", "low_rank": True}}, "opt.low_rank", "True"),
    ({"opt": {"search_alpha_config": {"enable": 1}}}, "opt.search_alpha_config.enable", "1"),
    ({"opt": {"search_alpha_config": {"step": 0}}}, "opt.search_alpha_config.step", "greater than 0, got 0"),
    ({"opt": {"search_alpha_config": {"min": 0.9, "max": 0.1}}}, "opt.search_alpha_config", "min=0.9 is above max=0.1"),
    ({"calib": {"type": "GPTQ2"}}, "calib.type", "amax, gptq"),
    ({"calib": {"type": "gptq", "damp": 0}}, "calib.damp", "got 0"),
    ({"calib": {"type": "gptq", "block_size": None}}, "calib.block_size", "None"),
    ({"input_quant": {"axis": 1}}, "input_quant.axis", "None or -1, got 1"),
    ({"input_quant": {"dynamic": 0}}, "input_quant.dynamic", "0"),
    ({"weight_quant": None}, "weight_quant", "None"),
    ({"weight_quant": {"type": "int9"}}, "weight_quant.type", "int5, int6, int7, int8, int16, fp8e4m3"),
    ({"weight_quant": {"type": 8}}, "weight_quant.type", "8"),
    ({"weight_quant": {"axis": 0}}, "weight_quant.axis", "None, 1 or -1, got 0"),
    ({"weight_quant": {"axis": True}}, "weight_quant.axis", "True"),
    ({"weight_quant": {"axis": 1.0}}, "weight_quant.axis", "1.0"),
    ({"weight_quant": {"group_size": 64.0}}, "weight_quant.group_size", "64.0"),
    ({"weight_quant": {"group_size": float("nan")}}, "weight_quant.group_size", "nan"),
    ({"weight_quant": {"group_size": 0}}, "weight_quant.group_size", "0"),
    ({"opt": {"magnitude": "mean"}}, "opt.magnitude", "'amax' or 'rms', got 'mean'"),
    ({"weight_quant": {"clip": "max"}}, "weight_quant.clip", "'amax' or 'mse', got 'max'"),
    # Unknown keys, at each level.
    ({"enabled": True}, "enabled", "allowed are enable, float_share, seglinear"),
    ({"opt": {"rank": 4}}, "opt.rank", "allowed are type, alpha, magnitude, search_alpha_config, fold, low_rank"),
    ({"opt": {"search_alpha_config": {"stop": 1}}}, "stop", "allowed are enable, min, max, step"),
    ({"input_quant": {"clip": "mse"}}, "input_quant.clip", "allowed are type, axis, dynamic"),
    # Keys that are not strings, and values that JSON cannot hold.
    ({3: True}, "config['default']", "key 3 is not a string"),
    ({"opt": {None: 1}}, "config['default']['opt']", "key None is not a string"),
    ({"opt": {"alpha": 1j}}, "config['default']['opt']['alpha']", "type complex cannot be stored in JSON"),
    ({"search_patterns": {"stack2linear"}}, "['search_patterns']", "set cannot be stored in JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "key", "says"), WRONG, ids=[str(entry) for entry, *_ in WRONG])
@pytest.mark.parametrize("where", ["default", "*.attn.*"])
def test_errors_name_key_value_and_what_is_allowed(entry, key, says, where) -> None:
    rules = {where: entry}
    with pytest.raises(ConfigError) as error:
        QuantRules(rules).resolve("blocks.0.attn.to_q")
    assert key.replace("default", where) in str(error.value)
    assert says in str(error.value)
    assert repr(where) in str(error.value)


@pytest.mark.parametrize("entry", [None, True, "w8a8", [], 3])
def test_an_entry_is_a_dict(entry) -> None:
    with pytest.raises(ConfigError, match=r"config\['\*'\]: expected a dict of fields"):
        QuantRules({"*": entry})


def test_a_config_is_a_dict() -> None:
    for wrong in (["default"], 3, "nonsense"):
        with pytest.raises((TypeError, ConfigError), match=r"dict|w8a8-dynamic"):
            parse(wrong)
    with pytest.raises(ConfigError, match="key 0 is not a string"):
        QuantRules({0: {}})


def test_several_errors_are_all_listed() -> None:
    with pytest.raises(ConfigError) as error:
        default(enable=3, opt={"alpha": 2.0})
    assert len(str(error.value).splitlines()) == 2


IMPOSSIBLE = [
    ({"input_quant": {"axis": -1}}, "axis=-1 (one scale per token) needs dynamic=True"),
    (
        {"calib": {"type": "gptq"}, "weight_quant": {"type": "fp16"}},
        'calib.type "gptq" needs a weight_quant.type with a scale, not fp16',
    ),
    (
        {"calib": {"type": "gptq", "group_size": 32}, "weight_quant": {"group_size": 64}},
        "calib.group_size=32 contradicts weight_quant.group_size=64",
    ),
    ({"calib": {"group_size": 32}}, 'group_size=32 needs type "gptq"'),
    ({"calib": {"act_order": True}}, 'act_order=True needs type "gptq"'),
    ({"opt": {"type": "smooth", "low_rank": 8}}, 'low_rank=8 needs type "svd"'),
    ({"opt": {"type": "default", "magnitude": "rms"}}, 'magnitude=\'rms\' needs type "smooth" or "svd"'),
    ({"opt": {"type": "default", "alpha": 0.3}}, 'alpha=0.3 needs type "smooth" or "svd"'),
    ({"opt": {"type": "default", "search_alpha_config": {"enable": True}}}, 'needs type "smooth" or "svd"'),
    ({"weight_quant": {"type": "fp8e4m3", "symmetric": False}}, "symmetric=False needs an integer type, not fp8e4m3"),
    ({"weight_quant": {"type": "bf16", "group_size": 16}}, "group_size=16 has no meaning for bf16"),
    ({"weight_quant": {"type": "fp16", "clip": "mse"}}, "clip='mse' has no meaning for fp16"),
    ({"input_quant": {"type": "bf16", "segments": 4}}, "segments=4 has no meaning for bf16, which has no scale"),
]


@pytest.mark.parametrize(("entry", "says"), IMPOSSIBLE, ids=[says for _, says in IMPOSSIBLE])
def test_impossible_combinations(entry, says) -> None:
    with pytest.raises(ConfigError) as error:
        QuantRules({"default": entry})
    assert says in str(error.value)
    # In an override, the error is found at the latest when the layer is known.
    with pytest.raises(ConfigError) as error:
        QuantRules({"*.fc": entry}).resolve("block.fc")
    assert says in str(error.value)
    assert "'*.fc'" in str(error.value)


def test_a_combination_may_span_entries() -> None:
    rules = QuantRules(
        {"default": {"input_quant": {"axis": -1, "dynamic": True}}, "a": {"input_quant": {"dynamic": False}}}
    )
    with pytest.raises(ConfigError, match=r"layer 'a'.*needs dynamic=True"):
        rules.resolve("a")
    # Neither half is wrong on its own, only the layer that gets both.
    rules = QuantRules({"x*": {"calib": {"type": "gptq"}}, "*y": {"weight_quant": {"type": "fp16"}}})
    assert rules.resolve("xa").calib.type == Calibrate.GPTQ
    assert rules.resolve("ay").weight_quant.type == DType.FP16
    with pytest.raises(ConfigError, match=r"config\['x\*'\] \+ config\['\*y'\] for layer 'xy'"):
        rules.resolve("xy")


def test_static_unscaled_inputs_may_name_an_axis() -> None:
    assert default(input_quant={"type": "fp16", "axis": -1}).needs_data  # because of the default opt, smooth
    assert not default(input_quant={"type": "fp16"}, opt={"type": "default"}).needs_data


# Presets and the need for data.

NEEDS_DATA = {
    "w8a8": True, "w8a8-dynamic": False, "w8a8-smooth": True, "w8a16": False, "w6a16": False, "w4a16": False,
    "w8a8-gptq": True, "w6a16-gptq": True, "w6a8-gptq": True, "w4a16-gptq": True, "w4a8-gptq": True,
    "w3a16-gptq": True,
    "w4a8-dynamic": False, "w4a4-gptq": True, "w4a4-dynamic": False,
    "fp8": True, "fp8-dynamic": False, "w4-auto": True,
}  # fmt: skip


@pytest.mark.parametrize("name", ["w4a8", "w4a8-svd", "w4a4-svd"])
def test_presets_that_there_were_name_their_successor(name) -> None:
    with pytest.raises(ConfigError, match=f"preset '{name}' was removed; use 'w4a8-gptq'"):
        parse(name)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name) -> None:
    rules = parse(name)
    assert rules.needs_data == NEEDS_DATA[name]
    weight, inputs = rules.default.weight_quant, rules.default.input_quant
    if rules.search is not None:
        assert rules.default == parse(rules.search.budget).default
    elif name.startswith("fp8"):
        assert (weight.type, inputs.type) == (DType.FP8E4M3, DType.FP8E4M3)
    else:
        bits, activations = name.split("-")[0].removeprefix("w").split("a")
        assert weight.format.bits == int(bits)
        assert (16 if inputs is None else inputs.format.bits) == int(activations)
    if "dynamic" in name:
        assert inputs.dynamic
    assert not rules.default.opt.folds()


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'w2a2'; available: w8a8, w8a8-dynamic"):
        parse("w2a2")


FREE = {"opt": {"type": "default"}, "input_quant": None}


@pytest.mark.parametrize(
    ("config", "needs"),
    [
        ({"default": FREE}, False),
        ({"default": {**FREE, "calib": {"type": "gptq"}}}, True),
        ({"default": {**FREE, "opt": {"type": "svd"}}}, True),
        ({"default": {**FREE, "input_quant": {"type": "fp8e5m2"}}}, True),
        ({"default": {**FREE, "input_quant": {"type": "bf16"}}}, False),
        ({"default": {"enable": False}}, False),
        ({"default": {"enable": False}, "*.fc": {**FREE, "enable": True}}, False),
        ({"default": {"enable": False}, "*.fc": {"enable": True}}, True),
        # One glob enables layers, another one needs data for them; neither covers the other.
        (
            {"default": {**FREE, "enable": False}, "layers.*": {"enable": True}, "*.fc": {"calib": {"type": "gptq"}}},
            True,
        ),
        ({"default": {**FREE, "enable": False}, "a.fc": {"enable": True}, "*.fc": {"calib": {"type": "gptq"}}}, True),
        ({"default": {**FREE, "enable": False}, "a.up": {"enable": True}, "*.fc": {"calib": {"type": "gptq"}}}, False),
        ({"default": FREE, "a": {"opt": {"type": "smooth"}}}, True),
        # A glob that does not match its own text.
        ({"default": FREE, "layers.[01].fc": {"opt": {"type": "smooth"}}}, True),
        # A later glob covers it and removes the need for data.
        ({"default": FREE, "a.*": {"opt": {"type": "smooth"}}, "*": {"opt": {"type": "default"}}}, False),
    ],
)
def test_needs_data(config, needs) -> None:
    assert QuantRules(config).needs_data is needs


def test_the_references_own_spellings_are_read() -> None:
    rules = QuantRules(
        {
            "default": {
                "search_patterns": ["linear_to_chunk", "activation_to_linear"],
                "calib": {"type": "gptq", "blocksize": 64, "percdamp": 0.02, "groupsize": 32, "actorder": True},
                "input_quant": {"type": "fpe4m3"},
                "weight_quant": {"type": "fpe5m2"},
            }
        }
    )
    assert rules.raw["default"] == {
        "search_patterns": ["linear2chunk", "activation2linear"],
        "calib": {"type": "gptq", "block_size": 64, "damp": 0.02, "group_size": 32, "act_order": True},
        "input_quant": {"type": "fp8e4m3"},
        "weight_quant": {"type": "fp8e5m2"},
    }


def test_a_flat_dict_is_told_to_wrap_itself() -> None:
    with pytest.raises(ConfigError, match=r"'weight_quant' is a field.*\{\"default\": \{"):
        QuantRules({"weight_quant": {"type": "int4"}})


def test_an_unknown_preset_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'w4a16-gptq'"):
        parse("w4a16_gptq")


def test_a_search_of_too_many_alphas_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"step=1e-07 makes 1e\+07 alphas, at most 1000"):
        default(opt={"search_alpha_config": {"enable": True, "step": 1e-7}})
    assert len(SearchAlpha(max=0.999, step=0.001).grid()) == 1000


def test_needs_data_looks_at_each_glob_once(monkeypatch) -> None:
    from hfquant import config

    calls = 0

    def counted(name: str, glob: str) -> bool:
        nonlocal calls
        calls += 1
        return name == glob

    rules = QuantRules(
        {"default": {**parse("w8a8-dynamic").raw["default"]}, **{f"layer.{i}.*": {"enable": False} for i in range(500)}}
    )
    monkeypatch.setattr(config, "fnmatchcase", counted)
    assert not rules.needs_data
    assert calls == 0


def test_a_config_without_an_end_is_refused() -> None:
    endless: dict = {"default": {}}
    endless["default"]["opt"] = endless
    with pytest.raises(ConfigError, match="nested more than 8 levels"):
        QuantRules(endless)


def test_a_search_is_no_layer() -> None:
    rules = QuantRules({"default": {"calib": {"type": "amax"}}, "search": {"budget": 4.5}, "*.up": {"enable": False}})
    assert rules.patterns == ["*.up"]
    assert rules.search is not None
    assert (rules.search.budget, rules.search.choices) == (4.5, ("int3", "int4", "int5", "int6", "int8"))
    assert rules.needs_data
    assert QuantRules(rules.raw).search == rules.search
    assert rules.resolve("search") == rules.default
    with pytest.raises(ConfigError, match=r"config\['search'\].bits: unknown key; allowed are budget, choices"):
        QuantRules({"search": {"budget": 4, "bits": 3}})
