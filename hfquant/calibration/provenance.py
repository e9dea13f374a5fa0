"""Provenance of a calibration set: enough to avoid mixing two sets or resuming the wrong one."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping
from typing import Any

import xxhash
from torch import Tensor, nn

from hfquant.calibration.batches import length_of
from hfquant.calibration.recorder import Target
from hfquant.calibration.samplers import BaseSampler
from hfquant.digests import update, update_with_weights
from hfquant.hub_ids import shared_name

_PACKAGES = ("hfquant", "torch", "transformers", "diffusers", "safetensors", "zstandard")
_PROBES = 16
_REDACTED = "(redacted)"
_SECRET_NAMES = re.compile(r"secret|passw|api.?key|access.?key|private.?key|authorization|credential|cookie")
# Tokens of the Hugging Face Hub, in HTTP headers and in URLs.
_SECRET_FORMS = re.compile(
    r"\bhf_\w{16,}|\b(?:bearer|basic) [\w.~+/=-]{8,}|(?<=//)[^\s/@]+:[^\s/@]+(?=@)", re.IGNORECASE
)


def provenance(
    model: Any, target: Target, sampler: BaseSampler, call_kwargs: Mapping[str, Any], shard: tuple[int, int]
) -> dict[str, Any]:
    """Describe a set that is about to be generated, as JSON, without secrets.

    The model is named by its hub id or its folder, without where the folder lies. Its entry also holds a digest of a
    few values of each weight and of the scheduler's config, so checkpoints with the same name but different weights can
    be told apart.
    """
    parts = model.components if not isinstance(model, nn.Module) else {"": model}
    weights = xxhash.xxh3_128()
    for name, part in sorted(parts.items()):
        weights.update(f"{name}:{type(part).__name__}".encode())
        if isinstance(part, nn.Module):
            update_with_weights(weights, part)
        elif isinstance(config := getattr(part, "config", None), Mapping):
            # Keys that start with an underscore are diffusers' own bookkeeping, in no fixed order.
            update(weights, {key: value for key, value in config.items() if not key.startswith("_")})
    return {
        "model": {
            "class": type(model).__name__,
            "name": without_secrets(shared_name(str(getattr(model, "name_or_path", None) or ""))),
            "weights": weights.hexdigest(),
        },
        "layer": target.name,
        "sampler": {"class": type(sampler).__name__, **_described(vars(sampler))},
        "call": _described(call_kwargs),
        "shard": list(shard),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def data_provenance(data: Any) -> dict[str, Any]:
    """Describe calibration data as JSON, without secrets: the provenance of a source or set, else its class.

    Args:
        data: batches, as returned by :func:`~hfquant.calibration.calibration_batches`.
    """
    known = getattr(getattr(data, "dataset", data), "provenance", None)
    if not isinstance(known, Mapping):
        batches = length_of(data)
        return {"class": type(data).__name__} | ({} if batches is None else {"batches": batches})
    # For a calibration set, keep what was recorded; it was recorded from the model that is being quantized.
    return _described({key: value for key, value in known.items() if key not in ("model", "shard", "versions")})


def shareable(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return a set's provenance without secrets and without where its model lies, which earlier versions recorded."""
    shared: dict[str, Any] = without_secrets(dict(provenance))
    model = shared.get("model")
    if isinstance(model, Mapping) and isinstance(name := model.get("name"), str):
        shared["model"] = {**model, "name": shared_name(name)}
    return shared


def without_secrets(value: Any) -> Any:
    """Return a value with everything that looks like a secret, by name or by form, redacted at any depth.

    Numbers under a name that contains "token" are kept: they count or identify tokens.
    """
    if isinstance(value, Mapping):
        return {key: _REDACTED if _is_secret(key, item) else without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [without_secrets(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return _SECRET_FORMS.sub(_REDACTED, value) if isinstance(value, str) else value


def _is_secret(name: Any, value: Any) -> bool:
    text = str(name).lower()
    return bool(_SECRET_NAMES.search(text)) or ("token" in text and not isinstance(value, (bool, int, float, Tensor)))


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Describe the differences between a stored set's provenance and the wanted one. Versions are ignored."""
    stored, wanted = shareable(stored), shareable(wanted)
    keys = sorted((stored.keys() | wanted.keys()) - {"versions"})
    return [f"{k} is {stored.get(k)!r} there, {wanted.get(k)!r} here" for k in keys if stored.get(k) != wanted.get(k)]


def _described(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as JSON: the value itself if JSON can represent it, else its type and a digest."""
    described = {}
    for name, value in sorted(without_secrets(arguments).items()):
        try:
            plain = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError):
            plain = False
        digest = xxhash.xxh3_128()
        update(digest, value)
        described[name] = value if plain else f"{type(value).__name__} {digest.hexdigest()}"
    return described


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
