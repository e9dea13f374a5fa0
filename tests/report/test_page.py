"""The report page: what it says, and that sorting, filtering and the slider work in headless Chromium."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hfquant
from hfquant.affiner import BlockwiseAffiner
from hfquant.demo.pipeline import DigitsPipeline
from hfquant.recipes.run import save
from hfquant.report.gather import Inputs, gather
from hfquant.report.images import PipelineComparison
from hfquant.report.page import Report, block_of, columns, override, page, quoted, role_of, worst
from hfquant.report.quality import Figure, ModelComparison, TokenChange
from hfquant.report.stored import StoredLayer, read_folder
from tests.integrations import small_models
from tests.integrations.test_transformers_data import word_tokenizer

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
NEEDS_CHROMIUM = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium here; it is there where CI is set"
)


@pytest.fixture(scope="module")
def report(digits) -> Report:
    images = tuple((torch.rand(3, 8, 8), torch.rand(3, 8, 8)) for _ in range(2))
    figures = (Figure("PSNR", 30.1, 0.4, "dB"),)
    comparison = PipelineComparison(figures, images, {"FID": "requires <100> images"})
    speed = [("one call", 1.0, 0.5)]
    return Report("digits", read_folder(digits)[1], comparison, speed, "a machine", notes=["a note"])


def layer(name: str, sqnr: float | None, weight: str = "int4 g64", given: str = "int8 dynamic") -> StoredLayer:
    return StoredLayer(name, (8, 8), weight, given, "smooth/gptq", ((8,), (8,)), (False,), 32, sqnr)


class TestWhatItSays:
    def test_nothing_comes_from_elsewhere(self, report):
        text = page(report)
        assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)""", text)
        assert "http" not in re.sub(r"data:[^\"']*", "", text)

    def test_sizes_layers_and_what_was_measured(self, report):
        text = html.unescape(page(report))
        model = report.models["transformer"]
        assert all(f">{layer.name}<" in text for layer in model.layers)
        assert f"{model.bits:.2f}" in text
        assert "30.1 ± 0.4 dB" in text
        assert "FID not computed: requires <100> images" in text
        assert "2.00" in text
        assert text.count('<figure class="pair') == 2

    def test_every_heading_of_a_table_says_what_it_heads(self, report, llama):
        for text in (page(report), page(Report("llama", read_folder(llama)[1]))):
            headings = re.findall(r"<th\b[^>]*>", text)
            assert headings
            assert all('scope="col"' in heading for heading in headings)

    def test_only_tiny_pictures_are_shown_small(self, report):
        large = PipelineComparison((), ((torch.rand(3, 65, 65),) * 2,), {})
        assert '<div class="pairs tiny">' in page(report)
        assert '<div class="pairs">' in page(Report("large", report.models, large))

    def test_markup_in_names_is_escaped(self, report):
        changes = (TokenChange("<script>alert(1)</script>", ("<b>", 0.6), ("&", 0.5)),)
        text = page(Report("<i>", report.models, ModelComparison((), changes)))
        assert "<script>alert" not in text
        assert "<b>," not in text
        assert "<title>&lt;i&gt;: quantization report</title>" in text

    def test_without_measurements(self, llama):
        text = page(Report("llama", read_folder(llama)[1]))
        assert "Errors were not measured" in text
        assert 'class="chart"' not in text
        headings = set(re.findall(r"<button type=\"button\">([^<]*)<", text))
        assert "Weight" in headings
        assert not {"SQNR, dB", "Alpha", "Rank", "Segments", "Dual"} & headings

    def test_columns_are_those_that_some_layer_has(self, report):
        layers = report.models["transformer"].layers
        bare = [replace(layer, sqnr=None, alphas=(), rank=0, segments=((), ()), dual=()) for layer in layers]
        assert columns(bare) == set()
        assert columns([*bare, replace(bare[0], rank=8)]) == {"ranks"}
        assert columns([*bare, replace(bare[0], sqnr=3.0, dual=(False, True))]) == {"errors", "dual"}

    @pytest.mark.parametrize(("token", "shown"), [("\n", '"\\n"'), (" a", '" a"'), ("<b>", '"<b>"'), ("né", '"né"')])
    def test_tokens_are_quoted_so_that_spaces_are_seen(self, token, shown):
        assert quoted(token) == shown

    def test_an_affiner_is_drawn(self, digits):
        pipe, other = hfquant.demo.load_digits_pipeline(), hfquant.demo.load_digits_pipeline()
        hfquant.quantize_pipeline(other, None, "w4a16")
        config = {"stepper": {"max_timestep": 3, "sample_size": 4}, "solver": {"blocksize": None}}
        affiner = hfquant.load_affiner(config, [{"class_labels": [i]} for i in range(4)], pipe, other)
        assert isinstance(affiner, BlockwiseAffiner)
        text = page(Report("digits", read_folder(digits)[1], affiner=affiner))
        assert text.count("<polyline") == 2
        assert f"t = {affiner.timesteps[0]:g}" in text


