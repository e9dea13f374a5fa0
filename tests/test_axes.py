"""The extension points: a number format, a transform, a rounding and a kind of layer, each registered in one line.

Each quantizes a plain module, a Llama and a denoiser, is saved and loaded, and runs on codes. They are defined in this
file, and nothing in hfquant knows about them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from diffusers import DiTTransformer2DModel
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

import hfquant
from hfquant.algorithms import ROUNDINGS, TRANSFORMS, Problem, Rounding, TensorSpec, Transform, Transformed
from hfquant.config import ConfigError, parse
from hfquant.formats import FORMATS, Grid, GridRule, NumberFormat
from hfquant.formats.integer import IntegerFormat
from hfquant.nn.kinds import KINDS
from hfquant.nn.layer import QuantLayer
from hfquant.nn.modules import quant_layers
from hfquant.statistics import STATISTICS, LayerStats, Reduction, Statistic

# A format with few bits takes one line.
FIVE = IntegerFormat("five", 5, torch.int8)


@dataclass(frozen=True)
class Powers(NumberFormat):
    """0 and signed powers of two from 2^-6 to 1. The code is sign (e + 7), one per byte, stored unpacked."""

    @property
    def qmax(self) -> float:
        return 1.0

    def _steps(self, x: Tensor) -> Tensor:
        exponent = torch.log2(x.abs()).round().clamp(-7, 0)  # -7 represents 0
        return torch.where(exponent > -7, x.sign() * (exponent + 7), torch.zeros_like(x))

    def quantize(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
        assert scale is not None
        return self._steps(x.float() / scale).to(self.code_dtype)

    def values(self, codes: Tensor, zero_point: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = codes.to(dtype)
        return codes.sign() * torch.exp2(codes.abs() - 7)

    def snap(self, x: Tensor) -> Tensor:
        return self.values(self._steps(x))

    def round(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
        assert scale is not None
        return self.snap(x.float() / scale) * scale


POWERS = Powers("powers", 8, torch.int8)


class Shuffle(Transform):
    """Permute the input channels randomly; store the order as one integer tensor."""

    type: Literal["shuffle"] = "shuffle"
    seed: int = Field(0, ge=0)

    def tensors(self, in_features: int, rows: Sequence[int]) -> dict[str, TensorSpec]:
        return {"order": TensorSpec((in_features,), torch.int64)}

    def solve(self, weight: Tensor, problem: Problem) -> Transformed:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(self.seed))
        return Transformed(weight[:, order], {"order": order})

    def input(self, x: Tensor, tensors: Mapping[str, Tensor | None], group: int) -> Tensor:
        order = tensors["order"]
        assert order is not None
        return x[..., order]

    def restored(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        order = tensors["order"]
        assert order is not None
        return weight[:, order.argsort()]

    def reapplied(self, weight: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor:
        order = tensors["order"]
        assert order is not None
        return weight[:, order]

    def describe(self) -> str:
        return f"seed={self.seed}"


class Centred(Transform):
    """Subtract the inputs' mean from the input and add its effect to the output, solved from a statistic."""

    needs: ClassVar[frozenset[str]] = frozenset({"total"})
    needs_data: ClassVar[bool] = True
    type: Literal["centred"] = "centred"

    def tensors(self, in_features: int, rows: Sequence[int]) -> dict[str, TensorSpec]:
        return {"mean": TensorSpec((in_features,), torch.float32), "shift": TensorSpec((sum(rows),), None)}

    def solve(self, weight: Tensor, problem: Problem) -> Transformed:
        stats = problem.stats
        assert stats is not None
        mean = stats.sums["total"] / stats.count
        return Transformed(weight, {"mean": mean, "shift": (weight @ mean).to(problem.dtype)})

    def input(self, x: Tensor, tensors: Mapping[str, Tensor | None], group: int) -> Tensor:
        mean = tensors["mean"]
        assert mean is not None
        return x - mean

    def output(self, x: Tensor, tensors: Mapping[str, Tensor | None], rows: Sequence[int]) -> Tensor | None:
        shift = tensors["shift"]
        assert shift is not None
        return shift.float().expand(*x.shape[:-1], sum(rows))


