"""Generating sets: what they contain, and that a killed run resumes as if nothing had happened."""

import contextlib
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import xxhash
import zstandard
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn
from torch.utils.data import DataLoader

from hfquant.calibration import (
    BaseCalibSet,
    BaseSampler,
    CalibSetError,
    LanguageModelSampler,
    UniformSampler,
    generate_calibrate_set,
    load_calibrate_set,
    storage,
)
from hfquant.calibration.batches import CalibrationError
from hfquant.calibration.files import exclusive
from hfquant.calibration.generate import generate_shard
from hfquant.calibration.recorder import Recording
from hfquant.digests import update
from tests.calibration.test_recorder import identical
from tests.calibration.tiny_models import tiny_llama, tiny_pipeline

PROMPTS = [f"prompt number {'x' * i} of some" for i in range(7)]


def generate(
    directory, prompts=PROMPTS, *, seed=0, chunk_size=4, shard=(0, 1), layer="unet", pipe=None
) -> BaseCalibSet:
    """Run 7 prompts in batches of 2, and keep 5 of 9 steps of a stochastic scheduler: 20 samples in 5 chunks."""
    pipe = pipe or tiny_pipeline(DDPMScheduler())
    loader = DataLoader(prompts, batch_size=2, shuffle=True)
    kwargs = {"num_inference_steps": 9, "guidance_scale": 2.0}
    return generate_shard(pipe, UniformSampler(5, seed=seed), loader, layer, directory, chunk_size, True, kwargs, shard)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("unbroken")
    assert len(generate(directory)) == 20
    return directory


def test_memory_and_disk_hold_the_same(unbroken):
    in_memory, on_disk = generate(None), load_calibrate_set(unbroken)
    assert identical(list(in_memory), list(on_disk))
    assert in_memory.provenance == on_disk.provenance
    for sample in on_disk:
        assert sample["sample"].shape[1:] == (2, 8, 8)
        assert sample["encoder_hidden_states"].shape[1:] == (3, 12)
        assert sample["timestep"].ndim == 0


def test_provenance(unbroken):
    origin = json.loads((unbroken / "index.json").read_text())["provenance"]
    assert origin["layer"] == "unet"
    assert origin["sampler"] == {"class": "UniformSampler", "seed": 0, "timesteps": 5}
    assert origin["call"] == {"guidance_scale": 2.0, "num_inference_steps": 9}
    assert origin["versions"]["torch"] == torch.__version__
    assert origin["model"]["class"] == "TinyPipeline"


def test_the_folder_that_a_model_lies_in_is_not_recorded(tmp_path, monkeypatch):
    """A set is shared, so its model is named without where it lies; its weights say which model it is."""
    ids = [{"input_ids": torch.arange(8).view(1, 8) + 1}]

    def recorded(name, directory, model):
        model.name_or_path = str(name)
        return generate_calibrate_set(model, LanguageModelSampler(), ids, "model", directory)

    model = tiny_llama()
    for name, expected in (("org/llm", "org/llm"), (tmp_path / "mine" / "llm", "llm"), ("", "")):
        assert recorded(name, None, model).provenance["model"]["name"] == expected
    recorded(tmp_path / "mine" / "llm", tmp_path / "set", model)
    assert str(tmp_path) not in (tmp_path / "set" / "index.json").read_text()
    assert len(recorded(tmp_path / "other" / "llm", tmp_path / "set", model)) == 1
    with torch.no_grad():
        model.lm_head.weight += 1
    with pytest.raises(CalibSetError, match=r"another calibration set .*model is"):
        recorded(tmp_path / "mine" / "llm", tmp_path / "set", model)


def test_a_set_that_records_a_whole_path_is_the_same_set(tmp_path, monkeypatch):
    """Earlier versions recorded the path as it was given."""
    ids = [{"input_ids": torch.arange(8).view(1, 8) + 1}]
    model = tiny_llama()
    model.name_or_path = str(tmp_path / "llm")
    with monkeypatch.context() as patched:
        patched.setattr("hfquant.calibration.provenance.shared_name", str)
        generate_calibrate_set(model, LanguageModelSampler(), ids, "model", tmp_path / "set")
    assert model.name_or_path in (tmp_path / "set" / "index.json").read_text()
    assert len(generate_calibrate_set(model, LanguageModelSampler(), ids, "model", tmp_path / "set")) == 1


