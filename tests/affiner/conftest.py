import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models run many times faster on one thread than on several that share a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
