"""Rows of datasets of every kind become the arguments of calls."""

import copy
import itertools

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch.utils.data import IterableDataset

from hfquant import quantize
from hfquant.affiner import inputs, load_affiner
from hfquant.affiner.runs import DenoisingLoop
from tests.affiner.pipelines import W4A8, Recorder, Toy, noise, toy_config
from tests.calibration.tiny_modular import tiny_modular


class Stream(IterableDataset):
    """torch's kind of iterable dataset, whose base class also defines `__getitem__`."""

    def __init__(self, rows, length=None):
        self.rows, self.read, self.length = rows, 0, length

    def __iter__(self):
        for row in self.rows:
            self.read += 1
            yield row

    def __len__(self):
        if self.length is None:
            raise TypeError("no length")
        return self.length


def drawn(dataset, shuffle, count=3, size=None):
    """Return the labels that a fit on one step runs."""
    real, seen = Toy(), []
    real.register_forward_pre_hook(lambda m, a, k: seen.append(k["class_labels"].tolist()), with_kwargs=True)
    config = toy_config(sample_size=size, steps=1)
    load_affiner(config, dataset, real, Toy(), noise(count), shuffle, thirdparty_affiner=Recorder())
    return [label for batch in seen for label in batch]


def test_shuffle_and_sample_size_choose_rows():
    assert drawn(list(range(20)), False, size=3) == [0, 1, 2]
    shuffled = drawn(list(range(20)), True, size=3)
    assert len(set(shuffled)) == 3
    assert shuffled != [0, 1, 2]


def test_datasets_and_dicts_and_numbers_are_the_same():
    found = []
    for rows in (
        [0, 1, 2],
        [{"class_labels": i} for i in range(3)],
        [np.int64(i) for i in range(3)],
        [torch.tensor(i) for i in range(3)],
        [{"class_labels": np.asarray(i)} for i in range(3)],
        datasets.Dataset.from_dict({"class_labels": [0, 1, 2]}),
        datasets.Dataset.from_dict({"class_labels": [0, 1, 2]}).with_format("numpy"),
        datasets.Dataset.from_dict({"label": [0, 1, 2]}),
        datasets.Dataset.from_dict({"label": [0, 1, 2]}).to_iterable_dataset(),
        Stream(range(3)),
        Stream(range(3), length=3),
        iter(range(3)),
    ):
        affiner = load_affiner(toy_config(steps=2), rows, Toy(), Toy(gain=[0.9, 1.1]), latents=noise(3), shuffle=False)
        found.append(affiner.prediction.tensors("p"))
    for other in found[1:]:
        assert all(torch.equal(found[0][k], other[k]) for k in found[0])


@pytest.mark.parametrize("kind", ["torch", "datasets"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_streams_are_read_no_further_than_needed(kind, shuffle, monkeypatch):
    """The stream is endless; the shuffle buffers a few of its rows."""
    monkeypatch.setattr(inputs, "BUFFER", 4)
    if kind == "torch":
        stream = Stream(itertools.count())
    else:
        stream = datasets.IterableDataset.from_generator(lambda: ({"class_labels": i} for i in itertools.count()))
    labels = drawn(stream, shuffle, size=3)
    assert len(set(labels)) == 3
    assert max(labels) < 7
    assert (labels == [0, 1, 2]) != shuffle
    if kind == "torch":
        assert stream.read == (7 if shuffle else 3)


def test_a_shuffled_stream_gives_every_row_once():
    rows = drawn(Stream(range(6)), True, count=6)
    assert sorted(rows) == list(range(6))
    assert rows != list(range(6))
    assert rows == drawn(Stream(range(6)), True, count=6)


def test_rows_of_arrays_share_a_call():
    rows = [{"class_labels": i, "extra": np.ones(3) * i} for i in range(3)]

    class Takes(Toy):
        def forward(self, sample, timestep, class_labels=None, extra=None, return_dict=True):
            assert extra.shape == (len(sample), 3)
            return super().forward(sample, timestep, class_labels)

    real, quant = Takes(), Takes(gain=[0.9, 1.1])
    load_affiner(toy_config(steps=2), rows, real, quant, latents=noise(3), shuffle=False)


def test_prompts_of_a_modular_pipeline_are_passed_by_name():
    real, quant = tiny_modular(), tiny_modular()
    quant.update_components(unet=quantize(copy.deepcopy(real.unet), None, W4A8))
    prompts = ["a cat", "two dogs", "a red car"]
    config = {"stepper": {"max_timestep": 2, "batch_size": 2}, "solver": {"lambda1": 0.0, "lambda2": 0.0}}
    found = []
    for rows in ([{"prompt": p} for p in prompts], prompts, [{"text": p} for p in prompts]):
        affiner = load_affiner(config, rows, real, quant, shuffle=False)
        found.append(affiner.prediction.tensors("p"))
    for other in found[1:]:
        assert all(torch.equal(found[0][k], other[k]) for k in found[0])
    with pytest.raises(ValueError, match=r"dataset\[0\]: ModularPipeline does not accept \['height'\].*'prompt'"):
        load_affiner(config, [{"prompt": "a cat", "height": 8}], real, quant)


def test_a_reloaded_config_has_lists_for_tuples():
    def unet():
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=(8, 8), in_channels=2, out_channels=2, block_out_channels=(8, 8), norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1,
        ).eval()  # fmt: skip

    real, quant = unet(), unet()
    quant.register_to_config(sample_size=[8, 8])
    inputs.check_alike(DenoisingLoop(real, DDIMScheduler()), DenoisingLoop(quant, DDIMScheduler()))
    quant.register_to_config(sample_size=[8, 4])
    with pytest.raises(ValueError, match="the denoisers differ in sample_size"):
        inputs.check_alike(DenoisingLoop(real, DDIMScheduler()), DenoisingLoop(quant, DDIMScheduler()))
