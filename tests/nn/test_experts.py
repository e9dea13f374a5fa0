"""QuantExperts: stacked solved experts, against each expert's own linear, and against loops in float64."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hfquant import ptq
from hfquant.config import QuantRules, parse
from hfquant.layer_plan import layer_plan
from hfquant.nn.experts import QuantExperts, stacked, tensor_name
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import dequantized, log_share, quant_modules, set_real_quant
from hfquant.solver import solve
from hfquant.statistics import LayerStats
from tests.nn.fused_experts import (
    CHOICES,
    CONFIGS,
    EXPERTS,
    INNER,
    WIDTH,
    Fused,
    Model,
    by_loops,
    matrices,
    one_expert,
    quantized,
    routing,
)


def expert_of(experts: QuantExperts, projection: str, number: int) -> QuantLinear:
    bias = experts._parameters.get(f"{projection}_bias")
    own = None if bias is None else nn.Parameter(bias[number].detach(), requires_grad=False)
    layer = QuantLinear.from_tensors(experts.plans[projection], experts.tensors_of(projection, number), own)
    layer.real_quant = experts.real_quant
    return layer


@pytest.mark.sampled(2)
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_expert_is_what_its_linear_would_be(name: str, real: bool) -> None:
    """Bit for bit, with real and fake quantization, in either layout of the float parameters."""
    model = Model(transposed=name != "weights", bias=True)
    applied = quantized(model, CONFIGS[name])
    experts = model.experts
    assert isinstance(experts, QuantExperts)
    assert set(applied.plan.layers) == {"experts.gate_up_proj", "experts.down_proj"}
    set_real_quant(model, real)
    assert experts.real_quant is real
    x, (index, weights) = torch.randn(31, WIDTH), routing(31)
    linears = {p: [expert_of(experts, p, i) for i in range(EXPERTS)] for p in experts.plans}
    outputs = torch.zeros(31, CHOICES, WIDTH)
    for number in range(EXPERTS):
        token, choice = torch.where(index == number)
        if len(token):
            gate, up = linears["gate_up_proj"][number](x[token]).chunk(2, -1)
            outputs[token, choice] = linears["down_proj"][number](F.silu(gate) * up)
    expected = (outputs * weights[..., None]).sum(1)
    assert torch.equal(experts(x, index, weights), expected)


def test_codes_times_scales() -> None:
    """Weight-only INT8, decoded by hand in float64: equal to loops over tokens up to float32's summation error."""
    model = Model(bias=True)
    before = matrices(model.experts, False)
    quantized(model, CONFIGS["weights"])
    experts = model.experts
    decoded = dict(before)
    for name in ("gate_up_proj", "down_proj"):
        codes, scale = experts.get_parameter(name), experts.get_buffer(f"{name}_scale")
        assert codes.dtype == torch.int8
        assert codes.shape == before[name].shape
        decoded[name] = codes.double() * scale.double()
        # Weights are within half a step of the float ones, and scales just reach the largest.
        assert ((decoded[name] - before[name]).abs() <= scale.double() * (0.5 + 1e-5)).all()
        torch.testing.assert_close(scale[..., 0].double(), before[name].abs().amax(-1) / 127, rtol=1e-6, atol=0)
    x, (index, weights) = torch.randn(19, WIDTH), routing(19)
    expected = by_loops(decoded, x.double(), index, weights.double())
    torch.testing.assert_close(experts(x, index, weights).double(), expected, rtol=1e-5, atol=1e-5)


def test_only_chosen_experts_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    quantized(model, CONFIGS["dynamic"])
    ran = []
    project = QuantExperts.project
    monkeypatch.setattr(
        QuantExperts, "project", lambda self, p, e, rows: ran.append((p, e, len(rows))) or project(self, p, e, rows)
    )
    model.experts(torch.randn(3, WIDTH), torch.tensor([[1, 3], [3, 1], [3, 0]]), torch.ones(3, 2))
    assert [r for r in ran if r[0] == "down_proj"] == [("down_proj", 0, 1), ("down_proj", 1, 2), ("down_proj", 3, 3)]


