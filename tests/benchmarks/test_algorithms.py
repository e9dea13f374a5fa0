"""The benchmark of the algorithms' cost on a tiny model: every part runs and reports the expected rows."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import algorithms, models

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Words:
    """A tokenizer with one token per character."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 96 for c in text]}


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LlamaForCausalLM:
    """A stand-in for SmolLM2; widths are multiples of the configs' groups of 64."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=192, vocab_size=96, **heads)).eval()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    monkeypatch.setattr(models, "smollm2", lambda: (model, Words()))
    monkeypatch.setattr(models, "smollm2_folder", lambda: folder)
    return model


def run(*arguments: object) -> int:
    threads = str(torch.get_num_threads())
    small = ("--windows", "2", "--memory-windows", "2", "--seqlen", "32", "--batch-size", "1", "--threads", threads)
    return algorithms.main([*small, *map(str, arguments)])


@pytest.mark.slow
def test_pieces_are_timed_and_leave_the_model_alone(
    llama: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = copy.deepcopy(llama)
    file = tmp_path / "out" / "table.json"
    # On a model this small, call overhead dominates the arithmetic, so a missed target means nothing.
    assert run("--parts", "pieces", "--json", file) in (0, 1)
    assert all(torch.equal(p, q) for p, q in zip(llama.parameters(), before.parameters(), strict=True))
    assert not any(m._forward_pre_hooks for m in llama.modules())

    part = json.loads(file.read_text())["pieces"]
    assert part["settings"] | {"windows": 2, "tokens each": 32, "windows a batch": 1} == part["settings"]
    rows = part["rows"]
    passes = ["calibration pass: ranges and rows", "calibration pass: with Hessians"]
    assert list(rows) == ["plain forward", *passes, *algorithms.PIECES]
    forward = rows["plain forward"]["CPU s"]
    assert min(rows["plain forward"]["all CPU s"]) <= forward <= max(rows["plain forward"]["all CPU s"])
    for name, row in rows.items():
        assert row["CPU s"] > 0, name
        assert row["forwards"] == pytest.approx(row["CPU s"] / forward), name
        assert ("report CPU s" in row) == (name in algorithms.PIECES), name
        piece = algorithms.PIECES.get(name)
        assert ("met" in row) == (piece is not None and (piece.forwards or piece.seconds) is not None), name
    table = file.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    assert part["environment"]["cpu"] in table
    assert table.count("\n| ") == len(rows) + 2


def test_only_some_pieces(llama: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]) -> None:
    run("--parts", "pieces", "--only", "nearest", "GPTQ, W4A16 group 64, mse")
    table = capsys.readouterr().out
    assert table.count("W4A16") == 3
    with pytest.raises(SystemExit):
        run("--only", "no such piece")


def test_low_rank_against_the_best(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with torch.no_grad():  # a decaying spectrum, like a smoothed weight's, on which the fast path is reliable
        for linear in models.quantizable_linears(llama).values():
            out, width = linear.weight.shape
            scale = 0.5 ** torch.arange(min(out, width)).float()
            u, v = (nn.init.orthogonal_(torch.empty(n, len(scale))) for n in (out, width))
            linear.weight.copy_(u * scale @ v.T)
    file = tmp_path / "table.json"
    assert run("--parts", "low-rank", "--blocks", 0, -1, 7, "--ranks", 4, 32, 64, "--json", file) == 0
    rows = json.loads(file.read_text())["low-rank"]["rows"]
    # Keys and values have 64 rows, so rank 64 would gain nothing.
    expected = [(kind, r) for kind in PROJECTIONS for r in (4, 32, 64) if r < 64 or kind not in ("k_proj", "v_proj")]
    assert list(rows) == [f"{kind}, rank {rank}" for kind, rank in expected]
    assert (rows["gate_proj, rank 4"]["rows"], rows["gate_proj, rank 4"]["columns"]) == (192, 128)
    for (_, rank), (name, row) in zip(expected, rows.items(), strict=True):
        assert -1e-3 < row["most lost %"] < 0.1, name
        assert row["captured %"] > (95 if rank == 4 else 99.9), name
        assert row["exact"] == (4 * max(rank, algorithms.low_rank.BLOCK) > min(row["rows"], row["columns"])), name


def test_a_bad_low_rank_branch_is_noticed(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = algorithms.low_rank._exact
    monkeypatch.setattr(algorithms.low_rank, "_exact", lambda w, rank: tuple(f * 0.9 for f in exact(w, rank)))
    monkeypatch.setattr(algorithms.low_rank, "low_rank", lambda w, rank: algorithms.low_rank._exact(w, rank))
    assert run("--parts", "low-rank", "--blocks", 0, "--ranks", 4) == 1


def test_parts_in_a_file_are_kept(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"memory": {"settings": {}, "environment": {"cpu": "another"}, "rows": {}}}))
    run("--parts", "low-rank", "--blocks", 0, "--ranks", 4, "--json", file)
    assert list(json.loads(file.read_text())) == ["memory", "low-rank"]
    table = file.with_suffix(".md").read_text()
    assert "## Memory" in table
    assert "another" in table
    assert "## Low-rank" in table


@pytest.mark.slow
def test_memory_in_fresh_processes(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    assert run("--parts", "memory", "--json", file) in (0, 1)
    rows = json.loads(file.read_text())["memory"]["rows"]
    assert list(rows) == ["float model", "w4a16-gptq, one pass", "w4a16-gptq, per_layer_mode"]
    one, each = rows["w4a16-gptq, one pass"], rows["w4a16-gptq, per_layer_mode"]
    assert one["model"] == each["model"] < rows["float model"]["model"]
    assert all(row["above the model"] == row["peak"] - rows["float model"]["held after"] for row in (one, each))
    assert each["met"] == (each["above the model"] <= algorithms.MOST_MEMORY * one["above the model"])
