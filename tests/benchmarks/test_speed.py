"""The speed benchmarks: every row of their tables has a figure on tiny sizes, and no incorrect row is timed."""

import copy
import math
import re
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import kernels, models, speed, timing
from benchmarks.peer_kernels import ALL_PEERS, PEER_KERNELS, compiling, missing, peer_rows
from hfquant import QuantLinear
from hfquant.kernels.table import KERNELS
from hfquant.presets import PRESETS


def table(text: str, after: str) -> dict[str, list[str]]:
    """Return the cells of the Markdown table that follows a text, keyed by the first cell of their row."""
    lines = iter(text.split(after, 1)[1].splitlines())
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("| "):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found[name] = cells
        elif found:
            break
    return {name: cells for name, cells in found.items() if set(name) - set("- ")}


def ratio(cell: str) -> float:
    return float(cell.partition(" ")[0])


def assert_full(found: dict[str, list[str]], rows: list[str], columns: int) -> None:
    """Check that every row has a positive ratio per column, the reference row has 1, and missing peers have none."""
    assert list(found) == rows
    for name, cells in found.items():
        assert len(cells) == columns, name
        if missing(name):
            assert cells == ["-"] * columns, name
        elif name not in peer_rows():  # this project cannot promise that a peer runs
            assert all(math.isfinite(ratio(cell)) and ratio(cell) >= 0 for cell in cells), name
    first = next(iter(found.values()))
    assert all(re.fullmatch(r"1\.00 \([\d.e-]+ ms\)", cell) for cell in first), first


OWN = ["fp32*", "bf16*", "torch._int_mm*", "hfquant*"]


def test_kernels_has_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "kernels.md"
    assert kernels.main(["--quick", "--rows", *OWN, "--out", str(file)]) == 0
    text = file.read_text()
    assert text in capsys.readouterr().out
    rows = [name for name in kernels.ROWS if name not in peer_rows()]
    found = table(text, "more is faster")
    assert_full(found, rows, len(kernels.QUICK))
    assert len(rows) == 3 + len(kernels.LAYERS) + 10
    picked = table(text, "the table picked")
    assert list(picked) == [name for name in rows if name.startswith("hfquant")]
    assert {cell for cells in picked.values() for cell in cells} <= set(KERNELS)
    assert f"{torch.get_num_threads()} threads" in text
    assert f"torch {torch.__version__}" in text
    assert "Not measured" not in text


def test_peers_have_rows_or_a_note(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "missing", lambda row: "package is not installed" if row in peer_rows() else "")
    assert kernels.main(["--quick", "--shapes", "2x64x64", "--rows", "ark*", "zentorch*"]) == 0
    text = capsys.readouterr().out
    found = table(text, "more is faster")
    wanted = [name for name in peer_rows() if name.startswith(("ark", "zentorch"))]
    assert list(found) == ["fp32 F.linear", *wanted]
    assert all(found[name] == ["-"] for name in wanted)
    assert text.count("package is not installed") == 1


def test_a_peer_that_would_exit_the_process_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for vnni in (False, True):
        monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda vnni=vnni: vnni)
        reasons = {missing(row) for row in peer_rows() if row.startswith("zentorch")}
        assert (reasons == {"zentorch cannot run: this CPU has no AVX512-VNNI"}) != vnni
    assert {name for name, _ in peer_rows().values()} <= set(ALL_PEERS)
    assert set(peer_rows()) <= set(kernels.ROWS)


def test_a_row_that_is_wrong_is_not_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.ROWS["bf16 F.linear"]

    def doubled(subject: kernels.Subject) -> kernels.Built:
        built = right.build(subject)
        return built._replace(run=lambda x: 2 * built.run(x))

    def broken(subject: kernels.Subject) -> kernels.Built:
        raise RuntimeError("no such\nproduct")

    rows = {"fp32 F.linear": kernels.ROWS["fp32 F.linear"], "hfquant doubled": kernels.Row(doubled, right.tolerance)}
    monkeypatch.setattr(kernels, "ROWS", rows | {"hfquant broken": kernels.Row(broken, 1)})
    assert kernels.main(["--quick", "--shapes", "2x64x32"]) == 1
    text = capsys.readouterr().out
    found = table(text, "more is faster")
    assert found["hfquant doubled"] == found["hfquant broken"] == ["-"]
    assert "- hfquant doubled at 2x64x32: computes something else (relative error 1)" in text
    assert "- hfquant broken at 2x64x32: RuntimeError: no such\n" in text


@pytest.mark.parametrize("name", kernels.LAYERS)
def test_layers_are_what_they_are_called(name: str) -> None:
    layer = kernels.LAYERS[name]
    plan = layer.plan(150, 70)
    module = kernels.random_layer(plan, torch.float32, torch.device("cpu"))
    assert isinstance(module, QuantLinear)
    assert module.real_quant
    bits = re.match(r"(?:W|FP)(\d)A(\d+)|(?:INT|FP)(16) weights", name)
    assert bits is not None
    assert module.format.bits == int(bits[1] or bits[3])
    assert (plan.config.input_quant is None) == (bits[2] in ("16", None))
    assert plan.static_input == ("static" in name)
    assert any(plan.dual) == ("dual" in name)
    assert len(plan.input_segments) == (4 if "segments" in name else 1)
    assert ("weight_zero_point" in plan.tensors()) == ("asymmetric" in name)
    assert ("svd_down" in plan.tensors()) == ("rank" in name)
    if group := re.search(r"g(\d+)", name):
        assert plan.config.group_size == int(group[1])
    # Scales have a plausible size, so outputs are neither zero nor huge.
    assert 0.1 < module(torch.randn(8, 150)).std() < 100


