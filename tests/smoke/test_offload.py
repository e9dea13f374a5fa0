"""What offload.py needs from accelerate and diffusers; ``make test-floors`` runs it on the oldest versions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module
from safetensors.torch import load_file, save_file
from torch import nn

from hfquant import offload

CPU = torch.device("cpu")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))


def copied(model: nn.Module, fetch: bool) -> nn.Module:
    """Copy ``model`` the way a twin is: hooks shared, wrappers dropped."""
    memo: dict[int, Any] = {id(hook): hook for module in model.modules() for hook in offload.hooks_of(module)}
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        offload.drop_wrappers(module, fetch)
    return twin


def test_plain_modules_have_no_hook() -> None:
    model = net()
    assert not offload.has_hook(model)
    assert offload.execution_device(model) is None
    assert [hook for module in model.modules() for hook in offload.hooks_of(module)] == []
    twin, x = copied(model, fetch=False), torch.randn(3, 6)
    assert torch.equal(twin(x), model(x))


def test_a_hook_says_where_a_module_runs() -> None:
    model = cpu_offload(net(), execution_device=CPU)
    assert offload.has_hook(model)
    assert offload.execution_device(model[0]) == CPU
    assert offload.execution_device(model) is None  # it accepts inputs from any device
    assert offload.execution_device(cpu_offload(nn.Linear(6, 5), execution_device=CPU)) == CPU  # two hooks in sequence
    dispatched = dispatch_model(net(), {"0": "cpu", "1": "cpu", "2": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.device(offload.execution_device(dispatched[2])) == CPU
    other = net()
    add_hook_to_module(other[0], ModelHook())
    assert offload.has_hook(other)
    assert offload.execution_device(other[0]) is None


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("in_sequence", [False, True])
def test_a_copied_hook_offloads_the_new_weights(buffers: bool, in_sequence: bool) -> None:
    old, new, x = nn.BatchNorm1d(6).eval(), nn.BatchNorm1d(6).eval(), torch.randn(3, 6)
    for module in (old, new):
        nn.init.normal_(module.weight)
        module.running_mean.normal_()
    y, y_new = old(x), new(x)
    # A module offloaded by itself gets a second, outermost hook.
    cpu_offload(old if in_sequence else nn.Sequential(old), execution_device=CPU, offload_buffers=buffers)
    offload.copy_hook(old, new)
    assert new.weight.is_meta
    assert new.running_mean.is_meta == buffers
    assert torch.equal(new(x), y_new)
    assert new.weight.is_meta
    assert torch.equal(old(x), y)
    (hook,) = offload.hooks_of(new)
    assert isinstance(hook, SequentialHook) == in_sequence
    offload.copy_hook(old, new)
    assert list(offload.hooks_of(new)) == [hook]


@pytest.mark.parametrize("buffers", [False, True])
def test_what_replaces_a_module_on_disk_goes_there_too(buffers: bool, tmp_path: Path) -> None:
    old, new, x = nn.BatchNorm1d(6).eval(), nn.BatchNorm1d(6).eval().bfloat16(), torch.randn(3, 6)
    for module in (old, new):
        nn.init.normal_(module.weight)
        module.running_mean.normal_()
    y, y_new = old(x), new(x.bfloat16())
    disk_offload(model := nn.Sequential(old), tmp_path, execution_device=CPU, offload_buffers=buffers)
    place = offload.on_disk(old)
    assert place is not None
    assert (place.folder, place.prefix) == (tmp_path, "0.")
    before = {file.name for file in tmp_path.iterdir()}
    for _ in range(2):  # each time to a new file
        twin = copy.deepcopy(new)
        offload.copy_hook(old, twin)
        assert twin.weight.is_meta
        assert twin.running_mean.is_meta == buffers
        assert torch.equal(twin(x.bfloat16()), y_new)
        assert offload.on_disk(twin) is not None
        (file,) = {file.name for file in tmp_path.iterdir()} - before
        before.add(file)
        tensors = load_file(tmp_path / file)
        assert tensors.keys() == ({*new.state_dict()} if buffers else {"weight", "bias"})
        assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in tensors.items())
    assert torch.equal(model(x), y)
    offload.forget_weights(old)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {file for file in before if not file.endswith(".dat")}
    assert torch.equal(twin(x.bfloat16()), y_new)


def test_a_file_that_holds_one_offloaded_weight_is_deleted(tmp_path: Path) -> None:
    """transformers writes such files to the offload folder if the checkpoint has a weight in another form."""
    save_file({"0.weight": torch.ones(5, 6)}, tmp_path / "0.weight.safetensors")
    save_file({"0.bias": torch.ones(5)}, tmp_path / "model.safetensors")
    files = {"0.weight": "0.weight.safetensors", "0.bias": "model.safetensors"}
    where = {key: {"safetensors_file": str(tmp_path / f), "weight_name": key} for key, f in files.items()}
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    dispatch_model(model, {"0": "disk", "1": "cpu"}, main_device="cpu", offload_dir=tmp_path, offload_index=dict(where))
    assert torch.equal(model(torch.ones(2, 6)), torch.full((2, 5), 7.0))
    offload.forget_weights(model[0])
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("offloaded", ["owner", "borrower", "both", "neither"])
def test_a_lent_tensor_is_fetched_where_its_owner_has_it(offloaded: str, buffers: bool, tmp_path: Path) -> None:
    """The borrower receives the tensor after it has been dispatched itself, like a tied layer."""
    model = nn.ModuleList([nn.BatchNorm1d(6), nn.BatchNorm1d(6)])
    owner, borrower = model
    for module in model:
        nn.init.normal_(module.weight)
        module.running_mean.normal_()
    own_bias, weight = nn.init.normal_(borrower.bias).detach().clone(), owner.weight.detach().clone()
    mean = owner.running_mean.clone()
    borrower._parameters["weight"] = borrower._buffers["running_mean"] = None
    where = {str(i): "disk" if offloaded in (n, "both") else "cpu" for i, n in enumerate(("owner", "borrower"))}
    dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path, offload_buffers=buffers, force_hooks=True)
    borrower._parameters["weight"], borrower._buffers["running_mean"] = owner.weight, owner.running_mean
    offload.lend(owner, borrower, ["weight", "running_mean"])
    x, borrower = torch.randn(3, 6), borrower.eval()
    expected = nn.functional.batch_norm(x, mean, torch.ones(6), weight, own_bias)
    for _ in range(2):
        torch.testing.assert_close(borrower(x), expected)
    assert borrower.weight.is_meta == (offloaded != "neither")
    torch.testing.assert_close(
        owner.eval()(x), nn.functional.batch_norm(x, mean, torch.ones(6), weight, torch.zeros(6))
    )


def test_weights_in_memory_are_not_on_disk(tmp_path: Path) -> None:
    model = cpu_offload(net(), execution_device=CPU)
    assert [offload.on_disk(module) for module in (*net(), *model)] == [None] * 6
    offload.forget_weights(model[0])
    assert torch.equal(model(x := torch.ones(2, 6)), model(x))
    save_file({"0.weight": torch.ones(5, 6)}, tmp_path / "weights.safetensors")
    where = {"0.weight": {"safetensors_file": str(tmp_path / "weights.safetensors"), "weight_name": "0.weight"}}
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU())
    dispatch_model(model, {"0": "disk", "1": "cpu"}, main_device="cpu", offload_index=where)
    place = offload.on_disk(model[0])
    assert place is not None
    assert place.folder is None
    offload.forget_weights(model[0])  # a checkpoint's own file is kept
    assert torch.equal(model(torch.ones(2, 6)), torch.full((2, 5), 6.0))
    offload.copy_hook(model[0], new := nn.Linear(6, 5, bias=False))
    assert new.weight.is_meta
    assert offload.on_disk(new) is None


def test_other_hooks_are_shared() -> None:
    class Doubled(ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return 2 * output

    old, new, x = nn.Linear(6, 5), nn.Linear(6, 5), torch.randn(3, 6)
    y = new(x)
    offload.copy_hook(old, new)
    assert torch.equal(new(x), y)
    add_hook_to_module(old, Doubled())
    offload.copy_hook(old, new)
    assert torch.equal(new(x), 2 * y)


def test_copies_fetch_weights_or_run_bare() -> None:
    model, x = net(), torch.randn(3, 6)
    y = model(x)
    cpu_offload(model, execution_device=CPU)
    twin = copied(model, fetch=True)
    assert list(offload.hooks_of(twin[2])) == list(offload.hooks_of(model[2]))
    assert torch.equal(twin(x), y)
    assert copied(model, fetch=False)(x.to("meta")).is_meta
    assert torch.equal(model(x), y)


def test_copies_run_past_hooks_of_diffusers() -> None:
    model = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2).eval()
    x = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        y = model(x).sample
        model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
        twin = copied(model, fetch=True)
        assert any(list(offload.hooks_of(module)) for module in twin.modules())
        assert torch.equal(twin(x).sample, y)
        for parameter in twin.parameters():  # a wrapper would run the original
            parameter.copy_(2 * parameter)
        assert not torch.allclose(twin(x).sample, y)
        assert torch.equal(model(x).sample, y)
        with pytest.raises(ValueError, match="enable_group_offload afterwards"):
            offload.refuse_group_offloaded(model)


def test_other_hooks_of_diffusers_are_no_group_offload() -> None:
    model = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2).eval()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert any(list(offload.hooks_of(module)) for module in model.modules())
    offload.refuse_group_offloaded(model)
    offload.refuse_group_offloaded(nn.Linear(2, 2))
