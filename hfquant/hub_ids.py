"""Hub ids of models, and names of models that can be shared."""

from __future__ import annotations

import os
import re
from pathlib import Path

_SNAPSHOT = re.compile(r"models--((?:(?!--)[^/\\])+(?:--(?:(?!--)[^/\\])+)?)[/\\]snapshots[/\\]")


def hub_id(source: str) -> str | None:
    """Return the id of a repository, also for its folder in the cache; None for other folders."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if cached := _SNAPSHOT.search(source):
        return cached[1].replace("--", "/", 1)
    if not source or Path(source).exists() or Path(source).is_absolute():
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source


def shared_name(source: str) -> str:
    """Return how to name a model to others: by its hub id, or by the last name of its folder's path."""
    return hub_id(source) or (os.path.basename(os.path.abspath(source)) if source else "")
