"""Load models by name, prepare their inputs, and run both to compare and report on them."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from hfquant.affiner import BlockwiseAffiner
from hfquant.calibration.batches import forward
from hfquant.console import counted
from hfquant.denoisers import is_pipeline
from hfquant.integrations.data import tokenizer_of, transformers_batches
from hfquant.integrations.hub import load
from hfquant.report.images import PipelineComparison, compare_pipelines
from hfquant.report.page import Report
from hfquant.report.quality import MissingArguments, ModelComparison, NothingToCompare, builtin_text, compare_models
from hfquant.report.stored import read_folder


@dataclass(frozen=True)
class Inputs:
    """The inputs on which two models are compared.

    Attributes:
        data: text or dataset for language models; None for Python's own manual.
        column: column of the dataset.
        samples: number of text windows or images; None for :attr:`windows`, or one image per prompt.
        windows: number of text windows if ``samples`` is None.
        seqlen: tokens per window.
        prompts: prompts for pipelines that take any.
        call: other arguments of a pipeline's call.
        seed: seed of the noise and of the data order.
    """

    data: str | None = None
    column: str | dict[str, str] | None = None
    samples: int | None = None
    seqlen: int = 256
    prompts: Sequence[str] = ()
    call: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    windows: int = 8

    def batches(self, model: Any) -> list[Any]:
        """Return batches for a transformers model.

        Raises:
            ValueError: there are prompts or arguments of a call.
        """
        if self.prompts or self.call:
            raise ValueError("prompts and arguments of a call are for pipelines; a model runs on data")
        source = {"dataset": builtin_text() if self.data is None else self.data, "column": self.column}
        samples = self.windows if self.samples is None else self.samples
        size = {"samples": samples, "seqlen": self.seqlen, "seed": self.seed, "batch_size": 1}
        return list(transformers_batches(model, {**source, **size}))

    def calls(self) -> list[dict[str, Any]]:
        """Return the calls of a pipeline: one per prompt, or ``samples`` of them that take turns.

        Raises:
            ValueError: there is data or a column.
        """
        if self.data is not None or self.column:
            raise ValueError("data and columns are for models; a pipeline runs on prompts and arguments of its call")
        calls = [{"prompt": text, **self.call} for text in self.prompts] or [dict(self.call)]
        return list(islice(cycle(calls), len(calls) if self.samples is None else self.samples))


def compared(reference: Any, other: Any, inputs: Inputs) -> ModelComparison | PipelineComparison:
    """Compare two loaded models, or two pipelines.

    Raises:
        ValueError: one is a pipeline and the other is not, or they cannot be compared.
    """
    if is_pipeline(reference) != is_pipeline(other):
        raise ValueError("one is a pipeline, the other is not")
    if is_pipeline(reference):
        return compare_pipelines(reference, other, inputs.calls(), inputs.seed)
    tokenizer = tokenizer_of(reference)
    decode = None if tokenizer is None else tokenizer.decode
    return compare_models(reference, other, inputs.batches(reference), decode)


def gather(
    folder: Path, reference: str | None, inputs: Inputs, dtype: str | None = None, device: str | None = None
) -> Report:
    """Read a quantized folder and, if a reference is given, run both models.

    Args:
        folder: folder of a quantized model or pipeline.
        reference: folder or hub id of the full-precision version; None for none.
        inputs: inputs to run on.
        dtype: dtype to load both in.
        device: device to run both on.

    Raises:
        ValueError: the folder holds nothing quantized, or the two cannot be compared.
        FileNotFoundError: there is no such folder.
    """
    models = read_folder(folder)[1]
    where = folder / "affiner"
    affiner = BlockwiseAffiner.from_pretrained(where) if where.is_dir() else None
    if reference is None:
        note = "To measure quality and speed, pass the full-precision model as --reference."
        return Report(folder.absolute().name, models, affiner=affiner, notes=[note])
    pair = load(reference, dtype, device), load(str(folder), dtype, device)
    comparison: ModelComparison | PipelineComparison | None = None
    notes: list[str] = []
    speed: list[tuple[str, float, float]] = []
    try:
        comparison = compared(*pair, inputs)
        speed = [_timed(*pair, inputs)]
    except MissingArguments as error:
        notes = [f"Quality and speed left out: {error}."]
    except NothingToCompare as error:
        notes = [f"Quality left out: {error}."]
        speed = [_timed(*pair, inputs)]
    return Report(folder.absolute().name, models, comparison, speed, machine(pair[0].device), affiner, notes=notes)


def _timed(reference: Any, other: Any, inputs: Inputs, repeats: int = 3) -> tuple[str, float, float]:
    """Return what was run, and the shortest time of each in seconds; runs alternate, and both models are warm."""
    if is_pipeline(reference):
        call = inputs.calls()[0]
        runs = [partial(_call, pipe, call) for pipe in (reference, other)]
        what = "one pipeline call"
    else:
        batch = inputs.batches(reference)[0]
        runs = [partial(forward, model, batch) for model in (reference, other)]
        shape = next((list(v.shape) for v in batch.values()), []) if isinstance(batch, Mapping) else []
        what = f"one forward pass, inputs {' x '.join(map(str, shape))}"
    seconds: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(repeats):
            for times, run in zip(seconds, runs, strict=True):
                start = time.perf_counter()
                run()
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                times.append(time.perf_counter() - start)
    return what, min(seconds[0]), min(seconds[1])


def _call(pipe: Any, call: Mapping[str, Any]) -> Any:
    return pipe(generator=torch.Generator().manual_seed(0), **call)


def machine(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with its thread count, on which speed was measured."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {counted(torch.get_num_threads(), 'thread')}"
