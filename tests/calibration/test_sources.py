"""What users pass as calibration data: columns, series, rows, and what is none of these."""

import datasets
import pandas
import pytest

from hfquant.calibration import calibration_batches
from hfquant.calibration.batches import CalibrationError
from hfquant.calibration.sources import are_texts, is_source
from tests.calibration.tiny_models import tiny_llama
from tests.calibration.word_texts import TEXTS, flat, ids_of, make_tokenizer


@pytest.mark.parametrize("kind", ["column", "nested column", "series", "tuple", "rows"])
def test_what_holds_texts_is_read_like_a_list_of_strings(kind):
    texts = [*TEXTS[:20], None, *TEXTS[20:]]
    data = {
        "column": lambda: datasets.Dataset.from_dict({"text": texts})["text"],
        "nested column": lambda: datasets.Dataset.from_dict({"a": [{"b": text} for text in texts]})["a"]["b"],
        "series": lambda: pandas.Series(texts),
        "tuple": lambda: tuple(texts),
        "rows": lambda: [{"id": str(i), "text": text} for i, text in enumerate(texts)],
    }[kind]()
    assert is_source(data) or are_texts(data)
    for source in (data, {"dataset": data}):
        batches = calibration_batches(source, tokenizer=make_tokenizer(), model=tiny_llama())
        assert flat(batches) == flat(batches) == ids_of(TEXTS)
    some = calibration_batches({"dataset": data, "samples": 2, "seqlen": 8}, tokenizer=make_tokenizer())
    assert [batch["input_ids"].shape for batch in some] == [(1, 8), (1, 8)]


def test_a_streamed_column_is_read_like_its_dataset():
    data = datasets.Dataset.from_dict({"body": TEXTS, "text": ["w0"] * len(TEXTS)}).to_iterable_dataset()
    expected = flat(calibration_batches({"dataset": data, "column": "body"}, tokenizer=make_tokenizer()))
    for source in (data["body"], {"dataset": data["body"]}):
        batches = calibration_batches(source, tokenizer=make_tokenizer())
        assert flat(batches) == flat(batches) == expected
    with pytest.raises(CalibrationError, match="the column 'b' is streamed from within another column"):
        calibration_batches(data["a"]["b"])


def test_a_column_of_other_things_is_refused():
    data = datasets.Dataset.from_dict({"tokens": [None, [1, 2]]})
    message = "pass the dataset itself and name the column, .*'column': 'tokens'}: the column 'tokens' does not hold te"
    for source in (data["tokens"], {"dataset": data["tokens"]}):
        with pytest.raises(CalibrationError, match=message):
            calibration_batches(source)


def test_rows_are_calls_of_a_pipeline():
    calls = [{"prompt": "a fox", "negative_prompt": "a dog"}, {"prompt": "the sea"}]
    assert calibration_batches(calls) is calls


def test_a_string_among_tokens_does_not_make_a_row():
    samples = [{"input_ids": [[3, 4, 5]], "task": "retrieval"}] * 2
    assert calibration_batches(samples, tokenizer=make_tokenizer(), model=tiny_llama()) is samples


def test_chats_in_rows():
    rows = [{"messages": [{"role": "user", "content": "w1"}]}]
    with pytest.raises(CalibrationError, match="column 'messages' holds chats, but the tokenizer has no chat template"):
        list(calibration_batches(rows, tokenizer=make_tokenizer(), model=tiny_llama()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            datasets.Dataset.from_dict({"id": [1, 2]}),
            r"column 'id' holds numbers, not text; .* the columns are \['id'\]",
        ),
        ([{"text": 5}], "column 'text' holds numbers, not text"),
        ([{"text": "a"}, {"text": 5}], "the dicts in the list cannot be read as rows of one dataset"),
        (["a", None, 5], "item 2 of the list is int, not text"),
        (pandas.Series([1, 2]), "must be a hub id, a path, a datasets object or a list of strings"),
        (["w1", "w2 \ud83d"], r"'w2 \\ud83d' cannot be tokenized: it has half a surrogate pair at position 3"),
    ],
    ids=["numbers", "numbers in rows", "mixed rows", "mixed texts", "series", "surrogate"],
)
def test_what_is_not_text(data, message):
    with pytest.raises(CalibrationError, match=message):
        list(calibration_batches(data, tokenizer=make_tokenizer(), model=tiny_llama()))


def test_json_lines_without_text(tmp_path):
    (tmp_path / "numbers.jsonl").write_text('{"text": 5}\n{"text": 6}\n')
    with pytest.raises(CalibrationError, match="column 'text' holds numbers, not text"):
        list(calibration_batches(tmp_path / "numbers.jsonl", tokenizer=make_tokenizer(), model=tiny_llama()))
