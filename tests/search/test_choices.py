"""Valid choices, and the config of each choice."""

from __future__ import annotations

import pytest

from hfquant.config import ConfigError, QuantRules, parse
from hfquant.search.choices import rules_of
from tests.search.nets import BASE


def test_names_fields_and_presets():
    base = QuantRules({**BASE, "*.down": {"weight_quant": {"type": "int8"}}, "search": {"budget": 4}})
    choices = ["int3", {"type": "int5", "group_size": 16}, {"calib": {"type": "gptq"}}, "w8a8-dynamic", "fp8e4m3"]
    found = rules_of(choices, base)
    assert list(found) == ["int3", "int5 g16", "int4 g32", "w8a8-dynamic", "fp8e4m3"]
    int3, int5, gptq, dynamic, fp8 = (rules.default for rules in found.values())
    assert (int3.weight_quant.type, int3.group_size, int3.weight_quant.symmetric) == ("int3", 32, False)
    assert (int5.weight_quant.type, int5.group_size, int5.weight_quant.clip) == ("int5", 16, "mse")
    assert (gptq.weight_quant.type, gptq.calib.type, gptq.input_quant) == ("int4", "gptq", None)
    # All but which layers stay in float.
    assert dynamic == parse("w8a8-dynamic").default.model_copy(update={"float_share": 0.0})
    assert (fp8.weight_quant.symmetric, fp8.weight_quant.clip) == (True, "amax")
    for rules in found.values():
        # The base's own exceptions hold, whatever is chosen for the other layers.
        assert rules.resolve("block.down").weight_quant.type == "int8"
        assert rules.search is None


def test_labels_differ():
    found = rules_of([{"type": "int4"}, {"calib": {"type": "gptq"}}], parse(BASE))
    assert list(found) == ["int4 g32", "int4 g32 (1)"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["int4", "int5x"], r"choices\[1\]: unknown number format 'int5x'; available: formats int2.* and presets w8a8"),
        (["int4"], "at least two"),
        ("int4", "at least two"),
        (["int4", 5], r"choices\[1\]: expected the name of a format or a preset, or a dict of fields, got 5"),
        (["int4", {"type": "int4"}], r"choices\[1\]: .* is a duplicate"),
        (["int4", {"type": "int4", "groups": 3}], r"choices\[1\]: config\['default'\].*unknown key"),
        (["int8", {"weight_quant": {"group_size": 0}}], r"choices\[1\]: config\['default'\].weight_quant.group_size"),
    ],
)
def test_bad_choices(choices, message):
    with pytest.raises(ConfigError, match=message):
        rules_of(choices, parse(BASE))
