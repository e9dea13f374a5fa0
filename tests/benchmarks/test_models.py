"""Texts of the benchmarks: those trained on and those scored on have nothing in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.models import _docstrings, documentation_texts, evaluation_texts


@pytest.mark.slow
def test_documentation_is_not_what_is_evaluated() -> None:
    texts = documentation_texts(modules=1)
    assert sum(len(text) > 1000 for text in texts) > 100
    # Passages from all over each evaluation text.
    passages = [text[i : i + 80] for text in evaluation_texts() for i in range(200, len(text) - 80, 400)]
    assert len(passages) > 50
    assert not [passage for passage in passages if any(passage in text for text in texts)]


def test_docstrings_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    one, other = 250 * "a", 250 * "b"
    file.write_text(f'"""{one}"""\n\ndef f():\n    """Short."""\n\nclass C:\n    """{other}"""\n')
    assert _docstrings(file) == f"{one}\n\n{other}"
    file.write_text("def (")
    assert _docstrings(file) == ""
