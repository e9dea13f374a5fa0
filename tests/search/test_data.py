"""Which samples are used to measure, and which are held out to judge."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hfquant.calibration.batches import CalibrationError
from hfquant.search.data import apart


@pytest.mark.parametrize(("count", "held"), [(8, 2), (127, 31), (128, 32), (129, 25), (533, 31)])
def test_at_most_so_many_judge_spread_over_all(count: int, held: int) -> None:
    seen, judging = apart(range(count), 32)
    assert sorted(seen + judging) == list(range(count))
    assert len(judging) == held
    gaps = {b - a for a, b in pairwise(judging)}
    assert len(gaps) <= 1
    assert count - judging[-1] <= max(gaps)


def test_every_fourth_judges():
    """A denoiser's consecutive timesteps thus end up on both sides."""
    assert apart([0, 1]) == ([0], [1])
    assert apart([0, 1, 2]) == ([0, 1], [2])
    assert apart([0, 1, 2, 3]) == ([0, 1, 2], [3])
    assert apart([*range(9)]) == ([0, 1, 2, 4, 5, 6, 8], [3, 7])


def test_a_single_batch_is_cut():
    sample = {"x": torch.arange(8), "scale": torch.ones(()), "table": torch.ones(3), "flag": True}
    (seen,), (held,) = apart([sample])
    assert seen["x"].tolist() == [0, 1, 2, 3, 4, 5]
    assert held["x"].tolist() == [6, 7]
    assert held["table"] is sample["table"]
    assert held["flag"] is True
    (seen,), (held,) = apart([(torch.ones(2, 3), None)])
    assert (seen[0].shape, held[0].shape, seen[1]) == ((1, 3), (1, 3), None)


def test_what_all_samples_share_is_not_cut():
    """FLUX has one table of positions for the whole batch, with more rows than there are samples."""
    sample = {"positions": torch.ones(16, 3), "x": torch.arange(4), "t": torch.arange(4), "text": torch.ones(4, 2)}
    (seen,), (held,) = apart([sample])
    assert seen["positions"] is held["positions"] is sample["positions"]
    assert [seen[key].shape[0] for key in ("x", "t", "text")] == [3, 3, 3]
    assert held["x"].tolist() == [3]


@pytest.mark.parametrize("samples", [[], [torch.ones(1, 4)], ["text"], [torch.ones(())]])
def test_too_little(samples):
    with pytest.raises(CalibrationError, match="at least two samples"):
        apart(samples)