def test_global_random_state_plays_no_part(unbroken, tmp_path):
    pipe = tiny_pipeline(DDPMScheduler())
    torch.manual_seed(123)
    state = torch.get_rng_state()
    generate(tmp_path, pipe=pipe)
    assert contents(tmp_path) == contents(unbroken)
    assert torch.equal(torch.get_rng_state(), state)
    generate(tmp_path / "other", seed=1, pipe=pipe)
    assert (
        contents(tmp_path / "other")["chunk-00000.safetensors.zst"] != contents(unbroken)["chunk-00000.safetensors.zst"]
    )


class Killer:
    """Kill the process, as kill -9 does, at the writer's n-th system call, partway through the file if possible."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.fsync, self.replace = os.fsync, os.replace

    def _count(self) -> bool:
        self.left -= 1
        return self.left == 0

    def __enter__(self):
        def fsync(handle):
            if self._count():
                size = os.fstat(handle).st_size
                with contextlib.suppress(OSError):  # a directory
                    os.ftruncate(handle, random.Random(size).randrange(size + 1))
                os.kill(os.getpid(), signal.SIGKILL)
            self.fsync(handle)

        def replace(source, target):
            if self._count():
                os.kill(os.getpid(), signal.SIGKILL)
            self.replace(source, target)
            if self._count():
                os.kill(os.getpid(), signal.SIGKILL)

        storage.os.fsync, storage.os.replace = fsync, replace
        return self

    def __exit__(self, *args):
        storage.os.fsync, storage.os.replace = self.fsync, self.replace


def generate_and_die(directory: Path, at: int) -> bool:
    """Run `generate` in a process that is killed at event `at`; return whether it was killed (if not, it finished)."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with Killer(at):
                generate(directory)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    assert killed or os.WEXITSTATUS(status) == 0
    return killed


def count_events(directory: Path) -> int:
    with Killer(at=0) as counter:
        generate(directory)
    return -counter.left


def test_killed_at_ten_random_points(unbroken, tmp_path):
    events = count_events(tmp_path / "count")
    assert events > 30
    for at in random.Random(0).sample(range(1, events + 1), 10):
        directory = tmp_path / str(at)
        assert generate_and_die(directory, at)
        loaded = load_calibrate_set(directory) if directory.exists() else None
        assert loaded is None or identical(list(loaded), list(load_calibrate_set(unbroken)))
        assert len(generate(directory)) == 20
        assert contents(directory) == contents(unbroken), f"killed at {at}"


def test_killed_again_and_again(unbroken, tmp_path):
    kills = 0
    while generate_and_die(tmp_path / "set", at=random.Random(kills).randrange(7, 12)):
        kills += 1
        assert kills < 20, "no progress"
    assert kills >= 4
    assert contents(tmp_path / "set") == contents(unbroken)


@pytest.mark.slow
def test_killed_from_outside_in_new_processes(unbroken, tmp_path):
    """Other processes with other hash seeds, killed at arbitrary times."""
    code = (
        "import sys; from test_generate import generate; import torch; torch.set_num_threads(1); generate(sys.argv[1])"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    for attempt in range(20):
        env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": str(attempt)}
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "set")], env=env)
        chunks = len(list((tmp_path / "set").glob("chunk-*.zst")))
        while process.poll() is None:
            if len(list((tmp_path / "set").glob("chunk-*.zst"))) > chunks:
                process.kill()
                break
        if process.wait() == 0:
            break
    assert attempt >= 2, "never killed"
    assert contents(tmp_path / "set") == contents(unbroken)


def test_batches_that_are_done_are_not_run_again(tmp_path):
    assert generate_and_die(tmp_path, at=3 + 3 * 6)  # three chunks are written
    done = json.loads((tmp_path / "index.json").read_text())
    assert (done["complete"], done["length"]) == (False, 12)
    pipe = tiny_pipeline(DDPMScheduler())
    generate(tmp_path, pipe=pipe)
    assert pipe.runs == 2, "12 of 20 samples were there: batches 2 (in part) and 3 are left"


