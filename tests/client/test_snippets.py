"""Every Python snippet in the documentation runs."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from darkroom_client.testing import FakeServer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HTTP = ROOT / "docs" / "http.md"
"""Its snippets call the HTTP door, which the fake server lacks; ``tests/wire`` runs them."""

ADDRESS = "127.0.0.1:50051"


def snippets() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        if page == HTTP:
            continue
        text = page.read_text()
        for found in BLOCK.finditer(text):
            line = text.count("\n", 0, found.start(1)) + 1
            # As many lines before it as in the page: tracebacks then show the right line.
            yield f"{page.relative_to(ROOT)}:{line}", "\n" * (line - 1) + found[1]


SNIPPETS = dict(snippets())


def test_snippets_are_found() -> None:
    assert sum(name.startswith("client/README.md") for name in SNIPPETS) > 5
    assert any(name.startswith("README.md") for name in SNIPPETS)


@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_runs(
    name: str, fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = SNIPPETS[name].replace(ADDRESS, fake.target)

    exec(compile(code, ROOT / name.rpartition(":")[0], "exec"), {"__name__": "__main__"})
