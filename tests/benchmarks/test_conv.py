"""The benchmark of convolutions runs, and times nothing that computes a different result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import conv


def test_a_quick_run_writes_a_table(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    conv.main(["--quick", "--out", str(tmp_path / "conv.md"), "--threads", str(threads)])
    lines = [line for line in (tmp_path / "conv.md").read_text().splitlines() if line.startswith("| ")]
    rows = dict(line.strip("| ").split(" | ") for line in lines[2:])
    assert [*rows] == [row for d in conv.DTYPES for row in (f"float {d}", *(f"{c} {d}" for c in conv.CONFIGS))]
    assert all(float(value.removesuffix(" ms")) > 0 for value in rows.values())


def test_a_row_that_is_off_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        conv, "quantized", lambda module, config: nn.Conv2d(32, 32, 3, padding=1).to(module.weight.dtype)
    )
    with pytest.raises(ValueError, match="W8A8 fp32: relative error 1"):
        conv.run(["tiny"], ["W8A8*"], 0.1)
