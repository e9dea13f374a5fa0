"""Console output: log lines and progress bars."""

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
    """Return a count with its noun, plural unless the count is one: "1 layer", "3 layers"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


@contextmanager
def log_shown() -> Iterator[None]:
    """Show this package's INFO lines, above any progress bar, even if logging is not configured."""
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
    """Return a progress bar, hidden if the user has disabled progress bars; see :func:`bars_enabled`.

    Args:
        iterable: what to iterate over; None for a bar that is updated by hand.
        desc: title of the bar.
        total: number of steps; default: the length of ``iterable``.
        unit: name of a step.
        shown: whether this process shows the bar at all.
    """
    return tqdm(iterable, desc, total=total, unit=unit, disable=not (shown and bars_enabled()))


def bars_enabled() -> bool:
    """Return whether progress bars are enabled: neither ``TQDM_DISABLE`` nor an imported library disables them.

    tqdm itself reads ``TQDM_DISABLE`` only once, on import. transformers and diffusers each have a switch
    (``<library>.utils.logging.disable_progress_bar()``); a library that is not imported cannot have been switched off.
    """
    if os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false"):
        return False
    switches = (sys.modules.get(f"{library}.utils.logging") for library in ("transformers", "diffusers"))
    return all(switch is None or switch.is_progress_bar_enabled() for switch in switches)


def size(count: float) -> str:
    """Return a number of bytes in readable form, such as 1.2 GB."""
    from rich.filesize import decimal

    return decimal(round(count))
