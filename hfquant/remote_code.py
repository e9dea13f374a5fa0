"""Code that comes with a model, in its folder or hub repository, and whether it may run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_allowed: ContextVar[bool] = ContextVar("remote_code_allowed", default=False)


@contextmanager
def remote_code(allowed: bool) -> Iterator[None]:
    """Set whether models that are loaded in this context by name may run code of their own.

    Args:
        allowed: the value of ``trust_remote_code`` for both libraries. It is False elsewhere, and never left open:
            transformers would then ask on the terminal.
    """
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def remote_code_allowed() -> bool:
    """Return whether models that are loaded by name may run code of their own."""
    return _allowed.get()


@contextmanager
def remote_code_errors(name: str) -> Iterator[None]:
    """Turn the libraries' refusal to run a model's own code into one sentence that names the option.

    Args:
        name: folder or hub id being read.

    Raises:
        ValueError: the model has code of its own, which is not allowed to run.
    """
    try:
        yield
    except ValueError as error:
        if remote_code_allowed() or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name} has code of its own, which would run on this machine: read it, and if you trust it, pass "
            "--trust-remote-code"
        ) from error
