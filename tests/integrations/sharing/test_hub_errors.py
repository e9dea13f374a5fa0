"""If the Hub does not deliver what is asked for, every command explains why in one sentence."""

from __future__ import annotations

import time
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from hfquant.calibration import calibration_batches
from hfquant.cli import app
from hfquant.hub_errors import hub_errors
from hfquant.integrations.hub import load
from hfquant.integrations.skeleton import skeleton
from tests.integrations.sharing.hub_server import Hub

NOWHERE = "http://127.0.0.1:9"


def read_data(name: str) -> None:
    list(calibration_batches({"dataset": name, "samples": 1}))


@pytest.fixture
def hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Also covers the datasets library, and skips the delays between retries."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.repos |= {("model", "me/gated"): {"config.json": b"{}"}, ("dataset", "me/gated"): {"a.csv": b"text\na"}}
    hub.repos["model", "me/empty"] = {".gitattributes": b""}
    hub.gated.add("me/gated")
    return hub


def refuses(hub: Hub, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    if state == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    elif state == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
        template = NOWHERE + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", NOWHERE)
    elif state == "broken":
        hub.broken = 503
    elif state == "bad token":
        hub.broken = 401


CASES = [
    ("offline", "me/nothing", ConnectionError, "offline mode is on: unset HF_HUB_OFFLINE, or run `hf download"),
    ("unreachable", "me/nothing", ConnectionError, f"{NOWHERE} cannot be reached: check the connection"),
]
MODEL_CASES = [
    ("online", "me/nothing", FileNotFoundError, "the hub has no such model, or it is private: check the spelling"),
    ("online", "me/gated", PermissionError, "me/gated is gated: ask for access on http"),
    ("broken", "me/nothing", ConnectionError, "the hub answers 503 for me/nothing"),
    ("bad token", "me/nothing", PermissionError, "rejected this token for me/nothing: log in"),
    ("online", "me/empty", FileNotFoundError, "me/empty holds no model: it has neither model_index.json nor"),
    ("online", "me/not an id", FileNotFoundError, "nor a valid id of a model on the hub"),
]
DATA_CASES = [
    ("online", "me/nothing", FileNotFoundError, "doesn't exist on the Hub or cannot be accessed. Check the spelling"),
    ("online", "me/gated", FileNotFoundError, "'me/gated' is a gated dataset on the Hub."),
]


@pytest.mark.parametrize("read", [load, skeleton])
@pytest.mark.parametrize(("state", "name", "kind", "said"), [*CASES, *MODEL_CASES])
def test_models(hub, monkeypatch, read, state, name, kind, said):
    refuses(hub, monkeypatch, state)
    with pytest.raises(kind) as caught:
        read(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("state", "name", "kind", "said"), [*CASES, *DATA_CASES])
def test_datasets(hub, monkeypatch, state, name, kind, said):
    refuses(hub, monkeypatch, state)
    with pytest.raises(kind) as caught:
        read_data(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [
        ("plan", "me/nothing"),
        ("quantize", "me/nothing", "--preset", "w4a16", "--out", "out"),
        ("compare", "me/nothing", "me/nothing"),
        ("calibrate", "me/nothing", "--source", "me/nodata", "--out", "out"),
        ("export", "me/nothing", "--out", "out"),
        ("recipe", "check", "smollm2-w4a16", "me/nothing"),
    ],
)
def test_every_command_says_it_in_one_line(hub, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "the hub has no such model" in result.stderr
    assert not list(Path.cwd().iterdir())


def test_other_errors_pass(tmp_path):
    with pytest.raises(ValueError, match="something else"), hub_errors("me/nothing"):
        raise ValueError("something else")
    with pytest.raises(ConnectionError, match="of a process"), hub_errors(str(tmp_path)):
        raise ConnectionError("of a process")
