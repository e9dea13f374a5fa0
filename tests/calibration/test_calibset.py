"""Calibration sets in memory and on disk: what is read back, and what is refused."""

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from safetensors import safe_open

from hfquant.calibration import BaseCalibSet, CalibSetError, load_calibrate_set, storage
from tests.calibration.test_recorder import identical, random_tensor


def make_samples(count: int) -> list:
    embedding = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    return [
        {
            "hidden_states": random_tensor(torch.bfloat16, (2, 3), seed=i),
            "timestep": torch.tensor(i),
            "context": embedding,
            "nested": [(i, None), {"residual": torch.full((i % 3, 2), i, dtype=torch.float8_e4m3fn)}],
            "return_dict": False,
        }
        for i in range(count)
    ]


@pytest.fixture(params=[True, False], ids=["zstd", "plain"])
def stored(request, tmp_path):
    """Eleven samples in three chunks."""
    return BaseCalibSet.from_samples(make_samples(11)).save(tmp_path / "set", chunk_size=4, compress=request.param)


def chunks(directory: Path) -> list[Path]:
    return sorted(directory.glob("chunk-*"))


def edit_index(directory: Path, **changes) -> None:
    """Rewrite the index as someone would who knows how the checksum is computed."""
    body = json.loads((directory / "index.json").read_text())
    del body["checksum"]
    for path, value in changes.items():
        target, *keys = path.split("__")
        item, key = body, target
        for part in keys:
            item, key = item[key], int(part) if part.isdigit() else part
        item[key] = value
    body["checksum"] = storage._checksum(body)
    (directory / "index.json").write_text(json.dumps(body))


def test_round_trip(stored, tmp_path):
    loaded = load_calibrate_set(tmp_path / "set", compress=False)
    expected = make_samples(11)
    assert len(loaded) == 11
    for calibset in (stored, loaded, BaseCalibSet.from_samples(expected)):
        assert identical(list(calibset), expected)
        order = random.Random(0).sample(range(-11, 11), 22)
        assert all(identical(calibset[i], expected[i]) for i in order)
        for bad in (11, -12):
            with pytest.raises(IndexError):
                calibset[bad]


