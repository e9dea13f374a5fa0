import pytest
import torch

from hfquant.demo import load_digits_pipeline


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models run many times faster on one thread than on several threads that share a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe
