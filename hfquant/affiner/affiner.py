"""The affiner itself: one affine map a timestep, what it is fitted from, how it is applied and stored."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfquant.affiner import solvers
from hfquant.affiner.blocks import BlockMap, fold_blocks, hook_blocks
from hfquant.affiner.config import AffinerConfig, parse
from hfquant.affiner.hooks import Attachment, Step, Undo, attach, find_denoiser, step_coefficients
from hfquant.affiner.maps import AffineMaps, checked_tensor
from hfquant.affiner.solvers import Grid, Moments
from hfquant.config import ConfigError

CONFIG_FILE, TENSORS_FILE = "affiner_config.json", "affiner.safetensors"
_FORMAT, _VERSION = "hfquant-affiner", 1
_MAX_PIXELS = 1 << 22  # of a latent, whose maps are expanded to pixels; a file that asks for more is not believed


class BlockwiseAffiner:
    """Corrects a quantized denoiser, `e ~ K_t e^ + b_t` with maps constant on blocks of the latents.

    Comes from :func:`hfquant.load_affiner` or :meth:`from_pretrained`. The baselines "ptqd" and "tac" are the same
    object with another solver and one block a channel.

    Args:
        config: See :class:`hfquant.affiner.config.AffinerConfig`.

    Attributes:
        prediction: The maps of predictions.
        latents: The maps of latents after each step, where the config asks for them.
        blocks: The maps of denoiser blocks, where the config asks for them.
        uncond_half: Which half of the guidance batch is the unconditional one; found while fitting.
    """

    def __init__(self, config: AffinerConfig | Mapping[str, Any]) -> None:
        self.config = parse(config)
        self.prediction = _maps(self.config)
        self.latents = _latent_maps(self.config)
        self.blocks: list[BlockMap] = []
        self.uncond_half: int | None = None
        self._attachments: list[tuple[Attachment, Undo]] = []

    @property
    def noise_target(self) -> Any:
        """What of the denoiser's predictions is corrected."""
        return self.config.stepper.noise_target

    @property
    def timesteps(self) -> list[float]:
        """The fitted timesteps, highest (noisiest) first."""
        return sorted(self.prediction.table, reverse=True)

    @property
    def errors(self) -> dict[float, tuple[float, float]]:
        """For each timestep the mean squared error of predictions on the fitted samples, before and after."""
        return {t: self.prediction.errors[t] for t in self.timesteps}

    # ------------------------------------------------------------------------------------ the protocol of an affiner

    def observe(self, timestep: float, real: Tensor, quant: Tensor) -> None:
        """Adds a batch of predictions of both models on the same latents."""
        self.prediction.observe(timestep, real, quant)

    def solve(self, timestep: float) -> None:
        """Fits the map of a timestep."""
        self.prediction.solve(timestep)

    def correct(self, timestep: float, prediction: Tensor) -> Tensor:
        """Applies the map of a timestep; of a learned-sigma prediction `[B, 2C, H, W]` to the first C channels.

        Raises:
            ValueError: The timestep lies outside the fitted ones, or the channels differ.
        """
        fitted = next(iter(self.prediction.table.values()))[0].shape[0] if self.prediction.table else 0
        if prediction.dim() == 4 and prediction.shape[1] == 2 * fitted:
            noise, variance = prediction.chunk(2, dim=1)
            return torch.cat([self.prediction.apply(timestep, noise), variance], dim=1)
        return self.prediction.apply(timestep, prediction)

    def correct_latents(self, timestep: float, latents: Tensor) -> Tensor:
        """Applies the map of the latents that the step at `timestep` ended in."""
        return latents if self.latents is None else self.latents.apply(timestep, latents)

    def noise_scale(self, step: Step) -> float:
        """PTQD's variance schedule calibration (section 3.4): what to multiply the scheduler's own noise by.

        A stochastic step adds noise of variance sigma^2 and carries c^2 times what is left of the quantization noise's
        variance; the first is lowered by the second, to 0 at the least. 1 for the other types, other noise targets
        than "all", deterministic schedulers, timesteps between fitted ones, and steps that are not enabled.
        """
        applies = self.config.type == "ptqd" and self.noise_target == "all"
        if not applies or step.timestep not in self.prediction.errors:
            return 1.0
        scale, shift = self.prediction.table[step.timestep]
        if bool((scale == 1).all()) and not bool(shift.any()):
            return 1.0
        c, sigma = step_coefficients(step)
        if not (math.isfinite(c) and math.isfinite(sigma)) or sigma == 0:
            return 1.0
        return math.sqrt(max(0.0, 1 - c * c * self.prediction.errors[step.timestep][1] / (sigma * sigma)))

    # ----------------------------------------------------------------------------------------------------- attaching

    def attach(self, model: Any) -> BlockwiseAffiner:
        """Corrects every run of a pipeline (or every call of a bare denoiser) from now on.

        `with affiner.attach(pipe): ...` detaches at the end. The pipeline keeps working with any batch size, scheduler
        and number of steps whose timesteps lie in the fitted range, and with latents of any size (packed ones: see
        :meth:`hfquant.affiner.maps.AffineMaps.apply`).

        Raises:
            ValueError: An affiner is attached already, or nothing has been fitted.
            TypeError: `model` has no denoiser.
        """
        if not self.prediction.table:
            raise ValueError("this affiner has not been fitted: use hfquant.load_affiner or from_pretrained")
        attachment = attach(model, self)
        try:
            undo = hook_blocks(find_denoiser(model), self.blocks)
        except BaseException:
            attachment.detach()
            raise
        self._attachments.append((attachment, undo))
        return self

    def detach(self) -> None:
        """Takes the affiner off everything that it is attached to; outputs are bit for bit as before."""
        for attachment, undo in self._attachments:
            undo()
            attachment.detach()
        self._attachments = []

    def __enter__(self) -> BlockwiseAffiner:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def fold_blocks(self, model: Any) -> list[str]:
        """Moves the maps of blocks that are linears into these linears' scales and biases, for good.

        Other maps stay hooks: a transformer or UNet block ends in a residual stream that several layers read, so there
        is no next linear to take them. See :func:`hfquant.affiner.blocks.fold_blocks`.

        Returns:
            The names of the linears; the affiner no longer has maps for them.

        Raises:
            ValueError: The affiner is attached.
        """
        if self._attachments:
            raise ValueError("detach the affiner before its block maps are folded")
        folded = fold_blocks(find_denoiser(model), self.blocks)
        self.blocks = [block for block in self.blocks if block.module not in folded]
        return folded

    # ------------------------------------------------------------------------------------------------------- storage

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes affiner.safetensors and affiner_config.json.

        In the subfolder "affiner" of a pipeline's folder, :func:`hfquant.affiner.load_pipeline` picks them up.
        """
        if not self.prediction.table:
            raise ValueError("this affiner has not been fitted; there is nothing to save")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.prediction.tensors("prediction")
        if self.latents is not None:
            tensors |= self.latents.tensors("latents")
        for i, block in enumerate(self.blocks):
            tensors |= {f"blocks.{i}.scale": block.scale, f"blocks.{i}.shift": block.shift}
        description = {
            "format": _FORMAT,
            "version": _VERSION,
            "config": self.config.to_json(),
            "size": self.prediction.size,
            "latent_size": None if self.latents is None else self.latents.size,
            "uncond_half": self.uncond_half,
            "blocks": [[block.module, block.output] for block in self.blocks],
        }
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / TENSORS_FILE, {"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str = "",
        **hub_kwargs: Any,
    ) -> BlockwiseAffiner:
        """Loads what :meth:`save_pretrained` or :meth:`push_to_hub` wrote.

        Args:
            pretrained_model_name_or_path: A folder, or the id of a repository.
            subfolder: Where in it.
            **hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, ... of `hf_hub_download`.

        Raises:
            FileNotFoundError: The files are not there.
            ValueError: They are damaged, of a newer version, or do not fit each other.
        """
        config_path, tensors_path = _files(pretrained_model_name_or_path, subfolder, hub_kwargs)
        try:
            description = json.loads(config_path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{config_path} is damaged: {error}") from error
        if not isinstance(description, dict) or description.get("format") != _FORMAT:
            raise ValueError(f"{config_path} is not the config of an affiner")
        if description.get("version") != _VERSION:
            raise ValueError(f"{config_path} has version {description.get('version')!r}; this hfquant reads {_VERSION}")
        try:
            affiner = cls(description.get("config", {}))
            affiner._load(description, tensors_path)
        except (ConfigError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{config_path.parent}: {error}") from error
        return affiner

    def _load(self, description: Mapping[str, Any], tensors_path: Path) -> None:
        half = description["uncond_half"]
        if half not in (None, 0, 1) or isinstance(half, bool):
            raise ValueError(f"uncond_half is None, 0 or 1, got {half!r}")
        self.uncond_half = half
        tensors = _read(tensors_path)
        self.prediction.load("prediction", _size(description["size"]), tensors)
        if self.latents is not None:
            self.latents.load("latents", _size(description["latent_size"]), tensors)
        for i, entry in enumerate(description["blocks"]):
            match entry:
                case [str(module), int(output)] if output >= 0:
                    names = (f"blocks.{i}.scale", f"blocks.{i}.shift")
                    scale, shift = (checked_tensor(tensors, name, torch.float32) for name in names)
                    if scale.dim() != 1 or scale.shape != shift.shape:
                        raise ValueError(f"blocks.{i}: shapes {list(scale.shape)} and {list(shift.shape)} do not fit")
                    self.blocks.append(BlockMap(module, output, scale, shift))
                case _:
                    raise ValueError(f"blocks[{i}] is a module's name and the number of an output, got {entry!r}")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str = "",
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload affiner",
    ) -> str:
        """Uploads what :meth:`save_pretrained` writes, creating the repository where it is missing.

        Args:
            repo_id: "user/name".
            subfolder: "affiner" in a pipeline's repository.
            private: Of a repository created here.
            token: Of the hub; by default the one stored on this machine.
            commit_message: Of the commit.

        Returns:
            Address of the commit.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, path_in_repo=subfolder or None, commit_message=commit_message
            )
        return str(commit)


