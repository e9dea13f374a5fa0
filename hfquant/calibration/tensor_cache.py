"""A cache, below the Hugging Face home, for tensors that take long to compute."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

logger = logging.getLogger(__name__)


def folder() -> Path:
    """Return the cache folder for data that models generated themselves; it may not exist yet."""
    return Path(constants.HF_HOME) / "hfquant" / "self"


def kept(key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors cached under ``key``; else call ``make`` and cache the result if the folder is writable.

    Safe for concurrent processes: each writes its own temporary file and renames it, so readers never see a partial
    file.
    """
    path = folder() / f"{key}.safetensors"
    try:
        return load(path.read_bytes())  # opened once: another process may remove it
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s): generating its samples again", path, error)
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{key}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        try:
            save_file({name: tensor.contiguous() for name, tensor in made.items()}, partial)
            os.replace(partial, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(partial)
    except (OSError, SafetensorError) as error:  # a read-only home, or a full disk
        logger.info("generated samples could not be cached: %s", error)
    return made
