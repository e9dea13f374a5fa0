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
from torch.utils.data import DataLoader, TensorDataset
from transformers import MusicgenConfig, MusicgenForConditionalGeneration, RobertaConfig, RobertaModel

from hfquant.calibration import BaseCalibSet, LanguageModelSampler, calibration_batches, generate_calibrate_set
from hfquant.calibration.batches import CalibrationError
from hfquant.calibration.provenance import data_provenance
from hfquant.calibration.streams import _shuffled, _spread
from tests.calibration.tiny_models import tiny_llama
from tests.calibration.word_texts import TEXTS, WORDS, flat, ids_of, make_tokenizer
from tests.integrations import small_models


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


def test_strings_without_tokenizer_are_prompts():
    assert list(calibration_batches(["a", "b", "c"], batch_size=2)) == [["a", "b"], ["c"]]


@given(st.integers(0, 500), st.integers(0, 5))
def test_spread_is_a_permutation(count, seed):
    assert sorted(_spread(count, seed)) == list(range(count))


def test_spread_covers_evenly():
    first = np.sort(list(itertools.islice(_spread(10**9, 0), 100)))
    assert np.diff(first).max() < 4 * 10**9 / 100


@given(st.lists(st.integers(), max_size=60), st.integers(1, 20))
def test_shuffling_loses_nothing(items, size):
    assert sorted(_shuffled(items, size, 0)) == sorted(items)


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


def test_what_a_folder_holds_is_up_to_its_data_files(tmp_path):
    def read(name: str) -> list[int]:
        spec = {"dataset": str(tmp_path / name), "samples": None, "seqlen": 8, "seed": None}
        return flat(calibration_batches(spec, tokenizer=make_tokenizer()))

    (tmp_path / "tables").mkdir()
    for number, text in enumerate(TEXTS[:3]):
        datasets.Dataset.from_dict({"text": [text]}).to_parquet(tmp_path / "tables" / f"train-{number}.parquet")
    (tmp_path / "tables" / "LICENSE.txt").write_text("not data\n")
    assert read("tables") == ids_of(TEXTS[:3])
    (tmp_path / "texts" / "train").mkdir(parents=True)
    (tmp_path / "texts" / "train" / "a.txt").write_text("w1\nw2\n\nw3\n")
    assert read("texts") == ids_of(["w1 w2", "w3"])


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
    with pytest.raises(ValueError, match=r"calibration\.column: choose one of"):
        list(calibration_batches(datasets.Dataset.from_dict({"a": [1], "b": [2]})))


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


def test_calibration_sets(tmp_path):
    samples = [{"x": torch.full((2,), i)} for i in range(3)]
    stored = BaseCalibSet.from_samples(samples).save(tmp_path / "set")
    for source in (stored, tmp_path / "set", str(tmp_path / "set")):
        batches = list(calibration_batches(source, batch_size=2))
        assert [[int(sample["x"][0]) for sample in batch] for batch in batches] == [[0, 1], [2]]
    (tmp_path / "shards" / "shard-00000-of-00001").mkdir(parents=True)
    with pytest.raises(CalibrationError, match="shards holds no finished calibration set"):
        calibration_batches(tmp_path / "shards")


def test_the_first_samples_of_a_calibration_set(tmp_path):
    BaseCalibSet.from_samples([{"x": torch.full((2,), i)} for i in range(5)]).save(tmp_path / "set", chunk_size=2)

    def read(**spec) -> list[list[int]]:
        batches = calibration_batches({"dataset": tmp_path / "set", **spec})
        assert list(batches)  # and again
        return [[int(sample["x"][0]) for sample in batch] for batch in batches]

    assert read() == [[0], [1], [2], [3], [4]]
    assert read(samples=3, column=None) == [[0], [1], [2]]
    assert read(samples=3, batch_size=2) == [[0, 1], [2]]
    assert read(samples=9, batch_size=5) == [[0, 1, 2, 3, 4]]
    for path in (tmp_path / "set", str(tmp_path / "set")):
        with pytest.raises(CalibrationError, match=r"set is a calibration set, .* 'seqlen' and 'seed' cannot apply"):
            calibration_batches({"dataset": path, "samples": 3, "seqlen": 8, "seed": 0})
    with pytest.raises(CalibrationError, match=r"'tokenizer' cannot apply to it; allowed are 'samples' and 'batch_"):
        calibration_batches({"dataset": tmp_path / "set", "tokenizer": make_tokenizer()})


