"""Float checkpoints on disk, written once per session, and quiet libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from tests.integrations import small_models


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # These models are so small that waiting for a second thread takes most of the time.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Map the name of a ``small_models`` function to a folder with its float checkpoint. Do not write to the folder."""

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp(name)
        getattr(small_models, name)().save_pretrained(path)
        return path

    return folder
