"""Solved layers on disk: what a later run may reuse, and what it must not."""

from __future__ import annotations

import copy
import errno
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hfquant
from hfquant import ptq, resume

CONFIG = {
    "default": {
        "opt": {"type": "smooth"},
        "weight_quant": {"type": "int4", "group_size": 8},
        "input_quant": {"type": "int8"},
    }
}


class Net(nn.Module):
    """Two branches with equal weights whose inputs differ per channel by factors of 1e-4 to 1e4."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.two.load_state_dict(self.one.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.logspace(-2, 2, 16)
        return self.out(self.one(x * scale) + self.two(x / scale))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 16, generator=generator) for _ in range(3)]


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of layers as they are solved."""
    solve, names = ptq.solve, []

    def counted(name: str, *args: Any) -> Any:
        names.append(name)
        return solve(name, *args)

    monkeypatch.setattr(ptq, "solve", counted)
    return names


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(state(one).values(), state(two).values(), strict=True))


def test_layers_of_equal_weights_are_told_apart(net: Net, data: Any, tmp_path: Path) -> None:
    straight = hfquant.quantize(copy.deepcopy(net), data, CONFIG)
    for _ in range(2):
        assert same(hfquant.quantize(copy.deepcopy(net), data, CONFIG, resume_dir=tmp_path), straight)


def test_other_data_or_mode_takes_nothing(net: Net, data: Any, tmp_path: Path, solved: list[str]) -> None:
    hfquant.quantize(copy.deepcopy(net), data, CONFIG, resume_dir=tmp_path)
    for change in (
        {"calib_data_loader": [*data[:2], data[2] * 3]},
        {"calib_data_loader": data[:2]},
        {"per_layer_mode": True},
    ):
        solved.clear()
        arguments = {"calib_data_loader": data, **change}
        model = hfquant.quantize(copy.deepcopy(net), config=CONFIG, resume_dir=tmp_path, **arguments)
        assert solved == ["one", "two", "out"], change
        solved.clear()
        assert same(hfquant.quantize(copy.deepcopy(net), config=CONFIG, resume_dir=tmp_path, **arguments), model)
        assert not solved


