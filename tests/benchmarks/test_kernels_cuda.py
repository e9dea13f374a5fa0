"""What the CUDA kernel benchmark can run without a device: its products, their check, the table, the refusal."""

import pytest
import torch

from benchmarks import kernels_cuda
from hfquant.kernels.table import KERNELS


def test_without_a_device_it_says_so(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no CUDA device"):
        kernels_cuda.main([])


@pytest.mark.parametrize("name", kernels_cuda.KINDS)
def test_kernels_compute_their_products(name) -> None:
    kind = kernels_cuda.KINDS[name]
    for _, columns, _ in kernels_cuda.SHAPES:
        assert KERNELS[kind.kernel].refuses(kind.product(columns)) == ""


def test_runs_are_checked(monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(kernels_cuda, "obstacle", lambda kernel, product, device: kernel.refuses(product))
    runs = kernels_cuda.runs_of(3, 64, 32, torch.bfloat16, "cpu")
    assert [*runs] == ["F.linear", *kernels_cuda.KINDS]
    assert all(run().shape == (3, 32) for run in runs.values())
    monkeypatch.setattr(kernels_cuda.reference, "run", lambda x, operands, product: torch.ones(3, 32))
    with pytest.raises(RuntimeError, match=r"W8A8 at .* off by"):
        kernels_cuda.runs_of(3, 64, 32, torch.bfloat16, "cpu")


def test_table() -> None:
    text = kernels_cuda.table({"W8A8": {kernels_cuda.SHAPES[0]: [1.234, None]}})
    assert text.splitlines()[-1] == "| W8A8 | 1.23 / - | - | - | - | - | - |"


@pytest.mark.gpu
def test_times(monkeypatch, capsys) -> None:
    monkeypatch.setattr(kernels_cuda, "SHAPES", ((33, 64, 32),))
    kernels_cuda.main(["--calls", "2", "--repeats", "2"])
    assert "| W8A8 |" in capsys.readouterr().out
