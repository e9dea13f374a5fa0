"""Output of commands: folders that are written completely or not at all, tables and JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def check_empty(out: Path) -> None:
    """Raise FileExistsError if a folder to be written is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty; choose another --out, or remove it first")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` to write to. It is renamed to `out` at the end, or removed if anything fails."""
    check_empty(out)
    partial = out.absolute().with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def console() -> Console:
    """Return a console that prints text verbatim."""
    from rich.console import Console

    return Console(markup=False, highlight=False, soft_wrap=True)


def print_json(content: Any) -> None:
    """Print a JSON document."""
    typer.echo(json.dumps(content, indent=2))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print aligned columns, folded to the width of a terminal; elsewhere at full width."""
    from rich.table import Column, Table

    table = Table(*(Column(title, overflow="fold") for title in head), title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(*row)
    out = console()
    if not out.is_terminal:
        out.width = max(out.width, out.measure(table, options=out.options.update(max_width=10_000)).maximum)
    out.print(table)
