"""Folding smoothing divisors into preceding modules: same function, no division left, and it can be undone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import hfquant
from hfquant import ptq
from hfquant.config import parse
from hfquant.folding import Folding, _effective, find_folding
from hfquant.integrations import model_facts
from hfquant.layer_plan import layer_plan
from hfquant.nn.modules import quant_layers
from hfquant.observe import observe
from hfquant.planner import plan_layers
from hfquant.replacing import replace_modules
from hfquant.run import Settings
from tests.integrations.tiny_transformers import GQA, T5, TEXT

SEARCH = {"search_alpha_config": {"enable": True, "min": 0.2, "max": 0.6, "step": 0.2}}
DYNAMIC = {"type": "int8", "axis": -1, "dynamic": True}


def config(**opt: Any) -> dict[str, Any]:
    default = {"opt": {"type": "smooth", "fold": True, **opt}, "weight_quant": {"type": "int8", "axis": -1}}
    return {"default": {**default, "input_quant": DYNAMIC}}


class Block(nn.Module):
    """A gated MLP after a LayerNorm, and a ReLU MLP after an RMSNorm."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, 20), nn.Linear(width, 20), nn.Linear(20, width)
        self.one, self.two = nn.Linear(width, 10), nn.Linear(10, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return x + self.two(F.relu(self.one(self.norm2(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.blocks = nn.Linear(8, 12), nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return x


def scatter(model: nn.Module) -> nn.Module:
    """Give every gain and bias random values other than 1 or 0, and some channels large inputs."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.copy_(torch.exp(torch.randn(p.shape, generator=generator)))
                p[0] = 30.0
    return model.eval()


def tokens(*names: str, count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{n: torch.randint(3, 50, (2, 9), generator=generator) for n in names} for _ in range(count)]


def opt() -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 20, "num_attention_heads": 2}
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=32)
    )


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 4}
    return DiTTransformer2DModel(**sizes, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=2)


def pictures() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    fixed = {"timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}
    return [{"hidden_states": torch.randn(2, 4, 4, 4, generator=generator), **fixed} for _ in range(3)]


#: model -> its builder, its data, and the folded layers, by the last part of their names.
CASES: dict[str, tuple[Any, Any, set[str]]] = {
    "plain": (Net, lambda: [torch.randn(4, 5, 8) for _ in range(3)], {"gate", "up", "down", "one", "two"}),
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GQA)),
        lambda: tokens("input_ids"),
        {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "opt": (opt, lambda: tokens("input_ids"), {"q_proj", "k_proj", "v_proj", "fc1", "fc2"}),
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**TEXT)), lambda: tokens("input_ids"), {"dense"}),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        lambda: tokens("input_ids", "decoder_input_ids"),
        {"q", "k", "v", "o", "wi"},  # wo stays in float32
    ),
    "dit": (dit, pictures, {"0"}),
    "phi3": (
        lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**GQA)),
        lambda: tokens("input_ids"),
        {"qkv_proj", "gate_up_proj", "down_proj"},
    ),
    "gemma2": (
        lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GQA)),
        lambda: tokens("input_ids"),
        {"down_proj"},
    ),
}


def case(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(3)
    build, data, _ = CASES[name]

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    batches = [{k: cast(t) for k, t in d.items()} if isinstance(d, dict) else cast(d) for d in data()]
    return scatter(build()).to(dtype), batches


def run(model: nn.Module, sample: Any) -> Tensor:
    with torch.no_grad():
        out = model(**sample) if isinstance(sample, dict) else model(sample)
    return out if isinstance(out, Tensor) else out[0]


def folding_of(model: nn.Module, data: list[Any], rules: dict[str, Any]) -> tuple[Any, Folding]:
    plan = plan_layers(model, parse(rules), example=data[0], facts=model_facts(model))

    def seen(needs: Any) -> Any:
        return observe(model, {n: model.get_submodule(n) for n in needs}, data, needs)

    return plan, find_folding(model, plan, seen, 2**40)


def fold_in_float(model: nn.Module, plan: Any, folding: Folding) -> None:
    """Apply to a float model what folding does to a quantized one."""
    replace_modules(model, {model.get_submodule(n): m for n, m in folding.sources(model, plan).items()})
    for name in plan.layers:
        linear = model.get_submodule(name)
        linear.weight = nn.Parameter(folding.weight(name, linear.weight.detach()))
        linear.bias = folding.bias(name, linear.bias)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
def test_the_float_function_stays(name: str) -> None:
    model, data = case(name, torch.float64)
    before = run(model, data[0])
    plan, folding = folding_of(model, data, config())
    assert {n.rpartition(".")[2] for n in folding.inputs} == CASES[name][2]
    assert all((s != 1).any() for s in folding.inputs.values())
    fold_in_float(model, plan, folding)
    after = run(model, data[0])
    assert (after - before).abs().max() <= 1e-12 * before.abs().max()


def smoothed(model: nn.Module) -> set[str]:
    """Return the last parts of the names of the layers that divide at run time."""
    return {n.rpartition(".")[2] for n, m in quant_layers(model).items() if "smooth" in m._buffers}


def folded(model: nn.Module) -> set[str]:
    return {n for n, m in quant_layers(model).items() if m.plan.folded}


def error(model: nn.Module, reference: nn.Module, data: list[Any]) -> float:
    pairs = [(run(model, d), run(reference, d)) for d in data]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


@pytest.mark.sampled(2)
@pytest.mark.parametrize("per_layer_mode", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_folded_layers_store_no_divisor_and_are_as_good(name: str, per_layer_mode: bool) -> None:
    model, data = case(name)
    plain, reference = copy.deepcopy(model), copy.deepcopy(model)
    hfquant.quantize(plain, data, config(fold=False), per_layer_mode=per_layer_mode)
    hfquant.quantize(model, data, config(), per_layer_mode=per_layer_mode)
    assert smoothed(plain) >= CASES[name][2]
    assert {n.rpartition(".")[2] for n in folded(model)} == CASES[name][2]
    assert all(m.plan.folded != ("smooth" in m._buffers) for m in quant_layers(model).values())
    assert error(model, reference, data) < 1.5 * error(plain, reference, data) < 0.1
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in quant_layers(model).values())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("opt", [{"type": "svd", "low_rank": 2}, {"magnitude": "rms"}, SEARCH])
@pytest.mark.parametrize("per_layer_mode", [False, True])
def test_every_way_of_smoothing_folds(opt: dict[str, Any], per_layer_mode: bool) -> None:
    model, data = case("plain")
    reference = copy.deepcopy(model)
    rules = config(**opt)
    rules["default"] |= {"calib": {"type": "gptq"}, "input_quant": {"type": "int8"}}
    hfquant.quantize(model, data, rules, per_layer_mode=per_layer_mode)
    assert smoothed(model) == {"inp"}
    assert error(model, reference, data) < 0.1


def test_a_branch_sees_the_divided_input() -> None:
    # With full rank nothing is left to round, so the branch alone gives the float layer.
    model, data = case("plain")
    reference = copy.deepcopy(model)
    hfquant.quantize(model, data, config(type="svd", low_rank=20))
    assert error(model, reference, data) < 1e-5
    effective = quant_layers(model)["blocks.1.one"].effective_weight()
    divisor = reference.blocks[1].norm2.weight / model.blocks[1].norm2.weight
    rows = model.blocks[1].one.bias / reference.blocks[1].one.bias
    expected = reference.blocks[1].one.weight * divisor * rows[:, None]
    torch.testing.assert_close(effective, expected, rtol=1e-4, atol=1e-5)


def test_each_divisor_is_that_of_all_readers() -> None:
    model, data = case("plain", torch.float64)
    _, folding = folding_of(model, data, config(alpha=0.3))
    block = model.blocks[0]
    with torch.no_grad():
        x = torch.cat([block.norm(model.inp(d)).flatten(0, 1) for d in data])
        up = block.up.weight / folding.outputs["blocks.0.up"][:, None]
        columns = (block.gate.weight.abs().amax(0) * up.abs().amax(0)).sqrt()
    expected = x.abs().amax(0) ** 0.3 / columns**0.7
    for name in ("gate", "up"):
        torch.testing.assert_close(folding.inputs[f"blocks.0.{name}"], expected, rtol=1e-5, atol=0)


def test_heads_that_share_values_share_their_divisor() -> None:
    model, data = case("llama", torch.float64)
    data = [{**d, "use_cache": False} for d in data]
    before = run(model, data[0])
    plan, folding = folding_of(model, data, config())
    name = "model.layers.0.self_attn"
    assert torch.equal(folding.inputs[f"{name}.o_proj"], folding.outputs[f"{name}.v_proj"].repeat(2))
    fold_in_float(model, plan, folding)
    assert (run(model, data[0]) - before).abs().max() <= 1e-12 * before.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gain_in_half_precision_divides_by_what_it_was_rounded_to(dtype: torch.dtype) -> None:
    model, data = case("llama", dtype)
    plan, folding = folding_of(model, data, config())
    name = "model.layers.0.input_layernorm"
    gain, divisor = folding.sources(model, plan)[name].weight, folding.inputs["model.layers.0.self_attn.q_proj"]
    assert gain.dtype == dtype
    torch.testing.assert_close(gain.double() * divisor, model.get_submodule(name).weight.double(), rtol=1e-15, atol=0)


def test_a_gain_that_would_leave_its_range_stays() -> None:
    gain = torch.tensor([1e-7, 2.0, 0.0, -3.0], dtype=torch.float16)
    divisor = torch.tensor([1e6, 4.0, 5.0, 1e-9], dtype=torch.float64)
    assert _effective(gain, divisor).tolist() == [1.0, 4.0, 5.0, 1.0]


def test_dequantize_keeps_the_function() -> None:
    model, data = case("llama")
    reference = copy.deepcopy(model)
    hfquant.quantize(model, data, config())
    hfquant.dequantize(model)
    assert not quant_layers(model)
    assert error(model, reference, data) < 0.03


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["llama", "opt", "bert", "t5", "dit"])
def test_saved_and_loaded_without_data(name: str, tmp_path: Path) -> None:
    model, data = case(name)
    hfquant.quantize(model, data, config())
    expected = run(model, data[0])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert folded(loaded) == folded(model) != set()
    assert torch.equal(run(loaded, data[0]), expected)


def state(model: nn.Module) -> tuple[dict[str, Tensor], list[int], list[int]]:
    modules = list(model.modules())
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules]
    return {k: v.clone() for k, v in model.state_dict().items()}, [id(m) for m in modules], hooks


def assert_untouched(model: nn.Module, before: Any) -> None:
    after = state(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][k], v) for k, v in before[0].items())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("per_layer_mode", [False, True])
@pytest.mark.parametrize("at", [0, 3, 9, "swapped"])
def test_what_was_begun_is_undone(kind: Any, per_layer_mode: bool, at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = case("plain")
    before, solve, calls = state(model), ptq.solve, []

    def failing(*args: Any) -> Any:
        if len(calls) == at:
            raise kind
        calls.append(1)
        return solve(*args)

    def finish(applied: Any) -> None:
        assert {"blocks.0.norm", "blocks.1.norm2"} <= applied.originals.keys()
        raise kind

    monkeypatch.setattr(ptq, "solve", failing)
    with pytest.raises(kind):
        ptq.quantize(model, data, parse(config()), Settings(per_layer_mode=per_layer_mode), finish=finish)
    assert_untouched(model, before)


def test_a_finished_one_is_undone_whole() -> None:
    model, data = case("plain")
    before = state(model)
    applied = ptq.quantize(model, data, parse(config()))
    assert not torch.equal(model.blocks[0].norm.weight, before[0]["blocks.0.norm.weight"])
    applied.undo(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("per_layer_mode", [False, True])
def test_an_interrupted_run_goes_on(per_layer_mode: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = case("plain")
    whole, solve, solved = copy.deepcopy(model), ptq.solve, []
    hfquant.quantize(whole, data, config(), per_layer_mode=per_layer_mode)

    def failing(name: str, *args: Any) -> Any:
        if len(solved) == 5:
            raise KeyboardInterrupt
        solved.append(name)
        return solve(name, *args)

    monkeypatch.setattr(ptq, "solve", failing)
    with pytest.raises(KeyboardInterrupt):
        hfquant.quantize(model, data, config(), per_layer_mode=per_layer_mode, resume_dir=tmp_path)
    done = set(solved)
    solved.clear()
    monkeypatch.setattr(ptq, "solve", lambda name, *args: solved.append(name) or solve(name, *args))
    hfquant.quantize(model, data, config(), per_layer_mode=per_layer_mode, resume_dir=tmp_path)
    assert len(done) == 5
    assert not done & set(solved)
    for (name, one), two in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_a_memory_budget_takes_more_passes_and_changes_nothing() -> None:
    model, data = case("plain")
    other, passes = copy.deepcopy(model), []
    plan, large = folding_of(model, data, config())

    def seen(needs: Any) -> Any:
        passes.append(list(needs))
        return observe(model, {n: model.get_submodule(n) for n in needs}, data, needs)

    small = find_folding(model, plan, seen, 20_000)
    assert len(passes) > 2
    assert all(torch.equal(small.inputs[n], s) for n, s in large.inputs.items())
    hfquant.quantize(model, data, config())
    hfquant.quantize(other, data, config(), memory_budget=20_000)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("patch", [{"opt": {"alpha": 0.7}}, {"weight_quant": {"type": "int6"}}, {"enable": False}])
def test_readers_that_disagree_keep_their_divisors(patch: dict[str, Any]) -> None:
    model, data = case("plain")
    plan = plan_layers(model, parse({**config(), "*.gate": patch}), example=data[0])
    assert {n.rpartition(".")[2] for n, p in plan.layers.items() if p.folded} == {"down", "one", "two"}


def test_a_linear_that_stays_in_float_can_give() -> None:
    model, data = case("plain")
    reference, rules = copy.deepcopy(model), {**config(), "*.one": {"enable": False}}
    hfquant.quantize(model, data, rules)
    assert type(model.blocks[0].one) is nn.Linear
    assert quant_layers(model)["blocks.0.two"].plan.folded
    assert not torch.equal(model.blocks[0].one.weight, reference.blocks[0].one.weight)
    assert error(model, reference, data) < 0.05
    plan = plan_layers(reference.bfloat16(), parse(rules), example=data[0].bfloat16())
    assert not plan.layers["blocks.0.two"].folded  # its rows would be rounded again


def test_layers_that_never_run_are_left_out() -> None:
    model, data = case("plain")
    model.blocks[1].forward = lambda x: x
    plan = plan_layers(case("plain")[0], parse(config()), example=data[0])
    found = find_folding(
        model, plan, lambda needs: observe(model, {n: model.get_submodule(n) for n in needs}, data, needs), 2**40
    )
    assert found.outputs.keys() == {"blocks.0.norm", "blocks.0.norm2", "blocks.0.up", "blocks.0.one"}


def test_offloaded_models_fold() -> None:
    from accelerate import cpu_offload

    model, data = case("plain")
    reference, loaded = copy.deepcopy(model), copy.deepcopy(model)
    hfquant.quantize(loaded, data, config())
    cpu_offload(model, "cpu")
    hfquant.quantize(model, data, config())
    assert error(model, reference, data) < 0.05
    assert all(torch.equal(run(model, d), run(loaded, d)) for d in data)


def test_a_stored_plan_of_nonsense_is_refused() -> None:
    with pytest.raises(hfquant.ConfigError, match=r"layer 'a': stored plan\.folded: .*valid boolean, got 'yes'"):
        layer_plan("a", nn.Linear(4, 4), parse(config()).default, {"folded": "yes"})