class HalfUp(Rounding):
    """Round halves up, or, with an even number of ``dice``, randomly."""

    needs_scale: ClassVar[bool] = True
    type: Literal["half_up"] = "half_up"
    dice: int = Field(1, ge=1)

    def cost(self, in_features: int, out_features: int) -> float:
        return float(in_features * out_features)

    def solve(self, weight: Tensor, rule: GridRule, stats: LayerStats | None, name: str) -> tuple[Tensor, Grid]:
        grid = rule.fit(weight)
        half = 0.5 if self.dice % 2 else torch.rand(weight.shape, generator=torch.Generator().manual_seed(self.dice))
        assert grid.scale is not None
        steps = weight / grid.scale.repeat_interleave(torch.tensor(rule.columns), 1)
        codes = torch.floor(steps + half).clamp(-rule.format.qmax, rule.format.qmax)
        return codes.to(rule.format.code_dtype), grid


DYNAMIC = {"type": "int8", "dynamic": True, "axis": -1}
PLAIN = {"opt": {"type": "default"}, "input_quant": None, "weight_quant": {"type": "int8", "group_size": 10}}
#: What is added to which table, and the config fields that use it.
AXES: dict[str, tuple[dict[str, Any], str, Any, dict[str, Any]]] = {
    "format": (FORMATS, "five", FIVE, {"weight_quant": {"type": "five", "group_size": 10}}),
    "asymmetric format": (
        FORMATS, "five", FIVE, {"weight_quant": {"type": "five", "group_size": 10, "symmetric": False, "clip": "mse"}},
    ),
    "format of inputs": (
        FORMATS, "five", FIVE, {"weight_quant": {"type": "five", "axis": -1}, "input_quant": {"type": "five"}},
    ),
    "format of one's own": (
        FORMATS, "powers", POWERS,
        {"weight_quant": {"type": "powers", "axis": -1}, "input_quant": {**DYNAMIC, "type": "powers"}},
    ),
    "format, smoothed": (
        FORMATS, "five", FIVE,
        {"weight_quant": {"type": "five"}, "opt": {"type": "svd", "low_rank": 2}, "calib": {"type": "gptq"}},
    ),
    "transform": (TRANSFORMS, "shuffle", Shuffle, {"opt": {"type": "shuffle", "seed": 3}, "input_quant": DYNAMIC}),
    "transform with data": (TRANSFORMS, "centred", Centred, {"opt": {"type": "centred"}, "input_quant": DYNAMIC}),
    "rounding": (ROUNDINGS, "half_up", HalfUp, {"calib": {"type": "half_up"}}),
    "rounding by chance": (
        ROUNDINGS, "half_up", HalfUp, {"calib": {"type": "half_up", "dice": 2}, "weight_quant": {"type": "int4"}},
    ),
}  # fmt: skip


MADE_UP = {name for _, name, _, _ in AXES.values()}


@pytest.fixture(params=AXES)
def config(request: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    table, name, entry, fields = AXES[request.param]
    monkeypatch.setitem(table, name, entry)
    monkeypatch.setitem(STATISTICS, "total", Statistic(lambda n: (n,), Reduction.SUM, lambda rows: rows.x.sum(0)))
    return {"default": {**PLAIN, **fields}}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return x + self.down(torch.cat([nn.functional.silu(gate), value], -1))


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 64, (3, 9))}


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(v, theirs[k]) and v.dtype == theirs[k].dtype for k, v in ours.items()
    )


