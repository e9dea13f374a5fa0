"""Code that comes with a model runs only where it is allowed."""

from __future__ import annotations

import pytest

from hfquant.remote_code import remote_code, remote_code_allowed, remote_code_errors


def test_it_is_allowed_in_a_context():
    assert not remote_code_allowed()
    with remote_code(True):
        assert remote_code_allowed()
        with remote_code(False):
            assert not remote_code_allowed()
        assert remote_code_allowed()
    assert not remote_code_allowed()


def test_a_refusal_names_the_option():
    refusal = ValueError("Please pass the argument `trust_remote_code=True`\nto allow custom code to be run.")
    named = r"^me/llm has code of its own.* pass --trust-remote-code$"
    with pytest.raises(ValueError, match=named), remote_code_errors("me/llm"):
        raise refusal
    # Where it is allowed, the option is no remedy.
    with pytest.raises(ValueError, match=r"^Please pass"), remote_code(True), remote_code_errors("me/llm"):
        raise refusal
    with pytest.raises(ValueError, match=r"^something else$"), remote_code_errors("me/llm"):
        raise ValueError("something else")
