"""One quantization shared by several processes: which batches each reads, which layers each solves, and how they merge.

Under ``accelerate launch --num_processes N``, every process runs the same script on its own copy of the model. Batches
are assigned round-robin, statistics are reduced to the process that solves a layer, and solved layers are sent to all.
A single process runs the same code and sends nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import xxhash
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from hfquant.digests import digest_of, update_with_weights
from hfquant.statistics import SAMPLE_ROWS, STATISTICS, LayerStats, Reduction, RowSample, collected

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Environment variable: seconds that a process waits for another one that is alive but slow.
TIMEOUT_VARIABLE = "HFQUANT_TIMEOUT"
#: Solving is balanced, so waits are short; a mix of slower and faster hardware may need more.
DEFAULT_TIMEOUT = 7200.0

_OPERATIONS = (
    {
        Reduction.MIN: dist.ReduceOp.MIN,
        Reduction.MAX: dist.ReduceOp.MAX,
        Reduction.SUM: dist.ReduceOp.SUM,
    }
    if dist.is_available()
    else {}
)


@dataclass(frozen=True)
class Processes:
    """The processes that share the work; by default only this one.

    Attributes:
        rank, size: index of this process, and number of processes.
        group: process group of ``torch.distributed`` (gloo, which takes CPU tensors whatever device the model is on).
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the process that logs and writes for all."""
        return self.rank == 0

    @property
    def on_this_machine(self) -> int:
        """Number of processes on this machine, including this one."""
        return min(self.size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank.

        Raises:
            RuntimeError: a process is gone, or did not respond within the timeout; the message has its rank.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            # A plain collective does not report which process is missing.
            dist.monitored_barrier(self.group, timeout=_timeout(), wait_all_ranks=True)
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise RuntimeError(
                f"process {self.rank} of {self.size}: another process died or did not respond within "
                f"{_timeout().total_seconds():g} s ({TIMEOUT_VARIABLE}): {first}"
            ) from error
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make a step fail in all processes if it fails in one.

        Raises:
            RuntimeError: another process failed; the message has its rank and cause. The failing process raises its own
                error.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        causes = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, cause in enumerate(causes):
            if cause is not None:
                raise RuntimeError(f"process {rank} of {self.size} failed: {cause}")

    def share(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Assign each item a rank: most expensive first, each to the least loaded. The same in all processes."""
        load = [0.0] * self.size
        ranks = {}
        for name in sorted(costs, key=lambda n: (-costs[n], n)):
            ranks[name] = load.index(min(load))
            load[ranks[name]] += costs[name]
        return ranks

    def merge(
        self,
        stats: Mapping[str, LayerStats],
        owners: Mapping[str, int],
        features: Mapping[str, int],
        needs: Mapping[str, Collection[str]],
    ) -> dict[str, LayerStats]:
        """Return the statistics over the rows of all processes, for the layers that this process owns.

        Args:
            stats: statistics of this process; layers that it never ran are missing.
            owners: layer -> rank, for all layers.
            features: layer -> number of input features.
            needs: layer -> statistics that it needs.
        """
        if self.size == 1:
            return dict(stats)
        # Layers with the same input share one LayerStats, which is sent once to each owner.
        first: dict[int, str] = {}
        own = {name: first.setdefault(id(stats[name]), name) for name in owners if name in stats}
        shared = self.gather(own)
        merged: dict[tuple[Any, ...], LayerStats | None] = {}
        found = {}
        for name, owner in owners.items():
            key = (owner, frozenset(collected(needs[name])), *(names.get(name) for names in shared))
            if not any(key[2:]):
                continue
            if key not in merged:
                part = stats.get(name)
                merged[key] = self._merge(
                    LayerStats.empty(features[name], needs[name]) if part is None else part, owner
                )
            result = merged[key]
            if result is not None:
                found[name] = result
        return found

    def _merge(self, part: LayerStats, owner: int) -> LayerStats | None:
        sums = {}
        for name, tensor in part.sums.items():
            # A copy: the reduction leaves partial sums in every process's buffers, and layers share them.
            sums[name] = tensor.cpu().clone()
            dist.reduce(sums[name], owner, _OPERATIONS[STATISTICS[name].reduction], group=self.group)
        counts = self._collect(torch.tensor([part.count, len(part.sample.keys)]), owner)
        samples = [
            self._collect(_padded(t.cpu()), owner)
            for t in (part.sample.rows, part.sample.keys, part.sample.second_half)
        ]
        if counts is None:
            return None
        parts = [
            RowSample(*(everyones[rank][: int(c[1])] for everyones in samples if everyones is not None))
            for rank, c in enumerate(counts)
        ]
        return LayerStats(sum(int(c[0]) for c in counts), sums, parts[0].merge(*parts[1:]))

    def _collect(self, tensor: Tensor, owner: int) -> list[Tensor] | None:
        """Gather tensors of equal shape at the owner, by rank; return None in the other processes."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == owner else None
        dist.gather(tensor, parts, owner, group=self.group)
        return parts

    def exchange(self, mine: Mapping[str, tuple[T, Mapping[str, Tensor]]]) -> dict[str, tuple[T, dict[str, Tensor]]]:
        """Return the results of all processes by name: a picklable value, and tensors (on the CPU if received).

        No two processes may use the same name.
        """
        if self.size == 1:
            return {name: (value, dict(tensors)) for name, (value, tensors) in mine.items()}
        specs = self.gather(
            {
                name: (value, {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()})
                for name, (value, tensors) in mine.items()
            }
        )
        result: dict[str, tuple[T, dict[str, Tensor]]] = {}
        for rank, spec in enumerate(specs):
            for name, (value, layouts) in spec.items():
                own = mine[name][1] if rank == self.rank else None
                tensors = {
                    key: self._send(None if own is None else own[key], shape, dtype, rank)
                    for key, (shape, dtype) in layouts.items()
                }
                result[name] = value, tensors
        return result

    def _send(self, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, source: int) -> Tensor:
        # As bytes: gloo does not support every dtype.
        buffer = torch.empty(shape, dtype=dtype) if tensor is None else tensor.detach().cpu().contiguous()
        if buffer.numel():
            dist.broadcast(buffer.view(-1).view(torch.uint8), source, group=self.group)
        return buffer if tensor is None else tensor


def check_models_agree(model: nn.Module, group: Processes) -> None:
    """Check that all processes have the same model with the same weights.

    Raises:
        ValueError: a process has another model or other weights; the message has its rank.
    """
    if group.size == 1:
        return
    digest = xxhash.xxh3_128()
    update_with_weights(digest, model)
    for rank, other in enumerate(group.gather(digest.hexdigest())):
        if other != digest.hexdigest():
            raise ValueError(f"process {rank} has a different model or weights than process {group.rank}")


def shard_of(first: Any, group: Processes) -> tuple[int, int]:
    """Return which batches a process takes, as (rank, size): its share of common data, or all of its own data.

    Args:
        first: the first batch of this process's data; None without data.
        group: the processes.
    """
    if group.size == 1:
        return 0, 1
    if len(set(group.gather(digest_of(first)))) == 1:
        return group.rank, group.size
    if group.main:
        logger.info("the processes have different calibration data: each uses all of its own")
    return 0, 1


def is_main() -> bool:
    """Return whether this process logs for all; also valid outside :func:`processes`."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _padded(tensor: Tensor) -> Tensor:
    """Return ``tensor`` padded to :data:`SAMPLE_ROWS` rows, since a gather needs equal shapes."""
    padded = tensor.new_zeros(SAMPLE_ROWS, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded


def _timeout() -> timedelta:
    value = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(value or DEFAULT_TIMEOUT)
        if not 0 < seconds < 1e8:
            raise ValueError
    except ValueError:
        raise ValueError(f"{TIMEOUT_VARIABLE}={value!r}: expected a number of seconds above 0") from None
    return timedelta(seconds=seconds)


def _connected(timeout: timedelta | None = None) -> Any:
    """Return a new group that all processes have connected to: one closed before that makes the others' setup fail."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    dist.monitored_barrier(group, timeout=timeout)
    return group


@contextmanager
def processes() -> Iterator[Processes]:
    """Yield the processes that were launched to share the work, or only this one if there was no launcher.

    Every process must enter: the first waits for the others up to the launcher's own timeout.
    """
    if not dist.is_available():
        yield Processes()
        return
    if not dist.is_initialized() and "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield Processes()
        return
    timeout = _timeout()
    dist.destroy_process_group(_connected())  # with the launcher's timeout, until all have arrived
    group = _connected(timeout)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(group)
