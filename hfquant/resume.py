"""Solved layers kept on disk, so that an interrupted quantization goes on where it stopped.

One safetensors file a layer, named by its number and fingerprint. The fingerprint covers the float weight and the plan,
so a layer of another model or config is never taken; the calibration data is the caller's to keep the same.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfquant.planner import LayerPlan
from hfquant.solver import Solution, without_data


def fingerprint(weight: Tensor, plan: LayerPlan) -> str:
    """Digest of a layer's float weight and plan."""
    digest = xxhash.xxh3_128()
    digest.update(repr(plan).encode())
    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def store(folder: Path, name: str, key: str, solution: Solution) -> None:
    """Write a solved layer; the file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = solution.plan
    metadata = {
        "layer": name,
        "dual": json.dumps(plan.dual),
        "alphas": json.dumps(solution.alphas),
        "fallback": json.dumps(solution.fallback),
    }
    temporary = folder / f".{key}.{os.getpid()}.tmp"
    save_file({k: v.contiguous() for k, v in solution.tensors.items()}, temporary, metadata)
    os.replace(temporary, folder / f"{key}.safetensors")


def find(folder: Path, key: str, plan: LayerPlan) -> Solution | None:
    """The stored solution of a layer, or None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / f"{key}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it to solve the layer again") from error
    fallback = json.loads(metadata["fallback"])
    plan = replace(without_data(plan) if fallback else plan, dual=tuple(json.loads(metadata["dual"])))
    return Solution(plan, tensors, json.loads(metadata["alphas"]), fallback)