def test_unfinished_set_is_not_loaded(tmp_path, caplog):
    assert generate_and_die(tmp_path, at=3 + 2 * 6)
    with caplog.at_level(logging.WARNING, "hfquant"):
        assert load_calibrate_set(tmp_path) is None
    assert "unfinished (8 samples so far)" in caplog.text
    storage.chunk_files(tmp_path, storage.read_index(tmp_path))[0].path.unlink()
    with pytest.raises(FileNotFoundError, match="chunk-00000"):
        generate(tmp_path)


def test_finished_set_is_opened(unbroken, caplog):
    before = contents(unbroken)
    pipe = tiny_pipeline(DDPMScheduler())
    with caplog.at_level(logging.INFO, "hfquant"):
        assert len(generate(unbroken, pipe=pipe)) == 20
    assert pipe.runs == 0
    assert contents(unbroken) == before
    assert "nothing to generate" in caplog.text


def other_weights():
    pipe = tiny_pipeline(DDPMScheduler())
    nn.init.ones_(pipe.unet.inner.weight)
    return pipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "sampler is"),
        ({"chunk_size": 5}, "chunk_size is 4 there, 5 here"),
        ({"layer": "unet.inner"}, "layer is 'unet' there, 'unet.inner' here"),
        ({"pipe": tiny_pipeline(DDIMScheduler())}, "model is"),
        ({"pipe": tiny_pipeline(DDPMScheduler(beta_end=0.03))}, "model is"),
        ({"pipe": other_weights()}, "model is"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_set_is_in_the_way(tmp_path, changes, message, finished, unbroken):
    if finished:
        directory = unbroken
    else:
        directory = tmp_path
        assert generate_and_die(directory, at=3 + 2 * 6)
    before = contents(directory)
    with pytest.raises(CalibSetError, match=f"holds another calibration set.*{message}"):
        generate(directory, **changes)
    assert contents(directory) == before


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([*PROMPTS[:-1], "another one"], "yields different data"),
        (PROMPTS[:2], "ends after 1 batches, fewer"),
    ],
)
def test_data_that_changed_is_noticed(tmp_path, prompts, message):
    assert generate_and_die(tmp_path, at=3 + 2 * 6)
    with pytest.raises(CalibSetError, match=message):
        generate(tmp_path, prompts)


@pytest.mark.parametrize("prompts", [[*PROMPTS[:-1], "another one"], PROMPTS[:2], [*PROMPTS, "one more"]])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_finished_set_of_other_data_is_in_the_way(tmp_path, prompts, world_size):
    shards = [(rank, world_size) for rank in range(world_size)]
    for shard in shards * 2:
        generate(tmp_path, shard=shard)
    before = [path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))]
    pipe = tiny_pipeline(DDPMScheduler())
    for shard in shards:
        with pytest.raises(CalibSetError, match="was recorded from other data: choose another path"):
            generate(tmp_path, prompts, shard=shard, pipe=pipe)
    assert pipe.runs == 0
    assert [path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))] == before


