"""`hfquant plan`: show what quantizing would do, from configs alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfquant.cli import options
from hfquant.cli.errors import command
from hfquant.cli.output import console, print_json, print_table
from hfquant.console import size

if TYPE_CHECKING:
    import torch

    from hfquant.report.sizes import PlannedSize


def plan(
    model: options.Model,
    recipe: options.RecipeName = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    component: options.Components = None,
    skip: options.Skip = None,
    dtype: Annotated[
        str | None, typer.Option(help="Full-precision dtype of the model; default: its config's, else bfloat16.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print every layer's plan as well.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Estimate time and memory of calibration by measuring one block.")
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Show what quantizing a model would do: layers, bytes before and after, what stays in float. Reads no weights."""
    with command(debug, trust_remote_code):
        from hfquant.api import plan as plan_model
        from hfquant.integrations.hub import floating
        from hfquant.integrations.skeleton import skeleton
        from hfquant.recipes.run import check_fits
        from hfquant.report.sizes import planned_size

        asked = None if dtype is None else floating(dtype)
        found = skeleton(model)
        wanted = options.chosen_recipe(found, component or found.denoisers, recipe, preset, config, skip or ())
        check_fits(wanted, found)
        options.check_float(model, found, wanted.components)
        plans = {n: plan_model(found.models[n], part.quant_config()) for n, part in wanted.components.items()}
        sizes = {n: planned_size(found.models[n], plans[n], (asked or _dtype(found.models[n])).itemsize) for n in plans}
        costs: dict[str, Any] = {}
        if estimate:
            from hfquant.report.estimate import calibration_cost

            costs = {n: calibration_cost(found.models[n], plans[n]) for n in plans}
    if as_json:
        print_json({n: _json(plans[n], sizes[n], costs.get(n), layers) for n in plans})
        return
    rows = []
    for name, part in sizes.items():
        kinds = ", ".join(f"{count} x {words}" for words, count in _kinds(plans[name]).items())
        rows.append(
            (name, str(len(plans[name].layers)), size(part.before), size(part.after), f"{part.share:.1%}", kinds)
        )
    print_table(("component", "layers", "before", "after", "quantized", "as"), rows, title=f"{found.kind}")
    for name, found_plan in plans.items():
        for line in _reasons(found_plan):
            console().print(f"- {name}: {line}")
        if (rule := wanted.components[name].rules().search) is not None:
            budget = (
                f"the bytes of {rule.budget}" if isinstance(rule.budget, str) else f"{rule.budget:g} bits per weight"
            )
            console().print(f"- {name}: not final: quantizing chooses each layer's format on the data, within {budget}")
        if name in costs:
            console().print(f"- {name}: {costs[name]}")
        if layers:
            console().print(f"\n{found_plan}")


def _dtype(model: Any) -> torch.dtype:
    """Return the dtype of the weights according to the model's config; bfloat16 if the config does not say."""
    import torch

    found = getattr(model.config, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def _kinds(found: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer in found.layers.values():
        weight, given = layer.config.weight_quant, layer.config.input_quant
        group = f" g{layer.config.group_size}" if layer.config.group_size else ""
        words = f"{weight.type}{group}, inputs {'float' if given is None else given.type}"
        counts[words] = counts.get(words, 0) + 1
    return counts


def _reasons(found: Any) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, why in found.skipped.items():
        reasons.setdefault(why, []).append(name)
    return [
        f"{len(names)} in full precision, {why}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for why, names in reasons.items()
    ]


def _json(found: Any, part: PlannedSize, cost: Any, layers: bool) -> dict[str, Any]:
    content: dict[str, Any] = {
        "layers": len(found.layers),
        "bytes_before": part.before,
        "bytes_after": part.after,
        "share": round(part.share, 4),
        "as": _kinds(found),
        "skipped": found.skipped,
    }
    if cost is not None:
        content["calibration"] = cost.to_dict()
    if layers:
        content["plan"] = {
            name: {
                "config": layer.config.model_dump(mode="json"),
                "input_segments": layer.input_segments,
                "output_segments": layer.output_segments,
                "dual": layer.dual,
                "evidence": layer.evidence,
            }
            for name, layer in found.layers.items()
        }
    return content
