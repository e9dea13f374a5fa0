"""Tensors that took long to make, kept for the next time below the Hugging Face cache's home."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)


def folder() -> Path:
    """Return where samples that models made themselves are kept; it need not be there."""
    return Path(constants.HF_HOME) / "hfquant" / "self"


def kept(key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what is kept under ``key``, else what ``make`` gives, kept from now on where the folder can be written.

    Several processes may come at once: each writes a file of its own and renames it, so one is there whole or not.
    """
    path = folder() / f"{key}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            logger.warning("%s is damaged (%s): its samples are made again", path, error)
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
    except (OSError, SafetensorError) as error:  # a home that is read-only, or a full disk
        logger.info("samples are not kept for the next time: %s", error)
    return made
