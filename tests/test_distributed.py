"""Real multi-process runs: 2 and 4 processes give what one gives, and if one fails, all stop and name the cause."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hfquant import distributed
from hfquant.distributed import Processes, processes
from tests import distributed_job

EXACT = [
    "static",
    "uneven",
    "one batch",
    "search",
    "folded",
    "svd",
    "experts",
    "chosen bits",
    "prepared",
    "self-made",
    "mended",
    "recorded",
    "recorded on disk",
    "command",
    "pipeline",
    "loaded",
]


def launch(count: int, argument: str, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """Without GPUs, accelerate starts several processes only if told so twice, by the flag and by the variable."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(count), "--main_process_port", "0", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "-m", "tests.distributed_job", argument]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    ) as running:
        try:
            out, errors = running.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # Not kill(): the launcher ends its processes, which have sessions of their own, when it is terminated.
            running.terminate()
            out, errors = running.communicate()
            errors += f"\nterminated after {timeout} s"
    return subprocess.CompletedProcess(command, running.returncode, out, errors)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Return the results of each task that does not fail, from this single process."""
    tasks = distributed_job.tasks(tmp_path_factory.mktemp("alone"))
    return {name: tasks[name]() for name in tasks if name not in ("not finite", "other models")}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, dict[str, Tensor]], Any]]:
    """Return the results of each launched process: tensors by task, and errors."""
    out = tmp_path_factory.mktemp("launched")
    done = launch(request.param, str(out))
    assert done.returncode == 0, done.stderr
    found = []
    for rank in range(request.param):
        tensors: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(out / f"{rank}.safetensors").items():
            task, _, name = key.partition("/")
            tensors.setdefault(task, {})[name] = tensor
        found.append((tensors, json.loads((out / f"{rank}.json").read_text())))
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("task", EXACT)
def test_several_processes_make_the_same_bytes(task: str, alone: Any, ranks: Any) -> None:
    for tensors, errors in ranks:
        assert task not in errors
        assert sum(tensor.numel() for tensor in alone[task].values()) > 1000
        assert same(tensors[task], alone[task])


def test_statistics_are_those_of_all_data(alone: Any, ranks: Any) -> None:
    """Ranges, counts and samples match exactly, sums to 1e-6, custom statistics too; one process owns each layer."""
    seen: list[str] = []
    for tensors, _ in ranks:
        for key, value in tensors["statistics"].items():
            expected = alone["statistics"][key]
            if key.endswith(("hessian", "power", "magnitudes")):
                assert ((value - expected).norm() / expected.norm()).item() < 1e-6
            else:
                assert torch.equal(value, expected)
        seen += tensors["statistics"]
    assert sorted(seen) == sorted(alone["statistics"])
    assert sum(key.endswith(("magnitudes", "largest")) for key in seen) == 2 * 15
    assert min(len(tensors["statistics"]) for tensors, _ in ranks) > 0


@pytest.mark.parametrize("task", ["gptq", "mixed", "layer by layer", "resumed"])
def test_gptq_agrees_to_rounding(task: str, alone: Any, ranks: Any) -> None:
    """All processes have identical layers; codes and layer losses hardly differ from those of a single process."""
    (first, _), *others = ranks
    assert all(same(first[task], tensors[task]) for tensors, _ in others)
    assert first[task].keys() == alone[task].keys()
    codes = [k for k, v in alone[task].items() if v.dtype == torch.int8]
    assert len(codes) == 14
    differing = sum(int((first[task][k] != alone[task][k]).sum()) for k in codes)
    loss, expected = first[task]["errors"].square(), alone[task]["errors"].square()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert expected.min() > 0
    assert differing <= 0.001 * sum(alone[task][k].numel() for k in codes)


def test_an_error_in_one_stops_all_with_its_cause(ranks: Any) -> None:
    cause = "CalibrationError: layer '0': 1 of 16 inputs are NaN or Inf in calibration batch 1"
    for rank, (_, errors) in enumerate(ranks):
        assert errors["not finite"] == (
            cause if rank == 1 else f"RuntimeError: process 1 of {len(ranks)} failed: {cause}"
        )
        assert "has a different model or weights" in errors["other models"]
        assert set(errors) == {"not finite", "other models"}


def test_a_process_that_dies_stops_all() -> None:
    done = launch(2, "crash")
    assert done.returncode != 0
    assert "exitcode  : 3" in done.stderr


def test_layers_are_shared_out_evenly() -> None:
    costs = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 3.0, "e": 3.0, "f": 1e-9}
    ranks = Processes(0, 3).share(costs)
    assert ranks == Processes(2, 3).share(dict(reversed(costs.items())))
    loads = [math.fsum(cost for name, cost in costs.items() if ranks[name] == rank) for rank in range(3)]
    assert max(loads) < 7.5
    assert Processes(0, 9).share(costs).keys() == costs.keys()


def test_one_process_sends_nothing() -> None:
    with processes() as group:
        assert group == Processes(0, 1, None)
        assert group.main
        assert group.on_this_machine == 1
        assert group.gather("x") == ["x"]
        with pytest.raises(KeyError), group.together():
            raise KeyError("mine")


def test_memory_is_shared_with_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Processes(1, 16).on_this_machine == 4
    assert Processes().on_this_machine == 1


JOB = """
import sys
import torch
import hfquant
from hfquant.distributed import processes

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
data = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
hfquant.quantize(model, data, "w8a8")
with processes() as group:
    # One write, so that the lines of two processes do not mix.
    sys.stdout.write(f"rank {group.rank} of {group.size} {float(model[0].input_scale)}\\n")
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        (["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], 2),
        (["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"], 1),
    ],
    ids=["torchrun", "accelerate launch --cpu"],
)
def test_launchers_on_cpus(launcher: list[str], expected: int, tmp_path: Path) -> None:
    """As documented: torchrun's processes share the work, ``accelerate launch --cpu`` starts a single process."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert [line.split()[:4] for line in lines] == [["rank", str(i), "of", str(expected)] for i in range(expected)]
    assert len({line.split()[4] for line in lines}) == 1


SLOW = """
import os, sys, time, torch
from hfquant.distributed import processes

