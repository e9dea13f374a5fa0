"""What both models are run on: pipelines made alike, and a dataset's rows as the arguments of their calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hfquant.affiner.config import AffinerConfig
from hfquant.affiner.hooks import find_denoiser, refuse_attached
from hfquant.affiner.runs import DenoisingLoop, own_copy
from hfquant.config import ConfigError

Samples = list[dict[str, Any]]
_SEED = "seed of the batch"  # no argument's name has spaces


def as_pipeline(model: Any, name: str, scheduler: Any) -> Any:
    """The pipeline given, or one around a bare denoiser and a scheduler.

    Raises:
        ConfigError: a bare denoiser without a scheduler, or a pipeline with one.
        TypeError: neither pipeline nor module.
        ValueError: an affiner is attached to it.
    """
    if isinstance(model, nn.Module):
        if scheduler is None:
            raise ConfigError(f'{name} is a bare denoiser: give config["scheduler"], a diffusers scheduler')
        refuse_attached(model)
        model = DenoisingLoop(model, scheduler)
    elif not callable(model) or not hasattr(model, "scheduler"):
        raise TypeError(
            f"{name} must be a diffusers pipeline or a denoiser (a torch module), got {type(model).__name__}"
        )
    elif scheduler is not None:
        raise ConfigError(f'{name} is a pipeline with its own scheduler: leave config["scheduler"] out')
    find_denoiser(model)
    own_copy(model)  # refuses one with an affiner attached
    return model


def check_alike(real: Any, quant: Any) -> None:
    """Raise ValueError where two pipelines differ in their schedulers' settings or their denoisers' shapes."""
    one, other = ((type(p.scheduler).__name__, _settings(p.scheduler)) for p in (real, quant))
    if one[0] != other[0]:
        raise ValueError(f"the schedulers differ: {one[0]} in model_real, {other[0]} in model_quant")
    for key in one[1].keys() | other[1].keys():
        if one[1].get(key) != other[1].get(key):
            raise ValueError(f"the schedulers differ in {key}: {one[1].get(key)!r} and {other[1].get(key)!r}")
    for key in ("in_channels", "out_channels", "sample_size", "patch_size"):
        mine, theirs = (getattr(getattr(find_denoiser(p), "config", None), key, None) for p in (real, quant))
        if mine != theirs:
            raise ValueError(f"the denoisers differ in {key}: {mine!r} and {theirs!r}")


def _settings(scheduler: Any) -> dict[str, Any]:
    return {k: v for k, v in dict(getattr(scheduler, "config", {})).items() if not k.startswith("_")}


def call_batches(dataset: Any, pipeline: Any, latents: Tensor | None, shuffle: bool, config: AffinerConfig) -> Samples:
    """The arguments of all pipeline calls, initial noise included."""
    stepper = config.stepper
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or isinstance(dataset, (str, Mapping)):
        raise TypeError(
            f"dataset must be a datasets.Dataset, a list or a map-style dataset, got {type(dataset).__name__}"
        )
    if not len(dataset):
        raise ValueError("the dataset is empty: there is nothing to fit the affiner on")
    count = min(stepper.sample_size or len(dataset), len(dataset))
    if stepper.sample_size is not None and stepper.sample_size > len(dataset):
        raise ValueError(f"stepper.sample_size={stepper.sample_size}, but the dataset has {len(dataset)} rows")
    if latents is not None and len(latents) < count:
        raise ValueError(f"latents has noise for {len(latents)} samples, {count} are needed")
    order = list(range(len(dataset)))
    if shuffle:
        generator = torch.Generator().manual_seed(stepper.seed)
        order = torch.randperm(len(dataset), generator=generator).tolist()
    common = dict(config.extra_args)
    if stepper.max_timestep is not None:
        common["num_inference_steps"] = stepper.max_timestep
    rows = ((i, dataset[i]) for i in order[:count])
    _, accepted, open_ended = _call_arguments(pipeline)
    samples, start = [], 0
    for numbers, kwargs in _batches(rows, pipeline, stepper.batch_size, common):
        if latents is not None:
            kwargs["latents"] = latents[start : start + len(numbers)]
        start += len(numbers)
        if open_ended or "generator" in accepted:
            kwargs.setdefault(_SEED, stepper.seed * 1_000_003 + numbers[0])
        samples.append(kwargs)
    return samples


def seeded_call(sample: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call, with a fresh generator, so that each run of a batch draws the same noise."""
    kwargs = dict(sample)
    if (seed := kwargs.pop(_SEED, None)) is not None:
        kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
    given = kwargs.get("generator")
    if isinstance(given, torch.Generator):
        kwargs["generator"] = _generator_copy(given)
    elif isinstance(given, (list, tuple)):
        kwargs["generator"] = [_generator_copy(one) for one in given]
    return kwargs


