"""The affiner: its maps of predictions, latents and blocks, and how it is attached and stored."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hfquant.affiner.blocks import BlockMap, hook_blocks
from hfquant.affiner.config import AffinerConfig, parse
from hfquant.affiner.hooks import NoiseTarget, Step, attach
from hfquant.affiner.maps import METHODS, checked_tensor
from hfquant.config import ConfigError
from hfquant.denoisers import find_denoiser
from hfquant.schema import Section, explained

CONFIG_FILE, TENSORS_FILE = "affiner_config.json", "affiner.safetensors"
SUBFOLDER = "affiner"
#: Maximum pixels of a latent, since maps are expanded to pixels; files that claim more are rejected.
MAX_PIXELS = 1 << 22

_Size = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


class _Stored(Section):
    """Contents of `affiner_config.json`. `blocks` holds pairs of module name and output index."""

    format: Literal["hfquant-affiner"] = "hfquant-affiner"
    version: Literal[1] = 1
    config: dict[str, Any]
    size: _Size
    latent_size: _Size | None
    frames_first: bool = False
    uncond_half: Literal[0, 1] | None
    blocks: tuple[tuple[str, Annotated[int, Field(ge=0)]], ...]


class BlockwiseAffiner:
    """Corrects a quantized denoiser, `e ~ K_t e^ + b_t`, with maps that are constant on blocks of the latents.

    Create one with :func:`hfquant.load_affiner` or :meth:`from_pretrained`. The baselines "ptqd" and "tac" use other
    maps, see :data:`hfquant.affiner.maps.METHODS`.

    Args:
        config: See :class:`hfquant.affiner.config.AffinerConfig`.

    Attributes:
        prediction: The maps of predictions.
        latents: The maps of latents after each step, if the config asks for them.
        blocks: The maps of denoiser blocks, if the config asks for them.
        uncond_half: Which half of the guidance batch is the unconditional one; determined while fitting.
    """

    def __init__(self, config: AffinerConfig | Mapping[str, Any]) -> None:
        self.config = parse(config)
        method = METHODS[self.config.type]
        self.prediction = method(self.config)
        self.latents = method.of_latents(self.config)
        self.blocks: list[BlockMap] = []
        self.uncond_half: Literal[0, 1] | None = None
        self._attachments = ExitStack()

    @property
    def noise_target(self) -> NoiseTarget:
        """Which part of the denoiser's predictions is corrected."""
        return self.config.stepper.noise_target

    @property
    def frames_first(self) -> bool:
        """Whether video latents are `[B, T, C, H, W]`, as in CogVideoX."""
        return self.prediction.frames_first

    @frames_first.setter
    def frames_first(self, value: bool) -> None:
        for maps in filter(None, (self.prediction, self.latents)):
            maps.frames_first = value

    @property
    def timesteps(self) -> list[float]:
        """The fitted timesteps, highest (noisiest) first."""
        return sorted(self.prediction.table, reverse=True)

    @property
    def errors(self) -> dict[float, tuple[float, float]]:
        """For each timestep, the mean squared error of predictions on the fitted samples, before and after."""
        return {t: self.prediction.errors[t] for t in self.timesteps}

    def observe(self, timestep: float, real: Tensor, quant: Tensor) -> None:
        """Add a batch of predictions of both models for the same latents."""
        self.prediction.observe(timestep, real, quant)

    def solve(self, timestep: float) -> None:
        """Fit the map of a timestep."""
        self.prediction.solve(timestep)

    def correct(self, timestep: float, prediction: Tensor) -> Tensor:
        """Apply the map of a timestep; see :meth:`hfquant.affiner.maps.AffineMaps.correct`."""
        return self.prediction.correct(timestep, prediction)

    def noise_scale(self, step: Step) -> float:
        """Return the factor for the scheduler's own noise, 1 for most methods."""
        return self.prediction.noise_scale(step)

    def forget(self) -> None:
        """Make all maps the identity."""
        for maps in filter(None, (self.prediction, self.latents)):
            maps.forget()
        self.blocks.clear()

    def attach(self, model: Any) -> BlockwiseAffiner:
        """Correct every run of a pipeline (or every call of a bare denoiser) from now on.

        `with affiner.attach(pipe): ...` detaches at the end. The pipeline still works with any batch size, with any
        scheduler and number of steps whose timesteps lie in the fitted range, and with latents of any size (for packed
        ones, see :meth:`hfquant.affiner.maps.AffineMaps.correct`).

        Raises:
            ValueError: An affiner is already attached, nothing has been fitted, or `model` has no such denoiser.
        """
        self._check_fitted("use hfquant.load_affiner or from_pretrained")
        with ExitStack() as stack:
            stack.enter_context(attach(model, self))
            if self.blocks:
                stack.callback(hook_blocks(find_denoiser(model), self.blocks))
            self._attachments.push(stack.pop_all())
        return self

    def detach(self) -> None:
        """Remove the affiner from everything it is attached to; outputs are then bit for bit the same as before."""
        self._attachments.close()

    def __enter__(self) -> BlockwiseAffiner:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write affiner.safetensors and affiner_config.json.

        Saved to the subfolder "affiner" of a pipeline's folder, they are loaded by
        :func:`hfquant.affiner.load_pipeline`.
        """
        self._check_fitted("there is nothing to save")
        assert self.prediction.size is not None
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.prediction.tensors("prediction")
        if self.latents is not None:
            tensors |= self.latents.tensors("latents")
        for i, block in enumerate(self.blocks):
            tensors |= {f"blocks.{i}.scale": block.scale, f"blocks.{i}.shift": block.shift}
        stored = _Stored.model_construct(
            config=self.config.to_json(),
            size=self.prediction.size,
            latent_size=None if self.latents is None else self.latents.size,
            frames_first=self.frames_first,
            uncond_half=self.uncond_half,
            blocks=tuple((block.module, block.output) for block in self.blocks),
        )
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / TENSORS_FILE, {"format": "pt"})
        (folder / CONFIG_FILE).write_text(stored.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str = "",
        **hub_kwargs: Any,
    ) -> BlockwiseAffiner:
        """Load an affiner saved by :meth:`save_pretrained` or :meth:`push_to_hub`.

        Args:
            pretrained_model_name_or_path: A folder, or a repository id.
            subfolder: Subfolder that holds the files.
            **hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, ... of `hf_hub_download`.

        Raises:
            FileNotFoundError: The files do not exist.
            ValueError: They are damaged, of a newer version, or do not match each other.
        """
        config_path, tensors_path = _files(pretrained_model_name_or_path, subfolder, hub_kwargs)
        try:
            stored = _Stored.model_validate_json(config_path.read_bytes())
            affiner = cls(stored.config)
            affiner._load(stored, load_file(tensors_path))
        except ValidationError as error:
            raise ValueError(
                f"{config_path} is damaged, of another version, or not the config of an affiner: "
                + explained(error, _Stored)
            ) from error
        except (ConfigError, ValueError, SafetensorError) as error:
            raise ValueError(f"{config_path.parent} is damaged: {error}") from error
        return affiner

    def _load(self, stored: _Stored, tensors: Mapping[str, Tensor]) -> None:
        self.uncond_half, self.frames_first = stored.uncond_half, stored.frames_first
        for name, maps, size in (
            ("prediction", self.prediction, stored.size),
            ("latents", self.latents, stored.latent_size),
        ):
            if maps is not None:
                if size is None or size[0] * size[1] > MAX_PIXELS:
                    raise ValueError(f"size of {name}: expected at most {MAX_PIXELS} pixels, got {size}")
                maps.load(name, size, tensors)
        for i, (module, output) in enumerate(stored.blocks):
            scale, shift = (checked_tensor(tensors, f"blocks.{i}.{part}", torch.float32) for part in ("scale", "shift"))
            if scale.dim() != 1 or scale.shape != shift.shape:
                raise ValueError(f"blocks.{i}: shapes {list(scale.shape)} and {list(shift.shape)} do not fit")
            self.blocks.append(BlockMap(module, output, scale, shift))

    def _check_fitted(self, hint: str) -> None:
        if not self.prediction.table:
            raise ValueError(f"this affiner has not been fitted: {hint}")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str = "",
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload affiner",
    ) -> str:
        """Upload the files of :meth:`save_pretrained` and a card, as :func:`hfquant.push_to_hub` does.

        Args:
            repo_id: "user/name".
            subfolder: "affiner" in a pipeline's repository.
            private: Whether a repository created by this call is private.
            token: Hub token; by default, the one stored on this machine.
            commit_message: Message of the commit.

        Returns:
            URL of the commit.
        """
        from hfquant.integrations.sharing import push_to_hub

        options: dict[str, Any] = {"subfolder": subfolder, "private": private, "token": token}
        return push_to_hub(self, repo_id, commit_message=commit_message, **options)


def load_pipeline(pipeline_class: Any, pretrained: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a pipeline and attach the affiner in its subfolder "affiner", if there is one.

    Args:
        pipeline_class: `DiffusionPipeline` or any of its subclasses.
        pretrained: Folder or repository id.
        **kwargs: Passed to `pipeline_class.from_pretrained`; `revision`, `token`, `cache_dir` and `local_files_only`
            also apply to the affiner.

    Returns:
        The pipeline. `pipe.affiner` is the affiner (None without one); `pipe.affiner.detach()` removes it.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    pipe = pipeline_class.from_pretrained(pretrained, **kwargs)
    pipe.affiner = None
    if Path(pretrained).is_dir() and not (Path(pretrained) / SUBFOLDER / CONFIG_FILE).is_file():
        return pipe
    hub = {k: v for k, v in kwargs.items() if k in ("revision", "token", "cache_dir", "local_files_only")}
    try:
        pipe.affiner = BlockwiseAffiner.from_pretrained(pretrained, subfolder=SUBFOLDER, **hub)
    except LocalEntryNotFoundError:
        # Offline, we cannot know whether the repository has one; online, this is a failed download.
        if not (kwargs.get("local_files_only") or constants.HF_HUB_OFFLINE):
            raise
    except EntryNotFoundError:
        pass
    if pipe.affiner is not None:
        pipe.affiner.attach(pipe)
    return pipe


def _files(source: str | os.PathLike[str], subfolder: str, hub_kwargs: Mapping[str, Any]) -> list[Path]:
    """Return the paths of an affiner's two files, local or downloaded from the hub."""
    names = CONFIG_FILE, TENSORS_FILE
    if Path(source).is_dir():
        paths = [Path(source, subfolder, name) for name in names]
        if missing := [path for path in paths if not path.is_file()]:
            raise FileNotFoundError(f"{missing[0]} does not exist: {missing[0].parent} is not the folder of an affiner")
        return paths
    if Path(source).is_absolute() or str(source).startswith("."):
        raise FileNotFoundError(f"there is no folder {source}")
    from huggingface_hub import hf_hub_download

    return [Path(hf_hub_download(str(source), name, subfolder=subfolder or None, **hub_kwargs)) for name in names]
