"""The job of the processes in tests/test_distributed.py: each runs every task and writes one results file.

    accelerate launch --num_processes 4 -m tests.distributed_job OUT

Without a launcher, it is the single process that the others are compared with.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import DDIMScheduler
from huggingface_hub import constants
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import hfquant
from hfquant import ptq
from hfquant.cli import app
from hfquant.demo import load_digits_pipeline
from hfquant.distributed import processes
from hfquant.nn.modules import quant_layers
from hfquant.observe import observe
from hfquant.statistics import STATISTICS, Reduction, Statistic
from tests.calibration.tiny_models import tiny_pipeline, tiny_unet
from tests.integrations.small_models import llama_of_64
from tests.nn import fused_experts

STATIC = {"default": {"opt": {"type": "default"}, "input_quant": {"type": "int8"}}}
SEARCH = {"default": {"opt": {"type": "smooth", "search_alpha_config": {"enable": True}}}}
FOLD = {"default": {"opt": {**SEARCH["default"]["opt"], "fold": True}}}
GPTQ = {
    "default": {
        "opt": {"type": "default"},
        "calib": {"type": "gptq"},
        "weight_quant": {"type": "int4", "group_size": 64},
        "input_quant": None,
    }
}
SVD = {"default": {"opt": {"type": "svd", "low_rank": 8}, "weight_quant": {"type": "int4", "axis": -1}}}
MIXED = {**GPTQ, "*down_proj": {"input_quant": {"type": "int16"}, "opt": {"type": "smooth", "alpha": 0.4}}}


def data(count: int, seed: int = 7) -> list[dict[str, Tensor]]:
    """Return ``count`` batches of 2 to 6 sequences of odd lengths."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2 + i % 5, 31 - i) for i in range(count)]
    return [{"input_ids": torch.randint(3, 101, shape, generator=generator)} for shape in shapes]


#: Statistics that hfquant does not have: one line each, and they are merged like the others.
MADE_UP = {
    "magnitudes": Statistic(lambda n: (n,), Reduction.SUM, lambda rows: rows.x.abs().sum(0)),
    "largest": Statistic(lambda n: (n,), Reduction.MAX, lambda rows: rows.x.abs().amax(0)),
}


def statistics() -> dict[str, Tensor]:
    """Return the merged statistics of the layers that this process owns."""
    model = llama_of_64()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    features, needs = {n: m.in_features for n, m in linears.items()}, {n: {"hessian", *MADE_UP} for n in linears}
    with patch.dict(STATISTICS, MADE_UP), processes() as group:
        stats = observe(model, linears, data(5), needs, shard=(group.rank, group.size))
        owners = group.share({n: m.weight.numel() for n, m in linears.items()})
        stats = group.merge(stats, owners, features, needs)
    kept = {}
    for name, found in stats.items():
        kept |= {f"{name}.{key}": value for key, value in found.sums.items()}
        kept |= {f"{name}.sample.{key}": value for key, value in vars(found.sample).items()}
        kept[f"{name}.count"] = torch.tensor([found.count])
    return kept


def quantized(config: Any, batches: Any, **options: Any) -> dict[str, Tensor]:
    """Return a quantized model's state and the reported error of each layer."""
    model = hfquant.quantize(llama_of_64(), batches, config, **options)
    assert len(model.quant_report.layers) == 14
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied
    errors = [layer.error for layer in model.quant_report.layers]
    return {**state, "errors": torch.tensor(errors)}


def chosen() -> dict[str, Tensor]:
    """Search for bits; all processes use what the first one finds."""
    choices = {"search": {"budget": 6.5, "choices": ["int4", "int8"]}}
    state = quantized({**STATIC, **choices}, data(8))
    assert {v.shape[1] for k, v in state.items() if k.endswith(("k_proj.weight", "up_proj.weight"))} == {32, 64}
    return state


