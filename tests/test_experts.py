"""Fused experts split up for quantization: routed, planned, observed, and restored."""

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from hfquant import ConfigError, ptq
from hfquant.config import QuantRules, parse
from hfquant.experts import UnfusedExperts, route_all, route_sorted, unfused
from hfquant.nn.experts import QuantExperts
from hfquant.planner import plan_layers
from hfquant.run import Settings
from tests.nn.fused_experts import (
    CONFIGS,
    EXPERTS,
    INNER,
    WIDTH,
    Fused,
    Model,
    by_loops,
    data,
    layout,
    matrices,
    one_expert,
    quantized,
    routing,
)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_tokens_go_to_their_experts(transposed: bool, bias: bool) -> None:
    """Expert numbers past the last one select none, as for experts owned by another process."""
    original = Fused(transposed, bias).double()
    experts = UnfusedExperts(original, layout(transposed))
    x, (index, weights) = torch.randn(23, WIDTH).double(), routing(23, EXPERTS + 2)
    expected = by_loops(matrices(original, transposed), x, index, weights.double())
    torch.testing.assert_close(experts(x, index, weights.double()), expected, rtol=1e-12, atol=1e-12)
    assert experts(x[:0], index[:0], weights[:0].double()).shape == (0, WIDTH)
    nowhere = torch.full_like(index, EXPERTS)
    assert experts(x, nowhere, weights.double()).count_nonzero() == 0


def test_sorted_rows() -> None:
    """Rows past the last count are padding and give zeros."""
    original = Fused().double()
    experts = UnfusedExperts(original, layout(route=route_sorted))
    x, counts, w = torch.randn(11, WIDTH).double(), [3, 0, 4, 0, 2], matrices(original, False)
    owners = [e for e, n in enumerate(counts) for _ in range(n)]
    expected = torch.stack([one_expert(w, e, row) for e, row in zip(owners, x, strict=False)] + [0 * x[0]] * 2)
    torch.testing.assert_close(experts(x, torch.tensor(counts)), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(experts(x, counts), experts(x, torch.tensor(counts)))


def test_all_rows_but_zeros() -> None:
    """Rows that a router multiplied by zero reach no expert and give zeros."""
    original = Fused(transposed=True).double()
    experts = UnfusedExperts(original, layout(True, route_all))
    x = torch.randn(EXPERTS, 6, WIDTH).double() * (torch.rand(EXPERTS, 6, 1) < 0.4)
    seen = []
    for linear in experts.get_submodule("gate_up_proj").children():
        linear.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    w = matrices(original, True)
    expected = torch.stack([one_expert(w, e, row) for e in range(EXPERTS) for row in x[e]])
    torch.testing.assert_close(experts(x.view(-1, WIDTH)), expected, rtol=1e-12, atol=1e-12)
    assert sum(len(rows) for rows in seen) == (x != 0).any(-1).sum()


def test_taken_apart_without_a_copy() -> None:
    model = Model(bias=True)
    original = model.experts
    with unfused(model, model.facts.experts) as experts:
        apart = model.experts
        assert isinstance(apart, UnfusedExperts)
        assert apart.note == "kept"
        assert apart.act is original.act
        for i, linear in enumerate(apart.get_submodule("down_proj").children()):
            assert type(linear) is nn.Linear
            assert (linear.in_features, linear.out_features) == (INNER, WIDTH)
            assert linear.weight.data_ptr() == original.down_proj[i].data_ptr()
            assert linear.bias.data_ptr() == original.down_proj_bias[i].data_ptr()
        assert experts.parameters["experts.down_proj.4"] == "experts.down_proj"
        assert dict(model.named_modules())["experts.gate_up_proj.3"].weight.shape == (2 * INNER, WIDTH)
    assert model.experts is original


def test_what_cannot_be_taken_apart() -> None:
    """Offloaded weights, and weights shared by two modules, stay in float, and the plan says why."""
    model = Model()
    cpu_offload(model.experts)
    plan = plan_layers(model, parse("w8a16"), facts=model.facts)
    assert set(plan.layers) == {"first"}
    assert "offloaded" in plan.skipped["experts.gate_up_proj"]
    tied = Model()
    tied.other = nn.Module()
    tied.other.register_parameter("weight", tied.experts.down_proj)
    plan = plan_layers(tied, parse("w8a16"), facts=tied.facts)
    assert "another module" in plan.skipped["experts.down_proj"]
    assert type(tied.experts) is Fused


@pytest.mark.parametrize("per_layer_mode", [False, True])
def test_padding_reaches_no_statistic(per_layer_mode: bool) -> None:
    """Garbage values in masked rows change nothing."""

    class Masked(Model):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    torch.manual_seed(1)
    model = Masked()
    other = copy.deepcopy(model)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 25:] = 0
    for module, filler in ((model, 0.0), (other, 50.0)):
        batches = [{"x": x.masked_fill(mask[..., None] == 0, filler), "attention_mask": mask} for x in data()]
        ptq.quantize(module, batches, QuantRules({}), Settings(per_layer_mode=per_layer_mode), module.facts)
    assert model.experts.state_dict().keys() == other.experts.state_dict().keys()
    for key, tensor in model.experts.state_dict().items():
        assert torch.equal(tensor, other.experts.state_dict()[key]), key


