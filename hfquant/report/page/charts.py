"""Charts as plain SVG: no script, no library, the page's own colors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from hfquant.report.stored import StoredLayer

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 900, 280, 44, 28, 10
#: Number of colors for kinds of layers, as CSS classes; further kinds share the last one.
COLOURS = 8


def error_chart(layers: Sequence[StoredLayer]) -> str:
    """Chart the signal-to-noise ratio of each layer in order, as dots colored by kind; "" if none was measured."""
    from hfquant.report.page import role_of

    points = [(i, layer) for i, layer in enumerate(layers) if layer.sqnr is not None and math.isfinite(layer.sqnr)]
    if not points:
        return ""
    values = [layer.sqnr or 0.0 for _, layer in points]
    low, high, ticks = _scale(min(values), max(values))
    kinds = list(dict.fromkeys(role_of(layer.name) for _, layer in points))
    dots = []
    for i, layer in points:
        x = _LEFT + (i + 0.5) / len(layers) * (_WIDTH - _LEFT - 10)
        y = _y(layer.sqnr or 0.0, low, high)
        colour = min(kinds.index(role_of(layer.name)), COLOURS - 1)
        dots.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="c{colour}">'
            f"<title>{escape(layer.name)}: {layer.sqnr:.1f} dB</title></circle>"
        )
    legend = "".join(
        f'<span class="key"><span class="swatch c{min(i, COLOURS - 1)}"></span>{escape(kind)}</span>'
        for i, kind in enumerate(kinds)
    )
    label = f"SQNR of {len(points)} layers in layer order, from {min(values):.1f} to {max(values):.1f} dB"
    return _svg(label, _axes(ticks, low, high, "dB") + "".join(dots)) + f'<p class="legend">{legend}</p>'


def affiner_chart(errors: Mapping[float, tuple[float, float]]) -> str:
    """Chart the error of the predictions at each timestep, before and after the affiner, on a log scale."""
    times = sorted(errors, reverse=True)
    lines = [[math.log10(max(errors[t][i], 1e-30)) for t in times] for i in range(2)]
    low, high, ticks = _scale(min(map(min, lines)), max(map(max, lines)))
    drawn = _axes(ticks, low, high, "log10 of the squared error")
    for i, (name, values) in enumerate(zip(("quantized", "with affiner"), lines, strict=True)):
        points = " ".join(
            f"{_LEFT + (k + 0.5) / len(times) * (_WIDTH - _LEFT - 10):.1f},{_y(value, low, high):.1f}"
            for k, value in enumerate(values)
        )
        drawn += f'<polyline points="{points}" class="line l{i}"><title>{name}</title></polyline>'
    drawn += _text(_LEFT, _HEIGHT - 8, f"t = {times[0]:g}") + _text(_WIDTH - 60, _HEIGHT - 8, f"t = {times[-1]:g}")
    legend = "".join(
        f'<span class="key"><span class="swatch c{i}"></span>{name}</span>'
        for i, name in enumerate(("quantized", "with affiner"))
    )
    label = f"Squared error of the predictions at {len(times)} timesteps, without and with affiner"
    return _svg(label, drawn) + f'<p class="legend">{legend}</p>'


def segments_bar(segments: tuple[Sequence[int], Sequence[int]]) -> str:
    """Return bars that show how a layer's input and output are split into segments; "" if they are not."""
    bars = []
    for what, sizes in zip(("input", "output"), segments, strict=True):
        if len(sizes) < 2:
            continue
        x, rects = 0.0, []
        for i, part in enumerate(sizes):
            width = 120 * part / sum(sizes)
            rects.append(f'<rect x="{x:.2f}" y="0" width="{max(width - 1, 0.5):.2f}" height="10" class="c{i % 2}"/>')
            x += width
        label = f"{what} segments: {', '.join(map(str, sizes))}"
        bars.append(
            f'<span class="segments"><svg viewBox="0 0 120 10" role="img" aria-label="{label}">'
            f"<title>{label}</title>{''.join(rects)}</svg> {what}</span>"
        )
    return "".join(bars)


def _scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """Return bounds that contain all values, and ticks at round numbers between them."""
    span = max(high - low, 1e-6)
    step = 10 ** math.floor(math.log10(span))
    step *= next(factor for factor in (0.2, 0.5, 1, 2, 5) if span / (step * factor) <= 6)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    high = high if high > low else low + step
    return low, high, [low + i * step for i in range(round((high - low) / step) + 1)]


def _y(value: float, low: float, high: float) -> float:
    return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(ticks: Sequence[float], low: float, high: float, unit: str) -> str:
    lines = "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{_y(t, low, high):.1f}" y2="{_y(t, low, high):.1f}" class="grid"/>'
        + _text(_LEFT - 6, _y(t, low, high) + 4, f"{t:g}", "end")
        for t in ticks
    )
    return lines + _text(_LEFT + 4, _TOP + 10, unit)


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(label: str, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" class="chart" role="img" aria-label="{escape(label)}">{content}</svg>'
    )
