"""The tests mirror the package: hfquant/a/b.py is tested in tests/a/test_b.py, or where a table here says."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: Modules without a test file at the mirrored place, and the test file that covers them.
ELSEWHERE = {
    "__init__.py": "test_registration.py",
    "algorithms/base.py": "test_axes.py",
    "api.py": "test_ptq.py",
    "calibration/files.py": "calibration/test_storage.py",
    "calibration/provenance.py": "calibration/test_generate.py",
    "cli/__init__.py": "cli/test_calibrate.py",
    "cli/demo.py": "cli/test_recipe.py",
    "cli/errors.py": "cli/test_calibrate.py",
    "cli/export.py": "cli/test_inspect.py",
    "cli/options.py": "cli/test_quantize.py",
    "cli/report.py": "cli/test_inspect.py",
    "denoisers.py": "test_diffusion.py",
    "dataflow/functions.py": "dataflow/test_tracker.py",
    "dataflow/labels.py": "dataflow/test_tracker.py",
    "demo/__main__.py": "demo/test_demo.py",
    "demo/classifier.py": "demo/test_demo.py",
    "demo/pipeline.py": "demo/test_demo.py",
    "demo/rows.py": "demo/test_demo.py",
    "demo/train.py": "demo/test_demo.py",
    "enums.py": "test_config.py",
    "exporters/checkpoint.py": "exporters/test_exporters.py",
    "exporters/requantize.py": "exporters/test_compressed_tensors.py",
    "formats/__init__.py": "formats/test_base.py",
    "hub_errors.py": "integrations/sharing/test_hub_errors.py",
    "importers/checkpoint.py": "importers/test_importers.py",
    "importers/layers.py": "importers/test_importers.py",
    "integrations/__init__.py": "integrations/test_config.py",
    "integrations/adaptations.py": "test_registration.py",
    "integrations/compat.py": "smoke/test_compat.py",
    "integrations/checkpoint.py": "integrations/test_checkpoint_errors.py",
    "integrations/data.py": "integrations/test_transformers_data.py",
    "integrations/examples/diffusers_codecs.py": "integrations/examples/test_diffusers.py",
    "integrations/examples/diffusers_exceptions.py": "integrations/examples/test_diffusers.py",
    "integrations/examples/diffusers_rules.py": "integrations/examples/test_diffusers.py",
    "integrations/examples/sketch.py": "integrations/examples/test_examples.py",
    "integrations/examples/transformers_rules.py": "integrations/examples/test_transformers.py",
    "integrations/facts.py": "test_planner.py",
    "integrations/hub.py": "cli/test_calibrate.py",
    "integrations/refusals.py": "smoke/test_refusals.py",
    "integrations/sharing/kinds.py": "integrations/sharing/test_sharing.py",
    "layer_config.py": "test_config.py",
    "nn/layer.py": "nn/test_linear.py",
    "recipes/run.py": "recipes/test_recipes.py",
    "recipes/schema.py": "recipes/test_recipes.py",
    "report/gather.py": "report/test_page.py",
    "report/page/__init__.py": "report/test_page.py",
    "report/page/charts.py": "report/test_page.py",
    "integrations/words.py": "integrations/test_self_made.py",
    "kernels/triton/programs/few.py": "kernels/triton/test_integer.py",
    "kernels/triton/programs/integer.py": "kernels/triton/test_integer.py",
    "kernels/triton/programs/quantize.py": "kernels/triton/test_quantize.py",
    "kernels/triton/programs/tiles.py": "kernels/triton/test_compile.py",
    "kernels/triton/programs/weight_only.py": "kernels/triton/test_weight_only.py",
    "offload.py": "smoke/test_offload.py",
    "presets.py": "test_config.py",
    "replacing.py": "nn/test_modules.py",
    "report/affiner.py": "affiner/test_fit.py",
    "run.py": "test_ptq.py",
    "schema.py": "test_config.py",
}
#: Test files that cover several modules, or the project itself.
WIDE = {
    "kernels/cpu/test_rotation.py",
    "test_behaviour.py",
    "test_docs.py",
    "affiner/test_refusals.py",
    "calibration/test_diffusers_pipelines.py",
    "calibration/test_digits.py",
    "calibration/test_end_to_end.py",
    "integrations/test_adapters_kinds.py",
    "integrations/test_adapters_merging.py",
    "integrations/test_adapters_training.py",
    "integrations/test_compile.py",
    "integrations/test_disk.py",
    "integrations/test_expectations.py",
    "integrations/test_guarded_kinds.py",
    "integrations/test_kinds.py",
    "integrations/test_kinds_of_pipelines.py",
    "integrations/test_lora_pipelines.py",
    "integrations/test_pipelines.py",
    "integrations/test_real_models.py",
    "integrations/test_self_made_refusals.py",
    "integrations/test_size.py",
    "integrations/test_transformers_checkpoints.py",
    "kernels/cpu/test_bfloat16.py",
    "kernels/cpu/test_floats.py",
    "smoke/test_smoke.py",
    "test_axes.py",
    "test_floors.py",
    "test_golden.py",
    "test_imports.py",
    "test_notebooks.py",
    "test_requantizing.py",
    "test_tree.py",
    "test_wheel.py",
    "test_without_libraries.py",
}


def mirrored(module: str) -> str:
    """Return the test file of a module, both as paths in their trees: "a/b.py" -> "a/test_b.py".

    Code in a package's __init__.py is tested in "a/test_a.py".
    """
    path = Path(module)
    name = path.parent.name or "hfquant" if path.stem == "__init__" else path.stem
    return (path.parent / f"test_{name}.py").as_posix()


def faults(modules: Iterable[str], tests: Iterable[str], elsewhere: Mapping[str, str], wide: set[str]) -> list[str]:
    """Return the reasons why ``tests`` does not mirror ``modules``, one per line, sorted."""
    modules, tests = set(modules), set(tests)
    own = {module: mirrored(module) for module in modules}
    found = [f"{m} has no {test}" for m, test in own.items() if m not in elsewhere and test not in tests]
    for module, test in elsewhere.items():
        if module not in modules:
            found.append(f"{module} is in the table and does not exist")
        elif mirrored(module) in tests:
            found.append(f"{module} is in the table and has {mirrored(module)}")
        if test not in tests:
            found.append(f"{test}, which the table names for {module}, does not exist")
    found += [f"{test} mirrors no module" for test in tests - wide - {*own.values()} - {*elsewhere.values()}]
    found += [f"{test} is listed as wide and does not exist" for test in wide - tests]
    return sorted(found)


def defines_something(path: Path) -> bool:
    """Return whether a module defines functions or classes; a package that only re-exports names needs no test."""
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.parse(path.read_text()).body)


def files(folder: str, pattern: str) -> dict[str, Path]:
    base = ROOT / folder
    return {path.relative_to(base).as_posix(): path for path in base.rglob(pattern)}


def test_tests_mirror_the_package() -> None:
    modules = [name for name, path in files("hfquant", "*.py").items() if defines_something(path)]
    tests = [name for name in files("tests", "test_*.py") if not name.startswith("benchmarks/")]
    assert faults(modules, tests, ELSEWHERE, WIDE) == []


def test_each_fault_is_found() -> None:
    assert faults(["a/b.py", "c.py"], ["a/test_b.py", "test_x.py"], {"c.py": "test_x.py"}, set()) == []
    assert faults(["a.py"], [], {}, set()) == ["a.py has no test_a.py"]
    assert faults(["a/__init__.py"], ["a/test_a.py"], {}, set()) == []
    assert faults([], ["test_a.py"], {}, set()) == ["test_a.py mirrors no module"]
    assert faults(["a.py"], ["test_a.py", "test_b.py"], {"a.py": "test_b.py"}, set()) == [
        "a.py is in the table and has test_a.py"
    ]
    assert faults([], ["test_b.py"], {"a.py": "test_b.py"}, set()) == ["a.py is in the table and does not exist"]
    assert faults(["a.py"], [], {"a.py": "test_b.py"}, {"test_c.py"}) == [
        "test_b.py, which the table names for a.py, does not exist",
        "test_c.py is listed as wide and does not exist",
    ]
