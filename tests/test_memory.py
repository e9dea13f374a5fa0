"""Free memory is the machine's, and returning what malloc keeps never fails."""

import ctypes
from types import SimpleNamespace

import psutil
import pytest

from hfquant.memory import free_memory, release_free_memory


def test_free_memory_is_what_the_machine_can_hand_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < free_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=123.0))
    assert free_memory() == 123
    assert type(free_memory()) is int


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
