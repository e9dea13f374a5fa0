"""The benchmarks' own code: the function-preserving shuffle, the metrics, the peers and the tables."""

import copy
import json
import math
import mmap
import os

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hfquant
from benchmarks import memory, metrics, models, quality, static, streaming
from benchmarks.ablation import ABLATION, DIGITS_ABLATION
from benchmarks.peers import PEERS, linearized
from hfquant.config import parse
from hfquant.observe import observe
from hfquant.presets import PRESETS


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """Three query heads share one value head, so a wrong column order of ``o_proj`` shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # norms too, since their order must follow
    return model


def tokens(count: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(96, (1, length), generator=generator) for _ in range(count)]


class Words:
    """A tokenizer with one token per character."""

    all_special_ids = (0, 1, 2)

    def __len__(self) -> int:
        return 96

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_shuffle_keeps_the_function(llama: LlamaForCausalLM, tied: bool) -> None:
    shuffled = copy.deepcopy(llama)
    if not tied:
        shuffled.lm_head.weight = nn.Parameter(torch.randn_like(shuffled.lm_head.weight))
    original = copy.deepcopy(shuffled)
    models.shuffle_channels(shuffled, seed=1)
    ids = tokens(1, 20)[0]
    with torch.inference_mode():
        logits, expected = shuffled(ids).logits, original(ids).logits
    # Llama's norms compute in float32 whatever the dtype, so this is as close as it gets.
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    for name, linear in models.quantizable_linears(original).items():
        moved = shuffled.get_submodule(name).weight != linear.weight
        assert moved.float().mean() > 0.9, name


def test_quantizable_linears_leaves_the_head(llama: LlamaForCausalLM) -> None:
    names = models.quantizable_linears(llama)
    assert len(names) == 2 * 7
    assert "lm_head" not in names


def test_token_batches_are_spread_over_the_text() -> None:
    text = "".join(chr(i) for i in range(1000))
    batches = models.token_batches(Words(), text, seqlen=10, count=7, batch_size=3)
    rows = torch.cat([b["input_ids"] for b in batches])
    assert [len(b["input_ids"]) for b in batches] == [3, 3, 1]
    assert (rows == rows[:, :1] + torch.arange(10)).all()  # each is a contiguous piece of the text
    gaps = rows[:, 0].diff()
    assert gaps.min() >= 140
    assert gaps.max() <= 150
    with pytest.raises(ValueError, match="100 windows of 10 tokens, 101"):
        models.token_batches(Words(), text, seqlen=10, count=101)


def test_texts_are_apart() -> None:
    texts = models.evaluation_texts()
    calibration = models.calibration_text()
    assert len(texts) == 14
    assert len(calibration) > 400_000
    assert not any(text[:200] in calibration for text in texts)


def test_a_missing_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(models, "MODELS", tmp_path)
    monkeypatch.setattr(models, "GGUF", tmp_path / "none.gguf")  # type: ignore[operator]
    with pytest.raises(FileNotFoundError, match="make models"):
        models.smollm2()
    assert not list(tmp_path.iterdir())  # type: ignore[attr-defined]


@pytest.mark.slow
def test_shuffled_smollm2_is_the_same_model_off_the_grid() -> None:
    model, tokenizer = models.smollm2()
    original, _ = models.smollm2(shuffle=None)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits, expected = model(ids).logits, original(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-4)  # logits reach 27
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    for name, linear in models.quantizable_linears(original).items():
        assert most_values_a_block(linear.weight) <= 16, name
        assert most_values_a_block(model.get_submodule(name).weight) > 24, name


def most_values_a_block(weight: torch.Tensor) -> int:
    """Return the largest number of distinct values in any block of 32 along the input dimension."""
    blocks = weight.detach().reshape(-1, 32).sort(dim=1).values
    return int((blocks.diff(dim=1) > 0).sum(1).max()) + 1


# --- metrics --------------------------------------------------------------------------------------------------------


def test_windows_cover_each_text_and_nothing_twice() -> None:
    texts = ["abcdefghijk", "xyz", "q", "12345"]
    windows = metrics.evaluation_windows(Words(), texts, seqlen=4, full=True)
    assert ["".join(map(chr, w[0])) for w in windows] == ["abcd", "efgh", "ijk", "xyz", "1234"]
    first = metrics.evaluation_windows(Words(), texts, seqlen=4)
    assert ["".join(map(chr, w[0])) for w in first] == ["abcd", "xyz", "1234"]


def test_language_scores_against_float64(llama: LlamaForCausalLM) -> None:
    windows = [*tokens(3, 17), *tokens(1, 5, seed=1)]
    worse = copy.deepcopy(llama)
    with torch.no_grad():
        for linear in models.quantizable_linears(worse).values():
            linear.weight.add_(0.02 * torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(3)))
    ref = metrics.reference(llama, windows)
    scores = metrics.language_scores(worse, ref)

    loss, kl, agree = [], [], []
    for window in windows:
        with torch.inference_mode():
            p, q = llama(window).logits[0].double(), worse(window).logits[0].double()
        p, q = p.exp() / p.exp().sum(-1, keepdim=True), q.exp() / q.exp().sum(-1, keepdim=True)
        for i in range(window.shape[1] - 1):
            loss.append(-math.log(q[i, window[0, i + 1]]))
            kl.append(float((p[i] * (p[i] / q[i]).log()).sum()))
            agree.append(p[i].argmax() == q[i].argmax())
    count = 3 * 16 + 4
    assert scores.tokens == count == len(kl)
    assert scores.perplexity == pytest.approx(math.exp(sum(loss) / count), rel=1e-5)
    assert scores.kl == pytest.approx(sum(kl) / count, rel=1e-4)
    assert scores.kl > 0.01
    assert scores.kl_error == pytest.approx(torch.tensor(kl).std().item() / math.sqrt(count), rel=1e-4)
    assert scores.top1 == sum(agree) / count


def test_a_model_agrees_with_itself(llama: LlamaForCausalLM) -> None:
    ref = metrics.reference(llama, tokens(2, 9))
    scores = metrics.language_scores(llama, ref)
    assert scores.perplexity == pytest.approx(ref.perplexity, rel=1e-6)
    assert abs(scores.kl) < 1e-6
    assert scores.top1 == 1


def test_infinite_logits_are_an_error(llama: LlamaForCausalLM) -> None:
    ref = metrics.reference(llama, tokens(1, 9))
    broken = copy.deepcopy(llama)
    broken.model.layers[0].mlp.up_proj.weight.data[0] = math.inf
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        metrics.language_scores(broken, ref)


def test_decibels() -> None:
    signal = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.full_like(signal, 0.01)
    assert metrics.sqnr(signal, signal + noise) == pytest.approx(
        10 * math.log10(float(signal.double().square().mean()) / 1e-4), rel=1e-4
    )
    torch.testing.assert_close(
        metrics.psnr(signal, signal + noise, value_range=1.0), torch.full((4,), 40.0).double(), rtol=1e-4, atol=0
    )
    mean, error = metrics.mean_and_error(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5
    assert error == pytest.approx(math.sqrt(5 / 3) / 2)


def test_bits_count_every_tensor() -> None:
    model = nn.Sequential(nn.Linear(64, 10, bias=False), nn.Linear(10, 3))
    weights = {"0": 640, "1": 30}
    with pytest.raises(ValueError, match="2 of 2 linears were not quantized, the first is 0"):
        metrics.bits_per_weight(model, weights)
    model[0].weight = nn.Parameter(torch.zeros(10, 32, dtype=torch.int8), requires_grad=False)
    model[0].register_buffer("weight_scale", torch.zeros(10, 1))
    model[1].weight = nn.Parameter(torch.zeros(3, 10, dtype=torch.int8), requires_grad=False)
    model[1].bias = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    assert metrics.bits_per_weight(model, weights) == pytest.approx(8 * (320 + 40 + 30 + 6) / 670)
    model[1].weight = nn.Parameter(torch.zeros(3, 10))
    assert metrics.bits_per_weight(model, weights, left=["1"]) == pytest.approx(8 * (320 + 40 + 120 + 6) / 670)
    with pytest.raises(ValueError, match="1 of 2 linears were not quantized, the first is 1"):
        metrics.bits_per_weight(model, weights, left=["0"])


# --- peers ----------------------------------------------------------------------------------------------------------

PACKAGES = {"torchao": "torchao", "quanto": "optimum.quanto", "sdnq": "sdnq"}
# Codes plus float32 scales and zero points per group of 64; a branch of rank 32 adds its factors.
MOST_BITS = {"w8a16": 8.6, "w8a8": 8.6, "fp8a16": 8.6, "w4a16": 5.3, "w4a8": 8.7}


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_peers_quantize_every_linear_and_nothing_else(llama: LlamaForCausalLM, name: str) -> None:
    kind, _, peer = name.partition("/")
    package = PACKAGES[peer.partition("-")[0]]
    pytest.importorskip(package, reason=f"needs {package} of the extra 'benchmarks', which make test-slow installs")
    batches = [{"input_ids": w} for w in tokens(4, 32)]
    ids = tokens(1, 32, seed=1)[0]
    weights = {n: linear.weight.numel() for n, linear in models.quantizable_linears(llama).items()}
    kept = {n: p.clone() for n, p in llama.named_parameters() if not any(n.startswith(w) for w in weights)}

    model = PEERS[name](copy.deepcopy(llama), batches)
    bits = metrics.bits_per_weight(model, weights)
    branch = 32 * 32 * sum(sum(llama.get_submodule(n).weight.shape) for n in weights) / sum(weights.values())
    assert int(kind[1] if kind[0] == "w" else 8) <= bits <= MOST_BITS[kind] + ("svd" in name) * branch
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in kept.items())
    low = "w4a16/torchao" in name  # its 4-bit linears need bfloat16
    if low:
        model.to(torch.bfloat16)
    with torch.no_grad():
        exact, native = llama(ids).logits, model(ids).logits
        assert 60 > metrics.sqnr(exact, native) > (8 if "4" in kind else 20)
        if kind.endswith("a16"):
            read_off = linearized(model, weights).to(torch.bfloat16 if low else torch.float32)(ids).logits
            assert metrics.sqnr(native, read_off) > (35 if low else 90)


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [quality.ROWS, DIGITS_ABLATION, ABLATION])
def test_every_config_is_valid(rows: dict[str, object]) -> None:
    for name, row in rows.items():
        if isinstance(row, str | dict) and not name.startswith("preset/"):
            resolved = parse(row).default
            assert resolved.weight_quant.format.bits == (8 if name[0] == "f" else int(name[1])), name
            assert (resolved.input_quant is None) == name.partition("/")[0].endswith("a16"), name


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_row(name) -> None:
    """Presets that need no data are quantized the way users do it: while the weights load."""
    row = quality.ROWS[f"preset/{name}"]
    assert row == (PRESETS[name] if parse(name).needs_data else name)


def test_quality_runs_rows_and_adds_to_a_file(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = metrics.reference(llama, tokens(2, 16))

    def subject(args) -> quality.Subject:
        calibration = [{"input_ids": w} for w in tokens(args.samples, 16, seed=5)]
        return quality.Subject(
            copy.deepcopy(llama),
            lambda config: pytest.fail("no preset asked for"),
            calibration,
            lambda m: {"KL": metrics.language_scores(m, ref).kl, "KL error": 0.5},
            {"calibration windows": args.samples},
        )

    rows = {
        "fp32": None,
        "w8a16/int8": ABLATION["w4a16/hfquant-mse"] | {"default": ABLATION["fp8a16/hfquant"]["default"]},
        "w4a16/mse": ABLATION["w4a16/hfquant-mse"],
        "w4a16/broken": lambda model, batches: model,
    }
    monkeypatch.setitem(quality.SUBJECTS, "smollm2", (subject, rows))
    file = tmp_path / "out" / "table.json"
    assert quality.main(["--rows", "fp32", "w4a16/mse", "--samples", "2", "--json", str(file)]) == 0
    assert quality.main(["--rows", "w8*", "--samples", "2", "--json", str(file)]) == 0
    stored = json.loads(file.read_text())["rows"]
    assert set(stored) == {"fp32", "w4a16/mse", "w8a16/int8"}
    # Each group of 64 stores a byte and each row a float32; rows have 192 inputs, or 320 in the down projections.
    assert 4 + (5 * 8 + 32) / 320 < stored["w4a16/mse"]["bits"] < 4 + (3 * 8 + 32) / 192
    assert stored["w4a16/mse"]["KL"] > 10 * stored["w8a16/int8"]["KL"] > 10 * abs(stored["fp32"]["KL"])
    table = file.with_suffix(".md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:5]] == ["fp32", "w8a16/int8", "w4a16/mse"]
    assert f"| {stored['w4a16/mse']['bits']:.2f} |" in table
    assert "± 0.5000" in table
    assert table in capsys.readouterr().out

    # A row that leaves a linear in full precision fails, and the file keeps the other rows.
    assert quality.main(["--rows", "*/broken", "--samples", "2", "--json", str(file)]) == 1
    assert json.loads(file.read_text())["rows"] == stored
    with pytest.raises(SystemExit):
        quality.main(["--rows", "fp32", "--samples", "3", "--json", str(file)])
    assert "other settings" in capsys.readouterr().err


def test_clipping_is_measured_on_windows_kept_out(llama: LlamaForCausalLM) -> None:
    batches = [{"input_ids": torch.randint(96, (4, 12))} for _ in range(5)]
    calibration, kept_out = static.split(batches)
    assert [len(batch["input_ids"]) for batch in calibration] == [4] * 4
    assert [window.shape for window in kept_out] == [(1, 12)] * 4
    everything = torch.cat([b["input_ids"] for b in calibration] + kept_out).sort(dim=0).values
    assert torch.equal(everything, torch.cat([b["input_ids"] for b in batches]).sort(dim=0).values)
    seen = [row[None] for batch in calibration for row in batch["input_ids"]]
    # A batch of four rows and a single row round differently, by some 1e-7 of a value, whose square is negligible.
    assert max(static.clipped(llama, calibration, seen).values()) < 1e-12
    shares = static.clipped(llama, calibration, kept_out)
    assert list(shares) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert all(0 < share < 0.5 for share in shares.values())


def test_text_that_the_model_wrote_is_kept(llama: LlamaForCausalLM, tmp_path) -> None:
    file = tmp_path / "wrote.safetensors"
    before = torch.get_rng_state()
    batches = models.written_batches(llama, Words(), file, seqlen=12, count=70, batch_size=8)
    assert torch.equal(torch.get_rng_state(), before)
    windows = torch.cat([batch["input_ids"] for batch in batches])
    assert windows.shape == (70, 12)
    assert windows[:, 0].min() > 2
    assert len(windows[:, 0].unique()) > 30
    # The text is as likely as the model says: neither greedy nor random.
    with torch.inference_mode():
        chances = llama(windows).logits[:, :-1].log_softmax(-1)
    surprise = -chances.gather(-1, windows[:, 1:, None]).mean()
    entropy = -(chances.exp() * chances).sum(-1).mean()
    assert surprise == pytest.approx(entropy.item(), rel=0.03)
    again = models.written_batches(None, Words(), file, seqlen=12, count=70, batch_size=8)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(again, batches, strict=True))
    with pytest.raises(ValueError, match="remove it"):
        models.written_batches(llama, Words(), file, seqlen=12, count=71)


def test_solving_from_shared_statistics_is_quantize(llama: LlamaForCausalLM) -> None:
    batches = [{"input_ids": torch.randint(96, (2, 12))} for _ in range(3)]
    rules = static.CONFIGS["W8A8 static, SMOOTH search, GPTQ, weights in groups of 64"]
    linears = models.quantizable_linears(llama)
    stats = observe(llama, linears, batches, dict.fromkeys(linears, ("hessian",)))
    found = static.solved(copy.deepcopy(llama), rules, stats)
    expected = hfquant.quantize(copy.deepcopy(llama), batches, rules)
    for a, b in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1]), a[0]


def test_anonymous_memory_is_seen() -> None:
    # Map fresh private pages: memory that malloc kept from earlier tests would already be counted.
    size = 64 * 2**20
    before = memory.status(os.getpid())["RssAnon"]
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.write(b"\1" * size)
        assert memory.status(os.getpid())["RssAnon"] - before > 0.9 * size


@pytest.mark.slow
def test_memory_of_a_load_in_a_fresh_process(llama: LlamaForCausalLM, tmp_path) -> None:
    llama.save_pretrained(tmp_path)
    measured = memory.measure(tmp_path, "w4a16")
    embedding = 96 * 192 * 4
    assert measured["largest tensor"] == max(embedding, 320 * 192 * 4)
    assert measured["float size"] == sum(p.numel() for p in llama.parameters()) * 4
    assert 0 < measured["model"] < 0.5 * measured["float size"]
    assert measured["samples"] > 0
    assert measured["resident peak"] < 100e6


def test_texts_of_a_length_repeat_paragraphs_in_another_order(tmp_path) -> None:
    path = streaming.write_text(tmp_path, "one\n\ntwo words\n\nthree", 1)
    assert 1e6 <= path.stat().st_size < 1e6 + 100
    paragraphs = path.read_text().rstrip("\n").split("\n\n")
    turns = {tuple(paragraphs[i : i + 3]) for i in range(0, len(paragraphs), 3)}
    assert len(turns) == 6
    assert {frozenset(turn) for turn in turns} == {frozenset({"one", "two words", "three"})}


@pytest.mark.slow
def test_memory_of_a_calibrated_load(llama: LlamaForCausalLM, tmp_path) -> None:
    llama.save_pretrained(tmp_path)
    text = streaming.tiny_text(str(tmp_path))
    float_model = streaming.measure(tmp_path)
    row = streaming.measure(tmp_path, "w8a8-smooth", {"dataset": text, "samples": 8, "seqlen": 64})
    row = streaming.above(row, float_model)
    assert row["model"] < float_model["model"]
    assert row["samples"] > 0
    assert row["above the model"] == row["peak"] - float_model["held after"]
    assert row["above the result"] >= 0
    assert 0 < row["above the model"] < 100e6
