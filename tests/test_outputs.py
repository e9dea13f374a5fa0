"""Outputs: which tensor counts, and how far apart two are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hfquant.outputs import better, decibels, divergence, is_distribution, main_tensor, padding_mask
from tests.report.conftest import small_llama


def test_which_outputs_are_distributions():
    model = small_llama()
    assert is_distribution(model, torch.ones(2, 3, 50))
    assert not is_distribution(model, torch.ones(2, 3, 49))
    model.config.num_labels = 1
    assert not is_distribution(model, torch.ones(4, 1))
    assert not is_distribution(nn.Linear(2, 2), torch.ones(4, 50))


def test_outputs_without_tensors():
    assert torch.equal(main_tensor({"a": None, "b": [torch.ones(2)]}), torch.ones(2))
    with pytest.raises(ValueError, match="a dict holds no tensor of floats to compare"):
        main_tensor({"a": None})


def test_decibels():
    signal, noise = torch.tensor([100.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert decibels(signal, noise).tolist() == [20, torch.inf, torch.inf, -torch.inf]


def test_divergence_of_logits():
    one, other = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    p, q = other.softmax(-1), one.softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    assert torch.allclose(divergence(one, other, True), each.mean(1))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    assert torch.allclose(divergence(one, other, True, mask), torch.stack([each[0, :3].mean(), each.new_zeros(())]))


def test_divergence_of_other_outputs_is_relative():
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert divergence(expected + 1, expected, False)[0] == pytest.approx(2 / 25)
    assert divergence(expected, expected, False).tolist() == [0, 0]


class Plain(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return input_ids * attention_mask


def test_padding_masks_are_of_sequences():
    mask, model = torch.ones(2, 5), Plain()
    assert padding_mask(model, {"attention_mask": mask}, torch.ones(2, 5, 3)) is mask
    assert padding_mask(model, (mask, mask), torch.ones(2, 5, 3)) is mask
    assert padding_mask(model, {"attention_mask": mask.tolist()}, torch.ones(2, 5, 3)).equal(mask.double())
    for sample, output in (({}, (2, 5, 3)), ({"attention_mask": mask}, (2, 5)), ({"attention_mask": mask}, (2, 6, 3))):
        assert padding_mask(model, sample, torch.ones(output)) is None
    assert padding_mask(model, torch.ones(2, 5), torch.ones(2, 5, 3)) is None


def test_better_is_beyond_noise():
    ones = torch.ones(16)
    noise = torch.randn(16, generator=torch.Generator().manual_seed(0))
    assert better(0.9 * ones, ones)
    assert not better(ones, ones)
    assert not better(ones + noise - noise.mean() - 0.1, ones)  # lower by 0.4 standard errors
    assert better(ones + noise - noise.mean() - 1, ones)
    assert not better(torch.zeros(1), torch.ones(1))
    for few in (2, 3):  # rounding, which may have the same effect on all
        lowest = torch.nextafter(ones[:few], torch.zeros(few))
        assert not better(lowest, ones[:few])
        assert better((1 - 1e-5) * ones[:few], ones[:few])