def test_files(stored, tmp_path):
    """What the format promises to readers that do not use this library."""
    directory = tmp_path / "set"
    suffix = ".zst" if stored.chunks[0].index.compress else ""
    assert [path.name for path in chunks(directory)] == [f"chunk-0000{i}.safetensors{suffix}" for i in range(3)]
    index = json.loads((directory / "index.json").read_text())
    assert [chunk["samples"] for chunk in index["chunks"]] == [4, 4, 3]
    assert (index["length"], index["complete"], index["version"]) == (11, True, 1)
    for path, entry in zip(chunks(directory), index["chunks"], strict=True):
        data = path.read_bytes()
        assert entry["xxh3_128"] == xxhash.xxh3_128(data).hexdigest()
        assert entry["size"] == len(data)
        plain = tmp_path / "plain.safetensors"
        plain.write_bytes(zstandard.decompress(data) if suffix else data)
        with safe_open(plain, framework="pt") as file:
            shapes = {tuple(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118
        assert (4, 6) in shapes
        # each sample has 2 tensors of its own; all share one; at most 3 residual shapes, one of them empty
        assert sum(count for _, count in entry["layouts"]) == entry["samples"]
    assert index["layouts"][0] == {
        "hidden_states": ["bfloat16", [2, 3]],
        "timestep": ["int64", []],
        "context": ["float32", [4, 6]],
        "nested.1.residual": ["float8_e4m3fn", [0, 2]],
    }
    assert len(index["layouts"]) == 3


def test_same_samples_make_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        BaseCalibSet.from_samples(make_samples(11)).save(tmp_path / name, chunk_size=4)
    for left, right in zip(sorted((tmp_path / "a").iterdir()), sorted((tmp_path / "b").iterdir()), strict=True):
        assert left.name == right.name
        assert left.read_bytes() == right.read_bytes()


def test_chunk_boundaries(tmp_path):
    for count, size, expected in ((8, 4, 2), (1, 400, 1), (5, 1, 5), (0, 4, 0)):
        directory = tmp_path / f"{count}-{size}"
        stored = BaseCalibSet.from_samples(make_samples(count)).save(directory, chunk_size=size)
        assert len(chunks(directory)) == expected
        assert identical(list(stored), make_samples(count))


def test_cache_is_bounded(stored, monkeypatch):
    loads = []
    original = storage.ChunkFile.load
    monkeypatch.setattr(storage.ChunkFile, "load", lambda self: loads.append(self.path.name[6:11]) or original(self))
    list(stored)
    assert [int(name) for name in loads] == [0, 1, 2], "walking in order reads each chunk once"
    assert len(stored._cache) == 2
    loads.clear()
    for i in (10, 7, 10, 4, 0, 10):
        stored[i]
    assert [int(name) for name in loads] == [0, 2], "chunks 1 and 2 were cached; 0 pushed out the least recently used"


def test_samples_can_be_written_to(stored):
    stored[0]["hidden_states"].zero_()
    assert identical(stored[0], make_samples(1)[0])


# A spawned worker imports the library again, which takes seconds.
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loader_workers(stored, context):
    plain = list(stored.get_dataloader(batch_size=3))
    worked = list(stored.get_dataloader(batch_size=3, num_workers=2, multiprocessing_context=context))
    assert [len(batch) for batch in plain] == [3, 3, 3, 2]
    assert identical(plain, worked)
    assert identical([sample for batch in plain for sample in batch], make_samples(11))


def test_loaders_can_be_sent_to_a_spawned_worker(stored):
    stored[0]
    loader = stored.get_dataloader()
    dataset, collate_fn = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    assert not dataset._cache, "the cache stays behind"
    assert identical(collate_fn([dataset[3]]), [make_samples(4)[3]])


def test_shuffling_reads_each_chunk_once(stored, monkeypatch):
    loads = []
    original = storage.ChunkFile.load
    monkeypatch.setattr(storage.ChunkFile, "load", lambda self: loads.append(self.path.name) or original(self))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    loader = stored.get_dataloader(shuffle=True, seed=3)
    order = [int(batch[0]["timestep"]) for batch in loader]
    assert sorted(order) == list(range(11))
    assert order != list(range(11))
    assert len(loads) == 3
    assert order == [int(batch[0]["timestep"]) for batch in loader], "each walk is the same"
    assert order != [int(batch[0]["timestep"]) for batch in stored.get_dataloader(shuffle=True, seed=4)]
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_stored(tmp_path):
    assert load_calibrate_set(tmp_path) is None
    assert load_calibrate_set(tmp_path / "nowhere") is None


def test_saving_does_not_overwrite(stored, tmp_path):
    with pytest.raises(FileExistsError, match="already holds a calibration set"):
        stored.save(tmp_path / "set")
    again = stored.save(tmp_path / "copy", chunk_size=5, compress=False)
    assert identical(list(again), list(stored))
    shard = tmp_path / "shards" / "shard-00000-of-00002"
    shard.mkdir(parents=True)
    with pytest.raises(FileExistsError, match="already holds a calibration set"):
        stored.save(shard.parent)
    assert list(shard.parent.iterdir()) == [shard]


def test_bare_arrays_are_samples_of_their_own():
    arrays = [np.full((2, 3), i, dtype=np.float32) for i in range(3)]
    first, second = BaseCalibSet.from_samples(arrays).get_dataloader(batch_size=2)
    assert [len(sample) for sample in (*first, *second)] == [1, 1, 1]
    assert [float(sample[0].mean()) for sample in (*first, *second)] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("seed", range(10))
def test_flipped_byte_in_any_file(stored, tmp_path, seed):
    draw = random.Random(seed)
    path = draw.choice(sorted((tmp_path / "set").iterdir()))
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    with pytest.raises(CalibSetError, match=path.name.replace(".", r"\.")):
        list(load_calibrate_set(tmp_path / "set"))


def test_truncated_chunk(stored, tmp_path):
    path = chunks(tmp_path / "set")[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CalibSetError, match=r"chunk-00001.* bytes, index\.json says .*truncated"):
        load_calibrate_set(tmp_path / "set")
    with pytest.raises(CalibSetError, match="chunk-00001"):
        stored[5]
    assert identical(stored[10], make_samples(11)[10]), "the others are still there"


def test_missing_chunk(stored, tmp_path):
    chunks(tmp_path / "set")[2].unlink()
    with pytest.raises(FileNotFoundError, match="chunk-00002"):
        load_calibrate_set(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="chunk-00002"):
        stored[9]


def test_missing_index(stored, tmp_path):
    (tmp_path / "set" / "index.json").unlink()
    with pytest.raises(CalibSetError, match=r"index\.json is missing"):
        load_calibrate_set(tmp_path / "set")


def test_index_of_another_set(stored, tmp_path):
    other = BaseCalibSet.from_samples(make_samples(12)[1:]).save(
        tmp_path / "other", chunk_size=4, compress=stored.chunks[0].index.compress
    )
    for path in chunks(tmp_path / "other"):
        path.write_bytes((tmp_path / "set" / path.name).read_bytes())
    with pytest.raises(CalibSetError, match="chunk-0000"):
        list(load_calibrate_set(tmp_path / "other"))
    with pytest.raises(CalibSetError, match="chunk-00000"):
        other[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "not the index of a calibration set"),
        ('{"weight_map": {}}', "not the index of a calibration set"),
        ('{"format": "hfquant.calibration", "version": 2}', "format version 2; this hfquant reads 1"),
        ('{"format": "hfquant.calibration", "version": 1}', "chunk_size: is missing"),
        ("[" * 100000, "damaged"),
    ],
)
def test_foreign_index(tmp_path, text, message):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(CalibSetError, match=message):
        load_calibrate_set(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunks__0__file": "../../outside.safetensors"}, "must be named chunk-00000"),
        ({"chunks__0__file": "/etc/passwd"}, "must be named chunk-00000"),
        ({"chunks__1__file": "chunk-00000.safetensors.zst"}, "must be named chunk-00001"),
        ({"chunks__0__samples": 1 << 60}, "layouts of chunk 0 are not those of"),
        ({"chunks__0__layouts": [[0, 1 << 60]]}, "layouts of chunk 0 are not those of"),
        ({"chunks__0__layouts": [[9, 4]]}, "layouts of chunk 0 are not those of"),
        ({"layouts__0": {"x": ["nn", [2]]}}, "unknown dtype 'nn'"),
        ({"layouts__0": {"x": ["float32", [-2]]}}, "greater than or equal to 0"),
        ({"layouts__0": {"x": ["float32", [1 << 60]]}}, "tensors of a sample are not those that index.json declares"),
        ({"chunks__0__samples": -4}, "greater than 0"),
        ({"chunks__0__samples": "4"}, "valid integer"),
        ({"chunks__0__size": 1 << 60}, "has .* bytes, index.json says|two sizes differ"),
        ({"chunks__0__raw_size": 1 << 60}, "claims to hold|two sizes differ"),
        ({"chunks__0__xxh3_128": "0" * 32}, "checksum"),
        ({"length": 12}, "do not add up"),
        ({"extra": 1}, "extra: unknown key"),
        ({"chunks": []}, "do not add up"),
    ],
    ids=str,
)
def test_index_that_lies(stored, tmp_path, changes, message):
    edit_index(tmp_path / "set", **changes)
    with pytest.raises(CalibSetError, match=message):
        list(load_calibrate_set(tmp_path / "set"))


