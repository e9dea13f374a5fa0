"""Every config error names the key, the value and what is allowed."""

import pytest

from hfquant.affiner.config import AffinerConfig, parse
from hfquant.config import ConfigError


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "blockwise"}, r"config.kind: unknown key; allowed are type, stepper, solver, blocks, extra_args"),
        ({"stepper": {"steps": 3}}, r"config.stepper.steps: unknown key; allowed are max_timestep"),
        (
            {"blocks": {"module": ["x"], "modules": ["x"]}},
            r"blocks.module: unknown key; allowed are modules",
        ),
        ({"blocks": {}}, r"config.blocks.modules: is missing"),
        ({"type": "gan"}, r"config.type: .*'blockwise', 'ptqd' or 'tac', got 'gan'"),
        ({"solver": {"type": "lad"}}, r"config.solver.type: .*'mserel'"),
        ({"solver": {"blocksize": 0}}, r"config.solver.blocksize: .*greater than or equal to 1, got 0"),
        ({"solver": {"alpha": 1.5}}, r"config.solver.alpha: .*less than or equal to 1, got 1.5"),
        ({"solver": {"lambda1": -1.0}}, r"config.solver.lambda1"),
        ({"solver": {"scale": float("nan")}}, r"config.solver.scale"),
        ({"solver": {"sample_mode": "nearest"}}, r"'block' or 'interpolate', got 'nearest'"),
        ({"solver": {"percentile": 101}}, r"config.solver.percentile"),
        ({"stepper": {"recurrent": 1}}, r"config.stepper.recurrent: .*boolean, got 1"),
        ({"stepper": {"noise_target": "both"}}, r"'all', 'uncond' or 'text', got 'both'"),
        ({"stepper": {"enable_timesteps": []}}, r"config.stepper.enable_timesteps: expected None or a non-empty list"),
        ({"stepper": {"enable_timesteps": [-1]}}, r"step numbers >= 0"),
        ({"stepper": {"enable_latent_affine": True, "recurrent": False}}, r"enable_latent_affine=true needs recurrent"),
        ({"type": "ptqd", "solver": {"blocksize": 4}}, r'solver has no effect on type "ptqd"'),
        ({"type": "tac", "stepper": {"enable_latent_affine": True}}, r'needs type "blockwise", not "tac"'),
        ({"blocks": {"modules": []}}, r"config.blocks.modules"),
        ({"stepper": {"max_timestep": 4}, "extra_args": {"num_inference_steps": 4}}, r"are the same; give one"),
        ({"extra_args": [1]}, r"config.extra_args: .*dictionary"),
        ({"extra_args": {1: 2}}, r"config.extra_args"),
        ({"stepper": {"seed": object()}}, r"config.stepper.seed: .*integer"),
        ({"stepper": {"enable_timesteps": [1.0]}}, r"config.stepper.enable_timesteps.0: .*integer, got 1.0"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        parse(config)


def test_the_callers_dict_is_left_alone_and_json_comes_back():
    extra = {"guidance_scale": 2.0, "callback": print}
    config = {"stepper": {"enable_timesteps": [0, 2]}, "extra_args": extra}
    parsed = parse(config)
    assert parsed.extra_args == extra
    assert parsed.stepper.enable_timesteps == (0, 2)
    assert config == {"stepper": {"enable_timesteps": [0, 2]}, "extra_args": extra}
    stored = parsed.to_json()
    assert stored["extra_args"] == {"guidance_scale": 2.0}
    assert parse(stored).model_copy(update={"extra_args": extra}) == parsed
    assert parse({}) == AffinerConfig()
    assert parse(parsed) is parsed