def _generator_copy(given: torch.Generator) -> torch.Generator:
    return torch.Generator(given.device).set_state(given.get_state())


def _call_arguments(pipeline: Any) -> tuple[str | None, set[str], bool]:
    """What a pipeline can be called with: its first argument, all names, and whether it takes any others too."""
    if isinstance(pipeline, DenoisingLoop):
        own = inspect.signature(pipeline.__call__).parameters
        model = list(inspect.signature(pipeline.transformer.forward).parameters)
        labels = next((n for n in ("class_labels", "encoder_hidden_states") if n in model), None)
        return labels, set(own) - {"arguments"} | set(model), False
    parameters = inspect.signature(type(pipeline).__call__).parameters
    names = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD][1:]
    return next(iter(names), None), set(names), len(names) + 1 < len(parameters)


def _batches(
    rows: Iterator[tuple[int, Any]], pipeline: Any, batch_size: int, common: Mapping[str, Any]
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Rows of a dataset to arguments of pipeline calls.

    A row is a dict of call arguments, or the first argument alone (a prompt, a label); so is a dict of one column that
    is no argument (`{"text": ...}`). Strings, and the first argument, become lists (tensors of numbers for a bare
    denoiser); tensors are stacked; anything else is passed on as it is, and a batch ends where it changes.

    Yields:
        The rows' numbers, and the arguments.

    Raises:
        ValueError: A row names an argument that the call does not have.
    """
    first, allowed, open_ended = _call_arguments(pipeline)
    if not open_ended and (odd := set(common) - allowed):
        raise ValueError(f"extra_args: {_name(pipeline)} takes no {sorted(odd)}; it takes {sorted(allowed)}")
    bare = isinstance(pipeline, DenoisingLoop)
    numbers: list[int] = []
    group: list[dict[str, Any]] = []
    for number, row in rows:
        if isinstance(row, Mapping):
            row = dict(row)
            if len(row) == 1 and not open_ended and first and not set(row) <= allowed:
                row = {first: next(iter(row.values()))}
            if not open_ended and (odd := set(row) - allowed):
                raise ValueError(
                    f"dataset[{number}]: {_name(pipeline)} takes no {sorted(odd)}; it takes {sorted(allowed)}"
                )
        else:
            row = row.item() if isinstance(row, np.generic) else row
            if first is None or not isinstance(row, (str, int, float, Tensor)):
                raise ValueError(
                    f"dataset[{number}]: expected a dict of arguments of {_name(pipeline)}"
                    f"{f' or its {first}' if first else ''}, got {type(row).__name__}"
                )
            row = {first: row}
        if group and (len(group) == batch_size or not _alike(group[0], row, first, bare)):
            yield numbers, _joined(group, first, bare) | dict(common)
            numbers, group = [], []
        numbers.append(number)
        group.append(row)
    if group:
        yield numbers, _joined(group, first, bare) | dict(common)


def _name(pipeline: Any) -> str:
    return type(pipeline.transformer if isinstance(pipeline, DenoisingLoop) else pipeline).__name__


def _joins(name: str, value: Any, first: str | None, bare: bool) -> bool:
    return name == first or isinstance(value, (str, Tensor)) or (bare and isinstance(value, (int, float)))


def _alike(one: dict[str, Any], other: dict[str, Any], first: str | None, bare: bool) -> bool:
    """Whether two rows can share a call."""
    if one.keys() != other.keys():
        return False
    return all(
        (isinstance(v, Tensor) and isinstance(other[k], Tensor) and v.shape == other[k].shape)
        if isinstance(v, Tensor)
        else type(v) is type(other[k]) and (_joins(k, v, first, bare) or v == other[k])
        for k, v in one.items()
    )


def _joined(group: list[dict[str, Any]], first: str | None, bare: bool) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for name, value in group[0].items():
        column = [row[name] for row in group]
        if isinstance(value, Tensor):
            joined[name] = torch.stack(column)
        elif bare and isinstance(value, (int, float)):
            joined[name] = torch.tensor(column)
        else:
            joined[name] = column if _joins(name, value, first, bare) else value
    return joined
