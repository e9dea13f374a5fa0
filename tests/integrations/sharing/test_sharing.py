"""What is saved and pushed can be loaded by its id, with its card, and no user-written text is lost."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline
from huggingface_hub import HfApi, ModelCard, snapshot_download
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import hfquant
from hfquant import BaseCalibSet, BlockwiseAffiner, HfQuantConfig
from hfquant.affiner import load_pipeline
from hfquant.cli import app
from hfquant.demo import load_digits_pipeline
from hfquant.demo.pipeline import DigitsPipeline
from hfquant.integrations import note_distillation
from hfquant.integrations.sharing.merge import CardError, sections
from hfquant.nn.modules import quant_layers
from tests.integrations import small_models
from tests.integrations.sharing.hub_server import TOKEN, Hub
from tests.integrations.small_models import assert_same

Checkpoint = Callable[[str], Path]
ROOT = Path(__file__).parents[3]


def quantized(source: Any, name: str = "llama", preset: str = "w8a8-dynamic", **options: Any) -> Any:
    cls = type(getattr(small_models, name)())
    return cls.from_pretrained(source, quantization_config=HfQuantConfig(preset, **options))


def card(hub: Hub, repo: str, kind: str = "model") -> ModelCard:
    return ModelCard(hub.repos[kind, repo]["README.md"].decode())


def pipeline() -> DiffusionPipeline:
    torch.manual_seed(3)
    sizes = {"block_out_channels": (8,), "norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 4}
    return DiTPipeline(small_models.dit(), AutoencoderKL(**sizes), DDIMScheduler(num_train_timesteps=10))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<p>": 0, "a": 1, "b": 2}, "<p>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<p>")


@pytest.mark.parametrize(
    ("name", "preset", "bits"),
    [("llama", "w4a16", "4-bit"), ("bert", "fp8-dynamic", "8-bit"), ("dit", "w8a8-dynamic", "8-bit")],
)
def test_a_model_comes_back_by_its_id(
    hub: Hub, checkpoint: Checkpoint, tmp_path: Path, name: str, preset: str, bits: str
) -> None:
    model = quantized(checkpoint(name), name, preset)
    url = hfquant.push_to_hub(model, "me/model", token=TOKEN, commit_message="The first")
    assert url.startswith(f"{hub.endpoint}/me/model/commit/")
    assert hub.commits == [("me/model", "The first")]
    loaded = type(model).from_pretrained("me/model")
    assert quant_layers(loaded).keys() == quant_layers(model).keys()
    assert_same(model, loaded)
    data = card(hub, "me/model").data
    assert data.library_name == ("diffusers" if name == "dit" else "transformers")
    assert data.tags == ["hfquant", bits, preset]
    assert data.base_model is None  # it came from a folder
    assert f'{type(model).__name__}.from_pretrained("me/model")' in card(hub, "me/model").text
    hfquant.save_pretrained(loaded, tmp_path / "model", is_main_process=False)
    assert not (tmp_path / "model" / "README.md").exists()
    hfquant.save_pretrained(loaded, tmp_path / "model")
    saved = (tmp_path / "model" / "README.md").read_text()
    assert dict(sections(saved))["Quantization"] == dict(sections(card(hub, "me/model").text))["Quantization"]


def test_a_pipeline_comes_back_by_its_id(hub: Hub) -> None:
    pipe = pipeline()
    hfquant.quantize(pipe.transformer, None, "w8a8-dynamic")
    hfquant.quantize(pipe.vae, None, "w4a16")
    hfquant.push_to_hub(pipe, "me/pipe", token=TOKEN)
    loaded = DiffusionPipeline.from_pretrained("me/pipe")
    for name in ("transformer", "vae"):
        assert quant_layers(getattr(loaded, name)).keys() == quant_layers(getattr(pipe, name)).keys()
    assert_same(pipe.transformer, loaded.transformer)
    pushed = card(hub, "me/pipe")
    assert pushed.data.library_name == "diffusers"
    assert pushed.data.tags == ["hfquant", "8-bit", "w8a8-dynamic", "4-bit", "w4a16"]
    for heading in (
        "## Quantization of transformer\n",
        "## Quantization of vae\n",
        "## Left in full precision in vae\n",
    ):
        assert heading in pushed.text
    assert 'DiffusionPipeline.from_pretrained("me/pipe")' in pushed.text


def test_an_affiner_comes_back_by_its_id(hub: Hub) -> None:
    affiner = BlockwiseAffiner({"solver": {"blocksize": 2}})
    real = torch.randn(6, 2, 4, 4)
    affiner.observe(10.0, real, real * 0.9 + 0.1)
    affiner.solve(10.0)
    affiner.push_to_hub("me/affiner", token=TOKEN)
    affiner.push_to_hub("me/pipe", subfolder="affiner", token=TOKEN)
    for loaded in (
        BlockwiseAffiner.from_pretrained("me/affiner"),
        BlockwiseAffiner.from_pretrained("me/pipe", subfolder="affiner"),
    ):
        assert torch.equal(loaded.correct(10.0, real), affiner.correct(10.0, real))
    assert card(hub, "me/affiner").data.tags == ["hfquant", "affiner"]
    assert "mean squared error of predictions" in card(hub, "me/affiner").text
    assert {path for path in hub.repos["model", "me/pipe"] if path.endswith(".md")} == {"affiner/README.md"}


def test_a_pipeline_comes_back_with_its_affiner(hub: Hub) -> None:
    pipe = pipeline()
    hfquant.quantize(pipe.transformer, None, "w8a8-dynamic")
    pipe.affiner = BlockwiseAffiner({"solver": {"blocksize": 2}})
    real = torch.randn(6, 4, 4, 4)
    pipe.affiner.observe(10.0, real, real * 0.9 + 0.1)
    pipe.affiner.solve(10.0)
    hfquant.push_to_hub(pipe, "me/pipe", token=TOKEN)
    assert len(hub.commits) == 1
    loaded = load_pipeline(DiffusionPipeline, "me/pipe")
    again = hfquant.load_affiner({"pretrained": "me/pipe", "subfolder": "affiner"})
    hfquant.push_to_hub(loaded, "me/copy", token=TOKEN)  # with the affiner attached
    for affiner in (loaded.affiner, again, load_pipeline(DiffusionPipeline, "me/copy").affiner):
        assert torch.equal(affiner.correct(10.0, real), pipe.affiner.correct(10.0, real))
    text = card(hub, "me/pipe").text
    assert 'load_pipeline(DiffusionPipeline, "me/pipe")' in text
    assert "## Affiner\n" in text
    assert "mean squared error of predictions" in text


def test_the_command_line_pushes_the_affiner_of_a_recipe(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    load_digits_pipeline().save_pretrained(tmp_path / "digits")
    Dataset.from_dict({"label": list(range(4))}).to_parquet(tmp_path / "labels.parquet")
    recipe = {
        "title": "digits",
        "models": ["digits"],
        "loads": "DigitsPipeline",
        "components": {"transformer": {"config": "w4a16"}},
        "calibration": {
            "data": {"dataset": str(tmp_path / "labels.parquet"), "column": "label", "samples": 4},
            "call": {"num_inference_steps": 2},
        },
        "affiner": {"stepper": {"sample_size": 4}, "solver": {"blocksize": None}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    out = ["--out", str(tmp_path / "q"), "--push", "me/digits"]
    command = ["quantize", str(tmp_path / "digits"), "--recipe", str(tmp_path / "recipe.yaml"), *out]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    pipe = load_pipeline(DigitsPipeline, "me/digits")
    assert pipe.affiner.timesteps == BlockwiseAffiner.from_pretrained(tmp_path / "q" / "affiner").timesteps


def test_a_calibration_set_comes_back_by_its_id(hub: Hub, tmp_path: Path) -> None:
    samples = [{"x": torch.randn(2, 3)} for _ in range(5)]
    made = BaseCalibSet.from_samples(samples)
    made.provenance = {"layer": "transformer", "call": {"authorization": "Bearer abcdefghijk", "steps": 4}}
    hfquant.push_to_hub(made, "me/calib", token=TOKEN, chunk_size=2)
    hfquant.push_to_hub(made, "me/calib", token=TOKEN, chunk_size=4)
    folder = snapshot_download("me/calib", repo_type="dataset", local_dir=tmp_path / "calibration")
    loaded = hfquant.load_calibrate_set(folder)
    assert [s["x"].tolist() for s in loaded] == [s["x"].tolist() for s in samples]
    assert len(list(Path(folder).glob("chunk-*"))) == 2  # the third chunk of the first push is gone
    text = card(hub, "me/calib", "dataset").text
    assert "5 samples of the layer `transformer`" in text
    assert '"steps": 4' in text
    assert "abcdefghijk" not in text


def test_where_the_model_of_a_calibration_set_lies_is_not_published(hub: Hub) -> None:
    """Not even if the set was recorded by a version that stored the path."""
    made = BaseCalibSet.from_samples([{"x": torch.randn(2, 3)}])
    made.provenance = {"layer": "", "model": {"class": "Net", "name": "/home/me/secret/llm", "weights": "0a"}}
    hfquant.push_to_hub(made, "me/calib", token=TOKEN)
    published = hub.repos["dataset", "me/calib"]
    assert not [path for path, content in published.items() if b"secret" in content]
    assert '"name": "llm"' in card(hub, "me/calib", "dataset").text
    assert made.provenance["model"]["name"] == "/home/me/secret/llm"


def test_the_librarys_own_push_has_our_tags_and_keeps_our_card(hub: Hub, checkpoint: Checkpoint) -> None:
    model = quantized(checkpoint("llama"), preset="w4a16")
    model.push_to_hub("me/own", token=TOKEN)
    assert card(hub, "me/own").data.tags == ["hfquant", "4-bit", "w4a16"]
    assert_same(model, type(model).from_pretrained("me/own"))
    hfquant.push_to_hub(model, "me/ours", token=TOKEN)
    before = hub.repos["model", "me/ours"]["README.md"]
    type(model).from_pretrained("me/ours").push_to_hub("me/ours", token=TOKEN)
    assert ModelCard(before.decode()).text == card(hub, "me/ours").text
    model.dequantize()
    assert model.model_tags == []


def test_a_second_push_keeps_what_a_person_wrote(hub: Hub, checkpoint: Checkpoint) -> None:
    hfquant.push_to_hub(quantized(checkpoint("llama"), preset="w8a16"), "me/model", token=TOKEN)
    files = hub.repos["model", "me/model"]
    text = files["README.md"].decode().replace("library_name: transformers", "library_name: mine\nlicense: mit")
    text = text.replace("## Quantization\n", "## Evaluation\n\nBetter than I thought.\n\n## Quantization\n")
    files["README.md"] = text.encode()
    hfquant.push_to_hub(quantized(checkpoint("llama"), preset="w4a16"), "me/model", token=TOKEN)
    pushed = card(hub, "me/model")
    assert "Better than I thought." in pushed.text
    assert (pushed.data.library_name, pushed.data.license) == ("mine", "mit")
    assert pushed.data.tags == ["hfquant", "4-bit", "w4a16"]
    assert '"int8"' not in pushed.text
    assert "int4, groups of 32" in pushed.text


def test_shards_of_an_earlier_push_go(hub: Hub, checkpoint: Checkpoint) -> None:
    model = quantized(checkpoint("llama"))
    hfquant.push_to_hub(model, "me/model", token=TOKEN, max_shard_size="20kB")
    files = hub.repos["model", "me/model"]
    assert len([path for path in files if path.endswith(".safetensors")]) > 1
    files["other.safetensors"] = b"a person's"
    hfquant.push_to_hub(model, "me/model", token=TOKEN)
    left = {path for path in hub.repos["model", "me/model"] if "safetensors" in path}
    assert left == {"model.safetensors", "other.safetensors"}
    assert_same(model, type(model).from_pretrained("me/model"))


def test_a_push_to_a_branch_leaves_the_main_one_alone(hub: Hub, checkpoint: Checkpoint) -> None:
    hfquant.push_to_hub(quantized(checkpoint("llama")), "me/model", token=TOKEN, max_shard_size="20kB")
    before = dict(hub.repos["model", "me/model"])
    smaller = quantized(checkpoint("llama"), preset="w4a16")
    options = {"commit_message": "four bits", "commit_description": "for phones"}
    for _ in range(2):  # the branch is new, and then it exists
        hfquant.push_to_hub(smaller, "me/model", revision="w4", token=TOKEN, **options)
    assert hub.repos["model", "me/model"] == before
    on_branch = hub.repos["model", "me/model@w4"]
    assert [path for path in on_branch if path.endswith(".safetensors")] == ["model.safetensors"]
    assert ModelCard(on_branch["README.md"].decode()).data.tags == ["hfquant", "4-bit", "w4a16"]
    assert_same(smaller, type(smaller).from_pretrained("me/model", revision="w4"))
    assert hub.commits[-1] == ("me/model@w4", "four bits")


@pytest.mark.parametrize("exists", [False, True])
def test_no_permission_is_one_clear_error(hub: Hub, checkpoint: Checkpoint, exists: bool) -> None:
    """For a repository that cannot be created, and for one that can be read but not written."""
    model = quantized(checkpoint("llama"))
    before = {"README.md": b"theirs"}
    if exists:
        hub.repos["model", "other/model"] = dict(before)
    hub.closed.add("other")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for token in (TOKEN, "hf_" + "stranger" * 4):
        with pytest.raises(PermissionError, match=r"other/model: .* may not write|other/model: .*\(403\)") as caught:
            hfquant.push_to_hub(model, "other/model", token=token)
        assert "hf auth login" in str(caught.value)
        assert token not in str(caught.value)
    assert hub.repos == ({("model", "other/model"): before} if exists else {})
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_token_reaches_no_file_and_no_log(
    hub: Hub,
    checkpoint: Checkpoint,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    model = quantized(checkpoint("llama"))
    with caplog.at_level(logging.DEBUG):
        hfquant.push_to_hub(model, "me/model", token=TOKEN)
        hfquant.save_pretrained(model, tmp_path / "saved")
    pushed = b"".join(content for files in hub.repos.values() for content in files.values())
    saved = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    printed = capfd.readouterr()
    assert TOKEN.encode() not in pushed + saved
    assert TOKEN not in caplog.text + printed.out + printed.err
    assert str(checkpoint("llama")).encode() not in pushed + saved  # nor any path on this machine


def test_what_the_source_has_goes_along(hub: Hub, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Tokenizer, license, language and the base model's id come from the Hub, and then again from the pushed model."""
    api = HfApi(token=TOKEN)
    api.create_repo("base/float")
    folder = tmp_path / "float"
    small_models.llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [big]\n---\n# Float\n")
    api.upload_folder(repo_id="base/float", folder_path=folder)
    model = quantized("base/float", preset="w4a16")
    hfquant.push_to_hub(model, "me/quantized", token=TOKEN)
    data = card(hub, "me/quantized").data
    assert (data.base_model, data.base_model_relation) == ("base/float", "quantized")
    assert (data.license, data.language) == ("apache-2.0", ["en", "de"])
    assert data.tags == ["hfquant", "4-bit", "w4a16"]
    assert AutoTokenizer.from_pretrained("me/quantized").vocab == tokenizer().vocab

    files = hub.repos["model", "me/quantized"]
    files["README.md"] += b"\n## Thanks\n\nTo all.\n"
    again = type(model).from_pretrained("me/quantized")
    hfquant.save_pretrained(again, tmp_path / "again")
    saved = ModelCard.load(tmp_path / "again" / "README.md")
    assert (saved.data.base_model, saved.data.license) == ("base/float", "apache-2.0")
    assert "To all." in saved.text
    assert (tmp_path / "again" / "tokenizer.json").is_file()


