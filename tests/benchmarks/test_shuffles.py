"""The table over several orders of the channels."""

from __future__ import annotations

from fnmatch import fnmatchcase

from benchmarks import quality, shuffles


def test_figures_are_means_over_the_orders() -> None:
    rows = {"a": {seed: {"bits": 4.5, "text": kl, "seconds": 1.0} for seed, kl in (("0", 1.0), ("1", 3.0))}}
    header, _, row = shuffles.markdown(rows).splitlines()
    assert header == "| KL to full precision | orders | bits | text | range |"
    assert row == "| a | 2 | 4.50 | 2.0000 ± 1.0000 | 1.0000 to 3.0000 |"


def test_its_rows_are_rows_of_the_quality_table() -> None:
    names = quality.SUBJECTS["smollm2"][1]
    assert all(any(fnmatchcase(name, glob) for name in names) for glob in shuffles.ROWS)
    assert not any(fnmatchcase("preset/w4-auto", glob) for glob in shuffles.ROWS)