def test_model_inputs_pass_through():
    loader = DataLoader(TensorDataset(torch.arange(4)))
    inputs = [{"input_ids": torch.ones(1, 2)}]
    assert calibration_batches(loader) is loader
    assert calibration_batches(inputs) is inputs


def test_model_limits_the_length():
    batches = calibration_batches([" ".join(WORDS)], tokenizer=make_tokenizer(), model=tiny_llama())
    assert max(batch["input_ids"].shape[1] for batch in batches) == 64


def test_a_model_with_two_text_parts_sets_no_limit():
    small = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = MusicgenConfig(
        text_encoder={"model_type": "t5", "vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1},
        audio_encoder={"model_type": "encodec", "num_filters": 4, "hidden_size": 8, "codebook_size": 16},
        decoder={"model_type": "musicgen_decoder", "vocab_size": 16, "hidden_size": 16, "ffn_dim": 20, **small},
    )
    rows = datasets.Dataset.from_dict({"ids": [[3, 4, 5]] * 2, "codes": [[[1, 2], [3, 4]]] * 2})
    spec = {"dataset": rows, "column": {"input_ids": "ids", "decoder_input_ids": "codes"}}
    batches = list(calibration_batches(spec, model=MusicgenForConditionalGeneration(config)))
    assert [batch["input_ids"].tolist() for batch in batches] == [[[3, 4, 5]]] * 2


@torch.no_grad()
def test_positions_that_roberta_does_not_use_do_not_count():
    config = RobertaConfig(
        vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    model = RobertaModel(config).eval()
    batches = list(calibration_batches([" ".join(WORDS)], tokenizer=make_tokenizer(), model=model))
    assert max(batch["input_ids"].shape[1] for batch in batches) == 32
    for batch in batches:
        model(**batch)


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (
            {"dataset": "x", "colum": "text"},
            ValueError,
            "calibration.colum: unknown key; allowed are dataset, name, split",
        ),
        ({"column": "text"}, ValueError, r"calibration.dataset: is missing"),
        ({"dataset": 3}, ValueError, r"calibration.dataset: must be a hub id"),
        ({"dataset": "x", "samples": 0}, ValueError, r"calibration.samples: .*greater than 0"),
        ({"dataset": "x", "seqlen": "512"}, ValueError, r"calibration.seqlen: .*valid integer"),
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
    for nothing in ([], [None]):
        column = datasets.Dataset.from_dict({"text": nothing})["text"]
        with pytest.raises(CalibrationError, match="there is no text in it"):
            calibration_batches(column, tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match="no text in the list"):
        list(calibration_batches(["", " "], tokenizer=make_tokenizer()))


def test_caller_s_dict_is_not_changed():
    source = {"dataset": datasets.Dataset.from_dict({"text": TEXTS}), "samples": 1}
    before = dict(source)
    list(calibration_batches(source, tokenizer=make_tokenizer()))
    assert source == before


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
        with pytest.raises(CalibrationError, match=r"calibration\.split: choose one of \['a', 'b'\]"):
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
    # A DataLoader has a length only if its dataset has one.
    rows = datasets.Dataset.from_dict({"x": [1, 2, 3]})
    for data, known in ((rows, {"batches": 3}), (rows.to_iterable_dataset(), {})):
        loader = torch.utils.data.DataLoader(data, batch_size=None)
        assert data_provenance(calibration_batches(loader)) == {"class": "DataLoader", **known}
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
