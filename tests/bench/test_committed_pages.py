"""The committed pages are exactly what the committed results make."""

from pathlib import Path

import pytest

from bench.pages import SECTIONS, peers_results
from bench.peers.report.plots import plot
from bench.peers.report.section import section
from bench.report.markdown import DOCS, replace_section
from bench.report.results import newest

BENCHMARKS = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
WITHOUT_RESULTS = {"gpu", "memory"}
"""No results of these are committed: they need CUDA, or a quiet machine."""


@pytest.mark.parametrize("name", sorted(SECTIONS.keys() - WITHOUT_RESULTS))
def test_a_section_is_what_the_newest_results_make(name: str) -> None:
    """`python -m bench.pages` writes it."""
    results = newest(name)
    assert results is not None
    file, make = SECTIONS[name]
    page = (DOCS / file).read_text(encoding="utf-8")
    assert f"<!-- bench:{name} -->" in page
    assert replace_section(page, name, make(results)) == page


@pytest.mark.parametrize("name", sorted(WITHOUT_RESULTS))
def test_a_section_without_results_is_not_on_a_page(name: str) -> None:
    assert newest(name) is None
    assert f"<!-- bench:{name} -->" not in (DOCS / SECTIONS[name][0]).read_text(encoding="utf-8")


def test_the_peers_section_is_what_the_results_that_it_names_make(tmp_path: Path) -> None:
    every = peers_results()
    assert every
    plots = [plot(results, tmp_path) for results in every]
    for file in (file for shown in plots for file, _ in shown):
        assert (DOCS / "images" / file).exists()
    made = section(every, "images", plots)
    assert replace_section(BENCHMARKS, "peers", made) == BENCHMARKS