def test_a_tokenizer_that_is_there_stays(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "float"
    small_models.llama().save_pretrained(source)
    tokenizer().save_pretrained(source)
    mine = tmp_path / "quantized" / "tokenizer_config.json"
    mine.parent.mkdir()
    mine.write_text("{}")
    hfquant.save_pretrained(quantized(source), mine.parent)
    assert mine.read_text() == "{}"
    assert not (mine.parent / "tokenizer.json").exists()


def test_what_the_data_was_outlives_a_reload(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """config.json records the data; measurements are only in the card, and stay there as long as the recipe does."""
    ids = [{"input_ids": torch.randint(3, 40, (2, 9))} for _ in range(3)]
    recorded = BaseCalibSet.from_samples(ids)
    recorded.provenance = {"layer": "model", "sampler": {"class": "LanguageModelSampler", "seed": 7}}
    model = quantized(checkpoint("llama"), preset="w8a8-smooth", calibration=recorded)
    hfquant.save_pretrained(model, tmp_path / "first")
    stored = json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]
    assert stored["provenance"] == recorded.provenance
    loaded = type(model).from_pretrained(tmp_path / "first")
    hfquant.save_pretrained(loaded, tmp_path / "second")
    text = (tmp_path / "second" / "README.md").read_text()
    assert "'seed': 7" in text
    assert "## Measured while quantizing" in text
    other = quantized(checkpoint("llama"), preset="w8a8-dynamic")
    hfquant.save_pretrained(other, tmp_path / "second")
    text = (tmp_path / "second" / "README.md").read_text()
    assert "## Measured while quantizing" not in text
    assert "## Calibration data" not in text


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", ["quantize", "from_pretrained", "reloaded"])
@pytest.mark.parametrize("create", [small_models.flux, small_models.llama])
def test_what_has_been_saved_is_saved_again(create: Callable[[], Any], how: str, tmp_path: Path) -> None:
    """Saving changes diffusers' config: its item of our config becomes a dict."""
    model = create()
    model.save_pretrained(tmp_path / "float")
    if how == "quantize":
        hfquant.quantize(model, None, "w4a16")
    else:
        model = type(model).from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig("w4a16"))
    if how == "reloaded":
        model.save_pretrained(tmp_path / "quantized")
        model = type(model).from_pretrained(tmp_path / "quantized")
    model.save_pretrained(tmp_path / "own")
    for name in ("first", "second"):
        hfquant.save_pretrained(model, tmp_path / name)
        assert (tmp_path / name / "config.json").read_text() == (tmp_path / "own" / "config.json").read_text()
    assert "w4a16" in (tmp_path / "second" / "README.md").read_text()


