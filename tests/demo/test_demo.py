"""The embedded denoiser draws digits, its pipeline samples as the papers define, and the demo command runs."""

import inspect
import subprocess
import sys
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from safetensors.torch import load_file

from hfquant import QuantLinear
from hfquant.demo import DIGITS_PATH, DigitsPipeline, load_digits_pipeline, rows, train
from hfquant.demo import __main__ as demo
from hfquant.demo.classifier import agreement, classifier, digits_split

ROOT = Path(__file__).parents[2]
LABELS_200 = list(range(10)) * 20


@pytest.fixture(scope="module")
def embedded() -> DigitsPipeline:
    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(embedded) -> DigitsPipeline:
    """The embedded pipeline with its own scheduler, which a test may replace."""
    pipe = DigitsPipeline(embedded.transformer, DPMSolverMultistepScheduler.from_config(embedded.scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_embedded_files_are_small_and_hold_no_code():
    files = [f for f in DIGITS_PATH.rglob("*") if f.is_file()]
    assert {f.suffix for f in files} == {".json", ".safetensors"}
    assert sum(f.stat().st_size for f in files) <= 4_000_000


def test_classifier_reads_held_out_digits():
    train, held_out, train_labels, labels = digits_split()
    assert train.shape == (1437, 8, 8)
    assert held_out.shape == (360, 8, 8)
    assert np.bincount(train_labels).min() > 130
    assert classifier().score(held_out.reshape(-1, 64), labels) >= 0.98
    assert agreement(held_out[..., None], labels) == classifier().score(held_out.reshape(-1, 64), labels)
    assert agreement(torch.from_numpy(held_out)[:, None], torch.from_numpy((labels + 1) % 10)) <= 0.02


@pytest.mark.parametrize("shape", [(3, 8, 8, 1), (4, 3, 8, 8), (4, 8, 7)])
def test_agreement_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="8x8"):
        agreement(np.zeros(shape, np.float32), [0, 1, 2, 3])


def test_samples_are_recognisable(pipe):
    images = pipe(LABELS_200, num_inference_steps=20, generator=seeded(), output_type="pt").images
    assert images.shape == (200, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert agreement(images, LABELS_200) >= 0.9
    # Ten repeated pictures would be recognizable too: samples of a class must differ about as much as real ones do.
    real, _, real_labels, _ = digits_split()
    drawn = images.reshape(20, 10, 64).std(dim=0).mean(dim=1)
    spread = torch.stack(
        [torch.from_numpy(real[real_labels == d]).reshape(-1, 64).std(dim=0).mean() for d in range(10)]
    )
    assert ((drawn / spread > 0.7) & (drawn / spread < 1.3)).all(), drawn / spread


# EDM's preconditioning is refused (below); DPMSolverSDE needs a package that hfquant does not depend on.
SCHEDULERS = sorted({s.name for s in KarrasDiffusionSchedulers} - {"EDMEulerScheduler", "DPMSolverSDEScheduler"})


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_samples_with_every_scheduler(pipe, scheduler):
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    labels = list(range(10))
    images = pipe(labels, num_inference_steps=20, generator=seeded(), output_type="np").images
    assert images.shape == (10, 8, 8, 1)
    assert agreement(images, labels) >= 0.9


def test_ddim_with_guidance_matches_the_formulas(pipe):
    """DDIM (arXiv 2010.02502, eq. 12, eta 0) with guided noise (arXiv 2207.12598, eq. 6), written out in float64."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="leading")
    labels, weight, steps = torch.tensor([3, 7, 1]), 2.5, 10
    x = torch.randn(3, 1, 8, 8, generator=seeded())
    images = pipe(
        labels, num_inference_steps=steps, guidance_scale=weight, latents=x.clone(), output_type="pt", return_dict=False
    )[0]

    config = pipe.scheduler.config
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)

    def noise(x: torch.Tensor, t: int, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return pipe.transformer(x.float(), torch.full((3,), t), labels).sample.double()

    x = x.double()
    for t in range(900, -1, -100):
        null = noise(x, t, torch.full((3,), 10))
        eps = null + weight * (noise(x, t, labels) - null)
        a, a_next = alpha_bar[t], alpha_bar[t - 100] if t else 1.0
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x = a_next**0.5 * x0 + (1 - a_next) ** 0.5 * eps
    expected = ((x + 1) / 2).clamp(0, 1).float()
    torch.testing.assert_close(images, expected, atol=2e-4, rtol=0)


def test_guidance_costs_a_second_batch_only_when_on(pipe):
    batches = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    try:
        pipe([4, 2], num_inference_steps=2, guidance_scale=1.0, generator=seeded())
        pipe([4, 2], num_inference_steps=1, guidance_scale=2.0, generator=seeded())
    finally:
        handle.remove()
    assert batches == [[4, 2], [4, 2], [4, 2, 10, 10]]


def test_noise_comes_from_the_generator_alone(pipe):
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)  # also draws noise in its steps
    run = {"class_labels": [0, 8], "num_inference_steps": 3, "output_type": "np"}
    first = pipe(**run, generator=seeded(5)).images
    torch.manual_seed(99)
    assert np.array_equal(first, pipe(**run, generator=seeded(5)).images)
    assert not np.array_equal(first, pipe(**run, generator=seeded(6)).images)

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    plain = pipe(**run, generator=seeded(5)).images
    latents = torch.randn(2, 1, 8, 8, generator=seeded(5))
    assert np.array_equal(plain, pipe(**run, latents=latents).images)
    single = pipe(**run, generator=[seeded(5), seeded(6)]).images
    np.testing.assert_allclose(single[:1], pipe(**{**run, "class_labels": 0}, generator=seeded(5)).images, atol=1e-5)
    assert not np.array_equal(plain, pipe(**run, generator=seeded(5), eta=1.0).images)


def test_output_types_hold_the_same_images(pipe):
    run = {"class_labels": [6, 9], "num_inference_steps": 2}
    tensor = pipe(**run, generator=seeded(), output_type="pt").images
    array = pipe(**run, generator=seeded(), output_type="np").images
    (pictures,) = pipe(**run, generator=seeded(), return_dict=False)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert [(p.size, p.mode) for p in pictures] == [((8, 8), "L")] * 2
    assert np.array_equal(np.stack(pictures), (array[..., 0] * 255).round().astype(np.uint8))


def test_half_precision_denoiser(pipe):
    reference = pipe(LABELS_200[:20], generator=seeded(), output_type="pt").images
    half = load_digits_pipeline(dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.dtype == torch.bfloat16
    images = half(LABELS_200[:20], generator=seeded(), output_type="pt").images
    assert images.dtype == torch.float32
    assert (images - reference).square().mean() < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [10]}, "0 to 9"),
        ({"class_labels": [-1]}, "0 to 9"),
        ({"class_labels": []}, "at least one"),
        ({"class_labels": [0.5]}, "integers"),
        ({"class_labels": [1], "latents": torch.zeros(2, 1, 8, 8)}, r"\[1, 1, 8, 8\], got \[2, 1, 8, 8\]"),
        ({"class_labels": [1], "output_type": "latent"}, "'latent'"),
    ],
)
def test_bad_arguments(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_schedulers_that_do_not_take_noise_predictions_are_refused(pipe):
    base = pipe.scheduler.config
    for scheduler in (
        DDIMScheduler.from_config(base, prediction_type="v_prediction"),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.EDMEulerScheduler(),
    ):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=type(scheduler).__name__):
            pipe([1], num_inference_steps=2)


def test_saved_pipeline_loads_through_every_door(pipe, tmp_path, monkeypatch):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "pipe")
    expected = pipe([5, 2], num_inference_steps=3, generator=seeded(), output_type="np").images

    modules = tmp_path / "modules"
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", list(sys.path))
    custom = DiffusionPipeline.from_pretrained(
        tmp_path / "pipe", custom_pipeline=str(Path(inspect.getfile(DigitsPipeline)).parent), trust_remote_code=True
    )
    loaded = [
        DigitsPipeline.from_pretrained(tmp_path / "pipe"),
        DiffusionPipeline.from_pretrained(tmp_path / "pipe"),
        custom,
    ]
    assert type(loaded[1]) is DigitsPipeline
    assert custom.__module__.startswith("diffusers_modules")
    for again in loaded:
        again.set_progress_bar_config(disable=True)
        assert isinstance(again.scheduler, DDIMScheduler)
        images = again([5, 2], num_inference_steps=3, generator=seeded(), output_type="np").images
        assert np.array_equal(images, expected)


def test_command_quantizes_saves_and_compares(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hfquant.demo.rows.record_inputs", partial(rows.record_inputs, steps=2))
    names = ["w8a8-dynamic", "w4a8-gptq", "w4a16+affiner"]
    demo.main(["--out", str(tmp_path), "--steps", "4", "--presets", ",".join(names)])
    said = capsys.readouterr().out
    table = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.split()[:1] and " x" in line}
    assert list(table) == ["full", *names]
    assert [table[name][0] for name in names] == ["none", "calibrated", "affiner"]

    linears = {n: m for n, m in load_digits_pipeline().transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    weights = sum(m.weight.numel() for m in linears.values())
    for name in names:
        bits, megabytes, psnr, read = (float(x.rstrip("%")) for x in table[name][1:5])
        saved = load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        stored = sum(t.nbytes for key, t in saved.items() if key.rpartition(".")[0] in linears)
        assert bits == pytest.approx(8 * stored / weights, abs=0.006)
        files = [*(tmp_path / name / "transformer").iterdir(), *(tmp_path / name / "affiner").glob("*")]
        assert megabytes == pytest.approx(sum(file.stat().st_size for file in files) / 1e6, abs=0.006)
        assert psnr > 25
        assert read >= 90
    psnrs = {name: float(table[name][3]) for name in names}
    assert psnrs["w8a8-dynamic"] > psnrs["w4a16+affiner"] + 6
    assert float(table["w4a16+affiner"][1]) < 5 < 8 < float(table["w8a8-dynamic"][1]) < 9

    full = DigitsPipeline.from_pretrained(tmp_path / "full-precision")
    assert not any(isinstance(m, QuantLinear) for m in full.transformer.modules())
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 20
    text = (tmp_path / "report.html").read_text()
    assert "<title>w4a16+affiner: quantization report</title>" in text
    assert text.count('<figure class="pair') == 10
    assert 'id="affiner"' in text
    assert f"{tmp_path / 'report.html'} (w4a16+affiner)" in said
    affined = rows.read_row("w4a16+affiner", tmp_path)
    plain = DigitsPipeline.from_pretrained(tmp_path / "w4a16+affiner")
    run = {"class_labels": [3], "num_inference_steps": 3, "output_type": "np"}
    assert not np.array_equal(affined(**run, generator=seeded()).images, plain(**run, generator=seeded()).images)


@pytest.mark.parametrize("arguments", [["--presets", "w8a8-dynamic,w3a3"], ["--steps", "0"]])
def test_command_refuses_nonsense(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        demo.main(["--out", str(tmp_path / "never"), *arguments])
    assert exit_.value.code == 2
    assert arguments[1].split(",")[-1] in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_imports_stay_light():
    script = (
        "import sys, hfquant; assert 'hfquant.demo' not in sys.modules, 'demo';"
        "import hfquant.demo; assert 'matplotlib' not in sys.modules, 'matplotlib';"
        "assert 'hfquant.demo.classifier' not in sys.modules, 'classifier'"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_denoiser_predicts_the_noise_in_held_out_digits(pipe):
    """The training loss on held-out digits: 1 for predicting zero, 0.081 at the end of training."""
    _, held_out, _, labels = digits_split()
    x0, labels, generator = torch.from_numpy(held_out)[:, None] * 2 - 1, torch.from_numpy(labels), seeded()
    t = torch.arange(len(x0)) * 1000 // len(x0)
    noise = torch.randn(x0.shape, generator=generator)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0)[t][:, None, None, None].float()
    noisy = signal.sqrt() * x0 + (1 - signal).sqrt() * noise
    with torch.no_grad():
        right = (pipe.transformer(noisy, t, labels).sample - noise).square().mean()
        wrong = (pipe.transformer(noisy, t, (labels + 1) % 10).sample - noise).square().mean()
    assert right < 0.12
    assert wrong > 1.2 * right


def test_training_is_seeded():
    model = train.build_transformer()
    image, t, label = torch.randn(2, 1, 8, 8, generator=seeded()), torch.tensor([5, 900]), torch.tensor([3, 10])
    assert not model(image, t, label).sample.any()  # adaLN-Zero

    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(train.train(steps=3, batch_size=8, lr=1e-3))
    first, second = (w.state_dict() for w in weights)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert weights[0](image, t, label).sample.any()
    embedded = load_digits_pipeline().transformer.state_dict()
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in embedded.items()}