def test_globs_name_the_parameter_or_its_experts() -> None:
    model = Model()
    for glob in ("experts.gate_up_proj", "experts.gate_up_proj.*", "*gate_up*"):
        rules = QuantRules({"default": CONFIGS["weights"], glob: {"weight_quant": {"type": "int4"}}})
        plan = plan_layers(model, rules, facts=model.facts)
        types = {name: layer.config.weight_quant.type for name, layer in plan.layers.items()}
        assert types == {"first": "int8", "experts.gate_up_proj": "int4", "experts.down_proj": "int8"}
        assert not plan.skipped
    plan = plan_layers(model, parse("w8a16", ["experts.down_proj"]), facts=model.facts)
    assert plan.skipped == {"experts.down_proj": "in modules_to_not_convert"}
    one = QuantRules({"experts.gate_up_proj.3": {"weight_quant": {"type": "int4"}}})
    message = r"'experts.gate_up_proj.0' and 'experts.gate_up_proj.3' are slices .* address .* 'experts.gate_up_proj'"
    with pytest.raises(ConfigError, match=message):
        plan_layers(model, one, facts=model.facts)
    assert type(model.experts) is Fused


def test_the_plan_sees_what_surrounds_an_expert() -> None:
    """Also for an expert that never ran: the two halves of the gate, and SiLU's product before the down projection."""
    plan = plan_layers(Model(), QuantRules({}), example=torch.zeros(1, 3, WIDTH), facts=Model().facts)
    assert plan.layers["experts.gate_up_proj"].output_segments == (INNER, INNER)
    assert plan.layers["experts.down_proj"].dual == (True,)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("per_layer_mode", [False, True])
@pytest.mark.parametrize("when", ["solving", "finishing"])
def test_left_as_it_was(
    error: type[BaseException], per_layer_mode: bool, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    solve, solved = ptq.solve, []

    def failing(name: str, *args: Any, **kwargs: Any) -> Any:
        solved.append(name)
        if len(solved) == EXPERTS + 2:
            raise error
        return solve(name, *args, **kwargs)

    def finish(applied: ptq.Applied) -> None:
        assert isinstance(model.experts, QuantExperts)
        raise error

    if when == "solving":
        monkeypatch.setattr(ptq, "solve", failing)
    settings = Settings(per_layer_mode=per_layer_mode)
    with pytest.raises(error):
        ptq.quantize(model, data(), QuantRules({}), settings, model.facts, finish)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in state.items())


def test_an_interrupted_run_goes_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    model = Model()
    whole = copy.deepcopy(model)
    quantized(whole, CONFIGS["static, smooth"])
    quantized(copy.deepcopy(model), CONFIGS["static, smooth"], resume_dir=tmp_path)
    monkeypatch.setattr(ptq, "solve", lambda *args: pytest.fail("solved again"))
    quantized(model, CONFIGS["static, smooth"], resume_dir=tmp_path)
    assert model.experts.plans == whole.experts.plans
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in whole.state_dict().items())


def test_nan_in_an_expert_is_named() -> None:
    model = Model()
    with torch.no_grad():
        model.experts.down_proj[2, 1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'experts.down_proj.2': 1 of 84 weights are NaN or Inf"):
        ptq.quantize(model, None, parse("w8a16"), facts=model.facts)
    assert type(model.experts) is Fused
