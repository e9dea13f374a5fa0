"""Shared by all tests: no network, few threads, the same random numbers each time."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(min(2, os.cpu_count() or 1))
settings.register_profile("hfquant", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("hfquant")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