class TestOverrides:
    @pytest.mark.parametrize(
        ("weight", "given", "entry"),
        [
            ("int4 g64", "int8 dynamic", {"weight_quant": {"type": "int8"}}),
            ("int4 g64", "-", {"weight_quant": {"type": "int8"}}),
            ("int8", "int8", {"input_quant": {"type": "int8", "axis": -1, "dynamic": True}}),
            ("int8", "int8 dynamic", {"enable": False}),
            ("fp8e4m3", "-", {"enable": False}),
        ],
    )
    def test_each_is_one_step_up(self, weight, given, entry):
        assert json.loads(override(layer("a.0.b", 9.0, weight, given))) == {"a.0.b": entry}

    def test_it_is_an_entry_that_a_config_takes(self, report):
        for bad in worst(report.models["transformer"].layers):
            hfquant.HfQuantConfig({**hfquant.PRESETS["w4a4-gptq"], **json.loads(override(bad))})

    def test_the_worst_are_those_with_the_least_signal(self):
        layers = [layer("a", 9.0), layer("b", None), layer("c", 3.0), layer("d", float("inf")), layer("e", 5.0)]
        assert [x.name for x in worst(layers, 2)] == ["c", "e"]

    def test_blocks_and_kinds(self):
        assert block_of("model.layers.3.mlp.up_proj") == "model.layers.3"
        assert block_of("proj_out") == "proj_out"
        assert role_of("blocks.1.ff.net.2") == "net"
        assert role_of("7") == "7"


def run_in_browser(text: str, script: str, folder: Path) -> dict[str, object]:
    """Run a script in the page, which fills `result`. Any console message counts as a failure."""
    assert CHROMIUM, "CI has no Chromium: .ci/run installs it"
    probe = f"<script>const result = {{}};{script};document.title = JSON.stringify(result);</script></body>"
    file = folder / "page.html"
    file.write_text(text.replace("</body>", probe), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={folder}/profile",
    ]
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title
    return json.loads(html.unescape(title[1]))


@NEEDS_CHROMIUM
class TestInABrowser:
    def test_sorting_filtering_and_the_slider(self, report, tmp_path):
        script = """
          const table = document.getElementById("t1"), names = () =>
            [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.dataset.name);
          const heading = (words) => [...table.querySelectorAll("th")].find((th) => th.textContent.startsWith(words));
          const press = (words) => heading(words).querySelector("button").click();
          result.first = names();
          press("SQNR"); result.rising = names(); result.sort = heading("SQNR").getAttribute("aria-sort");
          press("SQNR"); result.falling = names();
          press("Layer"); result.alphabet = names(); result.old = heading("SQNR").getAttribute("aria-sort");
          const controls = document.querySelector(".controls"), fill = (name, value) => {
            const field = controls.querySelector(`[name=${name}]`);
            field.value = value; field.dispatchEvent(new Event("input", { bubbles: true })); };
          fill("name", "attn1"); result.attention = names();
          result.count = controls.querySelector("output").textContent;
          fill("block", "transformer_blocks.1"); result.block = names();
          fill("kind", "to_q"); result.kind = names();
          const pair = document.querySelector(".pair"), slider = pair.querySelector("input");
          slider.value = 20; slider.dispatchEvent(new Event("input", { bubbles: true }));
          result.cut = getComputedStyle(pair.querySelector(".over")).clipPath;
        """
        found = run_in_browser(page(report), script, tmp_path)
        layers = report.models["transformer"].layers
        by_error = [x.name for x in sorted(layers, key=lambda x: x.sqnr)]
        assert found["first"] == [x.name for x in layers]
        assert found["rising"] == by_error
        assert found["sort"] == "ascending"
        assert found["falling"] == by_error[::-1]
        assert sorted(found["alphabet"]) == sorted(found["first"])
        assert found["alphabet"][0] == "proj_out_1"
        assert found["old"] is None
        assert found["attention"]
        assert all("attn1" in name for name in found["attention"])
        assert found["count"] == f"{len(found['attention'])} of {len(layers)} layers"
        assert found["block"]
        assert all(name.startswith("transformer_blocks.1.") for name in found["block"])
        assert found["kind"] == ["transformer_blocks.1.attn1.to_q"]
        assert "20%" in found["cut"]

    @pytest.mark.parametrize("width", [360, 1200])
    def test_it_fits_the_width(self, report, width, tmp_path):
        script = f"""
          const source = document.documentElement.outerHTML.replace(/<script[^]*?<\\/script>/g, "");
          const frame = document.createElement("iframe"); frame.style.width = "{width}px"; frame.style.height = "900px";
          document.body.append(frame);
          const inner = frame.contentDocument; inner.open();
          inner.write("<!doctype html>" + source);
          inner.close();
          const beyond = (e) => e.getBoundingClientRect().right > inner.documentElement.clientWidth;
          result.wide = [...inner.querySelectorAll("*")].filter((e) => !e.closest(".wide") && beyond(e)).map(String);
          result.overflow = inner.documentElement.scrollWidth - inner.documentElement.clientWidth;
          result.names = [...inner.querySelectorAll("button, input, select")].every((e) =>
            e.getAttribute("aria-label") || e.textContent.trim() || e.closest("label"));
        """
        found = run_in_browser(page(report), script, tmp_path)
        assert found["wide"] == []
        assert found["overflow"] <= 0
        assert found["names"]


