"""Pages with sections that benches write, beside what people write."""

import re
from pathlib import Path

from bench.results import ROOT

DOCS = ROOT / "docs"


def replace_section(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the marks of section ``name``, appended if it has none."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(page):
        return pattern.sub(lambda _: section, page)
    return f"{page.rstrip()}\n\n{section}\n"


def write_section(file: str, title: str, name: str, text: str, docs: Path = DOCS) -> Path:
    """Write section ``name`` of the page ``file``; a new page gets ``title`` as its heading."""
    path = docs / file
    docs.mkdir(parents=True, exist_ok=True)
    page = path.read_text(encoding="utf-8") if path.exists() else f"# {title}\n"
    path.write_text(replace_section(page, name, text), encoding="utf-8")
    return path


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; numbers, which all columns but the first hold, go to the right."""
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
