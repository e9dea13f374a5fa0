"""Rows with sounds, or with images next to text: what a model's processor makes of them, and what cannot be read."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessorPil, LlavaProcessor, WhisperFeatureExtractor

from hfquant.calibration import calibration_batches
from hfquant.calibration.batches import CalibrationError
from hfquant.integrations.data import transformers_batches
from tests.calibration.word_texts import make_tokenizer
from tests.integrations import small_models, tiny_transformers

IMAGE_TOKEN = "<image>"
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{{ c['text'] if c['type'] == 'text' else '<image>' }} {% endfor %}{% endif %}{% endfor %}"
)


def image(shade: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (shade, 0, 0))


def sees_and_reads() -> tuple[nn.Module, LlavaProcessor]:
    """Return a model whose image is four tokens, and its processor."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.image_token, tokenizer.image_token_id = IMAGE_TOKEN, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    parts = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(CLIPImageProcessorPil(**sizes), tokenizer, chat_template=TEMPLATE, **parts)
    with torch.device("meta"):
        model = tiny_transformers.build("LlavaForConditionalGeneration")
    return model, processor


def read(data: Any, **spec: Any) -> list[Any]:
    model, processor = sees_and_reads()
    given = {"dataset": data, "processor": processor, **spec}
    return list(calibration_batches(given, model=model))


ROWS = [{"image": image(0), "text": f"w1 {IMAGE_TOKEN} w2"}, {"image": image(200), "text": f"{IMAGE_TOKEN} w3"}]
PART = {"type": "text", "text": "w1"}


def chat(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, PART]}]


@pytest.mark.parametrize("table", [False, True])
def test_an_image_is_read_with_the_text_next_to_it(table):
    _, processor = sees_and_reads()
    data = datasets.Dataset.from_list(ROWS) if table else ROWS
    made = read(data, **({"seed": None} if table else {}))
    assert len(made) == 2
    for batch, row in zip(made, ROWS, strict=True):
        expected = processor(images=row["image"], text=row["text"], return_tensors="pt")
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
        assert (batch["input_ids"] == processor.image_token_id).sum() == 4
    assert not torch.equal(made[0]["pixel_values"], made[1]["pixel_values"])


def test_the_processor_is_the_one_saved_with_the_model(tmp_path):
    model, processor = sees_and_reads()
    processor.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    model.name_or_path = str(tmp_path)
    for batch, expected in zip(transformers_batches(model, ROWS), read(ROWS), strict=True):
        assert {k: v.tolist() for k, v in batch.items()} == {k: v.tolist() for k, v in expected.items()}


@pytest.mark.parametrize("where", ["in the chat", "in a column", "in a list"])
def test_the_images_of_a_chat(where):
    part = {"type": "image", "image": image(200)} if where == "in the chat" else {"type": "image"}
    column = {"in a column": {"image": image(200)}, "in a list": {"images": [image(200)]}}.get(where, {})
    (batch,) = read([{"messages": chat(part), **column}])
    (expected,) = read([{"image": image(200), "text": f"{IMAGE_TOKEN} w1"}])
    assert {k: v.tolist() for k, v in batch.items()} == {k: v.tolist() for k, v in expected.items()}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": image(0), "text": "w1 w2"}, "columns 'text' and 'image': .* <image> tokens"),
        ({"image": image(0), "messages": chat()}, "'messages' and 'image': a chat has fewer parts of type 'image'"),
        ({"messages": chat({"type": "image"})}, "column 'messages': a chat has more parts of type 'image'"),
        ({"messages": chat({"type": "video", "url": "a.mp4"})}, "column 'messages': chats with parts of type 'video'"),
    ],
)
def test_images_are_never_dropped(row, message):
    with pytest.raises(CalibrationError, match=message + r".* batches of LlavaForConditionalGeneration"):
        read([row])


def test_rows_without_an_image_are_read_as_text():
    made = read([{"image": None, "text": "w1 w2"}, ROWS[0]])
    assert ["pixel_values" in batch for batch in made] == [False, True]


def test_images_next_to_text_need_the_whole_processor():
    model, processor = sees_and_reads()
    given = {"dataset": ROWS, "processor": processor.image_processor, "tokenizer": processor.tokenizer}
    with pytest.raises(CalibrationError, match=r"columns 'text' and 'image': .* need the model's whole processor"):
        list(calibration_batches(given, model=model))


def test_a_column_of_text_may_be_chosen():
    (batch,) = read(ROWS, column="text")
    assert batch.keys() == {"input_ids", "attention_mask"}


def test_a_text_only_model_reads_the_text_of_rows_with_images():
    (batch,) = calibration_batches({"dataset": ROWS, "tokenizer": make_tokenizer()}, model=small_models.llama())
    assert batch.keys() == {"input_ids", "attention_mask"}


def sounds(count: int = 2) -> list[dict[str, Any]]:
    waves = np.random.default_rng(0).standard_normal((count, 320)).astype(np.float32)
    return [{"audio": {"array": wave.tolist(), "sampling_rate": 16000}} for wave in waves]


@pytest.mark.parametrize("written", [{}, {"text": "w1 w2"}])
@torch.no_grad()
def test_sounds_are_read_by_the_feature_extractor(written):
    model = tiny_transformers.build("WhisperForConditionalGeneration", "cpu")
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1, n_fft=64, hop_length=800)
    rows = [{**row, **written} for row in sounds()]
    made = list(calibration_batches({"dataset": rows, "processor": extractor}, model=model))
    assert len(made) == 2
    for batch, row in zip(made, rows, strict=True):
        wave = np.array(row["audio"]["array"], dtype=np.float32)
        expected = extractor(wave, sampling_rate=16000, return_tensors="pt")
        assert torch.equal(batch["input_features"], expected["input_features"])
        assert batch["decoder_input_ids"].tolist() == [[model.config.decoder_start_token_id]]
        assert model(**batch).logits.isfinite().all()


def test_sounds_at_another_rate_are_refused():
    model = tiny_transformers.build("Wav2Vec2ForCTC")
    rows = [{"audio": {"array": [0.0, 1.0], "sampling_rate": 8000}}]
    with pytest.raises(CalibrationError, match=r"'audio' holds sounds of 8000 Hz, .* reads 16000 Hz"):
        list(calibration_batches({"dataset": rows, "processor": transformers.Wav2Vec2FeatureExtractor()}, model=model))


def test_sounds_need_a_feature_extractor():
    with pytest.raises(CalibrationError, match="column 'audio' holds sounds, which need a feature extractor"):
        list(calibration_batches({"dataset": sounds()}, model=tiny_transformers.build("Wav2Vec2ForCTC")))


def test_an_image_model_reads_the_images_of_rows_with_text():
    (batch,) = calibration_batches(
        {"dataset": ROWS[:1], "processor": CLIPImageProcessorPil()}, model=small_models.vit()
    )
    assert batch.keys() == {"pixel_values"}


def test_images_with_labels_are_batched():
    rows = datasets.Dataset.from_list([{"image": image(i), "label": i} for i in range(4)])
    given = {"dataset": rows, "processor": CLIPImageProcessorPil(), "batch_size": 4}
    (batch,) = calibration_batches(given, model=small_models.vit())
    assert len(batch["pixel_values"]) == 4