def check_layers(model: nn.Module, count: int, run: Callable[[], Tensor], exact: Tensor) -> Tensor:
    """Check that all layers are quantized, close to the originals, and run on codes as on floats."""
    layers = quant_layers(model)
    assert len(layers) == count
    for layer in layers.values():
        chosen = layer.plan.config
        assert {chosen.weight_quant.type, chosen.opt.type, chosen.calib.type} & MADE_UP
        if chosen.weight_quant.type == "five":
            assert layer.weight.nbytes == layer.out_features * -(-layer.in_features * 5 // 8)
    output = run()
    assert 0 < (output - exact).norm() < 0.4 * exact.norm()
    hfquant.set_real_quant(model)
    torch.testing.assert_close(run(), output, rtol=1e-4, atol=1e-4)
    hfquant.set_real_quant(model, False)
    assert torch.equal(run(), output)
    return output


@pytest.mark.sampled(3)
@torch.no_grad()
@pytest.mark.parametrize("per_layer_mode", [False, True])
def test_a_plain_module(config: dict[str, Any], per_layer_mode: bool) -> None:
    model, x = nn.Sequential(Block(), Block()), torch.randn(4, 7, 24)
    exact = model(x)
    twin = nn.Sequential(Block(), Block())
    twin.load_state_dict(model.state_dict())
    data = [torch.randn(4, 7, 24), x]
    hfquant.quantize(model, data, config, per_layer_mode)
    check_layers(model, 4, lambda: model(x), exact)
    # Quantizing is deterministic, so a second run gives the same.
    hfquant.quantize(twin, data, config, per_layer_mode)
    assert same(model, twin)
    hfquant.dequantize(model)
    assert type(model[0].up) is nn.Linear
    assert (model(x) - exact).norm() < 0.4 * exact.norm()


@pytest.mark.sampled(3)
@torch.no_grad()
def test_a_plain_module_is_resumed(config: dict[str, Any], tmp_path: Path) -> None:
    model, twin, data = nn.Sequential(Block()), nn.Sequential(Block()), [torch.randn(4, 24)]
    twin.load_state_dict(model.state_dict())
    hfquant.quantize(model, data, config, resume_dir=tmp_path)
    hfquant.quantize(twin, data, config, resume_dir=tmp_path)
    assert same(model, twin)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.sampled(3)
@torch.no_grad()
def test_a_llama_saved_and_loaded(config: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = llama(), ids()
    exact = model(**inputs).logits
    hfquant.quantize(model, [ids(), inputs], config)
    output = check_layers(model, 14, lambda: model(**inputs).logits, exact)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert parse(stored["config"]).raw == parse(config).raw
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(model, loaded)
    assert torch.equal(loaded(**inputs).logits, output)
    hfquant.set_real_quant(loaded)
    torch.testing.assert_close(loaded(**inputs).logits, output, rtol=1e-4, atol=1e-4)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.sampled(3)
@torch.no_grad()
def test_a_denoiser_saved_and_loaded(config: dict[str, Any], tmp_path: Path) -> None:
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=2, num_layers=1, sample_size=4, patch_size=2,
        num_embeds_ada_norm=5, norm_num_groups=2,
    ).eval()  # fmt: skip
    batch = {"hidden_states": torch.randn(2, 2, 4, 4), "timestep": torch.tensor([3, 5])}
    batch["class_labels"] = torch.tensor([1, 2])
    hfquant.quantize(model, [batch], config)
    assert len(quant_layers(model)) > 5
    model.save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert same(model, loaded)
    assert torch.equal(loaded(**batch).sample, model(**batch).sample)


@pytest.mark.sampled(3)
@torch.no_grad()
def test_a_llama_quantized_while_loading(config: dict[str, Any], tmp_path: Path) -> None:
    """Its tensors equal those of a model quantized in memory."""
    model, inputs = llama(), ids()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=hfquant.HfQuantConfig(config, calibration=[inputs])
    )
    hfquant.quantize(model, [inputs], config)
    assert same(model, loaded)


