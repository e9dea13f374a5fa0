"""The Hub client, pointed at a local server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from huggingface_hub import constants

from tests.integrations.sharing.hub_server import Hub, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Do in this process what HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE=0 and HF_HUB_DISABLE_XET=1 do in a new one."""
    cache: Path = tmp_path_factory.mktemp("cache")
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for client in (huggingface_hub.hf_api.api, transformers.utils.hub.hf_api()):
            monkeypatch.setattr(client, "endpoint", server.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()
