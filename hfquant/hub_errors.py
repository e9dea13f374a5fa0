"""What goes wrong between here and the hub, in one sentence each: what it was, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hub_errors(name: str, kind: str = "model") -> Iterator[None]:
    """Say in one sentence why the hub does not give a repository; all other errors pass as they are.

    Args:
        name: folder or hub id that is being read.
        kind: "model" or "dataset".

    Raises:
        FileNotFoundError: neither a folder nor a repository that this user can see.
        PermissionError: a gated repository, or a token that the hub does not take.
        ConnectionError: offline mode, no connection, or a hub that is out of order; and nothing in the cache.
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
    # The libraries wrap what the client raises, each in an error of its own: the first of these kinds decides.
    known = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError)
    cause = next((e for kinds in known for e in causes if isinstance(e, kinds)), None)
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    download = f"hf download {name}{' --repo-type dataset' if kind == 'dataset' else ''}"
    if kind == "dataset":
        from datasets.exceptions import DatasetNotFoundError

        if isinstance(error, DatasetNotFoundError):  # it hides what the client said, and says it in words of its own
            return FileNotFoundError(
                f"{name} is no file or folder here. {error} Check the spelling; if it is private or gated, {log_in}"
            )
    match cause:
        case EntryNotFoundError() if not isinstance(cause, LocalEntryNotFoundError):
            return None
        case GatedRepoError():
            page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
            return PermissionError(f"{name} is gated: ask for access on {page}, then {log_in}")
        case RepositoryNotFoundError():
            return FileNotFoundError(
                f"{name} is no folder here, and the hub has no such {kind}, or it is private: check the spelling; if "
                f"it is private, {log_in}"
            )
        case HFValidationError():
            return FileNotFoundError(f"{name} is no folder here, and cannot be the id of a {kind} on the hub")
        case HfHubHTTPError() if cause.response.status_code in (401, 403):
            return PermissionError(f"the hub does not give {name} with this token: {log_in} anew")
        case HfHubHTTPError():
            return ConnectionError(
                f"the hub answers {cause.response.status_code} for {name}, which is not in the cache: try again later"
            )
        case LocalEntryNotFoundError() | ConnectionError() if is_offline_mode():
            return ConnectionError(
                f"{name} is no folder here and not in the cache, and offline mode is on: unset HF_HUB_OFFLINE, or run "
                f"`{download}` where there is a connection"
            )
        case LocalEntryNotFoundError() | ConnectionError():
            return ConnectionError(
                f"{name} is no folder here and not in the cache, and {constants.ENDPOINT} cannot be reached: check the "
                "connection, or name a folder"
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it came of, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
