"""What this package says on the console: log lines and progress bars."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural unless it is one: "1 layer", "3 layers"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


@contextmanager
def log_shown() -> Iterator[None]:
    """This package's INFO lines appear, above any progress bar, also where nobody has set up logging."""
    package, root = logging.getLogger("hfquant"), logging.getLogger()
    level = package.level
    package.setLevel(min(package.getEffectiveLevel(), logging.INFO))
    try:
        with logging_redirect_tqdm([root if root.handlers else package]):
            yield
    finally:
        package.setLevel(level)


def progress_bar(
    iterable: Iterable[Any] | None = None,
    desc: str | None = None,
    *,
    total: int | None = None,
    unit: str = "it",
    shown: bool = True,
) -> tqdm:
    """Return a progress bar, silent where the user has switched bars off: see :func:`bars_enabled`.

    Args:
        iterable: what is iterated through the bar; None for one that is updated by hand.
        desc: its title.
        total: steps in all; default: the length of ``iterable``.
        unit: what a step is called.
        shown: whether this process shows it at all.
    """
    return tqdm(iterable, desc, total=total, unit=unit, disable=not (shown and bars_enabled()))


def bars_enabled() -> bool:
    """Return whether bars are wanted now: not switched off by ``TQDM_DISABLE`` nor in a library that is in use.

    tqdm itself reads ``TQDM_DISABLE`` once, when it is imported. transformers and diffusers keep a switch each
    (``<library>.utils.logging.disable_progress_bar()``); one that has not been imported has not been switched.
    """
    if os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false"):
        return False
    switches = (sys.modules.get(f"{library}.utils.logging") for library in ("transformers", "diffusers"))
    return all(switch is None or switch.is_progress_bar_enabled() for switch in switches)
