"""quantize() on whole models: one pass and per layer, failure safety, resume, report, offload."""

import copy
import logging
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import hfquant
from hfquant import CalibrationError, QuantLinear, dequantize, ptq, quantize
from hfquant.integrations.checkpoint import needs_no_data
from hfquant.nn.modules import quant_layers
from tests.schemes import SVDQUANT

STATIC = {"default": {"opt": {"type": "default"}, "weight_quant": {"type": "int8", "axis": -1}}}
FULL = {
    "default": {
        "opt": {"type": "svd", "low_rank": 4},
        "calib": {"type": "gptq"},
        "weight_quant": {"type": "int4", "group_size": 8, "symmetric": False, "clip": "mse"},
        "input_quant": {"type": "int8"},
    }
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.down(F.silu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.inp = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.unused = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = self.inp(x) * scale
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def net() -> Net:
    torch.manual_seed(3)
    return Net()


@pytest.fixture
def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(4, 10, 8, generator=generator) for _ in range(6)]


def error(model: nn.Module, reference: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        exact = reference(x)
        return float((model(x) - exact).norm() / exact.norm())


def snapshot(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[int], list[bool], list[int]]:
    modules = list(model.modules())
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, [id(m) for m in modules], [m.training for m in modules], hooks


def assert_untouched(model: nn.Module, before: Any) -> None:
    after = snapshot(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("per_layer_mode", [False, True])
@pytest.mark.parametrize("config", [STATIC, FULL, "w4a16", "w8a8", "w4a8-gptq", "w4a16-gptq"])
def test_quantizes_every_linear_in_place(net: Net, data: Any, config: Any, per_layer_mode: bool) -> None:
    reference = copy.deepcopy(net)
    if isinstance(config, str):  # width 16 has no groups of 32
        config = copy.deepcopy(hfquant.PRESETS[config])
        config["default"]["weight_quant"].update(group_size=8)
        config["default"]["float_share"] = 0.0
        if "low_rank" in config["default"].get("opt", {}):
            config["default"]["opt"]["low_rank"] = 4
    result = quantize(net, data, config, per_layer_mode=per_layer_mode)
    assert result is net
    assert len(quant_layers(net)) == 3 * 4 + 2
    assert error(net, reference, data[0]) < 0.15
    assert net.training


def test_per_layer_mode_sees_quantized_inputs(net: Net, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    observe = ptq.observe

    def spy(model: nn.Module, layers: Any, *args: Any, **kwargs: Any) -> Any:
        stats = observe(model, layers, *args, **kwargs)
        seen[mode].update(stats)
        return stats

    monkeypatch.setattr(ptq, "observe", spy)
    for mode in (False, True):
        quantize(copy.deepcopy(net), data, STATIC, per_layer_mode=mode)
    assert torch.equal(seen[True]["inp"].amax, seen[False]["inp"].amax)
    name = "blocks.2.down"
    assert not torch.equal(seen[True][name].amax, seen[False][name].amax)
    torch.testing.assert_close(seen[True][name].amax, seen[False][name].amax, rtol=0.2, atol=0.2)


def test_per_layer_mode_holds_one_block_at_a_time(net: Net, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []
    observe = ptq.observe
    monkeypatch.setattr(
        ptq, "observe", lambda m, layers, *a, **k: groups.append(list(layers)) or observe(m, layers, *a, **k)
    )
    quantize(net, data, STATIC, per_layer_mode=True)
    assert groups[0] == ["inp"]
    assert [{n.split(".")[1] for n in g} for g in groups[1:4]] == [{"0"}, {"1"}, {"2"}]


def test_memory_budget_takes_more_passes_and_changes_nothing(
    net: Net, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    observe = ptq.observe
    monkeypatch.setattr(
        ptq, "observe", lambda m, layers, *a, **k: passes.append(list(layers)) or observe(m, layers, *a, **k)
    )
    other = copy.deepcopy(net)
    quantize(net, data, FULL)
    assert len(passes) == 1
    quantize(other, data, FULL, memory_budget=150_000)
    assert len(passes) > 3
    assert [name for group in passes[1:] for name in group] == passes[0]
    for (name, one), two in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


class Stop(Exception):
    pass


@pytest.mark.parametrize("per_layer_mode", [False, True])
@pytest.mark.parametrize("fail_at", [0, 5, 13])
def test_a_failure_leaves_the_model_as_it_was(
    net: Net, data: Any, per_layer_mode: bool, fail_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net.eval()
    net.blocks[1].train()
    before, solve, calls = snapshot(net), ptq.solve, []

    def failing(*args: Any) -> Any:
        if len(calls) == fail_at:
            raise Stop
        calls.append(1)
        return solve(*args)

    monkeypatch.setattr(ptq, "solve", failing)
    with pytest.raises(Stop):
        quantize(net, data, STATIC, per_layer_mode=per_layer_mode)
    assert_untouched(net, before)


@pytest.mark.parametrize(
    ("loader", "config", "kind", "message"),
    [
        (None, STATIC, CalibrationError, "needs calibration data"),
        ([], STATIC, CalibrationError, "empty"),
        (DataLoader([], batch_size=2), STATIC, CalibrationError, "empty"),
        ((torch.randn(2, 8) for _ in range(2)), STATIC, CalibrationError, "only once"),
        ([torch.full((2, 3, 8), torch.nan)], STATIC, CalibrationError, "layer 'inp'.*batch 0"),
        ([torch.randn(2, 9)], STATIC, RuntimeError, "shapes cannot be multiplied"),
        ([torch.randn(2, 3, 8)], 7, TypeError, "expected a dict"),
    ],
)
def test_bad_input_is_refused_and_nothing_lost(net: Net, loader: Any, config: Any, kind: Any, message: str) -> None:
    before = snapshot(net)
    with pytest.raises(kind, match=message):
        quantize(net, loader, config)
    assert_untouched(net, before)


def test_quantizing_twice_is_refused(net: Net, data: Any) -> None:
    quantize(net, None, "w8a16")
    with pytest.raises(ValueError, match="already quantized"):
        quantize(net, None, "w8a16")
    plain = dequantize(net)
    assert all(type(m) is not QuantLinear for m in plain.modules())
    quantize(plain, None, "w8a16")
    with pytest.raises(ValueError, match="no quantized layer"):
        dequantize(Net())


def test_a_layer_that_never_ran_is_reported_and_falls_back(
    net: Net, data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    quantize(net, data, STATIC)
    assert "1 layer never ran during calibration and got round-to-nearest and per-token" in caplog.text
    assert "input scales: 'unused'" in caplog.text
    (report,) = [r for r in net.quant_report.layers if r.fallback]
    assert report.name == "unused"
    x = torch.randn(3, 8)
    assert net.unused(x).isfinite().all()
    assert net.unused.plan.config.input_quant.dynamic


def test_resume_goes_on_and_ends_the_same(net: Net, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, cut = quantize(copy.deepcopy(net), data, FULL), copy.deepcopy(net)
    solve, calls = ptq.solve, []

    def failing(*args: Any) -> Any:
        calls.append(args[0])
        if len(calls) == 6:
            raise Stop
        return solve(*args)

    monkeypatch.setattr(ptq, "solve", failing)
    with pytest.raises(Stop):
        quantize(cut, data, FULL, resume_dir=tmp_path)
    done, calls = list(calls[:5]), calls
    calls.clear()
    calls += ["x"] * 10  # no more failures
    quantize(cut, data, FULL, resume_dir=tmp_path)
    assert not set(done) & set(calls[10:])
    for (name, one), two in zip(straight.state_dict().items(), cut.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    # Another config does not use anything from that folder.
    calls.clear()
    calls += ["x"] * 10
    quantize(copy.deepcopy(net), data, STATIC, resume_dir=tmp_path)
    assert len(calls) == 10 + 14


def test_report_measures_what_was_gained(net: Net, data: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hfquant"):
        quantize(net, data, FULL, verbose=True)
    report = net.quant_report
    assert [r.name for r in report.layers][:2] == ["inp", "blocks.0.qkv"]
    by_name = {r.name: r for r in report.layers}
    down = by_name["blocks.1.down"]
    assert down.rank == 4
    assert down.alphas == (0.5,)
    assert 0 < down.error < down.plain_error
    assert down.sqnr == pytest.approx(-20 * math.log10(down.error))
    assert down.plain_sqnr == pytest.approx(-20 * math.log10(down.plain_error))
    assert "blocks.1.down" in caplog.text
    text = str(report)
    assert all(name in text for name in by_name)
    assert report.to_dict()["layers"][0]["name"] == "inp"


VERBOSE = """
import logging, sys, torch, hfquant
from torch import nn
{setup}
data = [(torch.randn(4, 8),)]
hfquant.quantize(nn.Sequential(nn.Linear(8, 6)), data, "w8a8-smooth", verbose=True)
assert logging.getLogger("hfquant").level == logging.NOTSET
hfquant.quantize(nn.Sequential(nn.Linear(8, 6)), data, "w8a8-smooth")
"""


@pytest.mark.parametrize("setup", ["", "logging.basicConfig(level=logging.WARNING)"])
def test_verbose_shows_on_the_console_whatever_the_logging(setup: str) -> None:
    done = subprocess.run([sys.executable, "-c", VERBOSE.format(setup=setup)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # One line for the layer and one in the table, without duplicates; none in the run that is not verbose.
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if "SQNR dB" in line]
    assert len(lines) == 2
    assert "in_features=8" in lines[0]


def test_batches_of_different_shapes_and_kinds(net: Net) -> None:
    x = torch.randn(2, 5, 8)
    loader = [x, torch.randn(1, 3, 8), (x, 0.5), {"x": x, "scale": 2.0}, [(x,), (x, 0.5), {"x": x}], [x]]
    reference = copy.deepcopy(net)
    quantize(net, loader, STATIC)
    assert error(net, reference, x) < 0.05


def test_data_loader_with_workers(net: Net, data: Any) -> None:
    quantize(net, DataLoader(torch.cat(data), batch_size=5, num_workers=1), STATIC)
    assert quant_layers(net)["inp"].plan.static_input


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(net: Net, data: Any, dtype: torch.dtype) -> None:
    reference, net = copy.deepcopy(net), net.to(dtype)
    quantize(net, [x.to(dtype) for x in data], FULL)
    assert net.inp.svd_up.dtype == net.inp.bias.dtype == dtype
    with torch.no_grad():
        y = net(data[0].to(dtype))
    assert y.dtype == dtype
    exact = reference(data[0])
    assert (y.float() - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("per_layer_mode", [False, True])
def test_offloaded_models(net: Net, data: Any, tmp_path: Path, per_layer_mode: bool) -> None:
    from accelerate import cpu_offload, disk_offload

    expected = quantize(copy.deepcopy(net), data, FULL, per_layer_mode=per_layer_mode)(data[0])
    for offload in (
        lambda m: cpu_offload(m, torch.device("cpu")),
        lambda m: disk_offload(m, str(tmp_path / "weights"), torch.device("cpu")),
    ):
        model = copy.deepcopy(net)
        offload(model)
        assert model.inp.weight.device.type == "meta"
        quantize(model, data, FULL, per_layer_mode=per_layer_mode)
        assert model.inp.weight.device.type == "meta"
        assert torch.equal(model(data[0]), expected)


def test_shared_module_is_quantized_once_and_stays_shared(data: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = quantize(Twice(), data, STATIC)
    assert model.a is model.b
    assert isinstance(model.a, QuantLinear)


def test_says_what_share_was_quantized(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1000, 3), nn.Flatten(), nn.Linear(4, 4))
    quantize(model, None, "w8a16")
    assert "1 layer quantized" in caplog.text
    assert "the largest left: 0.weight" in caplog.text


def test_overlapping_globs_that_need_data_only_together_are_refused_on_load(net: Net) -> None:
    config = hfquant.HfQuantConfig(
        {
            "default": {"opt": {"type": "default"}, "input_quant": {"type": "int8", "axis": -1, "dynamic": True}},
            "*.up": {"input_quant": {"type": "bf16", "axis": None, "dynamic": False}},
            "blocks.1.*": {"input_quant": {"type": "int8"}},
        }
    )
    assert not config.needs_data
    with pytest.raises(CalibrationError, match=r"layer 'blocks\.1\.up' needs calibration data"):
        needs_no_data(hfquant.plan(net, config))


def test_share_of_a_model_whose_head_is_none(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    net.get_output_embeddings = lambda: None
    with caplog.at_level(logging.INFO, "hfquant"):
        quantize(net, None, {"default": {"opt": {"type": "default"}, "input_quant": None}})
    assert "100 % of the parameters in matrices" in caplog.text


@pytest.mark.parametrize("config", [{"default": {"enable": False}}, hfquant.HfQuantConfig("w8a8", None, ["*"])])
def test_all_switched_off_leaves_the_model_and_warns(
    net: Net, data: Any, config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = snapshot(net)
    assert quantize(net, data, config) is net
    assert "has nothing to quantize" in caplog.text
    assert_untouched(net, before)


@pytest.mark.parametrize("per_layer_mode", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_after_the_solve_undoes_all(
    net: Net, data: Any, error: Any, per_layer_mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(net)

    def interrupted(*args: Any) -> Any:
        raise error("now")

    monkeypatch.setattr(ptq, "log_share", interrupted)
    with pytest.raises(error, match="now"):
        quantize(net, data, STATIC, per_layer_mode)
    assert_untouched(net, before)
    assert not hasattr(net, "quant_report")


@pytest.mark.parametrize("where", ["weight", "bias"])
@pytest.mark.parametrize("config", ["w8a16", STATIC])
def test_nan_is_blamed_on_the_layer_that_has_it(net: Net, data: Any, where: str, config: Any) -> None:
    name = next(n for n, m in net.named_modules() if type(m) is torch.nn.Linear and m.bias is not None)
    getattr(net.get_submodule(name), where).data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=rf"layer '{name}': 1 of"):
        quantize(net, data, config)


def test_names_that_match_nothing_warn(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    hfquant.plan(net, hfquant.HfQuantConfig("w8a16", modules_to_not_convert=["blocks.0", "no_such"]))
    assert "'no_such' matches no module" in caplog.text
    assert "'blocks.0' matches" not in caplog.text


def test_linear_subclasses_stand_in_skipped() -> None:
    class Mine(torch.nn.Linear):
        def forward(self, x):  # type: ignore[no-untyped-def, override]
            return super().forward(x).relu()

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Mine(4, 4))
    assert hfquant.plan(model, "w8a16").skipped == {"1": "it is a subclass of nn.Linear, Mine"}


def test_groups_may_end_short_and_ranks_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(100, 70), torch.nn.Linear(70, 2))
    x = torch.randn(64, 100)
    exact = model(x).detach()
    with caplog.at_level(logging.INFO, "hfquant"):
        quantize(model, [x], SVDQUANT)
    plans = [layer.plan for layer in model]
    assert [p.columns for p in plans] == [(64, 36), (64, 6)]
    assert [p.transform.low_rank for p in plans] == [32, 2]
    assert model[0].weight_scale.shape == (70, 2)
    assert sum("the last group of a segment is shorter" in r.getMessage() for r in caplog.records) == 1
    assert sum("opt is reduced to the layer size" in r.getMessage() for r in caplog.records) == 1
    error = (model(x) - exact).norm() / exact.norm()
    assert error < 0.08
    hfquant.set_real_quant(model)
    assert torch.allclose(model(x), exact, atol=0.08 * float(exact.abs().max()) * 4)


@pytest.mark.parametrize("call", [lambda m: quantize(m, None, "w8a16"), lambda m: hfquant.plan(m, "w8a16")])
@pytest.mark.parametrize("model", [None, "model", [1], torch.zeros(2)])
def test_what_is_no_module_is_refused(call: Any, model: Any) -> None:
    with pytest.raises(TypeError, match=f"expected a torch.nn.Module, got {type(model).__name__}"):
        call(model)


@pytest.mark.parametrize("example", ["text", 3, {"nothing": torch.zeros(1)}, (), [[]]])
def test_a_senseless_example_costs_the_segments_and_no_more(
    net: Net, example: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plan = hfquant.plan(net, "w8a16", example)
    assert plan.layers
    assert "pattern detection failed" in caplog.text


def test_a_searched_alpha_at_16_bits_is_worse_neither_than_the_fixed_one_nor_than_8_bits() -> None:
    """With one static scale and almost no rounding error, a few clipped rows decide between alphas."""
    from hfquant.demo import load_digits_pipeline

    def batches(seed: int) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        return [
            {
                "hidden_states": torch.randn(4, 1, 8, 8, generator=generator),
                "timestep": torch.full((4,), 40 + 60 * i),
                "class_labels": torch.arange(4) + i % 6,
            }
            for i in range(16)
        ]

    exact, errors = load_digits_pipeline().transformer, []
    search = {"search_alpha_config": {"enable": True}}
    for dtype, options in (("int16", search), ("int16", {}), ("int8", search)):
        config = {"weight_quant": {"type": dtype, "axis": -1}, "input_quant": {"type": dtype}}
        model = quantize(
            copy.deepcopy(exact), batches(1), {"default": {"opt": {"type": "smooth", **options}, **config}}
        )
        with torch.no_grad():
            errors.append(sum((model(**b).sample - exact(**b).sample).square().sum().item() for b in batches(99)))
    assert errors[0] == min(errors)


@pytest.mark.parametrize("config", ["w8a16", "w8a8", "w4a16-gptq"])
def test_within_inference_mode(config: str) -> None:
    """The result is that of a call outside of it, and passes gradients on."""
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), [torch.randn(8, 32)]
    right = hfquant.quantize(copy.deepcopy(net), data, config)
    with torch.inference_mode():
        found = hfquant.quantize(net, [data[0].clone()], config)
    x = data[0].clone().requires_grad_()
    y = found(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(y, right(data[0]))


@pytest.mark.parametrize("per_layer_mode", [False, True])
def test_a_failure_leaves_hooks_in_place(per_layer_mode: bool) -> None:
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    seen: list[int] = []
    handles = [layer.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, layer in enumerate(net)]
    with torch.no_grad():
        net[2].weight[0, 0] = torch.nan
    for config in ("w8a16", "w8a8"):
        with pytest.raises(ValueError, match="NaN"):
            hfquant.quantize(net, [torch.randn(4, 16)], config, per_layer_mode=per_layer_mode)
    seen.clear()
    net(torch.randn(1, 16))
    assert seen == [0, 1, 2]
    for handle in handles:
        handle.remove()
    net(torch.randn(1, 16))
    assert seen == [0, 1, 2]


def test_layer_by_layer_folded_divisors_are_made_up_for_until_the_end() -> None:
    """Later blocks are calibrated on what earlier ones give once all is in place."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
            with torch.no_grad():
                self.norm.weight.mul_(4.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(self.norm(x))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    net, x, seen = Net(), torch.randn(32, 32), []
    right, first = net(x).detach(), net.layers[0](x).detach()
    net.layers[1].register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().clone()))
    fold = {"opt": {"type": "smooth", "fold": True}, "weight_quant": {"type": "int8", "axis": -1}}
    config = {"default": {**fold, "input_quant": {"type": "int8", "token_fallback": False}}}
    hfquant.quantize(net, [x], config, per_layer_mode=True)
    assert net.layers[0].up.plan.folded
    calibrated = [got for got in seen if type(got) is torch.Tensor]
    assert len(calibrated) > 1
    assert all((got - first).norm() < 0.05 * first.norm() for got in calibrated)
    assert (net(x) - right).norm() < 0.05 * right.norm()


def test_hooks_of_users_neither_see_nor_stop_the_detection_of_patterns() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], -1))

    class Keeper:
        def __init__(self) -> None:
            self.lock, self.seen = threading.Lock(), []

        def see(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            self.seen.append(output.detach())

    net, keeper = Net(), Keeper()
    net.a.register_forward_hook(keeper.see)
    static = {"opt": {"type": "default"}, "input_quant": {"type": "int8"}}
    hfquant.quantize(net, [torch.randn(4, 32)], {"default": static})
    assert net.c.plan.input_segments == (32, 32)
    assert {type(seen) for seen in keeper.seen} == {torch.Tensor}


def test_positional_lists_are_traced(caplog: pytest.LogCaptureFixture) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.a, self.b = nn.Embedding(9, 32), nn.Linear(32, 32), nn.Linear(64, 8)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(input_ids)
            return self.b(torch.cat([self.a(x), x], -1))

    net = hfquant.quantize(Net(), [([[1, 2, 3, 4]],)], {"default": {"opt": {"type": "default"}}})
    assert net.b.plan.input_segments == (32, 32)
    assert "pattern detection failed" not in caplog.text
