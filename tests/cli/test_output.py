"""What commands print."""

import json

import pytest

from hfquant.cli.output import print_json


def test_json_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    nan, inf = float("nan"), float("inf")
    print_json({"error": nan, "rows": [1.5, (inf, -inf)], "name": "nan", "count": 3, "none": None, "ok": True})

    def refused(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(capsys.readouterr().out, parse_constant=refused) == {
        "error": None,
        "rows": [1.5, [None, None]],
        "name": "nan",
        "count": 3,
        "none": None,
        "ok": True,
    }
