"""Inputs for both models: matching pipelines, and dataset rows as arguments of their calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hfquant.affiner.config import AffinerConfig, StepperConfig
from hfquant.affiner.hooks import refuse_attached
from hfquant.affiner.runs import DenoisingLoop, own_copy
from hfquant.calibration.batches import as_tensors
from hfquant.config import ConfigError
from hfquant.denoisers import call_parameters, find_denoiser

Samples = list[dict[str, Any]]
#: Size of the shuffle buffer for streams, in rows.
BUFFER = 1024


def as_pipeline(model: Any, name: str, scheduler: Any) -> Any:
    """Return the given pipeline, or a new one around a bare denoiser and a scheduler.

    Raises:
        ConfigError: A bare denoiser without a scheduler, or a pipeline with one.
        TypeError: The model is neither a pipeline nor a module.
        ValueError: An affiner is attached to it, or it has no denoiser.
    """
    if isinstance(model, nn.Module):
        if scheduler is None:
            raise ConfigError(f'{name} is a bare denoiser: set config["scheduler"] to a diffusers scheduler')
        refuse_attached(model)
        model = DenoisingLoop(model, scheduler)
    elif not callable(model) or not hasattr(model, "scheduler"):
        raise TypeError(
            f"{name} must be a diffusers pipeline or a denoiser (a torch module), got {type(model).__name__}"
        )
    elif scheduler is not None:
        raise ConfigError(f'{name} is a pipeline with its own scheduler: leave config["scheduler"] out')
    find_denoiser(model)
    own_copy(model)  # raises if an affiner is attached
    return model


def check_alike(real: Any, quant: Any) -> None:
    """Raise ValueError if two pipelines differ in their schedulers' settings or their denoisers' shapes."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value  # saved and loaded, a tuple is a list

    one, other = ({"class": type(p.scheduler).__name__, **getattr(p.scheduler, "config", {})} for p in (real, quant))
    for key in one | other:
        if not key.startswith("_") and plain(one.get(key)) != plain(other.get(key)):
            raise ValueError(f"the schedulers differ in {key}: {one.get(key)!r} and {other.get(key)!r}")
    for key in ("in_channels", "out_channels", "sample_size", "patch_size"):
        mine, theirs = (getattr(getattr(find_denoiser(p), "config", None), key, None) for p in (real, quant))
        if plain(mine) != plain(theirs):
            raise ValueError(f"the denoisers differ in {key}: {mine!r} and {theirs!r}")


def call_batches(dataset: Any, pipeline: Any, latents: Tensor | None, shuffle: bool, config: AffinerConfig) -> Samples:
    """Return the arguments of all pipeline calls, including initial noise.

    Rows are grouped into batches of `stepper.batch_size`; a batch ends early if the next row cannot share its call.

    Raises:
        TypeError: The dataset has no rows.
        ValueError: It is empty or too short, or the call does not accept a row or an extra argument.
    """
    stepper, call = config.stepper, _call_of(pipeline)
    common = dict(config.extra_args)
    if stepper.max_timestep is not None:
        common["num_inference_steps"] = stepper.max_timestep
    call.check("extra_args", common)
    rows = [(number, call.arguments(number, row)) for number, row in _rows(dataset, stepper, shuffle)]
    if latents is not None and len(latents) < len(rows):
        raise ValueError(f"latents has noise for {len(latents)} samples, {len(rows)} are needed")
    groups: list[list[tuple[int, dict[str, Any]]]] = []
    for row in rows:
        if groups and len(groups[-1]) < stepper.batch_size and call.kind(groups[-1][0][1]) == call.kind(row[1]):
            groups[-1].append(row)
        else:
            groups.append([row])
    samples, start = [], 0
    for group in groups:
        sample = call.joined([row for _, row in group]) | common
        if latents is not None:
            sample["latents"] = latents[start : start + len(group)]
        start += len(group)
        if call.accepts("generator"):
            seed = stepper.seed * 1_000_003 + group[0][0]
            sample.setdefault("generator", torch.Generator().manual_seed(seed))
        samples.append(sample)
    return samples


