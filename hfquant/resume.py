"""Solved layers stored on disk with what was measured of them, so that an interrupted quantization can resume.

There is one safetensors file per layer. Its name is a digest of everything the solution depends on: the layer's name,
its float weight, its plan, all weights of the model, the calibration data and the mode. So a layer of another model,
config or run is never used.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfquant.digests import content
from hfquant.layer_plan import LayerPlan
from hfquant.solver import Solution

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerFigures:
    """What a report states of a layer beyond its solution; resuming has no calibration rows to measure it again.

    Attributes:
        error: relative error of the layer as solved; None without data.
        plain_error: the same with round-to-nearest only.
        seconds: time to solve it.
    """

    error: float | None
    plain_error: float | None
    seconds: float


@dataclass(frozen=True)
class Cache:
    """A folder of solved layers.

    Attributes:
        folder: location; created if missing.
        context: digest of what all layers depend on: the model's weights, calibration data and mode.
    """

    folder: Path
    context: str

    @classmethod
    def open(cls, folder: str | os.PathLike[str], context: str) -> Cache:
        """Return the cache in a folder, after checking that the folder is writable.

        Raises:
            OSError: it is not writable; detected here rather than after hours of calibration.
        """
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".{os.getpid()}.tmp"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise type(error)(f"resume_dir {str(path)!r} cannot be written: {error}") from error
        return cls(path, context)

    def key(self, name: str, weight: Tensor, plan: LayerPlan) -> str:
        """Return the digest of one layer's solution."""
        digest = xxhash.xxh3_128()
        digest.update("\0".join([self.context, name, str(weight.dtype), repr(plan)]).encode())
        digest.update(content(weight.detach().cpu().contiguous()))
        return digest.hexdigest()

    def store(self, name: str, key: str, solution: Solution, measured: LayerFigures) -> None:
        """Write a solved layer atomically: the file appears complete or not at all.

        Raises:
            OSError: the file cannot be written (full disk); the message names it.
        """
        path = self.folder / f"{key}.safetensors"
        tensors = {k: v.contiguous() for k, v in solution.tensors.items()}
        metadata = {
            "layer": name,
            "dual": json.dumps(solution.plan.dual),
            "alphas": json.dumps(solution.alphas),
            "fallback": json.dumps(solution.fallback),
            "static": json.dumps(solution.plan.static_input),
            "measured": json.dumps(asdict(measured)),
        }
        temporary = self.folder / f".{key}.{os.getpid()}.tmp"
        try:
            save_file(tensors, temporary, metadata | {"checksum": _checksum(tensors, metadata)})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise OSError(f"layer {name!r} cannot be written to {path}: {error}") from error

    def find(self, name: str, key: str, plan: LayerPlan) -> tuple[Solution, LayerFigures | None] | None:
        """Return a layer's solution and measurements; None if it is missing, or damaged, which is logged.

        The measurements are None in a file of an earlier version, which did not store them.
        """
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
            if metadata.pop("checksum", None) != _checksum(tensors, metadata):
                raise ValueError("its checksum does not match")
            fallback = json.loads(metadata["fallback"])
            plan = plan.without_data() if fallback else plan
            if plan.static_input and not json.loads(metadata["static"]):
                plan = plan.by_token()
            plan = replace(plan, dual=tuple(json.loads(metadata["dual"])))
            measured = LayerFigures(**json.loads(metadata["measured"])) if "measured" in metadata else None
            return Solution(plan, tensors, json.loads(metadata["alphas"]), fallback), measured
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s): quantizing layer %r again", path, error, name)
            return None


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    digest = xxhash.xxh3_128(json.dumps(dict(metadata), sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(content(tensor.cpu().contiguous()))
    return digest.hexdigest()
