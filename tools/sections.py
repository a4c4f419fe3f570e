"""Pages of which several commands write a section each."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["replace_section"]


def replace_section(page: Path, title: str, text: str) -> None:
    """Write `text` below the heading `## title` of a Markdown page, in place of what stood there.

    A section that the page does not have yet goes to its end; the other sections stay as they are.
    """
    whole = page.read_text()
    section = f"## {title}\n\n{text.strip()}\n"
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", whole, re.DOTALL | re.MULTILINE)
    if found is None:
        whole = f"{whole.rstrip()}\n\n{section}"
    else:
        rest = whole[found.end() :]
        whole = whole[: found.start()] + section + (f"\n{rest}" if rest else "")
    page.write_text(whole)