def test_another_release_takes_nothing(
    net: Net, data: Any, tmp_path: Path, solved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hfquant.quantize(copy.deepcopy(net), data, CONFIG, resume_dir=tmp_path)
    solved.clear()
    monkeypatch.setattr("hfquant.run.version", lambda package: "99.0")
    hfquant.quantize(copy.deepcopy(net), data, CONFIG, resume_dir=tmp_path)
    assert solved == ["one", "two", "out"]


def test_another_model_takes_nothing(net: Net, data: Any, tmp_path: Path, solved: list[str]) -> None:
    """The inputs of `out` depend on the weights before it."""
    hfquant.quantize(copy.deepcopy(net), data, CONFIG, resume_dir=tmp_path)
    solved.clear()
    with torch.no_grad():
        net.one.weight *= 50
    straight = hfquant.quantize(copy.deepcopy(net), data, CONFIG)
    assert same(hfquant.quantize(copy.deepcopy(net), data, CONFIG, resume_dir=tmp_path), straight)
    assert solved == ["one", "two", "out"] * 2


def test_layer_by_layer_the_plans_of_earlier_layers_count(
    net: Net, data: Any, tmp_path: Path, solved: list[str]
) -> None:
    """There, layers are calibrated on the outputs of quantized ones."""
    coarse = {**CONFIG, "one": {"weight_quant": {"type": "int2", "group_size": 8}}}
    for mode, solved_again in ((False, ["one"]), (True, ["one", "two", "out"])):
        hfquant.quantize(copy.deepcopy(net), data, CONFIG, resume_dir=tmp_path, per_layer_mode=mode)
        solved.clear()
        hfquant.quantize(copy.deepcopy(net), data, coarse, resume_dir=tmp_path, per_layer_mode=mode)
        assert solved == solved_again


def test_data_that_has_no_length(net: Net, data: Any, tmp_path: Path, solved: list[str]) -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter(data)

    model = hfquant.quantize(copy.deepcopy(net), Stream(), CONFIG, resume_dir=tmp_path)
    solved.clear()
    assert same(hfquant.quantize(copy.deepcopy(net), Stream(), CONFIG, resume_dir=tmp_path), model)
    assert not solved


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_named_and_solved_anew(
    net: Net, data: Any, tmp_path: Path, solved: list[str], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    straight = hfquant.quantize(copy.deepcopy(net), data, CONFIG, resume_dir=tmp_path)
    broken = sorted(tmp_path.glob("*.safetensors"))[0]
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes({"cut": content[:50], "flipped": content, "empty": b""}[damage])
    solved.clear()
    with caplog.at_level(logging.WARNING, "hfquant"):
        again = hfquant.quantize(copy.deepcopy(net), data, CONFIG, resume_dir=tmp_path)
    assert len(solved) == 1
    assert sum(f"{broken} is damaged" in r.getMessage() for r in caplog.records) == 1
    assert same(again, straight)
    solved.clear()
    hfquant.quantize(copy.deepcopy(net), data, CONFIG, resume_dir=tmp_path)
    assert not solved  # the file has been restored


def test_a_folder_that_cannot_be_written_is_noticed_before_calibration(
    net: Net, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptq, "observe", lambda *args, **kwargs: pytest.fail("calibrated"))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match=r"resume_dir .*file. cannot be written"):
        hfquant.quantize(net, data, CONFIG, resume_dir=file)


def test_a_full_disk_names_layer_and_file(net: Net, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resume, "save_file", full)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(OSError, match=rf"layer 'one' cannot be written to {tmp_path}.*No space left"):
        hfquant.quantize(net, data, CONFIG, resume_dir=tmp_path)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_a_layer_that_took_scales_a_token_is_taken_as_it_was_solved(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIG)
    config["default"]["input_quant"]["token_fallback"] = True
    rows = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    rows[::64, 3] *= 1e3
    linear = nn.Sequential(nn.Linear(16, 8))
    first, again = (hfquant.quantize(copy.deepcopy(linear), [rows], config, resume_dir=tmp_path) for _ in range(2))
    assert not first[0].plan.static_input
    assert again[0].plan == first[0].plan
    assert again.state_dict().keys() == first.state_dict().keys()
    assert torch.equal(again(rows), first(rows))


def test_the_report_of_a_resumed_run_is_that_of_an_uninterrupted_one(
    net: Net, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured of a solved layer is stored with it, including the time that solving took."""
    whole = hfquant.quantize(copy.deepcopy(net), data, CONFIG).quant_report.to_dict()
    solve = ptq.solve

    def interrupted(name: str, *args: Any) -> Any:
        if name == "out":
            raise KeyboardInterrupt
        return solve(name, *args)

    monkeypatch.setattr(ptq, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hfquant.quantize(copy.deepcopy(net), data, CONFIG, resume_dir=tmp_path)
    monkeypatch.setattr(ptq, "solve", solve)
    first, second = (
        hfquant.quantize(copy.deepcopy(net), data, CONFIG, resume_dir=tmp_path).quant_report.to_dict() for _ in range(2)
    )
    assert second == first
    for report in (whole, first):
        assert all(layer.pop("seconds") > 0 for layer in report["layers"])
    assert first == whole
    assert all(layer["error"] for layer in first["layers"])


def test_a_file_without_measurements_is_still_taken(
    net: Net, data: Any, tmp_path: Path, solved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions did not store them."""
    save = resume.save_file

    def without(tensors: Any, path: Path, metadata: dict[str, str]) -> None:
        kept = {key: value for key, value in metadata.items() if key not in ("measured", "checksum")}
        save(tensors, path, kept | {"checksum": resume._checksum(tensors, kept)})

    monkeypatch.setattr(resume, "save_file", without)
    straight = hfquant.quantize(copy.deepcopy(net), data, CONFIG, resume_dir=tmp_path)
    solved.clear()
    again = hfquant.quantize(copy.deepcopy(net), data, CONFIG, resume_dir=tmp_path)
    assert not solved
    assert same(again, straight)
    assert [layer.error for layer in again.quant_report.layers] == [None] * 3
