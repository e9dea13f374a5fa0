"""The demo's table, and which row its page shows."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from rich.console import Console

from hfquant.demo.measure import Result, Speed
from hfquant.demo.show import best_of, table

FULL = Result("full precision", 32.0, 6.5, float("inf"), 1.0, np.zeros((1, 8, 8), np.float32))


def row(name: str, psnr: float) -> Result:
    return replace(FULL, name=name, psnr=psnr)


def test_the_best_has_learned_most_from_data():
    assert best_of([row("w8a8-dynamic", 50.0), row("w4a8-gptq", 30.0), row("w4a4-gptq", 20.0)]).name == "w4a8-gptq"
    assert best_of([row("w4a8-gptq", 30.0), row("w4a4-gptq+affiner", 21.0)]).name == "w4a4-gptq+affiner"
    assert best_of([row("w8a8-dynamic", 50.0), row("w4a16", 30.0)]).name == "w8a8-dynamic"


def test_the_table_says_what_was_measured_and_what_is_noisy():
    said = io.StringIO()
    rows = [FULL, row("w4a8-dynamic", 31.26), row("w4a4-gptq+affiner", 22.0)]
    steady, noisy = Speed(1.234, 0.1, (1.0, 0.8)), Speed(0.5, 0.4, (1.0, 2.0))
    Console(file=said, width=100).print(table(rows, [steady, noisy]))
    lines = [line.split() for line in said.getvalue().splitlines()]
    assert lines[1] == ["full", "precision", "-", "32.00", "6.50", "-", "100%", "1.00", "x"]
    assert lines[2] == ["w4a8-dynamic", "none", "32.00", "6.50", "31.3", "100%", "1.23", "x"]
    assert lines[3] == ["w4a4-gptq+affiner", "affiner", "32.00", "6.50", "22.0", "100%", "~0.50", "x"]