with processes() as group:
    group.gather(0)
    if group.rank == 1:
        time.sleep(60) if sys.argv[1] == "late" else os._exit(3)
    start = time.monotonic()
    try:
        group.gather(1)
    except RuntimeError as error:
        print("ERROR", f"{time.monotonic() - start:.0f}", error, flush=True)
        os._exit(0)
"""


@pytest.mark.parametrize("how", [pytest.param("late", marks=pytest.mark.slow), "gone"])
def test_a_process_that_does_not_come_is_named_within_the_time_that_is_set(how: str, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(SLOW)
    base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "HFQUANT_TIMEOUT": "12"}
    base |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        out, err = ranks[0].communicate(timeout=100)
    finally:
        for process in ranks:
            process.kill()
    assert "ERROR" in out, err
    assert "another process died or did not respond within 12 s (HFQUANT_TIMEOUT)" in out
    assert "anks 1" in out or "ank 1" in out  # its rank


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan"])
def test_a_timeout_that_makes_no_sense_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQUANT_TIMEOUT", value)
    with pytest.raises(ValueError, match=rf"HFQUANT_TIMEOUT='{value}': expected a number of seconds above 0"):
        distributed._timeout()


def test_no_group_closes_before_all_have_connected_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is still connecting to the others fails if one of them closes its end."""
    done: list[tuple[str, Any]] = []
    groups = iter("ab")
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "new_group", lambda **_: next(groups))
    monkeypatch.setattr(distributed.dist, "monitored_barrier", lambda group, **_: done.append(("all connected", group)))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda group: done.append(("closed", group)))
    with processes() as found:
        assert found == Processes(0, 2, "b")
    assert done == [("all connected", "a"), ("closed", "a"), ("all connected", "b"), ("closed", "b")]
