"""Modules whose forward accelerate or diffusers has wrapped, for example to fetch weights or move inputs.

Neither library has a public API to query these hooks, so only this module reads the attributes that hold them.
``tests/smoke/test_offload.py`` checks them against the installed versions, including the oldest ones allowed.
"""

from __future__ import annotations

import os
import tempfile
from collections import ChainMap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors.torch import save_file
from torch import Tensor, nn

_ACCELERATE, _DIFFUSERS = "_hf_hook", "_diffusers_hook"
_GROUP, _CASTING = "group_offloading", "layerwise_casting"


def has_hook(model: nn.Module) -> bool:
    """Return whether any module of ``model`` has an accelerate hook, which may fetch its weights on demand."""
    return any(_ACCELERATE in vars(module) for module in model.modules())


def refuse_group_offloaded(model: nn.Module) -> None:
    """Reject a model that diffusers offloads in groups: these hold the tensors that existed when it was enabled.

    For groups on disk, a module's own tensors are not even initialized.

    Raises:
        ValueError: ``model`` is group offloaded.
    """
    if any(vars(m)[_DIFFUSERS].get_hook(_GROUP) is not None for m in model.modules() if _DIFFUSERS in vars(m)):
        raise ValueError(
            f"{type(model).__name__} uses group offloading, whose groups would not include the quantized layers: "
            "load it without, and call enable_group_offload afterwards"
        )


def stored_dtype(layer: nn.Module) -> torch.dtype:
    """Return the dtype of a layer's weight between calls, which diffusers' layerwise casting sets."""
    hook = vars(layer)[_DIFFUSERS].get_hook(_CASTING) if _DIFFUSERS in vars(layer) else None
    dtype: torch.dtype = layer.get_parameter("weight").dtype if hook is None else hook.storage_dtype
    return dtype


def execution_device(module: nn.Module) -> torch.device | str | int | None:
    """Return the device on which accelerate runs ``module``; None if it specifies none."""
    hook = vars(module).get(_ACCELERATE)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    said = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in said if device is not None), None)


def fetches_weights(module: nn.Module) -> bool:
    """Return whether accelerate stores the module's weights elsewhere and fetches them for each forward."""
    return any(hook.offload for hook in _align_hooks(vars(module).get(_ACCELERATE)))


class OnDisk(NamedTuple):
    """Where accelerate stores the weights of a module that is offloaded to disk.

    Attributes:
        folder: folder of written weights; None if all are read from the checkpoint's own files.
        prefix: the module's name followed by a dot.
        files: accelerate's index entry of each weight on disk, by full name.
    """

    folder: Path | None
    prefix: str
    files: dict[str, Any]


def on_disk(module: nn.Module) -> OnDisk | None:
    """Return where ``module``'s own weights are on disk; None if they are in memory."""
    return next((found for hook in _align_hooks(vars(module).get(_ACCELERATE)) if (found := _place(hook))), None)


def _align_hooks(hook: Any) -> list[AlignDevicesHook]:
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]


def _place(hook: AlignDevicesHook) -> OnDisk | None:
    weights = hook.weights_map
    if not hook.offload or not isinstance(weights, PrefixedDataset):
        return None
    loader, prefix = weights.dataset, weights.prefix
    if not isinstance(loader, OffloadedWeightsLoader) or not any(key.startswith(prefix) for key in loader.index):
        return None
    folder = None if loader.save_folder is None else Path(loader.save_folder)
    return OnDisk(folder, prefix, loader.index)


def forget_weights(module: nn.Module) -> None:
    """Delete the files that a library wrote to an offload folder for a module that is no longer used."""
    place = on_disk(module)
    if place is None or place.folder is None:
        return
    for name in [name for name in place.files if name.startswith(place.prefix)]:
        # Written by accelerate, or by transformers to a separate file; other files belong to the checkpoint.
        own = place.folder / f"{name}.safetensors"
        if place.files[name].get("safetensors_file") in (None, str(own)):
            del place.files[name]
            own.unlink(missing_ok=True)
            (place.folder / f"{name}.dat").unlink(missing_ok=True)