def prepared() -> dict[str, Tensor]:
    """Each process has its own data, as from a loader that accelerate prepared; the last one may have none."""
    with processes() as group:
        rank, size = group.rank, group.size
    state = quantized(STATIC, data(3)[rank::size])
    del state["errors"]  # batches are numbered differently here, so other rows are sampled
    return state


def resumed(folder: Path) -> dict[str, Tensor]:
    """Solve once; every process that sees the folder then reuses the result, but not for other data."""
    first = quantized(GPTQ, data(4), resume_dir=folder)
    with patch.object(ptq, "solve", side_effect=AssertionError("solved again")):
        again = quantized(GPTQ, data(4), resume_dir=folder)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(quantized(GPTQ, data(4, seed=8), resume_dir=folder)["errors"], first["errors"])
    return again


def recorded(folder: Path | None) -> dict[str, Tensor]:
    """Generate a calibration set with all processes; sort its samples, as their order depends on who made them."""
    made = hfquant.generate_calibrate_set(
        tiny_pipeline(DDIMScheduler()),
        hfquant.UniformSampler(3),
        [["one prompt"], ["two prompts", "at once"], ["a third"]],
        "unet",
        folder,
        chunk_size=2,
        num_inference_steps=6,
    )
    samples = list(made) if folder is None else sorted(made, key=lambda s: float(s["sample"].sum()))
    return {f"{i}": sample["sample"].contiguous() for i, sample in enumerate(samples)}


def command(out: Path) -> dict[str, Tensor]:
    """Run `hfquant calibrate`; sort the samples, as their order depends on who made them."""
    with processes() as group:
        if group.main:
            load_digits_pipeline().save_pretrained(out / "digits")
            (out / "labels.jsonl").write_text("".join(f'{{"label": {i}}}\n' for i in range(5)))
        group.gather(None)
    source = ["--source", str(out / "labels.jsonl"), "--column", "label", "--batch-size", "2", "--steps", "4"]
    ran = CliRunner().invoke(app, ["calibrate", str(out / "digits"), *source, "--out", str(out / "made"), "--debug"])
    assert ran.exit_code == 0, ran.output
    assert ("samples" in ran.stdout) == group.main
    made = hfquant.load_calibrate_set(out / "made")
    hidden = sorted((s["hidden_states"] for s in made), key=lambda x: float(x.sum()))
    return {f"{i}": tensor.contiguous() for i, tensor in enumerate(hidden)}


def pipeline() -> dict[str, Tensor]:
    """Quantize a pipeline's denoiser on the inputs it sees while the pipeline runs."""
    pipe, sampler = tiny_pipeline(DDIMScheduler(), tiny_unet()), hfquant.UniformSampler(3)
    hfquant.quantize_pipeline(pipe, ["a", "b c", "d"], STATIC, sampler=sampler, num_inference_steps=6)
    assert len(quant_layers(pipe.unet)) > 10
    return dict(pipe.unet.state_dict())


def self_made(out: Path) -> dict[str, Tensor]:
    """Calibrate on text that the model generates, in the first process for all of them."""
    with patch.object(constants, "HF_HOME", str(out / "home")):
        return quantized(STATIC, {"source": "self", "samples": 6, "seqlen": 20})


def mended() -> dict[str, Tensor]:
    """Spoil a layer so that its static scale saturates: one process finds it, and all of them change it."""
    solve, name = ptq.solve, "model.layers.1.mlp.down_proj"

    def saturating(layer: str, *args: Any) -> Any:
        solution = solve(layer, *args)
        if layer == name:
            solution.tensors["input_scale"] /= 100
        return solution

    with patch.object(ptq, "solve", saturating):
        state = quantized(STATIC, data(5))
    assert f"{name}.input_scale" not in state
    assert "model.layers.0.mlp.down_proj.input_scale" in state
    return state


