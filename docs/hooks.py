"""What mkdocs does to pages beyond Markdown: links to files of the repository, roles in docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Point links that leave docs/ (``../README.md``) to the repository, so that they work there and here.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def address(link: re.Match[str]) -> str:
        file, *_ = link[1].split("#")
        if not (ROOT / file).exists():
            raise FileNotFoundError(f"a page links to ../{file}, which is not there")
        return f"]({config['repo_url']}/blob/main/{link[1]})"

    return re.sub(r"\]\(\.\./([^)]+)\)", address, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show names that docstrings mark up for Sphinx, such as :func:`~hfquant.quantize`, as code."""
    return re.sub(r":\w+:<code>~?(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", html)
