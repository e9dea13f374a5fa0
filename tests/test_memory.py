"""Free memory is the machine's, and returning what malloc keeps never fails."""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from hfquant import memory
from hfquant.memory import free_memory, release_free_memory


def test_free_memory_is_what_the_machine_can_hand_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < free_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12.0))
    assert free_memory() == 12
    assert type(free_memory()) is int


def test_a_container_has_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_memory() == 10_000  # no control group
    for limit, used, cached, free in ((4000, 3000, 500, 1500), ("max", 3000, 500, 10_000), (100, 300, 0, 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\nactive_file 9\n")
        assert free_memory() == free


def test_a_gpu_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (42, 100))
    assert free_memory(torch.device("cuda", 1)) == 42
    assert free_memory(torch.device("cpu")) > 42


def test_memory_is_given_back_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=kept.append))
    release_free_memory()
    assert kept == [0]


@pytest.mark.parametrize("error", [AttributeError, OSError])
def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(name: None) -> None:
        raise error("no malloc_trim here")

    monkeypatch.setattr(ctypes, "CDLL", fail)
    release_free_memory()