def replace_chunk(directory: Path, data: bytes, raw_size: int) -> None:
    """Replace the first chunk's bytes, with an index that matches them."""
    chunks(directory)[0].write_bytes(data)
    edit_index(
        directory,
        chunks__0__size=len(data),
        chunks__0__raw_size=raw_size,
        chunks__0__xxh3_128=xxhash.xxh3_128_hexdigest(data),
    )


def test_chunks_from_a_stranger(tmp_path):
    """Chunks that match their index but are still not what they should be."""
    directory = tmp_path / "set"
    BaseCalibSet.from_samples(make_samples(4)).save(directory)
    good = zstandard.decompress(chunks(directory)[0].read_bytes())
    header = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])

    def with_samples(samples) -> bytes:
        changed = json.dumps({**header, "__metadata__": {"samples": json.dumps(samples)}}).encode()
        return len(changed).to_bytes(8, "little") + changed + good[8 + int.from_bytes(good[:8], "little") :]

    for raw, message in [
        (b"", "chunk-00000"),
        (b"not safetensors at all", "chunk-00000"),
        (good[:-1], "chunk-00000"),
        (with_samples([1]), "holds 1 sample, index.json promises 4"),
        (with_samples({"a": 1}), "samples are not a list"),
        (with_samples("abcd"), "samples are not a list"),
        (good[:8] + b"{}" + good[8:], "chunk-00000"),
        ((1 << 62).to_bytes(8, "little") + good[8:], "chunk-00000.*cannot be read"),
        (with_samples([{"$tensor": ["x", "float32", [1 << 50]]}] * 4), "claims more memory than"),
        (with_samples([{"$tensor": ["x", "float32", [1]]}] * 4), "not those that index.json declares"),
        (with_samples([{"$object": ["os:system", []]}] * 4), "not those that index.json declares"),
    ]:
        replace_chunk(directory, zstandard.compress(raw), len(raw))
        with pytest.raises(CalibSetError, match=message):
            load_calibrate_set(directory)[0]


def test_decompression_bombs(tmp_path):
    directory = tmp_path / "set"
    BaseCalibSet.from_samples(make_samples(4)).save(directory)
    huge = 1 << 50
    # A frame header that claims a petabyte (RFC 8878: magic, descriptor for an 8-byte size, window, size).
    bomb = b"\x28\xb5\x2f\xfd" + bytes([0xC0, 0x58]) + huge.to_bytes(8, "little") + b"\x01\x00\x00"
    assert zstandard.get_frame_parameters(bomb).content_size == huge
    for size in (huge, 1000):
        replace_chunk(directory, bomb, size)
        with pytest.raises(CalibSetError, match=r"chunk-00000.*claims to hold"):
            load_calibrate_set(directory)[0]


def test_path_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CalibSetError, match="is a file"):
        load_calibrate_set(tmp_path / "file")
