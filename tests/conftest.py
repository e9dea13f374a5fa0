"""Shared by all tests: no network, one thread, fixed random seeds."""

import os
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

# Without a CUDA device, Triton runs kernels in its interpreter, a choice that it makes when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Most tensors here are tiny: a second thread costs more than it gains, and much more on a busy machine.
torch.set_num_threads(1)
settings.register_profile("hfquant", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("hfquant")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all cases of a test as slow except every n-th, if it is marked ``sampled(n)``."""
    seen: Counter[str] = Counter()
    for item in items:
        if (sampled := item.get_closest_marker("sampled")) is None:
            continue
        test = item.nodeid.partition("[")[0]
        if seen[test] % sampled.args[0]:
            item.add_marker(pytest.mark.slow)
        seen[test] += 1
