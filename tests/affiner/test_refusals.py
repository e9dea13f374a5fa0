"""What cannot be fitted is refused with a message that gives the reason, and leaves no trace."""

import copy

import pytest
import torch
from datasets import Dataset, DatasetDict
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from torch.utils.data import DataLoader

from hfquant.affiner import load_affiner
from hfquant.config import ConfigError
from tests.affiner.pipelines import Recorder, Toy, noise, toy_config


class Broken(Toy):
    """Predicts NaN from the third call onward."""

    calls = 0

    def forward(self, sample, timestep, class_labels=None):
        self.calls += 1
        (out,) = super().forward(sample, timestep, class_labels)
        return (out * float("nan") if self.calls > 2 else out,)


class Stepless(DDIMScheduler):
    """Has no scheduler that an affiner could hook."""

    def step(self, residual, timestep): ...


class Frames(torch.nn.Module):
    """Accepts latents of any layout; its config gives the number of channels."""

    def __init__(self, channels):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))
        self.config = type("Config", (), {"in_channels": 2 * channels, "out_channels": channels})()

    def forward(self, sample, timestep):
        return (sample * self.gain,)


@pytest.mark.parametrize(
    ("channels", "shape", "message"),
    [
        (3, (3, 3, 6, 6), "take another number of frames"),
        (2, (4, 2, 6, 6), r"\[2, 4, 2, 6, 6\] may be"),  # as many frames as input channels
        (4, (4, 9), r"packed tokens \[B, L, C\]; \[2, 4, 9\] looks like \[B, C, L\]"),
        (4, (2, 5, 6, 6), None),
        (2, (2, 5, 6, 6), None),
        (4, (9, 4), None),
        (4, (4, 4), None),
    ],
)
def test_layouts_that_would_be_misread_are_refused(channels, shape, message):
    def fit():
        latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        return load_affiner(toy_config(), [{}] * 2, Frames(channels), Frames(channels), latents=latents)

    if message is None:
        channels = shape[0] if len(shape) == 4 else shape[-1]
        assert {len(scale) for scale, _ in fit().prediction.table.values()} == {channels}
    else:
        with pytest.raises(ValueError, match=message):
            fit()


class Narrow(Toy):
    """Predicts one of two channels."""

    def forward(self, sample, timestep, class_labels=None):
        return (super().forward(sample, timestep, class_labels)[0][:, :1],)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dataset": []}, ValueError, "dataset is empty"),
        ({"dataset": "a prompt"}, TypeError, "dataset must be"),
        ({"dataset": [{"class_labels": 1, "colour": 2}]}, ValueError, "does not accept \\['colour'\\]"),
        ({"dataset": [(1, 2)]}, ValueError, "expected a dict"),
        ({"dataset": iter([])}, ValueError, "dataset is empty"),
        ({"dataset": None}, TypeError, "dataset must be .*got NoneType"),
        ({"dataset": DataLoader([0, 1, 2])}, TypeError, "dataset must be .*got DataLoader"),
        ({"dataset": DatasetDict(train=Dataset.from_dict({"label": [0]}))}, TypeError, "got DatasetDict"),
        (
            {"dataset": iter(range(3)), "config": toy_config(sample_size=9)},
            ValueError,
            "sample_size=9, but the dataset has 3 rows",
        ),
        ({"latents": noise(2)}, ValueError, "noise for 2 samples, 3 are needed"),
        ({"model_quant": Narrow()}, ValueError, r"real one predicts \[2, 2, 6, 6\], the quantized one \[2, 1, 6, 6\]"),
        ({"model_quant": "model"}, TypeError, "both be pipelines or both be denoisers"),
        ({"model_quant": Broken()}, ValueError, "quantized model predicts NaN or infinity at timestep"),
        ({"model_real": Broken()}, ValueError, "real model predicts NaN"),
        ({"config": {"stepper": {"max_timestep": 2}}}, ConfigError, "scheduler"),
        ({"config": {**toy_config(), "stepper": {"sample_size": 9}}}, ValueError, "sample_size=9"),
        ({"config": {**toy_config(), "extra_args": {"colour": 1}}}, ValueError, "extra_args"),
        ({"config": {**toy_config(), "blocks": {"modules": ["nothing"]}}}, ValueError, "no module of Toy matches"),
        ({"config": "fast"}, TypeError, "is a dict"),
        ({"config": toy_config(enable_timesteps=[0, 4])}, ValueError, "has step 4, but the last .* is 3"),
        ({"config": toy_config(Stepless())}, ValueError, r"Stepless has no step\(model_output"),
        ({"thirdparty_affiner": object()}, TypeError, "lacks observe, solve or correct"),
        (
            {"thirdparty_affiner": Recorder(), "config": toy_config(enable_timesteps=[0])},
            ConfigError,
            "enable_timesteps do not apply to a thirdparty_affiner",
        ),
        (
            {"thirdparty_affiner": Recorder(), "config": {**toy_config(), "blocks": {"modules": ["inner"]}}},
            ConfigError,
            "do not apply to a thirdparty_affiner",
        ),
    ],
)
def test_bad_input_is_refused_and_leaves_no_trace(change, error, message):
    given = {
        "config": toy_config(),
        "dataset": [0, 1, 2],
        "model_real": Toy().train(),
        "model_quant": Toy(),
        "latents": noise(3),
        **change,
    }
    with pytest.raises(error, match=message):
        load_affiner(**given)
    for model in (given["model_real"], given["model_quant"]):
        if isinstance(model, torch.nn.Module):
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if "model_real" not in change:
        assert given["model_real"].training


def test_unlike_pipelines_are_refused(digits):
    other = copy.deepcopy(digits)
    other.scheduler = DDIMScheduler.from_config(digits.scheduler.config)
    with pytest.raises(ValueError, match="schedulers differ in class: 'DPMSolverMultistepScheduler"):
        load_affiner({}, [1], digits, other)
    other.scheduler = copy.deepcopy(digits.scheduler)
    other.transformer = DiTTransformer2DModel.from_config(dict(digits.transformer.config) | {"in_channels": 2})
    with pytest.raises(ValueError, match="denoisers differ in in_channels: 1 and 2"):
        load_affiner({}, [1], digits, other)
    other.scheduler = type(digits.scheduler).from_config(digits.scheduler.config, solver_order=1)
    with pytest.raises(ValueError, match="schedulers differ in solver_order: 2 and 1"):
        load_affiner({}, [1], digits, other)
    with pytest.raises(TypeError, match="both be pipelines or both be denoisers"):
        load_affiner({"scheduler": DDPMScheduler()}, [1], digits, Toy())


def test_an_affiner_that_is_attached_is_in_the_way(digits):
    quant = copy.deepcopy(digits)
    affiner = load_affiner({"stepper": {"max_timestep": 2}}, [1], digits, quant)
    with affiner.attach(quant):
        with pytest.raises(ValueError, match="detach"):
            load_affiner({"stepper": {"max_timestep": 2}}, [1], digits, quant)
        with pytest.raises(ValueError, match="detach"):
            affiner.attach(quant)
    bare = Toy(gain=[0.9, 1.1])
    affiner = load_affiner(toy_config(), [0, 1], Toy(), bare, latents=noise(2))
    with affiner.attach(bare), pytest.raises(ValueError, match="detach"):
        load_affiner(toy_config(), [0, 1], Toy(), bare, latents=noise(2))
