"""From datasets, files and lists to batches of model inputs."""

import itertools
import json
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel, PreTrainedTokenizerFast

from hfquant.calibration import BaseCalibSet, LanguageModelSampler, calibration_batches, generate_calibrate_set
from hfquant.calibration.batches import CalibrationError
from hfquant.calibration.model_inputs import _packed, paragraphs
from hfquant.calibration.provenance import data_provenance
from hfquant.calibration.streams import _shuffled, _spread
from tests.calibration.tiny_models import tiny_llama
from tests.integrations import small_models

WORDS = [f"w{i}" for i in range(200)]


def make_tokenizer(*, bert: bool = False, limit: int = 10**30) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word: w7 is token 7 + 4."""
    vocab = {word: i for i, word in enumerate(["<unk>", "<eos>", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>"}
    if bert:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        special = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=limit, **special)


TEXTS = [" ".join(WORDS[i : i + 1 + i % 5]) for i in range(0, 180, 3)]


def ids_of(texts) -> list[int]:
    return [token for text in texts for token in [*(int(word[1:]) + 4 for word in text.split()), 1]]


def flat(batches) -> list[int]:
    parts = itertools.chain.from_iterable(batch if isinstance(batch, list) else [batch] for batch in batches)
    return [token for part in parts for token in part["input_ids"].flatten().tolist()]


def test_list_of_strings_is_packed_without_loss():
    batches = calibration_batches(TEXTS, tokenizer=make_tokenizer(limit=16), batch_size=3)
    shapes = [tuple(batch["input_ids"].shape) for batch in batches]
    total = len(ids_of(TEXTS))
    assert sum(rows * columns for rows, columns in shapes[:-1]) + shapes[-1][0] * shapes[-1][1] >= total - 16
    assert shapes[0] == (3, 16)
    assert flat(batches) == ids_of(TEXTS), "in the caller's order, an end-of-text token after each, nothing lost"
    for batch in batches:
        for part in batch if isinstance(batch, list) else [batch]:
            assert part["attention_mask"].all()
            assert part["attention_mask"].shape == part["input_ids"].shape
    assert [b["input_ids"].tolist() for b in batches if isinstance(b, dict)] == [
        b["input_ids"].tolist() for b in batches if isinstance(b, dict)
    ]


def test_sequences_for_an_encoder_are_not_packed_or_padded():
    batches = list(calibration_batches(TEXTS[:4], tokenizer=make_tokenizer(bert=True, limit=4), batch_size=4))
    parts = batches[0]
    assert sum(len(part["input_ids"]) for part in parts) == 4
    for part in parts:
        assert (part["input_ids"][:, 0] == 2).all()
        assert (part["input_ids"][:, -1] == 3).all()
        assert part["input_ids"].shape[1] <= 4
    tiny = calibration_batches(["w1 w2", "w3 w4"], tokenizer=make_tokenizer(bert=True), batch_size=2)
    assert next(iter(tiny))["input_ids"].tolist() == [[2, 5, 6, 3], [2, 7, 8, 3]]


def test_strings_without_tokenizer_are_prompts():
    assert list(calibration_batches(["a", "b", "c"], batch_size=2)) == [["a", "b"], ["c"]]


@given(st.lists(st.lists(st.integers(2, 99), max_size=12), max_size=12), st.integers(1, 9))
def test_packing(documents, seqlen):
    packed = list(_packed(documents, 1, seqlen))
    assert [t for sequence in packed for t in sequence] == [t for d in documents if d for t in [*d, 1]]
    assert all(len(sequence) == seqlen for sequence in packed[:-1])
    assert not packed or 0 < len(packed[-1]) <= seqlen


@given(st.integers(0, 500), st.integers(0, 5))
def test_spread_is_a_permutation(count, seed):
    assert sorted(_spread(count, seed)) == list(range(count))


def test_spread_covers_evenly():
    first = np.sort(list(itertools.islice(_spread(10**9, 0), 100)))
    assert np.diff(first).max() < 4 * 10**9 / 100


@given(st.lists(st.integers(), max_size=60), st.integers(1, 20))
def test_shuffling_loses_nothing(items, size):
    assert sorted(_shuffled(items, size, 0)) == sorted(items)


def test_paragraphs():
    lines = ["", "a\n", "b", " ", "", "c" * 70000, "d", "e"]
    assert list(paragraphs(lines)) == ["a\nb", "c" * 70000, "d\ne"]


# ------------------------------------------------------------------------------------------------------ sources on disk


def write_texts(tmp_path, kind: str) -> str:
    path = tmp_path / f"data.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(text.replace(" ", "\n", 1) for text in TEXTS))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)))
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif kind == "csv":
        path.write_text("\n".join(["text", *TEXTS]))
    elif kind == "parquet":
        datasets.Dataset.from_dict({"text": TEXTS, "id": range(len(TEXTS))}).to_parquet(path)
    elif kind == "folder":
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(path))
    elif kind == "splits":
        data = datasets.Dataset.from_dict({"text": TEXTS})
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(path))
    elif kind == "directory":
        path.mkdir()
        datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(path / "train-00000.parquet")
    return str(path)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet", "folder", "splits", "directory"])
def test_local_text(tmp_path, kind):
    source = {"dataset": write_texts(tmp_path, kind), "samples": None, "seqlen": 16}
    ordered = calibration_batches({**source, "seed": None}, tokenizer=make_tokenizer(), batch_size=4)
    assert flat(ordered) == ids_of(TEXTS)
    shuffled = calibration_batches({**source, "buffer_size": 10}, tokenizer=make_tokenizer(), batch_size=4)
    assert sorted(flat(shuffled)) == sorted(ids_of(TEXTS))
    assert flat(shuffled) != ids_of(TEXTS)
    assert flat(shuffled) == flat(shuffled), "each walk is the same"
    other = calibration_batches({**source, "buffer_size": 10, "seed": 1}, tokenizer=make_tokenizer(), batch_size=4)
    assert flat(other) != flat(shuffled)


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_objects(streaming, caplog):
    data = datasets.Dataset.from_dict({"text": [*TEXTS, None]})
    data = data.to_iterable_dataset(num_shards=3) if streaming else data
    source = {"dataset": data, "samples": 5, "seqlen": 8, "batch_size": 2}
    batches = list(calibration_batches(source, tokenizer=make_tokenizer(), batch_size=99))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 8), (2, 8), (1, 8)]
    assert flat(batches) == flat(calibration_batches(source, tokenizer=make_tokenizer()))
    assert not caplog.text
    everything = list(calibration_batches(data, tokenizer=make_tokenizer()))
    assert sorted(flat(everything)) == sorted(ids_of(TEXTS))
    assert "only 1 sequence, but 128 were requested" in caplog.text


def test_generator_dataset_without_features():
    data = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS))
    batches = calibration_batches(
        {"dataset": data, "samples": 2, "seqlen": 4}, tokenizer=make_tokenizer(), batch_size=2
    )
    assert [batch["input_ids"].shape for batch in batches] == [(2, 4)]


def test_prompts_from_a_text_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red fox\n\nthe sea\nsnow\n")
    batches = calibration_batches({"dataset": str(tmp_path / "prompts.txt"), "seed": None, "batch_size": 2})
    assert list(batches) == [["a red fox", "the sea"], ["snow"]]


def test_columns():
    data = datasets.Dataset.from_dict(
        {
            "caption": ["x", "y", "z"],
            "latent": [np.full((2, 2), i, dtype=np.float32).tolist() for i in range(3)],
            "label": [7, 8, 9],
            "input_ids": [[1, 2, 3], [4], [5, 6]],
        }
    )

    def first(column, **options):
        spec = {"dataset": data, "column": column, "seed": None, "batch_size": 3, **options}
        return next(iter(calibration_batches(spec)))

    assert first(None) == ["x", "y", "z"]
    latents = first("latent")
    assert (latents.shape, latents.dtype) == ((3, 2, 2), torch.float32)
    assert first("label").tolist() == [7, 8, 9]
    assert first("input_ids", seqlen=6)["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert [part["input_ids"].tolist() for part in first("input_ids", pack=False)] == [[[1, 2, 3]], [[4]], [[5, 6]]]
    several = first({"prompt": "caption", "latents": "latent"})
    assert several["prompt"] == ["x", "y", "z"]
    assert torch.equal(several["latents"], latents)
    assert first("caption", samples=2) == ["x", "y"]
    with pytest.raises(ValueError, match="no column 'nope'; it has"):
        first("nope")
    with pytest.raises(ValueError, match=r"'column'.*choose one of"):
        list(calibration_batches(datasets.Dataset.from_dict({"a": [1], "b": [2]})))


@pytest.mark.parametrize("form", ["lists", "tensors", "stream"])
def test_padding_of_tokenized_rows_is_left_out(form):
    padded = {"input_ids": [[1, 2, 3, 0], [0, 0, 0, 4], [5, 6, 0, 0]]}
    masks = {"attention_mask": [[1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]]}
    data = datasets.Dataset.from_dict({**padded, **masks, "label": [0, 1, 2]})
    data = {"lists": data, "tensors": data.with_format("torch"), "stream": data.to_iterable_dataset()}[form]
    spec = {"dataset": data, "seed": None, "batch_size": 3}
    (packed,) = calibration_batches(spec, tokenizer=make_tokenizer())
    assert packed["input_ids"].tolist() == [[1, 2, 3, 1, 4, 1, 5, 6, 1]]
    assert packed["attention_mask"].all()
    (apart,) = calibration_batches({**spec, "pack": False})
    assert [part["input_ids"].tolist() for part in apart] == [[[1, 2, 3]], [[4]], [[5, 6]]]
    # Columns chosen one by one are model inputs as they are.
    (chosen,) = calibration_batches({**spec, "column": {"input_ids": "input_ids", "mask": "attention_mask"}})
    assert {name: value.tolist() for name, value in chosen.items()} == {
        "input_ids": padded["input_ids"],
        "mask": masks["attention_mask"],
    }


class FakeProcessor:
    """The interface of an image processor."""

    def __call__(self, images, return_tensors):
        assert return_tensors == "pt"
        return {"pixel_values": torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])}


def test_images(tmp_path):
    for i in range(5):
        Image.new("L", (4, 3), color=i * 10).save(tmp_path / f"{i}.png")
    spec = {"dataset": str(tmp_path), "batch_size": 2, "seed": None}
    pixels = [batch["pixel_values"] for batch in calibration_batches(spec, processor=FakeProcessor())]
    assert [tuple(batch.shape) for batch in pixels] == [(2, 3, 3, 4), (2, 3, 3, 4), (1, 3, 3, 4)]
    assert [int(image[0, 0, 0]) for batch in pixels for image in batch] == [0, 10, 20, 30, 40]
    plain = list(calibration_batches(spec))
    assert [image.size for image in plain[0]["image"]] == [(4, 3)] * 2
    images = [image for batch in plain for image in batch["image"]]
    assert torch.equal(
        torch.cat([b["pixel_values"] for b in calibration_batches(images, processor=FakeProcessor())]),
        torch.cat(pixels),
    )


class LengthTokenizer:
    """One token per four characters: as much output as a real tokenizer, at no cost."""

    eos_token_id = 1
    cls_token_id = None

    def __call__(self, text, **kwargs):
        return {"input_ids": [2] * (len(text) // 4)}


def test_memory_does_not_grow_with_the_data(tmp_path):
    """Reading three times as much text, 10 MB, needs no more memory: Python's allocation peaks agree within 10 %."""
    block = "\n".join(" ".join(WORDS) for _ in range(1400)) + "\n\n"

    def peak(blocks: int) -> tuple[int, int]:
        path = tmp_path / f"{blocks}.txt"
        with path.open("w") as file:
            for _ in range(blocks):
                file.write(block)
        spec = {"dataset": str(path), "samples": None, "seqlen": 512, "batch_size": 4, "buffer_size": 4}
        batches = iter(calibration_batches(spec, tokenizer=LengthTokenizer()))
        next(batches)
        tracemalloc.start()
        tokens = sum(batch["input_ids"].numel() for batch in batches if isinstance(batch, dict))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size, tokens

    small, large = peak(3), peak(9)
    assert large[1] > 2.9 * small[1] > 10**5
    assert large[0] < 1.1 * small[0]


