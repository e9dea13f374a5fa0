"""Modules whose forward accelerate or diffusers has wrapped, to fetch weights or move inputs, say.

Neither library has a public way to ask for such a hook, so the attributes that hold them are read here alone.
``tests/smoke/test_offload.py`` checks them against the installed versions, the oldest allowed among them.
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
_GROUP = "group_offloading"


def has_hook(model: nn.Module) -> bool:
    """Return whether accelerate runs some module of ``model``, and so may fetch its weights when they are needed."""
    return any(_ACCELERATE in vars(module) for module in model.modules())


def refuse_group_offloaded(model: nn.Module) -> None:
    """Raise where diffusers offloads ``model`` in groups, which hold the tensors that were there when it was enabled.

    Of groups that are on disk a module's own tensors are not even initialized.

    Raises:
        ValueError: it does.
    """
    if any(vars(m)[_DIFFUSERS].get_hook(_GROUP) is not None for m in model.modules() if _DIFFUSERS in vars(m)):
        raise ValueError(
            f"{type(model).__name__} is group offloaded, and its groups would not know new layers: load it without, "
            "and call enable_group_offload afterwards"
        )


def execution_device(module: nn.Module) -> torch.device | str | int | None:
    """Return where accelerate runs ``module``; None where it does not say."""
    hook = vars(module).get(_ACCELERATE)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    said = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in said if device is not None), None)


def fetches_weights(module: nn.Module) -> bool:
    """Return whether accelerate keeps the module's weights elsewhere and fetches them for each forward."""
    return any(hook.offload for hook in _align_hooks(vars(module).get(_ACCELERATE)))


class OnDisk(NamedTuple):
    """Where accelerate keeps the weights of a module that is offloaded to disk.

    Attributes:
        folder: for weights that are written; None where all are read from the checkpoint's own files.
        prefix: the module's name and a dot.
        files: what accelerate knows of each weight on disk, by its full name.
    """

    folder: Path | None
    prefix: str
    files: dict[str, Any]


def on_disk(module: nn.Module) -> OnDisk | None:
    """Return where on disk ``module``'s own weights are; None where they are in memory."""
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
    """Delete what a library has written to an offload folder for a module that is not used any more."""
    place = on_disk(module)
    if place is None or place.folder is None:
        return
    for name in [name for name in place.files if name.startswith(place.prefix)]:
        # Either accelerate has written it, or transformers has, into a file of its own; others are the checkpoint's.
        own = place.folder / f"{name}.safetensors"
        if place.files[name].get("safetensors_file") in (None, str(own)):
            del place.files[name]
            own.unlink(missing_ok=True)
            (place.folder / f"{name}.dat").unlink(missing_ok=True)


def copy_hook(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the hook of accelerate that ``old`` has, unless it has one. ``old`` keeps its own.

    Where the weights of ``old`` are on disk those of ``new`` go there too, into files of their own.
    """
    if _ACCELERATE in vars(old) and _ACCELERATE not in vars(new):
        add_hook_to_module(new, _renewed(vars(old)[_ACCELERATE], new))


def lend(owner: nn.Module, borrower: nn.Module, names: Collection[str]) -> None:
    """Have accelerate fetch tensors that two modules share for both of them, where it fetches weights of either.

    Args:
        owner: that the tensors are loaded and offloaded as.
        borrower: which has them too, and was dispatched before it had them.
        names: of the tensors.
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
    """Return what accelerate fetches the module's weights from, by name; nothing where it does not."""
    hooks = _align_hooks(vars(module).get(_ACCELERATE))
    return next((hook.weights_map for hook in hooks if hook.offload), {})


def forget_hook(copied: nn.Module) -> None:
    """Take what accelerate bound to the original off a shallow copy of a module."""
    for key in (_ACCELERATE, "_old_forward", "forward"):
        vars(copied).pop(key, None)


def _renewed(hook: Any, new: nn.Module) -> Any:
    """Return a hook for another module: one that offloads has its module's weights, and must take the new one's."""
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
    """Write what a hook is to offload of a module, and return the map that accelerate reads it through.

    The file is a new one each time: the module that is replaced may come back.
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
    """Yield what either library keeps of its own in ``module``, weights included; a copy of the module may share it."""
    yield from (vars(module)[name] for name in (_ACCELERATE, _DIFFUSERS) if name in vars(module))


def drop_wrappers(copied: nn.Module, fetch: bool) -> None:
    """Have a copied module run its own forward.

    Args:
        copied: What ``copy.deepcopy`` made of a module, its hooks shared with it.
        fetch: Leave accelerate's wrapper, which fetches weights. diffusers' goes in any case: it runs the module that
            was copied, not the copy.
    """
    if _DIFFUSERS in vars(copied) or (not fetch and _ACCELERATE in vars(copied)):
        vars(copied).pop("forward", None)
