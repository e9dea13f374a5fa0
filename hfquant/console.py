"""What this package says on the console."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

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


def size(count: float) -> str:
    """Return a number of bytes as people write it, 1.2 GB."""
    from rich.filesize import decimal

    return decimal(round(count))