# ------------------------------------------------------------------------------------------------------- other sources


def test_calibration_sets(tmp_path):
    samples = [{"x": torch.full((2,), i)} for i in range(3)]
    stored = BaseCalibSet.from_samples(samples).save(tmp_path / "set")
    for source in (stored, tmp_path / "set", str(tmp_path / "set")):
        batches = list(calibration_batches(source, batch_size=2))
        assert [[int(sample["x"][0]) for sample in batch] for batch in batches] == [[0, 1], [2]]
    (tmp_path / "shards" / "shard-00000-of-00001").mkdir(parents=True)
    with pytest.raises(CalibrationError, match="shards holds no finished calibration set"):
        calibration_batches(tmp_path / "shards")


def test_model_inputs_pass_through():
    loader = DataLoader(TensorDataset(torch.arange(4)))
    inputs = [{"input_ids": torch.ones(1, 2)}]
    assert calibration_batches(loader) is loader
    assert calibration_batches(inputs) is inputs


def test_model_limits_the_length():
    batches = calibration_batches([" ".join(WORDS)], tokenizer=make_tokenizer(), model=tiny_llama())
    assert max(batch["input_ids"].shape[1] for batch in batches) == 64


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (
            {"dataset": "x", "colum": "text"},
            ValueError,
            r"unknown key 'colum'; allowed are \['dataset', 'name', 'split'",
        ),
        ({"column": "text"}, ValueError, r"calibration\['dataset'\]: Field required"),
        ({"dataset": 3}, ValueError, r"calibration\['dataset'\]: must be a hub id"),
        ({"dataset": "x", "samples": 0}, ValueError, r"calibration\['samples'\]: .*greater than 0"),
        ({"dataset": "x", "seqlen": "512"}, ValueError, r"calibration\['seqlen'\]: .*valid integer"),
        (iter([1]), CalibrationError, "list_iterator can be iterated only once"),
        ((x for x in [1]), CalibrationError, "generator can be iterated only once"),
        (3, CalibrationError, "expected a DataLoader or an iterable of batches, got int"),
        ([], CalibrationError, "empty"),
    ],
)
def test_bad_calibration(calibration, error, message):
    with pytest.raises(error, match=message):
        calibration_batches(calibration)