@pytest.mark.sampled(3)
def test_a_checkpoint_of_unknown_names_says_so(config: dict[str, Any], tmp_path: Path) -> None:
    hfquant.quantize(llama(), [ids()], config).save_pretrained(tmp_path)
    for table in (FORMATS, TRANSFORMS, ROUNDINGS):
        for name in MADE_UP & table.keys():
            del table[name]
    with pytest.raises(ConfigError, match="|".join(MADE_UP)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_names_and_options_are_checked_like_hfquant_s_own(config: dict[str, Any]) -> None:
    """Errors list the names in a table; options are validated by the class that declares them."""
    for section, table in (("opt", TRANSFORMS), ("calib", ROUNDINGS), ("weight_quant", FORMATS)):
        with pytest.raises(ConfigError) as error:
            parse({"default": {**config["default"], section: {"type": "nothing"}}})
        assert all(name in str(error.value) for name in table)
    if "shuffle" in TRANSFORMS:
        with pytest.raises(ConfigError, match=r"opt.seed.*got -1"):
            parse({"default": {"opt": {"type": "shuffle", "seed": -1}}})
        # A glob may name an option without the type, and overrides only that option.
        rules = parse({**config, "*.down": {"opt": {"seed": 7}}})
        assert (rules.resolve("a.up").opt.seed, rules.resolve("a.down").opt.seed) == (3, 7)
        assert isinstance(rules.resolve("a.down").opt, Shuffle)
    if "half_up" in ROUNDINGS:
        with pytest.raises(ConfigError, match=r'calib.type "half_up" needs a weight_quant.type with a scale, not fp16'):
            parse({"default": {"calib": {"type": "half_up"}, "weight_quant": {"type": "fp16"}}})


class Channels(nn.Module):
    """A linear on dimension 1 that stores its weight as [in, out] and multiplies its output by a constant."""

    def __init__(self, inputs: int, outputs: int, gain: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x.movedim(1, -1) @ self.weight + self.bias).movedim(-1, 1)


class QuantChannels(QuantLayer):
    """The quantized counterpart of ``Channels``."""

    gain: float

    @staticmethod
    def takes(module: nn.Module) -> bool:
        return isinstance(module, Channels)

    @staticmethod
    def refuses(module: nn.Module) -> str:
        return "" if isinstance(module, Channels) and module.gain else "all of it is zero"

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight.T

    @staticmethod
    def float_weight(matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.T

    @staticmethod
    def rows(module: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, None]:
        return x.movedim(1, -1), None

    def forward(self, x: Tensor) -> Tensor:
        gain: Any = self._float.gain
        return gain * self.multiply(x.movedim(1, -1)).movedim(-1, 1)

    # What the guard needs from a kind whose rows do not lie along the last dimension.

    def float_output(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        gain: Any = self._float.gain
        return gain * super().float_output(x.movedim(1, -1), matrix, bias).movedim(-1, 1)

    def output_rows(self, y: Tensor) -> Tensor:
        gain: Any = self._float.gain
        return super().output_rows(y.movedim(1, -1) / gain)

    def input_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return super().input_rows(x.movedim(1, -1), index)


class ChannelsConfig(PretrainedConfig):
    model_type = "channels"


class ChannelsModel(PreTrainedModel):
    config_class = ChannelsConfig

    def __init__(self, config: ChannelsConfig) -> None:
        super().__init__(config)
        self.first, self.second, self.idle = Channels(20, 24, 2.0), Channels(24, 12, -1.0), Channels(20, 20, 0.0)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) + self.idle(x).sum()


KIND_CONFIGS: dict[str, dict[str, Any]] = {
    "w8a8": {"opt": {"type": "smooth"}, "input_quant": {"type": "int8"}, "weight_quant": {"type": "int8", "axis": -1}},
    "w4": {"opt": {"type": "default"}, "input_quant": None, "weight_quant": {"type": "int4", "group_size": 8}},
    "gptq, low rank": {
        "opt": {"type": "svd", "low_rank": 2}, "calib": {"type": "gptq"}, "input_quant": DYNAMIC,
        "weight_quant": {"type": "int4", "axis": -1},
    },
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("fields", KIND_CONFIGS.values(), ids=KIND_CONFIGS)
def test_a_kind_of_layer(fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned, calibrated on its own rows, saved, loaded, quantized while loading, and restored in float."""
    monkeypatch.setattr("hfquant.nn.kinds.KINDS", [*KINDS, QuantChannels])
    config = {"default": fields}
    torch.manual_seed(0)
    model, x = ChannelsModel(ChannelsConfig()).eval(), torch.randn(3, 20, 7)
    float_state = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "float")
    exact = model(x)
    found = hfquant.plan(model, config, {"x": x})
    assert {n: (p.in_features, p.out_features) for n, p in found.layers.items()} == {
        "first": (20, 24), "second": (24, 12),
    }  # fmt: skip
    assert found.skipped == {"idle": "all of it is zero"}
    hfquant.quantize(model, [{"x": x}], config, resume_dir=tmp_path / "resume")
    assert [type(m) for m in (model.first, model.second, model.idle)] == [QuantChannels, QuantChannels, Channels]
    output = model(x)
    assert 0 < (output - exact).norm() < 0.3 * exact.norm()
    hfquant.set_real_quant(model)
    torch.testing.assert_close(model(x), output, rtol=1e-3, atol=1e-3)
    hfquant.set_real_quant(model, False)

    model.save_pretrained(tmp_path / "quantized")
    loaded = ChannelsModel.from_pretrained(tmp_path / "quantized").eval()
    assert same(model, loaded)
    assert torch.equal(loaded(x), output)
    with pytest.raises(RuntimeError):
        # The float module cannot load the codes.
        Channels(20, 24, 2.0).load_state_dict({"weight": model.first.codes_on_disk(), "bias": model.first.bias})
    streamed = ChannelsModel.from_pretrained(
        tmp_path / "float", quantization_config=hfquant.HfQuantConfig(config, calibration=[{"x": x}])
    )
    assert same(model, streamed)

    hfquant.dequantize(loaded)
    assert type(loaded.first) is Channels
    assert loaded.first.gain == 2.0
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in float_state.items()}
    error = (loaded.first.weight - float_state["first.weight"]).norm() / float_state["first.weight"].norm()
    assert 0 < error < 0.2


def test_the_tables_are_as_they_were() -> None:
    """Tests remove what they add, or a name would be known by accident."""
    assert "five" not in FORMATS
    assert "powers" not in FORMATS
    assert TRANSFORMS.keys() == {"default", "smooth", "svd", "hadamard", "smooth_hadamard"}
    assert ROUNDINGS.keys() == {"amax", "gptq"}
    assert QuantChannels not in KINDS
