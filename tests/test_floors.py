"""constraints-min.txt, which `make test-floors` installs, contains exactly pyproject.toml's lower bounds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    parts = [line.split("==") for line in lines]
    assert all(len(part) == 2 for part in parts), lines
    assert len(dict(parts)) == len(parts), "a package is named twice"
    return dict(parts)


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    found = {}
    for requirement in requirements:
        match = re.fullmatch(r"([\w-]+)>=([\d.]+)(; sys_platform == 'linux')?", requirement)
        assert match, f"{requirement}: write NAME>=VERSION, and where it is for Linux alone, ; sys_platform == 'linux'"
        found[match[1]] = match[2]
    return found


def numbers(version: str) -> tuple[int, ...]:
    """Return version numbers for comparison: "0.42" and "0.42.0" are equal."""
    parts = [int(part) for part in version.split(".")]
    return tuple(parts + [0] * (3 - len(parts)))


def test_floors_are_the_declared_lower_bounds() -> None:
    declared = lower_bounds(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])
    floors = pins("constraints-min.txt")
    assert floors.keys() == declared.keys()
    assert floors.pop("torch") == pins("constraints.txt")["torch"]
    for name, floor in floors.items():
        assert numbers(floor) == numbers(declared[name]), name


def test_versions_developed_with_are_within_the_bounds() -> None:
    declared = lower_bounds(PROJECT["dependencies"])
    used = pins("constraints.txt")
    assert declared.keys() <= used.keys()
    for name, floor in declared.items():
        assert numbers(used[name]) >= numbers(floor), name