def test_bad_sources(tmp_path):
    (tmp_path / "data.xyz").write_text("x")
    (tmp_path / "empty.txt").write_text("\n\n")
    for source, error, message in [
        (tmp_path / "data.xyz", ValueError, "unknown kind of file"),
        (tmp_path / "nothing.txt", FileNotFoundError, "nothing.txt does not exist"),
        (tmp_path / "empty.txt", ValueError, "the calibration data is empty: .*empty.txt gives no rows"),
    ]:
        with pytest.raises(error, match=message):
            list(calibration_batches({"dataset": str(source)}, tokenizer=make_tokenizer()))
    with pytest.raises(ValueError, match="no text in the list"):
        list(calibration_batches(["", " "], tokenizer=make_tokenizer()))


def test_caller_s_dict_is_not_changed():
    source = {"dataset": datasets.Dataset.from_dict({"text": TEXTS}), "samples": 1}
    before = dict(source)
    list(calibration_batches(source, tokenizer=make_tokenizer()))
    assert source == before


# --------------------------------------------------------------------------------------------- a source of every kind


def chat_tokenizer(template: str | None = "{% for m in messages %}{{ m['content'] }} {% endfor %}"):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "w9 w8"}] for text in ("w1 w2", "w3")]


def test_a_column_of_chats():
    data = datasets.Dataset.from_dict({"prompt": ["x", "y"], "messages": CHATS})
    spec = {"dataset": data, "seed": None, "samples": None}
    batches = list(calibration_batches(spec, tokenizer=chat_tokenizer()))
    assert flat(batches) == ids_of(["w1 w2 w9 w8", "w3 w9 w8"])
    named = list(calibration_batches({**spec, "column": "messages", "pack": False}, tokenizer=chat_tokenizer()))
    assert [batch["input_ids"].tolist() for batch in named] == [[[5, 6, 13, 12]], [[7, 13, 12]]]
    assert list(calibration_batches(spec, batch_size=2)) == [["x", "y"]], "without a tokenizer the prompts are wanted"