def test_a_distilled_denoiser_that_has_been_saved_says_so(tmp_path: Path) -> None:
    model = small_models.flux()
    hfquant.quantize(model, None, "w4a16")
    model.save_pretrained(tmp_path / "before")
    note_distillation(model, {"steps": 3}, [small_models.denoiser_inputs(model)])
    model.save_pretrained(tmp_path / "after")
    found = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after")]
    assert ["distilled" in str(config["quantization_config"].get("provenance")) for config in found] == [False, True]


def test_what_cannot_be_shared(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"expected a model of transformers or diffusers, a pipeline, .* got Linear"):
        hfquant.save_pretrained(nn.Linear(2, 2), tmp_path)
    for thing in (small_models.llama(), pipeline()):
        with pytest.raises(ValueError, match=f"{type(thing).__name__} has no quantized layer"):
            hfquant.push_to_hub(thing, "me/float")
    model = quantized(checkpoint("llama"))
    with pytest.raises(TypeError, match=r"LlamaForCausalLM.save_pretrained has no option 'shards'; .*max_shard_size"):
        hfquant.save_pretrained(model, tmp_path, shards=2)
    with pytest.raises(TypeError, match=r"LlamaForCausalLM.save_pretrained has no option 'branch'"):
        hfquant.push_to_hub(model, "me/model", branch="w4")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="LlamaForCausalLM has adapters"):
        hfquant.save_pretrained(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


class Extra(LlamaForCausalLM):
    """A class of a user's own, with an option of its own."""

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        (Path(save_directory) / "extra.txt").write_text(kwargs.pop("extra"))
        super().save_pretrained(save_directory, **kwargs)


def test_options_that_are_taken(checkpoint: Checkpoint, tmp_path: Path) -> None:
    hfquant.save_pretrained(quantized(checkpoint("llama")), tmp_path, safe_serialization=True, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (tmp_path / "own").mkdir()
    model = Extra.from_pretrained(checkpoint("llama"), quantization_config=HfQuantConfig("w8a16"))
    hfquant.save_pretrained(model, tmp_path / "own", extra="more")
    assert (tmp_path / "own" / "extra.txt").read_text() == "more"


@pytest.mark.parametrize("subfolder", ["", "llm"])
def test_the_tokenizer_and_card_are_those_of_the_revision(subfolder: str, tmp_path: Path) -> None:
    """Also if they are in a subfolder, or in a cache elsewhere."""
    words, others = tokenizer(), tokenizer()
    others.add_tokens(["c"])
    repository = tmp_path / "cache" / "models--me--llama"
    for revision, saved, license in (("main", others, "mit"), ("branch", words, "apache-2.0")):
        snapshot = repository / "snapshots" / (revision[0] * 40)
        for part in (small_models.llama(), saved):
            part.save_pretrained(snapshot / subfolder)
        (snapshot / "README.md").write_text(f"---\nlicense: {license}\n---\n")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(snapshot.name)
    places = {"cache_dir": tmp_path / "cache", "revision": "branch", "subfolder": subfolder}
    model = AutoModelForCausalLM.from_pretrained("me/llama", quantization_config=HfQuantConfig("w4a16"), **places)
    hfquant.save_pretrained(model, tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").vocab == words.vocab
    data = ModelCard.load(tmp_path / "saved" / "README.md").data
    assert (data.base_model, data.license) == ("me/llama", "apache-2.0")


def test_a_card_that_cannot_be_read_stops_before_anything_is_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntags: [a\n---\nmine")
    with pytest.raises(CardError, match=r"metadata at the top of README.md cannot be read, fix it first"):
        hfquant.save_pretrained(quantized(checkpoint("llama")), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


FRESH = """
import sys
import hfquant
from diffusers import DiffusionPipeline
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/model")
assert isinstance(model.model.layers[0].mlp.up_proj, hfquant.QuantLinear)
hfquant.push_to_hub(model, "me/copy")
assert DiffusionPipeline.from_pretrained("me/pipe").transformer.is_quantized
"""


@pytest.mark.slow
def test_a_fresh_process_through_the_environment(hub: Hub, checkpoint: Checkpoint, tmp_path: Path) -> None:
    hfquant.push_to_hub(quantized(checkpoint("llama")), "me/model", token=TOKEN)
    pipe = pipeline()
    hfquant.quantize(pipe.transformer, None, "w8a8-dynamic")
    hfquant.push_to_hub(pipe, "me/pipe", token=TOKEN)
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}
    done = subprocess.run([sys.executable, "-c", FRESH], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.repos["model", "me/copy"]["model.safetensors"] == hub.repos["model", "me/model"]["model.safetensors"]
    assert TOKEN not in done.stdout + done.stderr
