"""Drawn tokens, masks and noise against the distributions that they must follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hfquant.calibration.batches import CalibrationError
from hfquant.calibration.self_made import SelfMade, SelfSpec, draw, fill_masks, generator, pink_noise, random_ids
from hfquant.calibration.sources import is_source


def test_tokens_are_drawn_as_the_softmax_says():
    logits = torch.tensor([0.0, 1.0, -2.0, 2.5, -torch.inf])
    expected = np.exp(logits.double().numpy()) / np.exp(logits.double().numpy()).sum()
    count = 20_000
    drawn = draw(logits.expand(count, -1), [generator(0)] * count)
    found = np.bincount(drawn.numpy(), minlength=5) / count
    # Four standard errors of a proportion.
    assert np.all(np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / count))
    assert found[4] == 0


def test_a_row_depends_on_its_own_stream_alone():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    alone = [int(draw(logits[i : i + 1], [generator(7, i)])) for i in range(6)]
    assert draw(logits, [generator(7, i) for i in range(6)]).tolist() == alone
    assert draw(logits.bfloat16(), [generator(7, i) for i in range(6)]).shape == (6,)
    state = torch.get_rng_state()
    random_ids(torch.arange(5), 9, [generator(1)])
    pink_noise((2, 3), 1, generator(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_tokens_are_ordinary_ones():
    ordinary = torch.tensor([2, 3, 7, 11])
    ids = random_ids(ordinary, 400, [generator(0, i) for i in range(3)])
    assert ids.shape == (3, 400)
    assert ids.unique().tolist() == ordinary.tolist()
    assert not torch.equal(ids[0], ids[1])


def test_masks_are_filled_round_by_round_by_what_is_predicted():
    """The model predicts each token from the number of filled positions, which reveals what each round could see."""
    mask, rows, length = 9, 3, 20
    ids = torch.full((rows, length), mask)
    ids[:, 0] = 1
    masked = torch.ones(length, dtype=torch.bool)
    masked[0] = False
    calls = []

    def predict(seen: torch.Tensor) -> torch.Tensor:
        calls.append(int((seen == mask).sum()))
        logits = torch.full((rows, length, 10), -torch.inf)
        logits[..., len(calls)] = 0
        return logits

    filled = fill_masks(ids, masked, predict, [generator(i) for i in range(rows)], rounds=4)
    assert calls == [57, 42, 27, 12]
    assert filled[:, 0].eq(1).all()
    assert not filled.eq(mask).any()
    assert [int((filled == r).sum()) for r in (2, 3, 4)] == [15, 15, 12]
    assert not torch.equal(filled[0], filled[1])
    assert ids[:, 1:].eq(mask).all()


@pytest.mark.parametrize(("shape", "axes"), [((4, 2048), 1), ((3, 96, 96), 2)])
def test_noise_falls_as_one_over_frequency(shape, axes):
    noise = pink_noise(shape, axes, generator(0)).double().numpy()
    dims = tuple(range(-axes, 0))
    assert noise.shape == shape
    np.testing.assert_allclose(noise.mean(dims), 0, atol=1e-5)
    np.testing.assert_allclose(noise.std(dims), 1, rtol=1e-4)
    power = np.abs(np.fft.fftn(noise, axes=dims)) ** 2
    grids = np.meshgrid(*(np.fft.fftfreq(n) for n in shape[-axes:]), indexing="ij")
    frequency = np.sqrt(sum(g**2 for g in grids))
    kept = (frequency > 0.02) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[kept]), np.log(power.mean(0)[kept]), 1)[0]
    assert slope == pytest.approx(-2, abs=0.2)  # this is power; amplitude falls with half the exponent


def test_noise_of_a_single_place_is_finite():
    assert pink_noise((2, 1), 1, generator(0)).isfinite().all()


def test_what_may_be_asked_for():
    assert SelfSpec.of("self") == SelfSpec.of({"source": "self"}) == SelfSpec()
    asked = {"source": "self", "seed": 3, "samples": 4, "seqlen": 32}
    assert SelfSpec.of(asked).to_dict() == asked
    assert SelfSpec.of(SelfSpec(seed=1).settled(8).to_dict()) == SelfSpec(seed=1, samples=8)
    for other in (None, "./self", "wiki.txt", ["self"], {"dataset": "self"}, [{"input_ids": 1}]):
        assert SelfSpec.of(other) is None
    assert is_source("./self")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"source": "self", "tokens": 8},
            "calibration.tokens: unknown key; allowed are source, seed, ",
        ),
        ({"source": "self", "seed": -1}, r"calibration.seed"),
        ({"source": "self", "samples": 0}, r"calibration.samples"),
        ({"source": "self", "seqlen": 3.5}, r"calibration.seqlen"),
        ({"source": "other"}, r"calibration.source: Input should be 'self'"),
    ],
)
def test_wrong_wishes_are_named(asked, message):
    with pytest.raises(CalibrationError, match=message):
        SelfSpec.of(asked)


def test_batches_start_anew():
    made = SelfMade([1, 2], [3], SelfSpec())
    assert [list(made), list(made), len(made)] == [[1, 2], [1, 2], 2]