@pytest.mark.parametrize(
    ("column", "tokenizer", "message"),
    [
        (CHATS, chat_tokenizer(None), "column 'messages' holds chats, but the tokenizer has no chat template"),
        (CHATS, None, "column 'messages' holds chats, but there is no tokenizer"),
        (
            [[{"from": "a", "value": "b"}]],
            chat_tokenizer(),
            r"holds lists of dicts with keys \['from', 'value'\], .*'role'",
        ),
    ],
)
def test_chats_that_cannot_be_read(column, tokenizer, message):
    data = datasets.Dataset.from_dict({"messages": column})
    with pytest.raises(CalibrationError, match=message):
        list(calibration_batches(data, tokenizer=tokenizer))


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_dicts(streaming):
    one, other = (datasets.Dataset.from_dict({"text": [text]}) for text in ("w1", "w2"))
    kind = datasets.DatasetDict
    if streaming:
        kind, one, other = datasets.IterableDatasetDict, one.to_iterable_dataset(), other.to_iterable_dataset()

    def read(source):
        return flat(calibration_batches(source, tokenizer=make_tokenizer()))

    assert read(kind({"test": other, "train": one})) == [5, 1]
    assert read(kind({"test": other})) == [6, 1]
    assert read({"dataset": kind({"a": one, "b": other}), "split": "b"}) == [6, 1]
    for split in ({}, {"split": "train"}):
        with pytest.raises(CalibrationError, match=r"\['split'\]: choose one of \['a', 'b'\]"):
            read({"dataset": kind({"a": one, "b": other}), **split})