def save_words(folder: Path) -> None:
    """Save a tokenizer of single letters, and a text."""
    words = Tokenizer(
        models.WordLevel({"</s>": 2, "<unk>": 3, **{w: i + 4 for i, w in enumerate("abcdefgh")}}, "<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    (folder / "text.txt").write_text("a b c d e f g h\n\nh g f e\n\n" * 40)


def loaded(out: Path) -> dict[str, Tensor]:
    """Calibrate on streamed text inside from_pretrained, save from one process, and return the checkpoint's bytes."""
    with processes() as group:
        folder, saved = out / "float", out / "saved"
        llama_of_64().save_pretrained(folder)  # transformers writes in the first process only
        if group.main:
            save_words(folder)
        group.gather(None)
        spec = {"dataset": str(folder / "text.txt"), "samples": 7, "seqlen": 20, "batch_size": 2}
        config = hfquant.HfQuantConfig(STATIC, calibration=spec)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        model.save_pretrained(saved)
        group.gather(None)
        file = (saved / "model.safetensors").read_bytes()
    assert len(quant_layers(model)) == 14
    return {"file": torch.frombuffer(bytearray(file), dtype=torch.uint8)}


def not_finite() -> dict[str, Tensor]:
    """One batch of five is not finite, and the model stays unchanged."""
    model, batches = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), [torch.ones(2, 8) for _ in range(5)]
    batches[1][0, 0] = torch.nan
    try:
        hfquant.quantize(model, batches, STATIC)
    finally:
        assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    return {}


def other_models() -> dict[str, Tensor]:
    """Every process has different weights."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    return {"0": hfquant.quantize(nn.Sequential(nn.Linear(8, 8)), [torch.ones(2, 8)], STATIC)[0].weight}


def experts() -> dict[str, Tensor]:
    """Quantize fused experts, one of which gets no row in any process."""
    torch.manual_seed(0)
    model = fused_experts.Model()
    fused_experts.quantized(model, fused_experts.CONFIGS["static, smooth"])
    return model.state_dict()


def tasks(out: Path) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Return every task by name."""
    return {
        "statistics": statistics,
        "static": lambda: quantized(STATIC, data(5)),
        "uneven": lambda: quantized(STATIC, data(3)),
        "one batch": lambda: quantized(SEARCH, data(1)),
        "search": lambda: quantized(SEARCH, data(5)),
        "folded": lambda: quantized(FOLD, data(5), memory_budget=300_000),
        "svd": lambda: quantized(SVD, data(5)),
        "gptq": lambda: quantized(GPTQ, data(5)),
        "mixed": lambda: quantized(MIXED, data(5), memory_budget=1),
        "layer by layer": lambda: quantized(GPTQ, data(5), per_layer_mode=True),
        "experts": experts,
        "chosen bits": chosen,
        "prepared": prepared,
        "self-made": lambda: self_made(out),
        "mended": mended,
        "resumed": lambda: resumed(out / "resume"),
        "recorded": lambda: recorded(None),
        "recorded on disk": lambda: recorded(out / "set"),
        "command": lambda: command(out),
        "pipeline": pipeline,
        "loaded": lambda: loaded(out),
        "not finite": not_finite,
        "other models": other_models,
    }


def main(out: Path) -> None:
    """Run all tasks; write tensors to ``<rank>.safetensors`` and errors to ``<rank>.json``."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rank, tensors, errors = os.environ.get("RANK", "0"), {}, {}
    for name, task in tasks(out).items():
        try:
            tensors.update({f"{name}/{key}": tensor.clone().contiguous() for key, tensor in task().items()})
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    save_file(tensors, out / f"{rank}.safetensors")
    (out / f"{rank}.json").write_text(json.dumps(errors))


def crash() -> None:
    """Let the last process die silently while the others calibrate."""
    with processes() as group:
        last = group.rank == group.size - 1

    class Dies(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if last:
                os._exit(3)
            return super().forward(input)

    torch.manual_seed(0)
    hfquant.quantize(nn.Sequential(nn.Linear(8, 8), Dies(8, 8)), [torch.ones(2, 8)] * 4, STATIC)


if __name__ == "__main__":
    if sys.argv[1] == "crash":
        crash()
    else:
        main(Path(sys.argv[1]))
