"""A self-contained page about a quantized folder: sizes, each layer's error, suggested fixes, images or tokens."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hfquant import __version__
from hfquant.affiner import BlockwiseAffiner
from hfquant.console import size
from hfquant.report.images import PipelineComparison, picture
from hfquant.report.page.charts import affiner_chart, error_chart, segments_bar
from hfquant.report.quality import ModelComparison
from hfquant.report.stored import StoredLayer, StoredModel

#: Number of layers that the page lists as the worst.
WORST = 10

#: Width in pixels up to which images are shown small: their pixels are visible at any size.
TINY = 64


@dataclass(frozen=True)
class Report:
    """The contents of a page.

    Attributes:
        title: title of the page, the folder's name.
        models: quantized components by name.
        comparison: comparison with the model in full precision; None without one.
        speed: rows of (what, seconds in full precision, seconds quantized), measured on this machine.
        machine: the machine on which they were measured.
        affiner: affiner of a pipeline; None without one.
        images: maximum number of images of a comparison to show.
    """

    title: str
    models: Mapping[str, StoredModel]
    comparison: ModelComparison | PipelineComparison | None = None
    speed: Sequence[tuple[str, float, float]] = ()
    machine: str = ""
    affiner: BlockwiseAffiner | None = None
    images: int = 8
    notes: Sequence[str] = field(default=())


def page(report: Report) -> str:
    """Return the page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hfquant.report.page", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "number": number, "kind": role_of, "block": block_of, "quoted": quoted}
    comparison = report.comparison
    images = getattr(comparison, "images", ())[: report.images]
    errors = {} if report.affiner is None else report.affiner.errors
    return environment.get_template("page.html.j2").render(
        report=report,
        version=__version__,
        style=Markup(_text("page.css")),
        script=Markup(_text("page.js")),
        charts={name: Markup(error_chart(model.layers)) for name, model in report.models.items()},
        worst={name: worst(model.layers) for name, model in report.models.items()},
        columns={name: columns(model.layers) for name, model in report.models.items()},
        override=override,
        segments=lambda layer: Markup(segments_bar(layer.segments)),
        figures=() if comparison is None else comparison.figures,
        left_out=getattr(comparison, "left_out", {}),
        changes=getattr(comparison, "changes", ()),
        pairs=[(png(a), png(b)) for a, b in images],
        tiny=all(a.shape[-1] <= TINY for a, _ in images),
        affiner=Markup(affiner_chart(errors)) if errors else "",
    )


def write(report: Report, path: Path) -> None:
    """Write the page."""
    path.write_text(page(report), encoding="utf-8")


def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def columns(layers: Sequence[StoredLayer]) -> set[str]:
    """Return which optional columns of the layer table have something to show."""
    shown = {
        "errors": any(layer.sqnr is not None for layer in layers),
        "alphas": any(layer.alphas for layer in layers),
        "ranks": any(layer.rank for layer in layers),
        "segments": any(segments_bar(layer.segments) for layer in layers),
        "dual": any(any(layer.dual) for layer in layers),
    }
    return {name for name, found in shown.items() if found}


def worst(layers: Sequence[StoredLayer], count: int = WORST) -> list[StoredLayer]:
    """Return the layers with the lowest signal-to-noise ratio, among those for which it was measured."""
    measured = [layer for layer in layers if layer.sqnr is not None and math.isfinite(layer.sqnr)]
    return sorted(measured, key=lambda layer: layer.sqnr or 0.0)[:count]


def override(layer: StoredLayer) -> str:
    """Return the config entry that gives a layer more precision, as JSON to be added to the config's dict.

    It takes one step: a static input scale becomes per-token, fewer than 8 bits become 8, 8 bits become float.
    """
    bits = layer.weight.split()[0]
    if layer.input not in ("-",) and "dynamic" not in layer.input:
        entry: dict[str, Any] = {"input_quant": {"type": layer.input.split()[0], "axis": -1, "dynamic": True}}
    elif bits in ("int2", "int3", "int4", "int5", "int6", "int7"):
        entry = {"weight_quant": {"type": "int8"}}
    else:
        entry = {"enable": False}
    return json.dumps({layer.name: entry})


def role_of(name: str) -> str:
    """Return a layer's role within its block: the last part of its name that is not a number."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)


def block_of(name: str) -> str:
    """Return the block that a layer belongs to: its name up to the first number."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[: first + 1]) if first is not None else parts[0]


def number(value: float | None, digits: int = 1) -> str:
    """Return a number with ``digits`` decimals; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def quoted(token: str) -> str:
    """Return a token in quotes, so that spaces and line breaks are visible."""
    return json.dumps(token, ensure_ascii=False)


def png(image: Any) -> str:
    """Return an image [3, H, W] from 0 to 1 as a data URL."""
    buffer = io.BytesIO()
    picture(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