def test_a_bare_path_is_a_dataset(tmp_path):
    path = write_texts(tmp_path, "parquet")
    expected = flat(calibration_batches({"dataset": path}, tokenizer=make_tokenizer()))
    for source in (path, Path(path)):
        assert flat(calibration_batches(source, tokenizer=make_tokenizer())) == expected
    datasets.DatasetDict({"a": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(str(tmp_path / "splits"))
    assert sorted(flat(calibration_batches(tmp_path / "splits", tokenizer=make_tokenizer()))) == sorted(ids_of(TEXTS))
    for missing in (tmp_path / "nothing", str(tmp_path / "nothing.json"), "nothing.parquet"):
        with pytest.raises(FileNotFoundError, match=r"nothing.* does not exist"):
            list(calibration_batches(missing, tokenizer=make_tokenizer()))


def test_a_list_of_strings_named_by_a_dict():
    named = {"dataset": TEXTS, "tokenizer": make_tokenizer(), "samples": None, "seed": None}
    assert flat(calibration_batches(named)) == ids_of(TEXTS)
    assert list(calibration_batches({"dataset": ["a", "b"], "seed": None, "batch_size": 2})) == [["a", "b"]]


@pytest.mark.parametrize(
    ("column", "message"),
    [([[1, 2], [3]], "column 'x': the rows cannot be stacked"), ([{"a": 1}], None), ([None, None], "empty")],
)
def test_rows_that_make_no_tensor(column, message):
    batches = calibration_batches({"dataset": datasets.Dataset.from_dict({"x": column}), "batch_size": 2, "seed": None})
    if message is None:
        assert list(batches) == [column]
        return
    with pytest.raises(CalibrationError, match=message):
        list(batches)


def test_text_for_a_model_needs_a_tokenizer():
    for source in ({"dataset": ["a b"]}, ["a b"], datasets.Dataset.from_dict({"text": ["a b"]})):
        with pytest.raises(CalibrationError, match=r"text needs a tokenizer; .*'tokenizer': tokenizer"):
            list(calibration_batches(source, model=tiny_llama()))


def test_images_for_a_model_need_a_processor():
    data = datasets.Dataset.from_dict({"image": [Image.new("RGB", (2, 2))]})
    with pytest.raises(CalibrationError, match=r"images need a processor; .*'processor': processor"):
        list(calibration_batches(data, model=tiny_llama()))


def decoder_inputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, list[list[int]]]:
    """Return what was added to a model's inputs."""
    data = datasets.Dataset.from_dict({name: value.tolist() for name, value in inputs.items()})
    spec = {"dataset": data, "column": {name: name for name in inputs}, "seed": None, "batch_size": 2}
    (batch,) = calibration_batches(spec, model=model)
    return {name: value.tolist() for name, value in batch.items() if name not in inputs}


def test_the_decoder_of_an_encoder_decoder_reads_the_same_tokens():
    model, ids = small_models.t5(), torch.tensor([[5, 6, 7], [8, 9, 0]])
    shifted = {"decoder_input_ids": [[3, 5, 6], [3, 8, 9]]}  # 3 is the start token
    assert decoder_inputs(model, {"input_ids": ids}) == shifted
    masked = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    assert decoder_inputs(model, masked) == {**shifted, "decoder_attention_mask": [[1, 1, 1], [1, 1, 1]]}
    for name in ("decoder_input_ids", "labels"):
        assert decoder_inputs(model, {"input_ids": ids, name: ids}) == {}
    for other in (small_models.t5_encoder(), tiny_llama()):
        assert decoder_inputs(other, masked) == {}
    del model.config.decoder_start_token_id
    assert decoder_inputs(model, {"input_ids": ids}) == {"decoder_input_ids": [[0, 5, 6], [0, 8, 9]]}


@torch.no_grad()
def test_decoder_inputs_are_those_that_bart_derives_itself():
    model = small_models.bart()
    (batch,) = calibration_batches(["w1 w2 w3 w4"], tokenizer=make_tokenizer(), model=model)
    assert batch.keys() == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    derived = model(batch["input_ids"], batch["attention_mask"])
    assert torch.equal(model(**batch).logits, derived.logits)


def test_an_encoder_decoder_is_recorded_on_text():
    data = {"dataset": TEXTS[:4], "tokenizer": make_tokenizer(), "seqlen": 4}
    seen = generate_calibrate_set(small_models.t5(), LanguageModelSampler(), data, "decoder.block.0")
    assert len(seen) > 1


def test_a_stream_says_what_it_is_and_not_where_it_lies(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("one\n\ntwo\n")
    spec = {"samples": 2, "seqlen": 9, "seed": 3}
    batches = calibration_batches({"dataset": str(file), **spec})
    assert data_provenance(batches) == {"dataset": "texts.txt", **spec}
    assert data_provenance(calibration_batches(["a", "b"])) == {"dataset": "2 texts", "seqlen": 512}
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    assert data_provenance(calibration_batches(rows))["dataset"] == "Dataset"
    stored = BaseCalibSet.from_samples([torch.ones(2)])
    stored.provenance = {"layer": "proj", "call": {"token": "hf_" + "a" * 20}, "model": {"name": "/here"}}
    expected = {"layer": "proj", "call": {"token": "(redacted)"}}
    assert data_provenance(stored) == data_provenance(calibration_batches(stored)) == expected
    assert data_provenance(iter(())) == {"class": "tuple_iterator"}


def test_samples_beyond_those_asked_for_are_held_out(tmp_path):
    texts = [f"{'a b c d e f g h'[: 2 * i + 1]} ." for i in range(1, 8)]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": texts}).to_parquet(str(path))
    spec = {"dataset": str(path), "column": "text", "batch_size": 2}
    every = [prompt for batch in calibration_batches({**spec, "samples": None}) for prompt in batch]
    some = calibration_batches({**spec, "samples": 4})
    assert [prompt for batch in some for prompt in batch] == every[:4]
    assert [prompt for batch in some.held_out for prompt in batch] == every[4:6]
    assert calibration_batches({**spec, "samples": 7}).held_out == []
    assert calibration_batches(spec).held_out == []
    assert calibration_batches(texts).held_out == []


@pytest.mark.parametrize("mask", [np.tril(np.ones((1, 4, 4))).tolist(), np.eye(4).tolist(), 1, [1, 1, 0]])
def test_masks_that_are_not_of_tokens_are_ignored(mask):
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 2, "attention_mask": [mask] * 2})
    found = list(calibration_batches({"dataset": rows, "samples": 2, "seed": None, "pack": False}))
    assert [batch["input_ids"].tolist() for batch in found] == [[[1, 2, 3, 4]]] * 2


def test_a_decoder_of_another_vocabulary_needs_its_own_tokens():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    decoder = BertConfig(**sizes, vocab_size=10, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**sizes, vocab_size=20), decoder)
    rows = datasets.Dataset.from_dict({"input_ids": [[11, 12, 13]] * 2})
    with pytest.raises(CalibrationError, match="the decoder has another vocabulary"):
        next(iter(calibration_batches({"dataset": rows}, model=EncoderDecoderModel(config))))
