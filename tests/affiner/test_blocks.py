"""Block alignment: known channel distortions inside a denoiser, and what is refused."""

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel

from hfquant.affiner.blocks import BlockMap, fit_blocks, hook_blocks
from hfquant.affiner.config import BlocksConfig
from tests.affiner.pipelines import call, real_and_quant


def dit():
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=3, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()  # fmt: skip


def inputs(count=3, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [
        (
            (torch.randn(4, 1, 8, 8, generator=draw),),
            {"timestep": torch.full((4,), 300 * i), "class_labels": torch.arange(4)},
        )
        for i in range(count)
    ]


def outputs(model, call):
    with torch.no_grad():
        return model(*call[0], **call[1]).sample


def config(*modules, ridge=0.0):
    return BlocksConfig(modules=modules, lambda1=ridge, lambda2=ridge)


def test_planted_distortions_are_undone_block_by_block():
    """Each block is fitted with the blocks before it corrected, so three stacked distortions are recovered exactly."""
    real = dit()
    quant = copy.deepcopy(real)
    draw = torch.Generator().manual_seed(2)
    planted = [
        BlockMap(
            f"transformer_blocks.{i}", 0, 1 + 0.3 * torch.rand(16, generator=draw), torch.randn(16, generator=draw)
        )
        for i in range(3)
    ]
    hook_blocks(quant, planted)
    maps = fit_blocks(real, quant, inputs(), config("transformer_blocks.*"), progress=False)
    assert [m.module for m in maps] == [p.module for p in planted]
    for found, plant in zip(maps, planted, strict=True):
        torch.testing.assert_close(found.scale, 1 / plant.scale, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.shift, -plant.shift / plant.scale, rtol=1e-3, atol=1e-3)
    fresh = inputs(seed=5)[1]
    distorted = outputs(quant, fresh)
    undo = hook_blocks(quant, maps)
    torch.testing.assert_close(outputs(quant, fresh), outputs(real, fresh), rtol=1e-3, atol=1e-4)
    undo()
    assert torch.equal(outputs(quant, fresh), distorted)
    assert not torch.allclose(distorted, outputs(real, fresh), atol=1e-2)


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_compiled_denoisers(how):
    """Compiled code does not notice hooks that come and go after it was made."""
    real, fresh = dit(), inputs(seed=5)[1]
    quant = copy.deepcopy(real)
    with torch.no_grad():
        for parameter in quant.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    plain = outputs(quant, fresh)
    maps = fit_blocks(real, quant, inputs(), config("transformer_blocks.*"), progress=False)
    undo = hook_blocks(quant, maps)
    corrected = outputs(quant, fresh)
    undo()
    assert (corrected - plain).norm() > 0.01 * plain.norm()
    compiled = quant
    if how == "in place":
        quant.compile(backend="eager")
    else:
        compiled = torch.compile(quant, backend="eager")
    for some in (*inputs(), fresh):
        outputs(compiled, some)
    found = fit_blocks(real, compiled, inputs(), config("transformer_blocks.*"), progress=False)
    assert [each.module for each in found] == [each.module for each in maps]
    for one, other in zip(found, maps, strict=True):
        torch.testing.assert_close(one.scale, other.scale, rtol=1e-3, atol=1e-3)
    undo = hook_blocks(compiled, maps)
    torch.testing.assert_close(outputs(compiled, fresh), corrected, rtol=1e-4, atol=1e-5)
    undo()
    torch.testing.assert_close(outputs(compiled, fresh), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["unet", "sd3", "flux"])
def test_blocks_of_every_shape_lower_their_error(name):
    """Convolutional outputs have channels second, token outputs have them last; SD3 and FLUX blocks return tuples."""
    pipe, quant, rows, arguments = real_and_quant(name)
    patterns = {"unet": ["*_blocks.*.resnets.*", "mid_block"], "sd3": ["*_blocks.*"], "flux": ["*_blocks.*"]}
    real, quant = (p.unet if name == "unet" else p.transformer for p in (pipe, quant))
    found = []
    handle = real.register_forward_pre_hook(lambda m, a, k: found.append((a, k)), with_kwargs=True)
    call(pipe, rows, arguments, steps=2)
    handle.remove()
    maps = fit_blocks(real, quant, found, config(*patterns[name], ridge=0.01), progress=False)
    assert maps
    assert not any(m._forward_hooks for m in quant.modules())
    errors = []
    for count in (0, len(maps)):
        undo = hook_blocks(quant, maps[:count])
        errors.append(sum(distance(real, quant, one) for one in found))
        undo()
    assert errors[1] < errors[0]


def distance(real, quant, one):
    with torch.no_grad():
        r, q = (m(*one[0], **one[1])[0].double() for m in (real, quant))
    return float((r - q).square().sum())


def test_what_cannot_be_aligned_is_refused():
    real = dit()
    with pytest.raises(ValueError, match=r"none of the modules that match \['transformer_blocks'\] runs"):
        fit_blocks(real, dit(), inputs(), config("transformer_blocks"), progress=False)
    with pytest.raises(ValueError, match="no module of DiTTransformer2DModel matches"):
        fit_blocks(real, dit(), inputs(), config("nothing.*"), progress=False)
    with pytest.raises(ValueError, match="no block 'gone'"):
        hook_blocks(real, [BlockMap("gone", 0, torch.ones(1), torch.zeros(1))])
    broken = dit()
    broken.transformer_blocks[1].register_forward_hook(lambda m, a, out: out * float("nan"))
    hooks = [len(m._forward_hooks) for m in broken.modules()]
    with pytest.raises(ValueError, match=r"'transformer_blocks.1' returns NaN"):
        fit_blocks(real, broken, inputs(), config("transformer_blocks.*"), progress=False)
    assert [len(m._forward_hooks) for m in broken.modules()] == hooks
    shallow = DiTTransformer2DModel.from_config(dict(real.config) | {"num_layers": 2})
    with pytest.raises(ValueError, match=r"no block 'transformer_blocks.2'"):
        fit_blocks(real, shallow, inputs(), config("transformer_blocks.*"), progress=False)


@pytest.mark.parametrize(
    ("output", "width", "message"),
    [
        (0, 7, "not a tensor of 7 channels"),
        (0, 1, "not a tensor of 1 channels"),
        (1, 16, "output 1 of 'transformer_blocks.0'"),
    ],
)
def test_maps_of_another_denoiser_are_named(output, width, message):
    model = dit()
    plain = outputs(model, inputs()[0])
    undo = hook_blocks(model, [BlockMap("transformer_blocks.0", output, torch.ones(width), torch.zeros(width))])
    with pytest.raises(ValueError, match=message):
        outputs(model, inputs()[0])
    undo()
    assert torch.equal(outputs(model, inputs()[0]), plain)
