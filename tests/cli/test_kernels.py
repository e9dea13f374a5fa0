"""`hfquant kernels` on this machine, and on one without the C++ kernels."""

from __future__ import annotations

import importlib

import pytest
from typer.testing import CliRunner, Result

from hfquant.cli import app
from hfquant.kernels.base import Kernel
from hfquant.kernels.table import KERNELS, obstacle

RUNNER = CliRunner()
#: The module; as an attribute of the package, the name refers to the command.
command = importlib.import_module("hfquant.cli.kernels")


def run(*options: object) -> Result:
    return RUNNER.invoke(app, ["kernels", *map(str, options)], env={"COLUMNS": "120"})


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """Return the cells of a table, keyed by the first cell of each row."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == [heading])
    found = {}
    for line in lines[start:]:
        if not line.startswith(" "):
            break
        first, *cells = line.split()
        found[first] = cells
    return found


@pytest.fixture
def quick(monkeypatch) -> None:
    seconds = command._seconds
    monkeypatch.setattr(command, "_seconds", lambda calls, device: seconds(calls, device, budget=0))


def test_every_kernel_is_listed_with_what_it_computes() -> None:
    result = run("--no-time")
    assert result.exit_code == 0, result.output
    table = rows(result.stdout, "kernel")
    assert list(table) == ["kernel", *KERNELS]
    assert table["kernel"] == list(command.PRODUCTS)
    for name, cells in table.items():
        if name != "kernel":
            products = [command._layer(product, 4096, 4096).product for product in command.PRODUCTS]
            expected = ["-" if obstacle(KERNELS[name], product, "cpu") else "yes" for product in products]
            assert cells == expected, name
    assert table["reference"] == ["yes"] * len(command.PRODUCTS)
    assert "F.linear" not in result.stdout


def test_reasons_are_given_once(monkeypatch) -> None:
    def lacks() -> str:
        return "no unit for it"

    def run_nothing(*arguments: object) -> None:
        raise AssertionError

    made = {
        name: Kernel(name, "", lacks, lambda product: "", lambda *size: True, run_nothing) for name in ("one", "two")
    }
    only = Kernel(
        "only", "", lambda: "", lambda p: "" if p.input is None else "floats alone", lambda *s: True, run_nothing
    )
    monkeypatch.setattr("hfquant.kernels.table.KERNELS", {**made, "only": only, "reference": KERNELS["reference"]})
    result = run("--no-time")
    assert result.exit_code == 0, result.output
    notes = [line for line in result.stdout.splitlines() if line.startswith("- ")]
    assert notes == ["- one, two: no unit for it", "- only (W8A8, W4A8, FP8, INT16): floats alone"]
    table = rows(result.stdout, "kernel")
    assert set(table["one"]) == {"-"}
    assert table["only"] == ["-", "-", "yes", "yes", "yes", "-", "-"]


def test_shapes_are_timed(quick) -> None:
    result = run("--shape", "1x96x40", "--shape", "9x70x33", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "as F.linear in bfloat16" in result.stdout
    table = rows(result.stdout, "product")
    assert table["product"] == ["1x96x40", "9x70x33"]
    assert list(table)[1:] == ["F.linear", *command.PRODUCTS]
    for name in command.PRODUCTS:
        first, kernel, second, _ = table[name]
        assert float(first) > 0
        assert float(second) > 0
        product = command._layer(name, 96, 40).product
        assert not obstacle(KERNELS[kernel], product, "cpu")


def test_a_forced_kernel_is_the_one_that_is_timed(quick, monkeypatch) -> None:
    monkeypatch.setenv("HFQUANT_KERNEL", "reference")
    table = rows(run("--shape", "2x64x32").stdout, "product")
    assert {table[name][1] for name in command.PRODUCTS} == {"reference"}
    # A kernel that cannot compute a product leaves its cell empty.
    floats = Kernel(
        "floats", "", lambda: "", lambda p: "" if p.input is None else "floats alone", lambda *s: True,
        KERNELS["dequantize"].run,
    )  # fmt: skip
    monkeypatch.setitem(KERNELS, "floats", floats)
    monkeypatch.setenv("HFQUANT_KERNEL", "floats")
    table = rows(run("--shape", "2x64x32").stdout, "product")
    assert table["W4A16"][1] == "floats"
    assert table["W8A8"] == table["FP8"] == ["-"]


def test_an_unknown_forced_kernel_is_one_line_that_lists_the_known(monkeypatch) -> None:
    monkeypatch.setenv("HFQUANT_KERNEL", "fastest")
    result = run("--shape", "1x64x32")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: HFQUANT_KERNEL=fastest: unknown kernel; available: ")
    assert result.stderr.count("\n") == 1
    for name in KERNELS:
        assert name in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "1x2"], "'1x2' is not TOKENSxINPUTSxOUTPUTS"),
        (["--shape", "1x0x4"], "'1x0x4' is not TOKENSxINPUTSxOUTPUTS"),
        (["--dtype", "int8"], "'int8' is not a floating-point dtype"),
        (["--dtype", "nn"], "'nn' is not a floating-point dtype"),
        (["--device", "abacus"], "abacus"),
    ],
    ids=str,
)
def test_wrong_usage_is_exit_code_2(options, said) -> None:
    result = run(*options)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.replace("│", " ").split())
