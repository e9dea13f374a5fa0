"""Layers that get more bits than the config's type has, since they cost next to nothing and may count most.

The last projection of a denoiser is a thousandth of its weights, yet no norm and no other layer comes after it to even
out what its rounding does to the picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from hfquant.formats.integer import IntegerFormat
from hfquant.layer_config import InputQuant, WeightQuant
from hfquant.layer_plan import LayerPlan

#: The index of a repeated block in a module's name.
_INDEX = re.compile(r"(?:^|\.)\d+(?:\.|$)")


def with_wider_inputs(layers: Mapping[str, LayerPlan], rows: Mapping[str, int]) -> dict[str, LayerPlan]:
    """Return the plans of layers whose inputs become INT8, by ``input_quant.int8_share``.

    Args:
        layers: by name.
        rows: how many each multiplied in a forward; empty where none was watched, as if all were alike.
    """
    sizes = {n: (rows.get(n, 0) if rows else 1) * p.in_features * p.out_features for n, p in layers.items()}
    wider = {}
    for name, share in _smallest({n: p.config.input_quant for n, p in layers.items()}, sizes, sum(sizes.values())):
        plan = layers[name]
        quant = plan.config.input_quant
        assert quant is not None
        inputs = quant.model_copy(update={"type": "int8", "int8_share": 0.0})
        evidence = (*plan.evidence, f"INT8 inputs: {share:.2%} of all multiplications")
        wider[name] = replace(plan, config=plan.config.model_copy(update={"input_quant": inputs}), evidence=evidence)
    return wider


def with_wider_weights(layers: dict[str, LayerPlan]) -> dict[str, LayerPlan]:
    """Return the plans of layers outside of repeated blocks whose weights become INT8: ``weight_quant.int8_share``."""
    sizes = {name: plan.in_features * plan.out_features for name, plan in layers.items()}
    shared = {plan.tied for plan in layers.values()}
    # The last to run comes first among equals: nothing comes after it that could even its error out.
    alone = {n: p for n, p in reversed(layers.items()) if not _INDEX.search(n) and not p.tied and n not in shared}
    wider = {}
    for name, share in _smallest({n: p.config.weight_quant for n, p in alone.items()}, sizes, sum(sizes.values())):
        plan = layers[name]
        weight = plan.config.weight_quant.model_copy(update={"type": "int8", "int8_share": 0.0})
        evidence = (*plan.evidence, f"INT8 weights: {share:.2%} of all weights")
        wider[name] = replace(plan, config=plan.config.model_copy(update={"weight_quant": weight}), evidence=evidence)
    return wider


def _smallest(
    quants: Mapping[str, InputQuant | WeightQuant | None], sizes: Mapping[str, int], total: int
) -> Iterator[tuple[str, float]]:
    """Yield layers of integers below 8 bits, the smallest first, as long as all are within their share of ``total``.

    Of equal ones that which is listed first.
    """
    taken = 0
    for name in sorted(quants, key=lambda name: sizes[name]):
        quant = quants[name]
        if quant is None or not isinstance(quant.format, IntegerFormat) or quant.format.bits >= 8:
            continue
        if quant.int8_share and taken + sizes[name] <= quant.int8_share * total:
            taken += sizes[name]
            yield name, sizes[name] / max(total, 1)
