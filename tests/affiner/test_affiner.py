"""Saving, loading, the Hub, and damaged or hostile files."""

import json

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from hfquant.affiner import BlockwiseAffiner, load_affiner, load_pipeline
from hfquant.demo import DigitsPipeline, load_digits_pipeline
from hfquant.report.affiner import plot_affiner


@pytest.fixture(scope="module")
def digits():
    real, quant = load_digits_pipeline(), load_digits_pipeline()
    with torch.no_grad():
        for parameter in quant.transformer.parameters():
            parameter.mul_(32).round_().div_(32)
    for pipe in (real, quant):
        pipe.set_progress_bar_config(disable=True)
    return real, quant


@pytest.fixture(scope="module")
def affiner(digits):
    """An affiner with everything that can be stored: two tables and block maps."""
    config = {
        "stepper": {"max_timestep": 3, "enable_latent_affine": True},
        "solver": {"blocksize": 3, "sample_mode": "interpolate"},
        "blocks": {"modules": ["transformer_blocks.*"], "timesteps": 1},
    }
    return load_affiner(config, [0, 1, 2], *digits)


def images(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe([1, 7], 3, generator=generator, output_type="pt").images


def test_round_trip_is_bit_identical(affiner, digits, tmp_path):
    quant = digits[1]
    with affiner.attach(quant):
        expected = images(quant)
    affiner.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["affiner.safetensors", "affiner_config.json"]
    for loaded in (BlockwiseAffiner.from_pretrained(tmp_path), load_affiner({"pretrained": tmp_path})):
        assert loaded.config == affiner.config
        assert loaded.errors == affiner.errors
        with loaded.attach(quant):
            assert torch.equal(images(quant), expected)
    assert not torch.equal(images(quant), expected)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    for name in ("affiner.safetensors", "affiner_config.json"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_pipelines_folder_brings_its_affiner(affiner, digits, tmp_path):
    digits[1].save_pretrained(tmp_path)
    assert load_pipeline(DigitsPipeline, tmp_path).affiner is None
    affiner.save_pretrained(tmp_path / "affiner")
    assert load_affiner({"pretrained": tmp_path, "subfolder": "affiner"}).errors == affiner.errors
    pipe = load_pipeline(DigitsPipeline, tmp_path)
    pipe.set_progress_bar_config(disable=True)
    with affiner.attach(digits[1]):
        expected = images(digits[1])
    assert torch.equal(images(pipe), expected)
    pipe.affiner.detach()
    assert torch.equal(images(pipe), images(digits[1]))


def test_a_cached_pipeline_loads_offline_without_an_affiner(monkeypatch):
    """Offline, nothing tells whether the repository has an affiner; online, a failed download is an error."""

    class Pipe:
        @classmethod
        def from_pretrained(cls, name):
            return cls()

    def missing(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", missing)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(LocalEntryNotFoundError):
        load_pipeline(Pipe, "user/pipe")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_pipeline(Pipe, "user/pipe").affiner is None


def edit_json(folder, **changes):
    path = folder / "affiner_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "affiner.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def scale(change):
    def edit(folder):
        edit_tensors(folder, lambda t: t.update({"prediction.scale": change(t["prediction.scale"]).contiguous()}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "affiner_config.json").write_text("{"), "is damaged"),
        (lambda d: (d / "affiner_config.json").write_text("[" * 100_000), "is damaged"),
        (lambda d: edit_json(d, format="other"), "not the config of an affiner: format"),
        (lambda d: edit_json(d, version=99), "of another version, .*: version: Input should be 1"),
        (lambda d: edit_json(d, config={"type": "gan"}), "config.type"),
        (lambda d: edit_json(d, size=[10**6, 10**6]), "size of prediction: expected at most"),
        (lambda d: edit_json(d, size=[8192, 8192]), "size of prediction: expected at most"),
        (lambda d: edit_json(d, size="8"), "size: Input should be a valid"),
        (lambda d: edit_json(d, size=[4, 4]), "do not fit a grid of \\[4, 4\\]"),
        (lambda d: edit_json(d, uncond_half=2), "uncond_half"),
        (lambda d: edit_json(d, blocks=[["a", 0], [1, 2]]), "blocks"),
        (lambda d: (d / "affiner.safetensors").write_bytes(b"\xff" * 100), "is damaged"),
        (lambda d: edit_tensors(d, lambda t: t.pop("prediction.shift")), "no tensor 'prediction.shift'"),
        (lambda d: edit_tensors(d, lambda t: t.pop("blocks.0.scale")), "no tensor 'blocks.0.scale'"),
        (scale(lambda t: t.double()), "must be finite torch.float32, got torch.float64"),
        (scale(lambda t: t * float("inf")), "must be finite"),
        (scale(lambda t: t[:, :, :2]), "do not fit a grid"),
        (scale(lambda t: t[0]), "do not fit a grid"),
    ],
)
def test_damage_is_named(affiner, tmp_path, damage, message):
    affiner.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        BlockwiseAffiner.from_pretrained(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not the folder of an affiner"):
        BlockwiseAffiner.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        BlockwiseAffiner.from_pretrained(tmp_path / "gone")
    with pytest.raises(ValueError, match="nothing to save"):
        BlockwiseAffiner({}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='"pretrained" can only be combined with "subfolder"'):
        load_affiner({"pretrained": tmp_path, "stepper": {}})


def test_the_plot_is_a_picture_of_all_timesteps(affiner, tmp_path):
    figure = plot_affiner(affiner, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    before, after = (line.get_xydata().tolist() for line in figure.axes[0].lines)
    assert before == [[t, e[0]] for t, e in affiner.errors.items()]
    assert after == [[t, e[1]] for t, e in affiner.errors.items()]
    with pytest.raises(ValueError, match="has not been fitted"):
        plot_affiner(BlockwiseAffiner({}), tmp_path / "none.png")
