"""The affiner: per-timestep affine maps that align a quantized denoiser with the real one.

:func:`load_affiner` trains or loads one, `affiner.attach(pipe)` puts it to work, `affiner.detach()` takes it off.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hfquant.affiner.affiner import CONFIG_FILE, BlockwiseAffiner
from hfquant.affiner.config import AffinerConfig
from hfquant.affiner.fit import load_affiner
from hfquant.affiner.hooks import Affiner, Attachment, attach

__all__ = ["Affiner", "AffinerConfig", "Attachment", "BlockwiseAffiner", "attach", "load_affiner", "load_pipeline"]

SUBFOLDER = "affiner"


def load_pipeline(pipeline_class: Any, pretrained: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Loads a pipeline and attaches the affiner in its subfolder "affiner", if there is one.

    Args:
        pipeline_class: `DiffusionPipeline` or any of its subclasses.
        pretrained: Folder, or id of a repository.
        **kwargs: Of `pipeline_class.from_pretrained`; `revision`, `token`, `cache_dir` and `local_files_only` serve the
            affiner too.

    Returns:
        The pipeline; `pipe.affiner` is the affiner (None without one), `pipe.affiner.detach()` takes it off.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    pipe = pipeline_class.from_pretrained(pretrained, **kwargs)
    pipe.affiner = None
    if Path(pretrained).is_dir() and not (Path(pretrained) / SUBFOLDER / CONFIG_FILE).is_file():
        return pipe
    hub = {k: v for k, v in kwargs.items() if k in ("revision", "token", "cache_dir", "local_files_only")}
    try:
        pipe.affiner = BlockwiseAffiner.from_pretrained(pretrained, subfolder=SUBFOLDER, **hub)
    except LocalEntryNotFoundError:
        if not (kwargs.get("local_files_only") or constants.HF_HUB_OFFLINE):
            raise
    except EntryNotFoundError:
        pass
    if pipe.affiner is not None:
        pipe.affiner.attach(pipe)
    return pipe