class TestGather:
    def test_with_a_reference(self, llama, tmp_path):
        from tests.report.conftest import small_llama

        small_llama().save_pretrained(tmp_path / "full")
        batches = [{"input_ids": torch.arange(8).view(1, 8)}]
        inputs = Inputs()
        object.__setattr__(inputs, "batches", lambda model: batches)
        found = gather(llama, str(tmp_path / "full"), inputs)
        assert {figure.name for figure in found.comparison.figures} >= {"KL divergence", "perplexity"}
        ((what, before, after),) = found.speed
        assert what == "one forward pass, inputs 1 x 8"
        assert min(before, after) > 0
        assert "thread" in found.machine

    def test_an_encoder_decoder_on_text(self, tmp_path):
        full, quantized = tmp_path / "full", tmp_path / "quantized"
        small_models.t5().save_pretrained(full)
        word_tokenizer().save_pretrained(full)
        save(hfquant.quantize(small_models.t5(), None, "w4a16"), quantized)
        (tmp_path / "text.txt").write_text("a b c d e f g h")
        found = gather(quantized, str(full), Inputs(str(tmp_path / "text.txt"), seqlen=8))
        assert {figure.name for figure in found.comparison.figures} == {"KL divergence", "top-1 agreement"}
        assert found.speed[0][0] == "one forward pass, inputs 1 x 8"

    def test_without_one(self, llama):
        found = gather(llama, None, Inputs())
        assert found.comparison is None
        assert not found.speed
        assert "--reference" in found.notes[0]

    def test_nothing_to_compare_is_said(self, digits, monkeypatch):
        called = DigitsPipeline.__call__

        def codes(self: DigitsPipeline, **call: Any) -> SimpleNamespace:
            return SimpleNamespace(codes=called(self, **call).images)

        monkeypatch.setattr(DigitsPipeline, "__call__", codes)
        found = gather(digits, str(digits), Inputs(call={"class_labels": [1], "num_inference_steps": 2}))
        assert found.comparison is None
        assert found.speed[0][0] == "one pipeline call"
        note = "Quality left out: DigitsPipeline returns no images, frames, audio or embeddings."
        assert list(found.notes) == [note]
        assert note in page(found)

    def test_arguments_that_a_pipeline_requires_are_named(self, digits, monkeypatch):
        def call(self: DigitsPipeline, image: Any, strength: float, steps: int = 2, **more: Any) -> None:
            raise AssertionError("it cannot run")

        monkeypatch.setattr(DigitsPipeline, "__call__", call)
        found = gather(digits, str(digits), Inputs(call={"steps": 2}))
        assert found.comparison is None
        assert not found.speed
        options = "pass --arg image=FILE --arg strength=VALUE on the command line, or a call that has it"
        note = f"Quality and speed left out: DigitsPipeline requires image and strength: {options}."
        assert list(found.notes) == [note]
        assert note in page(found)

    def test_audio_has_figures_and_no_pictures(self, digits, monkeypatch):
        called = DigitsPipeline.__call__

        def audios(self: DigitsPipeline, **call: Any) -> SimpleNamespace:
            return SimpleNamespace(audios=called(self, **call).images)

        monkeypatch.setattr(DigitsPipeline, "__call__", audios)
        found = gather(
            digits, str(digits), Inputs(call={"class_labels": [1], "num_inference_steps": 2, "output_type": "pt"})
        )
        written = page(found)
        assert "SQNR of audio" in written
        assert "Images from the same noise" not in written

    def test_a_model_is_no_pipeline(self, llama, digits):
        with pytest.raises(ValueError, match="one is a pipeline"):
            gather(digits, str(llama), Inputs())
