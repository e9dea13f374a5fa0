"""What calibration data may be, how often it is opened, and how a batch reaches the model."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from contextlib import suppress
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from hfquant.calibration import BaseCalibSet
from hfquant.calibration.batches import CalibrationData, CalibrationError, evaluating, forward, samples
from hfquant.nn.modules import quant_layers
from tests.calibration.test_recorder import identical


class Opened:
    """An iterable that counts how often it is opened and how many batches it yields."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.times, self.given = items, 0, 0

    def __iter__(self):
        self.times += 1
        for item in self.items:
            self.given += 1
            yield item


def test_looking_at_the_first_batch_opens_nothing_more():
    source = Opened([1, 2, 3])
    data = CalibrationData(source)
    assert source.times == 0
    assert (data.first, data.first, source.given) == (1, 1, 1)
    assert list(data) == [1, 2, 3]
    assert (source.times, source.given) == (1, 3)
    assert list(data) == list(data) == [1, 2, 3]
    assert (data.first, source.times, source.given) == (1, 3, 9)


def test_each_pass_opens_the_loader_once():
    source = Opened([1, 2])
    data = CalibrationData(source)
    assert [list(data), list(data)] == [[1, 2], [1, 2]]
    assert source.times == 2
    cut = iter(data)
    assert next(cut) == 1
    assert list(data) == [1, 2], "a pass that was broken off leaves nothing behind"


def test_an_empty_loader_has_no_first():
    for empty in ([], Opened([]), DataLoader([])):
        data = CalibrationData(empty)
        assert data.first is None
        assert list(data) == []
    assert len(CalibrationData([])) == 0


def test_the_length_is_the_loader_s():
    assert len(CalibrationData(DataLoader(range(5), batch_size=2))) == 3
    with pytest.raises(TypeError):
        len(CalibrationData(Opened([1])))
    assert list(CalibrationData(Opened([1]))) == [1]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ("text", "expected a DataLoader or an iterable of batches, got str"),
        (b"text", "got bytes"),
        (7, "got int"),
        (None, "got NoneType"),
        ({"x": torch.ones(1)}, "got dict; put it in a list"),
        (torch.ones(2, 3), "got Tensor; put it in a list"),
        (np.ones((2, 3)), "got ndarray"),
        (iter([1]), "list_iterator can be iterated only once; pass a list"),
        ((x for x in [1]), "generator can be iterated only once"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_loader(loader, message):
    with pytest.raises(CalibrationError, match=message):
        CalibrationData(loader)


def test_a_loader_that_gives_nothing_the_second_time():
    class Once:
        def __init__(self) -> None:
            self.rows = iter([1, 2])

        def __iter__(self):
            yield from self.rows

    data = CalibrationData(Once())
    assert list(data) == [1, 2]
    with pytest.raises(CalibrationError, match="Once yields nothing on a second pass"):
        list(data)


# --------------------------------------------------------------------------------------------------- samples of a batch

A, B = torch.ones(1, 2), torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (A, [A]),
        ((A, B), [(A, B)]),
        ({"x": A}, [{"x": A}]),
        ([A], [(A,)]),
        ([A, B], [(A, B)]),
        ([A, 0.5, None], [(A, 0.5, None)]),
        ([(A,), (B,)], [(A,), (B,)]),
        ([{"x": A}, (B,)], [{"x": A}, (B,)]),
        ([[A, B], [B, A]], [(A, B), (B, A)]),
        ([[(A,)], [{"x": B}]], [(A,), {"x": B}]),
        ([], []),
    ],
)
def test_samples(batch, expected):
    assert identical(samples(batch), expected)


def test_a_list_that_can_be_read_either_way():
    for other in ((B,), {"x": B}):
        with pytest.raises(CalibrationError, match="mixes tensors with tuples or dicts; if it holds"):
            samples([A, other])