def copy_hook(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the accelerate hook of ``old``, unless it has one. ``old`` keeps its own.

    If the weights of ``old`` are on disk, those of ``new`` are written there too, to separate files.
    """
    if _ACCELERATE in vars(old) and _ACCELERATE not in vars(new):
        add_hook_to_module(new, _renewed(vars(old)[_ACCELERATE], new))


def lend(owner: nn.Module, borrower: nn.Module, names: Collection[str]) -> None:
    """Let accelerate fetch tensors shared by two modules for both of them, if it fetches weights of either.

    Args:
        owner: module as part of which the tensors are loaded and offloaded.
        borrower: module that shares them, and was dispatched before it did.
        names: names of the shared tensors.
    """
    if not fetches_weights(owner) and not fetches_weights(borrower):
        return
    hooks = [hook for m in (borrower, owner) for hook in _align_hooks(vars(m).get(_ACCELERATE))]
    offloading = next(hook for hook in hooks if hook.offload)
    own = {name: tensor for name, tensor in _tensors(borrower).items() if name not in names}
    lent = {name: tensor for name, tensor in _tensors(owner).items() if name in names}
    hook = AlignDevicesHook(
        execution_device=hooks[0].execution_device,
        offload=True,
        io_same_device=hooks[0].io_same_device,
        weights_map=ChainMap(_offloaded(borrower), own, _offloaded(owner), lent),
        offload_buffers=offloading.offload_buffers,
        place_submodules=offloading.place_submodules,
        skip_keys=hooks[0].skip_keys,
    )
    add_hook_to_module(borrower, hook)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _offloaded(module: nn.Module) -> Any:
    """Return the map from which accelerate fetches the module's weights, by name; empty if it does not."""
    hooks = _align_hooks(vars(module).get(_ACCELERATE))
    return next((hook.weights_map for hook in hooks if hook.offload), {})


def forget_hook(copied: nn.Module) -> None:
    """Remove from a shallow copy of a module what accelerate bound to the original."""
    for key in (_ACCELERATE, "_old_forward", "forward"):
        vars(copied).pop(key, None)


def _renewed(hook: Any, new: nn.Module) -> Any:
    """Return a copy of a hook for another module: if it offloads, it must hold the new module's weights."""
    if isinstance(hook, SequentialHook):
        return SequentialHook(*(_renewed(h, new) for h in hook.hooks))
    if not isinstance(hook, AlignDevicesHook):
        return hook
    place = _place(hook)
    return AlignDevicesHook(
        execution_device=hook.execution_device,
        offload=hook.offload,
        io_same_device=hook.io_same_device,
        weights_map=None if place is None or place.folder is None else _written(place, new, hook),
        offload_buffers=hook.offload_buffers,
        place_submodules=hook.place_submodules,
        skip_keys=hook.skip_keys,
    )


def _written(place: OnDisk, new: nn.Module, hook: AlignDevicesHook) -> PrefixedDataset:
    """Write the tensors of a module that a hook offloads, and return the map through which accelerate reads them.

    Each call creates a new file, since the replaced module may be restored.
    """
    tensors: dict[str, Tensor] = dict(new.named_parameters())
    if hook.offload_buffers:
        tensors |= dict(new.named_buffers())
    assert place.folder is not None
    handle, file = tempfile.mkstemp(".safetensors", place.prefix, place.folder)
    os.close(handle)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    index = {place.prefix + name: {"safetensors_file": file, "weight_name": name} for name in tensors}
    device = hook.weights_map.dataset.device
    return PrefixedDataset(OffloadedWeightsLoader(save_folder=place.folder, index=index, device=device), place.prefix)


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """Yield what either library stores in ``module``, weights included; a copy of the module may share it."""
    yield from (vars(module)[name] for name in (_ACCELERATE, _DIFFUSERS) if name in vars(module))


def drop_wrappers(copied: nn.Module, fetch: bool) -> None:
    """Make a copied module run its own forward.

    Args:
        copied: Result of ``copy.deepcopy`` on a module, which shares the module's hooks.
        fetch: Keep accelerate's wrapper, which fetches weights. The wrapper of diffusers is always removed: it runs the
            original module, not the copy.
    """
    if _DIFFUSERS in vars(copied) or (not fetch and _ACCELERATE in vars(copied)):
        vars(copied).pop("forward", None)