def _maps(config: AffinerConfig) -> AffineMaps:
    enabled = config.stepper.enable_timesteps
    match config.type:
        case "ptqd":
            return AffineMaps(None, lambda sums, _: solvers.solve_ptqd(sums), enabled=enabled)
        case "tac":
            return AffineMaps(None, lambda sums, _: solvers.solve_tac(sums), enabled=enabled)
    solver = config.solver
    interpolate = solver.sample_mode == "interpolate"
    terms = solver.alpha, solver.lambda1, solver.lambda2

    def solve(sums: Moments, grid: Grid) -> tuple[Tensor, Tensor]:
        pair = solvers.solve_interpolated(sums, grid, *terms) if interpolate else solvers.solve_blocks(sums, *terms)
        limited = solvers.limit(*pair, solver.percentile, solver.greater, solver.scale)
        if interpolate:
            # Pixels between a limited node and another may end up worse than they were.
            identity = torch.ones_like(pair[0]), torch.zeros_like(pair[1])
            return min(limited, identity, key=lambda maps: solvers.objective(sums, maps[0], maps[1], *terms, grid))
        return limited

    return AffineMaps(solver.blocksize, solve, interpolate, enabled)


def _latent_maps(config: AffinerConfig) -> AffineMaps | None:
    if config.type == "tac" and config.stepper.recurrent:
        return AffineMaps(None, lambda sums, _: solvers.solve_bias(sums), enabled=config.stepper.enable_timesteps)
    return _maps(config) if config.stepper.enable_latent_affine else None


def _files(source: str | os.PathLike[str], subfolder: str, hub_kwargs: Mapping[str, Any]) -> tuple[Path, Path]:
    folder = Path(source) / subfolder
    if Path(source).is_dir():
        paths = folder / CONFIG_FILE, folder / TENSORS_FILE
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is not there: {folder} holds no affiner")
        return paths
    if Path(source).is_absolute() or str(source).startswith("."):
        raise FileNotFoundError(f"there is no folder {source}")
    from huggingface_hub import hf_hub_download

    config, tensors = (
        Path(hf_hub_download(str(source), name, subfolder=subfolder or None, **hub_kwargs))
        for name in (CONFIG_FILE, TENSORS_FILE)
    )
    return config, tensors


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _size(value: Any) -> tuple[int, int]:
    match value:
        case [int(height), int(width)] if min(height, width) >= 1 and height * width <= _MAX_PIXELS:
            return height, width
    raise ValueError(f"size is height and width in latent pixels, got {value!r}")