class Positive(nn.Module):
    """A model that runs its layer only for inputs with a positive sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


class Counted:
    """A source, maybe without an end, that counts how many of its batches were read."""

    def __init__(self, batches) -> None:
        self.batches = batches

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            self.read = number + 1
            yield batch


def test_the_data_of_a_finished_set_ends_where_it_ended(tmp_path):
    ones, none = torch.ones(1, 2), torch.zeros(1, 2)
    torch.manual_seed(0)
    model = Positive()

    def record(batches):
        return len(generate_calibrate_set(model, BaseSampler(None), batches, "layer", tmp_path))

    recorded = [ones, none, ones * 2, none]
    assert record(recorded) == record(recorded) == 2
    endless = Counted(itertools.chain(recorded, itertools.repeat(none)))
    for batches in (endless, recorded[:3], [*recorded[:3], none + 0.5], Counted(itertools.repeat(none))):
        with pytest.raises(CalibSetError, match="recorded from other data"):
            record(batches)
    assert endless.read == 5, "one more than was recorded"
    # Sets used to store how far their last sample was, not how far their data went.
    index = storage.read_index(tmp_path)
    assert index.cursor == storage.Cursor(batch=4, taken=0, source=index.cursor.source)
    digest = xxhash.xxh3_128()
    for batch in recorded[:3]:
        update(digest, batch)
    index.cursor = storage.Cursor(batch=2, taken=1, source=digest.hexdigest())
    storage.write_index(tmp_path, index)
    assert record(recorded) == 2
    with pytest.raises(CalibSetError, match="recorded from other data"):
        record([ones, none, ones * 3, none])


def test_only_one_writer(tmp_path):
    with exclusive(tmp_path), pytest.raises(RuntimeError, match="another process is writing"):
        generate(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("world_size", [2, 5])
def test_shards_hold_what_one_process_holds(unbroken, tmp_path, world_size):
    for rank in reversed(range(world_size)):
        part = generate(tmp_path, shard=(rank, world_size))
        assert part.provenance["shard"] == [rank, world_size]
    whole, expected = load_calibrate_set(tmp_path), load_calibrate_set(unbroken)
    assert len(whole) == len(expected) == 20

    def in_order(samples):
        return sorted(samples, key=lambda s: (s["timestep"].item(), s["sample"].sum().item()))

    assert identical(in_order(whole), in_order(expected))
    (tmp_path / storage.shard_name(1, world_size)).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="shard-00001"):
        load_calibrate_set(tmp_path)


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_a_folder_of_other_files_is_left_alone(tmp_path, shard):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="is not empty and holds no calibration set; choose another path"):
        generate(tmp_path, shard=shard)
    assert contents(tmp_path) == {"config.json": b"{}"}


@pytest.mark.parametrize("begun", [1, 2, 4])
def test_a_set_of_other_processes_is_in_the_way(tmp_path, begun):
    generate(tmp_path, shard=(0, begun))
    before = sorted(tmp_path.rglob("*"))
    for world_size in {1, 2, 4} - {begun}:
        with pytest.raises(CalibSetError, match=rf"begun by {begun} process\(es\), this run has {world_size}"):
            generate(tmp_path, shard=(0, world_size))
    assert sorted(tmp_path.rglob("*")) == before


def test_language_model_set(tmp_path):
    model = tiny_llama()
    ids = torch.arange(40).reshape(4, 10)
    loader = DataLoader([{"input_ids": row} for row in ids], batch_size=2)
    stored = generate_calibrate_set(
        model, LanguageModelSampler(), loader, model.model.layers[1].mlp, tmp_path, chunk_size=1
    )
    with torch.no_grad():
        hidden = []
        handle = model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: hidden.append(output))
        model(input_ids=ids)
        handle.remove()
        again = torch.cat([model.model.layers[1].mlp(*batch[0]) for batch in stored.get_dataloader()])
    torch.testing.assert_close(again, hidden[0])


def test_a_dict_or_a_path_names_a_dataset(tmp_path):
    data = datasets.Dataset.from_dict({"prompt": PROMPTS[:3]})
    data.to_parquet(tmp_path / "prompts.parquet")

    def seen(source):
        return list(generate_calibrate_set(tiny_pipeline(DDIMScheduler()), BaseSampler(1), source, "unet"))

    spec = {"dataset": data, "seed": None, "batch_size": 2}
    expected = seen([PROMPTS[:2], PROMPTS[2:3]])
    assert len(expected) == 2
    assert identical(seen(spec), expected)
    assert identical(seen({**spec, "dataset": str(tmp_path / "prompts.parquet")}), expected)
    assert identical(seen({**spec, "dataset": datasets.DatasetDict({"train": data})}), expected)
    assert (
        len(seen(data)) == len(seen(tmp_path / "prompts.parquet")) == len(seen(str(tmp_path / "prompts.parquet"))) == 3
    )
    model, tokens = tiny_llama(), {"dataset": datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]]})}
    (sample,) = generate_calibrate_set(model, LanguageModelSampler(), tokens, "")
    assert sample["input_ids"].tolist() == [[1, 2, 3]]
    with pytest.raises(CalibrationError, match=r"calibration\.prompt: unknown key; allowed are"):
        seen({"prompt": "a cat"})


def test_text_encoder_of_a_pipeline():
    stored = generate_calibrate_set(tiny_pipeline(DDIMScheduler()), BaseSampler(1), ["a b", "c"], "text_encoder")
    assert [sample[0].tolist() for sample in stored] == [[[1, 1, 0]], [[0, 0, 0]], [[1, 0, 0]], [[0, 0, 0]]]


@pytest.mark.parametrize("generates", [False, True])
def test_a_language_model_in_a_pipeline_is_recorded_without_a_cache(generates):
    """Each call then has the whole text, and the same text is written. The settings are restored, also after errors."""

    class Writer:
        def __init__(self, model):
            self.components = {"model": model}

        def __call__(self, ids):
            (model,) = self.components.values()
            if generates:
                return model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
            cache = None
            for _ in range(3):
                output = model(ids if cache is None else ids[:, -1:], past_key_values=cache)
                cache, ids = output.past_key_values, torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
            return ids

    model = tiny_llama().eval()
    pipe, ids = Writer(model), torch.tensor([[1, 2]])
    before = vars(model.config) | vars(model.generation_config)
    written = pipe(ids)
    seen = generate_calibrate_set(pipe, BaseSampler(None), [(ids,)], "model")
    texts = [sample["input_ids"] if isinstance(sample, dict) else sample[0] for sample in seen]
    assert [text.tolist() for text in texts] == [written[:, :n].tolist() for n in (2, 3, 4)]
    with pytest.raises(TypeError):
        generate_calibrate_set(pipe, BaseSampler(None), [{"no_such": ids}], "model")
    assert vars(model.config) | vars(model.generation_config) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"calib_layer": "transformer"}, ValueError, "no layer 'transformer'"),
        ({"sample_dataloader": []}, ValueError, "sample_dataloader is empty"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be"),
        ({"sampler": UniformSampler}, TypeError, "sampler must be a BaseSampler"),
        ({"generator": torch.Generator()}, ValueError, "generator: "),
        ({"model": nn.ReLU}, TypeError, "module or a diffusers pipeline"),
        ({"calib_layer": "unet.unused"}, ValueError, "never calls its forward"),
        ({"no_such": 1}, TypeError, "no_such"),
    ],
)
def test_bad_arguments(arguments, error, message, tmp_path):
    pipe = tiny_pipeline(DDIMScheduler())
    pipe.unet.unused = nn.Linear(1, 1)
    defaults = {"model": pipe, "sampler": UniformSampler(1), "sample_dataloader": ["a"], "calib_layer": "unet"}
    for dump_path in (None, tmp_path):
        with pytest.raises(error, match=message):
            generate_calibrate_set(**{**defaults, "dump_path": dump_path, "num_inference_steps": 2, **arguments})
    assert load_calibrate_set(tmp_path) is None
    good = generate_calibrate_set(**defaults, dump_path=tmp_path, num_inference_steps=3)
    assert len(good) == 1, "the path is free for the corrected call"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_compression_does_not_depend_on_threads(monkeypatch, threads):
    """The data has several megabytes, so several threads have work."""
    data = b"".join(
        torch.randn(1 << 18, generator=torch.Generator().manual_seed(i)).numpy().tobytes() for i in range(9)
    )
    expected = storage._compress(data)
    original = zstandard.ZstdCompressor
    monkeypatch.setattr(
        zstandard, "ZstdCompressor", lambda level, threads=0: original(level=level, threads=threads and forced)
    )
    forced = threads
    assert len(data) > 2 * storage._PARALLEL_SIZE
    assert storage._compress(data) == expected
    assert zstandard.decompress(expected) == data


def test_one_chunk_at_most_is_held(tmp_path, monkeypatch):
    held = []
    original = Recording.take
    monkeypatch.setattr(
        Recording, "take", lambda self, other, index: (original(self, other, index), held.append(len(self.samples)))
    )
    generate(tmp_path, chunk_size=3)
    assert len(held) > 20
    assert max(held) <= 5, "chunks of 3, runs of 5"
