"""Hub access errors, each explained in one sentence: what went wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hub_errors(name: str, kind: str = "model") -> Iterator[None]:
    """Explain in one sentence why a repository cannot be read from the hub; other errors pass through unchanged.

    Args:
        name: folder or hub id being read.
        kind: "model" or "dataset".

    Raises:
        FileNotFoundError: ``name`` is neither a folder nor a repository that this user can see.
        PermissionError: the repository is gated, or the hub rejects the token.
        ConnectionError: offline mode, no connection, or a hub failure, and nothing in the cache.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        found = None if Path(name).exists() else _explained(error, name, kind)
        if found is None:
            raise
        raise found from error


def _explained(error: BaseException, name: str, kind: str) -> OSError | None:
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    causes = list(_causes(error))
    # The libraries wrap the client's errors in their own. The first of these types, in this order, decides.
    known = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError)
    cause = next((e for kinds in known for e in causes if isinstance(e, kinds)), None)
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    download = f"hf download {name}{' --repo-type dataset' if kind == 'dataset' else ''}"
    if kind == "dataset":
        from datasets.exceptions import DatasetNotFoundError

        if isinstance(error, DatasetNotFoundError):  # it replaces the client's message with its own
            return FileNotFoundError(
                f"{name} is not a local file or folder. {error} Check the spelling; if it is private or gated, {log_in}"
            )
    match cause:
        case EntryNotFoundError() if not isinstance(cause, LocalEntryNotFoundError):
            return None
        case GatedRepoError():
            page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
            return PermissionError(f"{name} is gated: ask for access on {page}, then {log_in}")
        case RepositoryNotFoundError():
            return FileNotFoundError(
                f"{name} is not a local folder, and the hub has no such {kind}, or it is private: check the spelling; "
                f"if it is private, {log_in}"
            )
        case HFValidationError():
            return FileNotFoundError(f"{name} is neither a local folder nor a valid id of a {kind} on the hub")
        case HfHubHTTPError() if cause.response.status_code in (401, 403):
            return PermissionError(f"the hub rejected this token for {name}: {log_in} again")
        case HfHubHTTPError():
            return ConnectionError(
                f"the hub answers {cause.response.status_code} for {name}, which is not in the cache: try again later"
            )
        case LocalEntryNotFoundError() | ConnectionError() if is_offline_mode():
            return ConnectionError(
                f"{name} is neither a local folder nor in the cache, and offline mode is on: unset HF_HUB_OFFLINE, or "
                f"run `{download}` while online"
            )
        case LocalEntryNotFoundError() | ConnectionError():
            return ConnectionError(
                f"{name} is neither a local folder nor in the cache, and {constants.ENDPOINT} cannot be reached: check "
                "the connection, or pass a local folder"
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