@pytest.mark.parametrize("name", ["static, smooth", "low rank", "groups, zero points, gptq"])
def test_an_expert_without_rows_is_rounded_to_nearest(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its transform is neutral, its static scale clips nothing that the others keep, and one line names it."""
    model = Model()
    float_weights = matrices(model.experts, False)
    applied = quantized(model, CONFIGS[name])
    few = EXPERTS - 1
    lines = [r.message for r in caplog.records if "fewer than" in r.message]
    assert lines == [
        "experts that saw fewer than 32 rows are rounded to nearest: "
        f"experts.gate_up_proj [{few}]; experts.down_proj [{few}]"
    ]
    for projection, plan in model.experts.plans.items():
        assert plan.rounded == (few,)
        tensors = model.experts.tensors_of(projection, few)
        assert set(tensors) == set(plan.tensors())
        assert (tensors["smooth"] == 1).all()
        assert not any(tensors[key].any() for key in tensors.keys() & {"svd_down", "svd_up"})
        layer = expert_of(model.experts, projection, few)
        step = layer.grid().scale.repeat_interleave(torch.tensor(plan.columns), 1)
        weight = float_weights[projection][few].float()
        slack = step if not plan.config.weight_quant.symmetric else step * 0.501
        assert ((layer.effective_weight() - weight).abs() <= slack).all()
        if plan.static_input:
            others = [model.experts.tensors_of(projection, i) for i in range(few)]
            reach = [(t["input_scale"] * t["smooth"].view(len(plan.row_groups), -1).amax(1)).tolist() for t in others]
            expected = [max(values) for values in zip(*reach, strict=True)]
            assert tensors["input_scale"].tolist() == pytest.approx(expected, rel=1e-6)
    by_name = {report.name: report for report in applied.report.layers}
    assert by_name[f"experts.down_proj.{few}"].fallback
    assert by_name["experts.down_proj.0"].sqnr > 10


@pytest.mark.parametrize("calib", ["amax", "gptq"])
def test_an_expert_without_rows_is_rotated_like_the_others(calib: str) -> None:
    """All experts share one plan, so the inputs of each are rotated."""
    model = Model()
    float_weights = matrices(model.experts, False)
    opt = {"type": "smooth_hadamard", "block_size": 4}
    quantized(model, {**CONFIGS["dynamic"], "opt": opt, "calib": {"type": calib}})
    few = EXPERTS - 1
    x = torch.randn(7, WIDTH)
    expected = by_loops(float_weights, x.double(), torch.full((7, 1), few), torch.ones(7, 1).double())
    found = model.experts(x, torch.full((7, 1), few), torch.ones(7, 1)).double()
    assert (found - expected).norm() < 0.03 * expected.norm()
    for projection, plan in model.experts.plans.items():
        assert plan.rounded == (few,)
        for number in range(EXPERTS):
            weight = float_weights[projection][number].double()
            kept = expert_of(model.experts, projection, number).effective_weight().double()
            assert (kept - weight).norm() < 0.02 * weight.norm()


def test_thirty_two_rows_are_enough() -> None:
    """Rows are counted by the model's own routing; the error is reported even for fewer rows."""
    torch.manual_seed(5)
    model, batches = Model(), [torch.randn(1, 31, WIDTH), torch.randn(1, 31, WIDTH)]
    rows = model.first(torch.cat(batches)).view(-1, WIDTH)
    chosen = (rows @ model.router.T)[:, : EXPERTS - 1].topk(CHOICES).indices
    counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
    few = [i for i in range(EXPERTS) if counts[i] < 32]
    assert 1 < len(few) < EXPERTS
    rules = QuantRules({"default": CONFIGS["static, smooth"], "first": {"enable": False}})
    applied = ptq.quantize(model, batches, rules, facts=model.facts)
    assert [list(plan.rounded) for plan in model.experts.plans.values()] == [few, few]
    reports = {report.name: report for report in applied.report.layers}
    for i in range(EXPERTS):
        report = reports[f"experts.gate_up_proj.{i}"]
        assert report.fallback == (i in few)
        assert (report.sqnr is None) == (counts[i] == 0)


def test_two_scales_in_one_expert_are_two_in_all() -> None:
    """The data decides on DualScale per expert, but a stack has one plan: experts with one scale store it twice."""
    generator = torch.Generator().manual_seed(0)
    rows = [F.silu(torch.randn(64, INNER, generator=generator) * 3), torch.randn(64, INNER, generator=generator)]
    config = parse({"default": {"opt": {"type": "default"}}}).default
    linear = nn.Linear(INNER, WIDTH)
    plan = replace(layer_plan("x", linear, config), dual=(True,))
    layers = []
    for x in rows:
        stats = LayerStats.of(x, torch.rand(64, dtype=torch.float64, generator=generator))
        solution = solve("x", linear.weight.detach(), plan, stats)
        layers.append(QuantLinear.from_tensors(solution.plan, solution.tensors, None))
    assert [layer.plan.dual for layer in layers] == [(True,), (False,)]
    joint, tensors = stacked(layers, ())
    assert joint.dual == (True,)
    assert torch.equal(tensors["input_scale"][1], tensors["input_scale_neg"][1])
    for i, layer in enumerate(layers):
        alike = QuantLinear.from_tensors(joint, {k: v[i] for k, v in tensors.items()}, None)
        torch.testing.assert_close(alike(rows[i]), layer(rows[i]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_back_to_floats(transposed: bool) -> None:
    """Restores the original class, the shapes and layout of its parameters, and the values of the codes."""
    model = Model(transposed, bias=True)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    before = matrices(model.experts, transposed)
    quantized(model, CONFIGS["static, smooth"])
    quantized_experts = model.experts
    dequantized(model, torch.float32)
    assert type(model.experts) is Fused
    assert model.experts.note == "kept"
    assert vars(model.experts).keys() == vars(Fused(transposed, bias=True)).keys()
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert all(p.requires_grad and p.is_contiguous() for p in model.experts.parameters())
    after = matrices(model.experts, transposed)
    for name in ("gate_up_proj", "down_proj"):
        signal = before[name].square().sum((1, 2))
        assert (10 * (signal / (after[name] - before[name]).square().sum((1, 2))).log10() > 30).all()
        linear = expert_of(quantized_experts, name, 2)
        torch.testing.assert_close(linear.effective_weight().double(), after[name][2], rtol=0, atol=0)


def test_a_projection_alone() -> None:
    """A disabled projection stays a float parameter and runs as one."""
    model = Model(transposed=True, bias=True)
    down = model.experts.down_proj
    rules = QuantRules({"default": CONFIGS["weights"], "*.down_proj*": {"enable": False}})
    applied = ptq.quantize(model, None, rules, facts=model.facts)
    assert set(applied.plan.layers) == {"first", "experts.gate_up_proj"}
    assert applied.plan.skipped == {"experts.down_proj": "enable=False"}
    assert model.experts.down_proj is down
    x, (index, weights) = torch.randn(9, WIDTH), routing(9)
    decoded = matrices(dequantized(copy.deepcopy(model), torch.float32).experts, True)
    expected = by_loops(decoded, x.double(), index, weights.double())
    torch.testing.assert_close(model.experts(x, index, weights).double(), expected, rtol=1e-5, atol=1e-5)
    applied.undo(model)
    assert type(model.experts) is Fused
    nothing = QuantRules({"default": CONFIGS["weights"], "experts.*": {"enable": False}})
    ptq.quantize(model, None, nothing, facts=model.facts)
    assert type(model.experts) is Fused


def test_gradients_reach_the_input() -> None:
    """The gradients are those of the dequantized weights, with respect to the tokens and the router's weights."""
    model = Model(bias=True)
    quantized(model, CONFIGS["weights"])
    float_model = dequantized(copy.deepcopy(model), torch.float32)
    w = matrices(float_model.experts, False)
    x, (index, weights) = torch.randn(8, WIDTH), routing(8)
    ours = x.clone().requires_grad_(), weights.clone().requires_grad_()
    model.experts(ours[0], index, ours[1]).square().sum().backward()
    exact = x.double().requires_grad_(), weights.double().requires_grad_()
    rows = []
    for t in range(8):
        parts = [exact[1][t, c] * one_expert(w, int(index[t, c]), exact[0][t]) for c in range(CHOICES)]
        rows.append(sum(parts))
    torch.stack(rows).square().sum().backward()
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_tensors_by_name_and_dtype() -> None:
    """Few stacked tensors, named after the float parameters; any cast keeps codes' and scales' dtypes; copies run."""
    model = Model(bias=True)
    quantized(model, CONFIGS["low rank"])
    experts = model.experts
    names = {f"{p}{suffix}" for p in ("gate_up_proj", "down_proj") for suffix in ("", "_bias", "_smooth", "_scale")}
    names |= {f"{p}_{t}" for p in ("gate_up_proj", "down_proj") for t in ("scale_row", "svd_up", "svd_down")}
    names |= {f"{p}_input_scale" for p in ("gate_up_proj", "down_proj")}
    assert {n for n in experts.state_dict() if "neg" not in n} == names
    assert tensor_name("down_proj", "weight_scale") == "down_proj_scale"
    shapes = {name: tuple(tensor.shape) for name, tensor in experts.state_dict().items()}
    assert shapes == {name: spec.shape for name, spec in experts.specs().items()}
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    half = copy.deepcopy(model).to(torch.bfloat16)
    for name, tensor in half.experts.state_dict().items():
        is_model_float = name.endswith(("_bias", "svd_up", "svd_down"))
        assert tensor.dtype == (torch.bfloat16 if is_model_float else before[name].dtype)
        assert is_model_float or torch.equal(tensor, before[name])
    x, (index, weights) = torch.randn(5, WIDTH, dtype=torch.bfloat16), routing(5)
    y = half.experts(x, index, weights.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), experts(x.float(), index, weights), rtol=0.05, atol=0.1)
    assert not any(p.requires_grad for p in experts.parameters())
    assert "Fused, experts=5" in repr(experts)


def test_codes_go_to_disk_and_back() -> None:
    """Codes are stored with rank 4, which no float parameter of experts accepts."""
    model = Model()
    quantized(model, CONFIGS["fp8"])
    experts = model.experts
    x, (index, weights) = torch.randn(6, WIDTH), routing(6)
    expected = experts(x, index, weights)
    stored = experts.codes_on_disk("down_proj")
    assert stored.shape == (1, EXPERTS, WIDTH, INNER)
    assert stored.dtype == torch.uint8
    assert experts.specs(on_disk=True)["down_proj"] == (tuple(stored.shape), torch.uint8)
    experts.down_proj = nn.Parameter(stored, requires_grad=False)
    assert torch.equal(experts(x, index, weights), expected)
    assert torch.equal(experts.codes_on_disk("down_proj"), stored)
    experts.set_tensor("down_proj", stored)
    assert experts.down_proj.dtype == torch.int8
    assert torch.equal(experts(x, index, weights), expected)


def test_bad_tensors_are_refused() -> None:
    model = Model()
    quantized(model, CONFIGS["dynamic"])
    with pytest.raises(ValueError, match="QuantExperts has no tensor 'smooth'; available: gate_up_proj, "):
        model.experts.set_tensor("smooth", torch.ones(1))
    with pytest.raises(
        ValueError, match=r"tensor 'down_proj': expected shape \(5, 12, 7\) of torch.int8, got \(12, 7\)"
    ):
        model.experts.set_tensor("down_proj", torch.zeros(12, 7, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"tensor 'down_proj_scale': .* got .* of torch.float64"):
        model.experts.set_tensor("down_proj_scale", torch.ones(5, 12, 1).double())


def test_share_of_quantized_parameters(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    quantized(model, CONFIGS["weights"])
    with caplog.at_level("INFO"):
        log_share(model)
    share = 100 * 3 * INNER * WIDTH * EXPERTS / (3 * INNER * WIDTH * EXPERTS + WIDTH**2 + EXPERTS * WIDTH)
    assert f"10 layers quantized, {share:.0f} % of the parameters in matrices" in caplog.text
    assert list(quant_modules(model)) == ["experts"]
