"""Save and push quantized models, pipelines, affiners and calibration sets together with the files they need.

Neither library tells a quantizer where a model is saved or pushed. So what their own ``save_pretrained`` and
``push_to_hub`` write has no hfquant card; transformers' card has hfquant's tags, and both keep a card that is already
in the repository.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from hfquant.integrations.sharing.card import content_of
from hfquant.integrations.sharing.kinds import Kind, kind_of
from hfquant.integrations.sharing.origin import CARD_FILE, origin_of

_LIBRARIES = ("hfquant.", "transformers.", "diffusers.")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def save_pretrained(
    thing: Any, save_directory: str | os.PathLike[str], *, base_model: str | None = None, **options: Any
) -> None:
    """Save an hfquant object with a model card and the tokenizer or processor that the model came with.

    Args:
        thing: a quantized model, a pipeline with quantized components (and its ``affiner``, if it has one, as
            :func:`hfquant.affiner.load_pipeline` sets it), an affiner, or a calibration set.
        save_directory: target folder. Text that a person wrote into an existing README.md is kept.
        base_model: hub id of the full-precision model; default: where ``thing`` was loaded from, if that is a hub id.
        **options: options of the object's own ``save_pretrained`` (``max_shard_size``, ``variant``...), or of
            :meth:`~hfquant.BaseCalibSet.save`.

    Raises:
        TypeError: ``thing`` is none of these, or its own method has no such option.
        ValueError: nothing in it is quantized, it has adapters, or the metadata of the existing README.md cannot be
            read.
    """
    folder = Path(save_directory)
    _save(thing, folder, folder.name, base_model, options)


def push_to_hub(
    thing: Any,
    repo_id: str,
    *,
    subfolder: str = "",
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    base_model: str | None = None,
    **options: Any,
) -> str:
    """Upload what :func:`save_pretrained` writes, in one commit, creating the repository if necessary.

    Text that a person wrote into an existing card is kept. Weight shards and indices left by an earlier push are
    removed.

    Args:
        thing: as for :func:`save_pretrained`; a calibration set becomes a dataset repository.
        repo_id: "user/name".
        subfolder: target folder in the repository.
        revision: branch to commit to, created from the main one if necessary; default: the main one.
        private: whether a repository created here is private.
        token: hub token; by default the one stored on this machine.
        create_pr: open a pull request instead of committing.
        commit_message: message of the commit.
        commit_description: description of the commit or of the pull request.
        base_model: as for :func:`save_pretrained`.
        **options: as for :func:`save_pretrained`.

    Returns:
        URL of the commit or of the pull request.

    Raises:
        PermissionError: the token has no write access there. Nothing was uploaded.
        TypeError, ValueError: as for :func:`save_pretrained`.
    """
    from huggingface_hub import HfApi

    kind = kind_of(thing)
    _check_options(kind, thing, options)
    api = HfApi(token=token)
    with _allowed(repo_id), tempfile.TemporaryDirectory() as temporary:
        repo_id = api.create_repo(repo_id, repo_type=kind.repo_type, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, repo_type=kind.repo_type, branch=revision, exist_ok=True)
        folder = Path(temporary)
        there = "/".join(filter(None, (subfolder, CARD_FILE)))
        if api.file_exists(repo_id, there, repo_type=kind.repo_type, revision=revision):
            card = Path(api.hf_hub_download(repo_id, there, repo_type=kind.repo_type, revision=revision))
            (folder / CARD_FILE).write_bytes(card.read_bytes())
        _save(thing, folder, repo_id, base_model, options)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=kind.repo_type,
            folder_path=folder,
            path_in_repo=subfolder or None,
            revision=revision,
            commit_message=commit_message or f"Upload {kind.noun}",
            commit_description=commit_description,
            create_pr=create_pr,
            delete_patterns=[*kind.leftovers, *_leftover_weights(folder)] or None,
        )
    return str(commit.pr_url or commit)


def _save(thing: Any, folder: Path, address: str, base_model: str | None, options: dict[str, Any]) -> None:
    kind, card = kind_of(thing), folder / CARD_FILE
    _check_options(kind, thing, options)
    origin = origin_of(thing, base_model)
    # A card that cannot be kept raises here, before anything is written.
    existing = card.read_text(encoding="utf-8-sig") if card.is_file() else origin.quantized_card
    content = content_of(kind.facts(thing), kind.noun, address, origin, existing)
    kind.save(thing, folder, options)
    if options.get("is_main_process", True):
        card.write_text(content, encoding="utf-8")


def _check_options(kind: Kind, thing: Any, options: Iterable[str]) -> None:
    """Raise TypeError for an option that the object's own method does not have; the libraries' methods ignore it."""
    methods = [vars(base)[kind.method] for base in type(thing).__mro__ if kind.method in vars(base)]
    if not methods[0].__module__.startswith(_LIBRARIES):  # a user's own method may take any
        return
    named = {name for method in methods for name, p in list(signature(method).parameters.items())[2:] if _is_named(p)}
    # transformers has dropped the first, which diffusers has. The last would push without a card.
    allowed = sorted((named | {"safe_serialization"}) - {"push_to_hub"})
    if unknown := [name for name in options if name not in allowed]:
        raise TypeError(
            f"{type(thing).__name__}.{kind.method} has no option {unknown[0]!r}; its options are {', '.join(allowed)}"
        )


def _is_named(parameter: Parameter) -> bool:
    return parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


@contextmanager
def _allowed(repo_id: str) -> Iterator[None]:
    """Turn the hub's permission errors into one error that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status not in (401, 403):
            raise
        raise PermissionError(
            f"{repo_id}: the hub does not let this token write there ({status}). Nothing was uploaded or lost. "
            "Log in with a token that may write (`hf auth login`), pass token=, or push to a name of your own"
        ) from error


def _leftover_weights(folder: Path) -> list[str]:
    """Return patterns for files that a push with other shards may have left next to the weights in ``folder``."""
    stems = {_SHARD.sub("", str(path.relative_to(folder).with_suffix(""))) for path in folder.rglob("*.safetensors")}
    shards = [f"{stem}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors" for stem in sorted(stems)]
    return [*shards, *(f"{stem}.safetensors{end}" for stem in sorted(stems) for end in ("", ".index.json"))]
