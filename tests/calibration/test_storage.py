"""Untrusted calibration sets: anything that wastes memory, blocks, or leads outside the directory is refused early."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import zstandard
from diffusers import DDIMScheduler

from hfquant.calibration import BaseCalibSet, BaseSampler, CalibSetError, generate_calibrate_set, load_calibrate_set
from tests.calibration.test_calibset import chunks, edit_index, make_samples, replace_chunk
from tests.calibration.tiny_models import tiny_pipeline


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    BaseCalibSet.from_samples(make_samples(8)).save(tmp_path / "set", chunk_size=4)
    return tmp_path / "set"


def read(directory: Path) -> list[Any]:
    loaded = load_calibrate_set(directory)
    assert loaded is not None
    return list(loaded)


def chunk_of(tensor: torch.Tensor, structures: list[Any]) -> bytes:
    return safetensors.torch.save({"0" * 32: tensor}, {"samples": json.dumps(structures)})


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "not declared"])
def test_a_small_chunk_does_not_expand(directory, declared):
    """A few hundred bytes of zstd hold 8 MB of zeros, which one sample references a hundred times."""
    zeros = torch.zeros(1 << 21)
    one = {"$tensor": ["0" * 32, "float32", [1 << 21]]}
    raw = chunk_of(zeros, [[one] * 100] * 4)
    data = zstandard.ZstdCompressor(level=19).compress(raw)
    assert len(data) < 1000
    assert 100 * zeros.nbytes > 800_000_000
    replace_chunk(directory, data, len(raw))
    if declared:
        edit_index(directory, layouts__0={str(i): ["float32", [1 << 21]] for i in range(100)})
        edit_index(directory, chunks__0__layouts=[[0, 4]])
    with pytest.raises(CalibSetError, match=r"chunk-00000.*(claims more memory than a file of this size)"):
        read(directory)


def test_a_bomb_in_many_frames(directory):
    """Decompressors that continue from frame to frame would expand each of them."""
    frame = zstandard.compress(bytes(1 << 24))
    replace_chunk(directory, frame * 50, 50 << 24)
    with pytest.raises(CalibSetError, match=r"chunk-00000.*claims to hold"):
        read(directory)


@pytest.mark.parametrize("name", ["index.json", "chunk-00001.safetensors.zst"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "socket", "directory", "device"])
def test_what_is_no_regular_file(directory, name, kind, tmp_path, monkeypatch):
    path = directory / name
    original = path.read_bytes()
    path.unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(original)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(directory)  # a socket path has at most a hundred characters
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CalibSetError, match=name.replace(".", r"\.")):
        read(directory)


def test_a_link_that_appears_later_is_not_followed(directory, tmp_path):
    loaded = load_calibrate_set(directory)
    path = chunks(directory)[0]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CalibSetError, match="chunk-00000"):
        loaded[0]


def test_a_shard_that_is_a_link(directory, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shard-00000-of-00001").symlink_to(directory)
    with pytest.raises(CalibSetError, match="shard-00000-of-00001 is a link"):
        load_calibrate_set(tmp_path / "shards")


def test_an_index_of_absurd_size(directory):
    with open(directory / "index.json", "r+b") as file:
        file.truncate(1 << 40)  # a sparse file
    with pytest.raises(CalibSetError, match=r"index\.json has 1099511627776 bytes, too many"):
        load_calibrate_set(directory)


@pytest.mark.parametrize("name", ["index.json.tmp", "chunk-00000.safetensors.zst.tmp"])
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_temporary_names_are_not_followed(name, kind, tmp_path):
    victim, directory = tmp_path / "victim", tmp_path / "set"
    victim.write_text("precious")
    directory.mkdir()
    path = directory / name
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "hard link":
        path.hardlink_to(victim)
    else:
        os.mkfifo(path)
    BaseCalibSet.from_samples(make_samples(3)).save(directory)
    assert victim.read_text() == "precious"
    assert len(read(directory)) == 3


def test_secrets_never_reach_the_index(tmp_path):
    def secret(n: int) -> str:
        return f"hf_{'abcdefgh'[n] * 30}"

    pipe = tiny_pipeline(DDIMScheduler())
    call = type(pipe).__call__

    class Open(type(pipe)):
        def __call__(self, prompt, num_inference_steps=2, **ignored):
            return call(self, prompt, num_inference_steps)

    pipe.__class__ = Open
    sampler = BaseSampler(1)
    sampler.api_key = secret(0)
    kwargs = {
        "token": secret(1),
        "use_auth_token": secret(2),
        "cross_attention_kwargs": {"scale": 0.5, "headers": [{"Authorization": f"Bearer {secret(3)}"}]},
        "hub": ({"apiKey": secret(4), "PASSWORD": secret(5), "client-secret": secret(6)},),
        "negative_prompt": f"a sign that reads {secret(7)}",
    }
    made = generate_calibrate_set(pipe, sampler, ["a"], "unet", tmp_path / "set", **kwargs)
    text = (tmp_path / "set" / "index.json").read_text()
    assert not [n for n in range(8) if secret(n) in text or secret(n) in repr(made.provenance)]
    assert made.provenance["call"]["cross_attention_kwargs"]["scale"] == 0.5
    # Another token does not make another set.
    again = {**kwargs, "token": secret(0)}
    assert len(generate_calibrate_set(pipe, sampler, ["a"], "unet", tmp_path / "set", **again)) == len(made)