class Net(nn.Module):
    """Records the arguments of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *args, **kwargs):
        self.calls.append((args, kwargs))


def calls(loader: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    net = Net()
    for batch in CalibrationData(loader):
        for sample in samples(batch):
            forward(net, sample)
    return net.calls


X, Y = torch.arange(8.0).reshape(4, 2), torch.arange(4.0).reshape(4, 1)
TOKENS = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]


class Rows(Dataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


def of_datasets(columns: dict[str, Any], form: str | None = None) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns).with_format(form)


@pytest.mark.parametrize(
    ("rows", "args", "kwargs"),
    [
        (TensorDataset(X), (X,), {}),
        (TensorDataset(X, Y), (X, Y), {}),
        (X, (X,), {}),
        (Stream(), (X,), {}),
        (Rows([(x, float(y)) for x, y in zip(X, Y, strict=True)]), (X, Y[:, 0]), {}),
        (Rows([{"x": x, "y": y} for x, y in zip(X, Y, strict=True)]), (), {"x": X, "y": Y}),
        (of_datasets({"input_ids": TOKENS}), (), {"input_ids": torch.tensor(TOKENS)}),
        (of_datasets({"input_ids": TOKENS}, "torch"), (), {"input_ids": torch.tensor(TOKENS)}),
        (of_datasets({"x": X.numpy()}, "numpy"), (), {"x": X}),
        (of_datasets({"x": X.numpy()}, "torch"), (), {"x": X}),
    ],
    ids=[
        "TensorDataset",
        "TensorDataset of two",
        "tensor",
        "IterableDataset",
        "tuples",
        "dicts",
        "datasets",
        "datasets torch",
        "datasets numpy",
        "datasets torch floats",
    ],
)
def test_data_loaders(rows, args, kwargs):
    found = calls(DataLoader(rows, batch_size=2))
    assert len(found) == 2
    for number, (got_args, got_kwargs) in enumerate(found):
        part = slice(2 * number, 2 * number + 2)
        assert identical([a.to(e) for a, e in zip(got_args, args, strict=True)], [a[part] for a in args])
        assert identical(got_kwargs, {k: v[part] for k, v in kwargs.items()})


def test_lists_and_arrays_become_tensors():
    ids = torch.tensor(TOKENS)
    for given in (TOKENS, np.array(TOKENS), ids, list(ids)):
        ((_, kwargs),) = calls([{"input_ids": given if given is not TOKENS else [row[:] for row in TOKENS]}])
        assert kwargs["input_ids"].dtype == torch.int64
        assert kwargs["input_ids"].shape in {(4, 3), (3, 4)}
    assert identical(calls([(X.numpy(),), X.numpy()]), [((X,), {})] * 2)
    shapes = [[(1, 4, 4)]]
    assert calls([{"img_shapes": shapes}]) == [((), {"img_shapes": shapes})], "only where a model takes a tensor"
    with pytest.raises(
        CalibrationError, match=r"'input_ids' is a list that cannot be converted to a tensor .*; pad or group the rows"
    ):
        calls([{"input_ids": [[1, 2], [3]]}])
    with pytest.raises(CalibrationError, match="'input_ids' is a list that cannot be converted to a tensor"):
        calls([{"input_ids": ["some text"]}])


def test_any_mapping_is_keyword_arguments():
    for mapping in ({"x": X}, OrderedDict(x=X), UserDict(x=X)):
        assert identical(calls([mapping]), [((), {"x": X})])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("text", "a sample is a tensor, a tuple or a dict, got str; tokenize text first"),
        (["text"], "got str; tokenize text first"),
        (3, "a sample is a tensor, a tuple or a dict, got int"),
        ([3], "got int"),
        (None, "got NoneType"),
    ],
    ids=str,
)
def test_unusable_samples(batch, message):
    with pytest.raises(CalibrationError, match=message):
        calls([batch])


def test_labels_leave_the_logits_alone():
    net = Net()
    options = {"use_cache": False, "logits_to_keep": 1}
    for sample in ({"x": A}, {"x": A, "labels": B}, {"x": A, "next_sentence_label": B}, (A,)):
        forward(net, sample, options)
    kept = [sorted(kwargs.keys() & options.keys()) for _, kwargs in net.calls]
    assert kept == [["logits_to_keep", "use_cache"], ["use_cache"], ["use_cache"], []]
    forward(net, {"x": A, "labels": B, "logits_to_keep": 5}, options)
    assert net.calls[-1][1]["logits_to_keep"] == 5


def test_a_calibration_set_s_loader_is_not_taken_for_positional_arguments():
    made = BaseCalibSet.from_samples([A, B, (A, B), {"x": A}])
    loader = made.get_dataloader(batch_size=3)
    assert identical(calls(loader), [((A,), {}), ((B,), {}), ((A, B), {}), ((), {"x": A})])


def test_what_torch_s_collate_does():
    """This is why a list of tensors is read as positional arguments."""
    assert identical(default_collate([(A[0], B[0])]), [A, B])


class Half(nn.Module):
    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(2, 2, dtype=dtype) for dtype in dtypes)

    def forward(self, hidden_states, timestep=None, img_ids=None, image_rotary_emb=None, extra=None, mask=None):
        self.seen = hidden_states, timestep, img_ids, image_rotary_emb, extra, mask


def test_floats_are_cast_to_the_model_s_dtype_where_that_loses_nothing():
    net = Half(torch.bfloat16, torch.bfloat16)
    time, ids = torch.tensor([999.0]), torch.tensor([[257.0, 1.0]])
    mask = torch.ones(1, 2, dtype=torch.int64)
    sample = {
        "hidden_states": A,
        "timestep": time,
        "img_ids": ids,
        "image_rotary_emb": (A, B),
        "extra": {"text_embeds": A.double(), "time_ids": ids, "residuals": [A, (B,)]},
        "mask": mask,
    }
    expected = (
        *(A.bfloat16(), time, ids, (A, B)),
        {"text_embeds": A.bfloat16(), "time_ids": ids, "residuals": [A.bfloat16(), (B.bfloat16(),)]},
        mask,
    )
    forward(net, sample)
    assert identical(net.seen, expected)
    forward(net, tuple(sample.values()))
    assert identical(net.seen, expected)
    assert sample["hidden_states"].dtype is torch.float32


def test_a_name_within_a_word_keeps_no_precision():
    class Poses(nn.Linear):
        def forward(self, past_time_features, pose_hidden_states=None, composed_image=None, rotary_pos_emb=None):
            self.seen = past_time_features, pose_hidden_states, composed_image, rotary_pos_emb

    net = Poses(2, 2, dtype=torch.bfloat16)
    forward(net, (A, A, A, A))
    assert [x.dtype for x in net.seen] == [torch.bfloat16] * 3 + [torch.float32]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float32,), torch.float32),
        ((torch.float16,), torch.float16),
        ((torch.float32, torch.bfloat16), torch.float64),
        ((), torch.float64),
    ],
)
def test_a_model_of_several_dtypes_gets_what_is_given(dtypes, expected):
    net = Half(*dtypes)
    forward(net, A.double())
    assert net.seen[0].dtype is expected


def test_float_data_for_a_half_precision_denoiser():
    import hfquant
    from tests.calibration.tiny_models import tiny_unet

    unet = tiny_unet().to(torch.bfloat16)
    batch = {
        "sample": torch.randn(2, 2, 8, 8),
        "timestep": torch.tensor([10.0, 999.0]),
        "encoder_hidden_states": torch.randn(2, 3, 12),
    }
    seen = hfquant.generate_calibrate_set(unet, hfquant.calibration.BaseSampler(), [batch], "mid_block")
    assert seen[0]["hidden_states"].dtype is torch.bfloat16
    hfquant.quantize(unet, [batch], "w8a8")
    assert quant_layers(unet)


class Prepares(nn.Linear):
    """A layer that computes a matrix for eval mode when it enters it, as some vision models do."""

    def train(self, mode: bool = True) -> Prepares:
        self.matrix = None if mode else self.weight.detach().T
        return super().train(mode)


@pytest.mark.parametrize("gradients", [False, True])
def test_evaluating_puts_each_module_back(gradients: bool) -> None:
    one = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), Prepares(2, 2)).train()
    other = nn.Sequential(nn.Linear(2, 2)).eval()
    one[0].eval()
    with suppress(KeyError), evaluating(one, other, gradients=gradients):
        assert not any(m.training for model in (one, other) for m in model.modules())
        assert one[2].matrix is not None
        assert torch.is_grad_enabled() is gradients
        other.train()
        raise KeyError
    assert [m.training for m in one.modules()] == [True, False, True, True]
    assert not any(m.training for m in other.modules())
    assert torch.is_grad_enabled()
    with torch.no_grad(), evaluating(one, gradients=gradients):
        assert not torch.is_grad_enabled()
