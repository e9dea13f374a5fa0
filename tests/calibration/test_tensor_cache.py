"""Samples kept on disk: found again, recreated if damaged, safe with several processes and a read-only home."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from hfquant.calibration import tensor_cache as module
from hfquant.calibration.tensor_cache import folder, kept


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    return tmp_path


def made(value: int = 1) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.full((2, 3), value)}


def never() -> dict[str, torch.Tensor]:
    raise AssertionError("made again")


def test_found_again_by_its_key(home: Path) -> None:
    assert folder() == home / "hfquant" / "self"
    kept("a", made)
    assert torch.equal(kept("a", never)["input_ids"], made()["input_ids"])
    assert torch.equal(kept("b", lambda: made(2))["input_ids"], made(2)["input_ids"])
    assert sorted(path.name for path in folder().iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_damaged_file_is_named_and_made_again(caplog: pytest.LogCaptureFixture) -> None:
    kept("a", made)
    path = folder() / "a.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with caplog.at_level(logging.WARNING, "hfquant"):
        assert torch.equal(kept("a", lambda: made(2))["input_ids"], made(2)["input_ids"])
    assert f"{path} is damaged" in caplog.text
    assert torch.equal(kept("a", never)["input_ids"], made(2)["input_ids"])


def test_a_home_that_cannot_be_written_does_not_matter(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    (home / "hfquant").write_text("a file, where a folder would have to be")
    with caplog.at_level(logging.INFO, "hfquant"):
        assert torch.equal(kept("a", made)["input_ids"], made()["input_ids"])
    assert "could not be cached" in caplog.text


def test_what_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module, "save_file", full)
    kept("a", made)
    assert list(folder().iterdir()) == []
    with pytest.raises(AssertionError):
        kept("a", never)


JOB = """
import sys, torch
from hfquant.calibration.tensor_cache import folder, kept
for i in range(40):
    found = kept("a" if i % 2 else f"{sys.argv[1]}-{i}", lambda: {"input_ids": torch.full((400, 50), 7)})
    assert found["input_ids"].eq(7).all()
    if i % 2:
        (folder() / "a.safetensors").unlink(missing_ok=True)
"""


def test_several_processes_at_once(home: Path) -> None:
    """Each process writes, reads and removes the same file; none ever reads a partial one."""
    environment = {**os.environ, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    jobs = [subprocess.Popen([sys.executable, "-c", JOB, str(n)], env=environment) for n in range(2)]
    assert [job.wait(timeout=120) for job in jobs] == [0, 0]
    assert not list(folder().glob(".*"))