@pytest.mark.parametrize(
    "wanted", [["fp32", "bf16", "hfquant w8a8", "hfquant w4a16, bf16"], pytest.param(OWN, marks=pytest.mark.slow)]
)
def test_speed_has_every_row(wanted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speed.md"
    assert speed.main(["--quick", "--rows", *wanted, "--out", str(file)]) == 0
    text = file.read_text()
    assert text in capsys.readouterr().out
    own = [name for name in speed.ROWS if name not in peer_rows()]
    assert {f"hfquant {name}" for name in PRESETS} < set(own)
    rows = own if wanted is OWN else wanted
    assert_full(table(text, "more is faster"), rows, 5)
    memory = table(text, "above the weights")
    assert list(memory) == rows
    assert all(float(cell) >= 0 for cells in memory.values() for cell in cells)
    assert "Not measured" not in text
    assert set(speed.ROWS) - set(own) == set(peer_rows()) - set(speed.LEFT_OUT)
    assert speed.COMPILED in speed.ROWS


@pytest.mark.parametrize("preset", ["w8a8", "w4a16-gptq", "w4a4-gptq"])
def test_rows_run_the_presets_on_codes_and_share_the_rest(preset: str) -> None:
    subject = speed.QUICK["SmolLM2"]()
    rows = {name: speed.ROWS[name] for name in ("fp32", f"hfquant {preset}")}
    plain, model = speed.built(subject, rows, {}).values()
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert set(quantized) == set(models.quantizable_linears(subject.model))
    section = PRESETS[preset]["default"]
    for layer in quantized.values():
        config = layer.plan.config
        assert layer.real_quant
        assert config.opt.type == section["opt"]["type"]
        assert config.weight_quant.symmetric == section["weight_quant"].get("symmetric", True)
    # The original is unchanged, and the embedding exists only once.
    assert not any(isinstance(m, QuantLinear) for m in subject.model.modules())
    embeddings = [m.get_input_embeddings().weight.data_ptr() for m in (subject.model, plain, model)]
    assert len(set(embeddings)) == 1


def test_decode_starts_anew_each_time() -> None:
    subject = speed.QUICK["SmolLM2"]()
    (decode,) = (w for name, w in subject.workloads.items() if "decode" in name)
    with torch.no_grad():
        run = decode(subject.model)
        first, second = run(False), run(False)
    assert first.shape[1] == 4
    assert torch.equal(first, second)


# --- timing ---------------------------------------------------------------------------------------------------------


def test_rows_take_turns() -> None:
    seen: list[str] = []

    def row(name: str, seconds: float):
        def run(_: int) -> None:
            seen.append(name)
            time.sleep(seconds)

        return run

    medians = timing.interleaved({"a": row("a", 0.0), "b": row("b", 0.002)}, seconds=0, turns=4, shortest=0)
    assert sorted(seen) == ["a"] * 4 + ["b"] * 4
    assert all({*seen[i : i + 2]} == {"a", "b"} for i in range(0, 8, 2))
    assert medians["b"] >= 0.002
    seen.clear()
    timing.interleaved({"b": row("b", 0.002)}, seconds=0, turns=1, shortest=0.0041)
    assert 2 + 1 <= len(seen) <= 2 + 3


def test_cpu_time_counts_on_one_thread_alone() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert (timing.clock_of("cpu"), timing.clock_of("cuda")) == (time.process_time, time.perf_counter)
        torch.set_num_threads(2)
        assert timing.clock_of("cpu") == time.perf_counter
    finally:
        torch.set_num_threads(before)


def test_memory_of_a_call_is_seen() -> None:
    assert timing.peak_above(lambda _: torch.ones(16 << 20).sum()) > 0.9 * (64 << 20)


def test_shares_of_other_processes() -> None:
    with timing.watched() as share:
        assert share == []
    assert len(share) == 1
    assert timing.shares([0.123, -0.001, math.nan]) == "12%, 0%, unknown"


def test_a_peer_that_sets_threads_changes_no_other_row() -> None:
    before = torch.get_num_threads()
    with compiling():
        torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before


# --- peers known for their speed ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PEER_KERNELS)
@pytest.mark.parametrize("bias", [True, False])
def test_peer_kernels_compute_the_linear(name: str, bias: bool) -> None:
    kind, _, peer = name.partition("/")
    if package := missing(f"{peer} {kind}"):
        pytest.skip(f"{package} is not installed")
    torch.manual_seed(0)
    linear = nn.Linear(192, 96, bias=bias)
    for dtype in (torch.float32, torch.bfloat16):
        if (name, dtype) not in peer_rows().values():
            continue
        model = PEER_KERNELS[name](nn.Sequential(copy.deepcopy(linear).to(dtype)), [])
        for lead in ((1,), (3, 5)):
            x = torch.randn(*lead, 192).to(dtype)
            y = model(x)
            assert y.dtype == dtype
            assert timing.relative_error(y, linear(x.float())) < (0.15 if kind.startswith("w4") else 0.02)