def _rows(dataset: Any, stepper: StepperConfig, shuffle: bool) -> list[tuple[int, Any]]:
    """Return the rows to fit on, with their indices. A stream is read only as far as needed; without a size, fully."""
    indexed = all(hasattr(dataset, name) for name in ("__len__", "__getitem__"))
    indexed = indexed and not isinstance(dataset, IterableDataset)
    no_rows = isinstance(dataset, (str, bytes, Mapping, DataLoader))
    if no_rows or not (indexed or hasattr(dataset, "__iter__")):
        raise TypeError(
            "dataset must be a datasets.Dataset, a list, or a map-style or iterable dataset, got "
            f"{type(dataset).__name__}"
        )
    draw = torch.Generator().manual_seed(stepper.seed)
    rows: Iterable[tuple[int, Any]]
    if indexed:
        order = torch.randperm(len(dataset), generator=draw).tolist() if shuffle else range(len(dataset))
        rows = ((i, dataset[i]) for i in order)
    else:
        rows = _shuffled(enumerate(dataset), draw) if shuffle else enumerate(dataset)
    found = list(islice(rows, stepper.sample_size))
    if not found:
        raise ValueError("the dataset is empty: there is nothing to fit the affiner on")
    if stepper.sample_size is not None and len(found) < stepper.sample_size:
        raise ValueError(f"stepper.sample_size={stepper.sample_size}, but the dataset has {len(found)} rows")
    return found


def _shuffled(rows: Iterable[Any], draw: torch.Generator) -> Iterator[Any]:
    """Yield the rows of a stream in random order, each drawn from a buffer of `BUFFER` rows that later rows refill."""
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < BUFFER:
            buffer.append(row)
            continue
        i = int(torch.randint(BUFFER, (), generator=draw))
        yield buffer[i]
        buffer[i] = row
    for i in torch.randperm(len(buffer), generator=draw).tolist():
        yield buffer[i]


class _Call(NamedTuple):
    """The call signature of a pipeline.

    Strings and the first argument become lists (numbers become tensors for a bare denoiser); tensors are stacked;
    anything else is passed on unchanged.
    """

    name: str
    first: str | None
    names: set[str]
    open_ended: bool  # also accepts any other arguments
    bare: bool

    def accepts(self, name: str) -> bool:
        return self.open_ended or name in self.names

    def check(self, where: str, arguments: Iterable[str]) -> None:
        if odd := sorted(name for name in arguments if not self.accepts(name)):
            raise ValueError(f"{where}: {self.name} does not accept {odd}; it accepts {sorted(self.names)}")

    def arguments(self, number: int, row: Any) -> dict[str, Any]:
        """Return the arguments that a row stands for: a dict of them, or only the first one (a prompt, a label).

        A dict with a single column that is not an argument (`{"text": ...}`) also stands for the first argument.
        """
        if isinstance(row, Mapping):
            if len(row) == 1 and self.first and not self.accepts(next(iter(row))):
                return {self.first: next(iter(row.values()))}
            self.check(f"dataset[{number}]", row)
            plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in row.items()}
            return dict(as_tensors(plain))
        row = row.item() if isinstance(row, np.generic) else row
        if self.first is None or not isinstance(row, (str, int, float, Tensor)):
            raise ValueError(
                f"dataset[{number}]: expected a dict of arguments of {self.name}"
                f"{f' or its {self.first}' if self.first else ''}, got {type(row).__name__}"
            )
        return {self.first: row}

    def joins(self, name: str, value: Any) -> bool:
        number = self.bare and isinstance(value, (int, float))
        return name == self.first or number or isinstance(value, (str, Tensor))

    def kind(self, row: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return what rows must have in common to share a call."""

        def fixed(name: str, value: Any) -> Any:
            return value.shape if isinstance(value, Tensor) else None if self.joins(name, value) else value

        return {name: (type(value), fixed(name, value)) for name, value in row.items()}

    def joined(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the arguments of one call for several rows."""
        columns = {name: [row[name] for row in rows] for name in rows[0]}

        def join(name: str, column: list[Any]) -> Any:
            if isinstance(column[0], Tensor):
                return torch.stack(column)
            if self.bare and isinstance(column[0], (int, float)):
                return torch.tensor(column)
            return column if self.joins(name, column[0]) else column[0]

        return {name: join(name, column) for name, column in columns.items()}


def _call_of(pipeline: Any) -> _Call:
    if isinstance(pipeline, DenoisingLoop):
        own = set(inspect.signature(pipeline.__call__).parameters) - {"arguments"}
        model = list(inspect.signature(pipeline.transformer.forward).parameters)
        labels = next((n for n in ("class_labels", "encoder_hidden_states") if n in model), None)
        return _Call(type(pipeline.transformer).__name__, labels, own | set(model), False, True)
    parameters = call_parameters(pipeline)
    names = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    return _Call(type(pipeline).__name__, next(iter(names), None), set(names), len(names) < len(parameters), False)
