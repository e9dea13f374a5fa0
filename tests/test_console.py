"""Console output while hfquant works: progress bars if they are wanted, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from torch import nn

import hfquant
from hfquant.console import bars_enabled, counted, progress_bar

LIBRARIES = {"transformers": transformers.utils.logging, "diffusers": diffusers.utils.logging}


@pytest.fixture(autouse=True)
def _bars_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    before = {name: switch.is_progress_bar_enabled() for name, switch in LIBRARIES.items()}
    for switch in LIBRARIES.values():
        switch.enable_progress_bar()
    yield
    for name, switch in LIBRARIES.items():
        (switch.enable_progress_bar if before[name] else switch.disable_progress_bar)()


def run() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.SiLU(), nn.Linear(6, 4))
    hfquant.quantize(model, [torch.randn(4, 8) for _ in range(3)], "w4a8-gptq")


def test_a_run_prints_nothing_but_bars(capfd: pytest.CaptureFixture[str]) -> None:
    run()
    printed = capfd.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.replace("\r", "\n").splitlines() if line.strip()]
    assert {line.partition(":")[0] for line in lines} == {"calibrating", "quantizing"}


def test_a_bar_that_is_not_of_this_process(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(3), "hidden", shown=False)) == [0, 1, 2]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("library", LIBRARIES)
def test_bars_obey_each_library(library: str, capfd: pytest.CaptureFixture[str]) -> None:
    LIBRARIES[library].disable_progress_bar()
    run()
    assert capfd.readouterr() == ("", "")
    LIBRARIES[library].enable_progress_bar()
    run()
    assert "quantizing" in capfd.readouterr().err


@pytest.mark.parametrize(("value", "shown"), [("1", False), ("true", False), ("0", True), ("False", True), ("", True)])
def test_bars_obey_the_environment_at_run_time(
    value: str, shown: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", value)
    run()
    assert ("quantizing" in capfd.readouterr().err) == shown


def test_libraries_that_are_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LIBRARIES:
        monkeypatch.delitem(sys.modules, f"{name}.utils.logging")
    assert bars_enabled()
    off = SimpleNamespace(is_progress_bar_enabled=lambda: False)
    monkeypatch.setitem(sys.modules, "diffusers.utils.logging", off)
    assert not bars_enabled()


def test_counts_have_their_plural() -> None:
    assert [counted(n, "layer") for n in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
